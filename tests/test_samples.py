"""The index of a bundle's sample pictures."""

import json
from pathlib import Path
from typing import Any

import pytest

from guard.errors import BundleError
from guard.samples import FOLDER, INDEX, Sample, dump, load
from tests.serving import CAT, ROOT


def write(bundle: Path, *entries: Any) -> Path:
    (bundle / FOLDER).mkdir()
    (bundle / FOLDER / "cat.png").write_bytes(CAT)
    (bundle / FOLDER / INDEX).write_text(json.dumps(list(entries)))
    return bundle


def test_a_bundle_without_samples_has_none(tmp_path: Path) -> None:
    assert load(tmp_path) == []


def test_what_is_dumped_is_loaded(tmp_path: Path) -> None:
    listed = [Sample(file="cat.png", title="cat", note="A red cat.", kind="adversarial")]
    write(tmp_path)
    (tmp_path / FOLDER / INDEX).write_bytes(dump(listed))
    assert load(tmp_path) == listed


def test_note_and_kind_may_be_left_out(tmp_path: Path) -> None:
    (sample,) = load(write(tmp_path, {"file": "cat.png", "title": "cat"}))
    assert (sample.note, sample.kind) == ("", "clean")


@pytest.mark.parametrize(
    "entry",
    [
        {"file": "../manifest.json", "title": "x"},
        {"file": "../secret.png", "title": "x"},
        {"file": "/etc/x.png", "title": "x"},
        {"file": ".hidden.png", "title": "x"},
        {"file": "cat.jpg", "title": "x"},
        {"file": "cat.png"},
        {"file": "cat.png", "title": "x", "kind": "odd"},
        {"file": "cat.png", "title": "x", "colour": "red"},
        {"file": "dog.png", "title": "not there"},
        "cat.png",
    ],
)
def test_an_index_that_is_not_right_is_refused(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(BundleError, match=INDEX):
        load(write(tmp_path, entry))


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / FOLDER / INDEX).write_text("[")
    with pytest.raises(BundleError, match=INDEX):
        load(tmp_path)


def test_the_shipped_bundle_has_clean_samples() -> None:
    shipped = load(ROOT / "models" / "cifar10")
    assert {"cat", "dog", "ship"} <= {sample.title for sample in shipped if sample.kind == "clean"}
