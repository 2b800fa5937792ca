import json
from pathlib import Path
from typing import Any

import pytest

from guard import bundle
from guard.bundle import (
    CALIBRATION,
    MANIFEST,
    MODEL,
    Calibration,
    Histogram,
    InputShape,
    Manifest,
    OmegaRecord,
    PredictedShare,
    RadiusCalibration,
    Share,
)
from guard.errors import BundleError
from guard.files import sha256


def calibration(model: Path, **changes: Any) -> Calibration:
    share = Share(count=0, n=20, value=0, upper=0.14)
    radii = RadiusCalibration(
        lipschitz=1,
        omega=OmegaRecord(eps=[0.1], values=[[0.0]], reach=[1.0]),
        violations=share,
        mean_radius=0.1,
        mean_distance=0.2,
        tightness=0.5,
        attack={},
        effort={},
    )
    values: dict[str, Any] = {
        "model_sha256": sha256(model),
        "graph_version": 1,
        "score": "jacobian",
        "fpr": 0.05,
        "threshold": 1.5,
        "n": 20,
        "seed": 0,
        "data": {},
        "folds": {},
        "predicted_fpr": PredictedShare(lower=0, upper=0.1, level=0.95, m=20),
        "realized_fpr": share,
        "row_bound": 3,
        "histogram": Histogram(edges=[0, 1], counts=[20]),
        "l2": radii,
        "linf": radii,
    }
    return Calibration(**values | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / MODEL).write_bytes(b"a model")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "cat.png").write_bytes(b"a cat")
    (tmp_path / CALIBRATION).write_bytes(bundle.dump(calibration(tmp_path / MODEL)))
    shape = InputShape(channels=3, height=4, width=4)
    bundle.seal(tmp_path, Manifest(name="test", input=shape, class_names=["a", "b"]))
    return tmp_path


def reseal(folder: Path) -> None:
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    bundle.seal(folder, manifest)


def test_what_was_sealed_loads(folder: Path) -> None:
    found = bundle.load(folder, graph_version=1)
    assert set(found.manifest.files) == {MODEL, CALIBRATION, "samples/cat.png"}
    assert found.digest == f"sha256:{sha256(folder / MODEL)}"
    assert found.calibrated().threshold == 1.5
    assert found.calibrated().radii("linf") == found.calibrated().linf


def test_a_record_survives_its_file(folder: Path) -> None:
    before = calibration(folder / MODEL)
    assert Calibration.model_validate_json(bundle.dump(before)) == before


@pytest.mark.parametrize("name", [MODEL, CALIBRATION, "samples/cat.png"])
def test_a_changed_file_is_named_with_both_digests(folder: Path, name: str) -> None:
    expected = sha256(folder / name)
    (folder / name).write_bytes(b"changed")
    with pytest.raises(BundleError) as caught:
        bundle.load(folder)
    assert str(folder / name) in str(caught.value)
    assert expected in str(caught.value)
    assert sha256(folder / name) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"colour": "grey"},
            "preprocessing.colour is grey where input.channels is 3: expected rgb with 3",
        ),
        ({"resize": 3}, "preprocessing.resize is 3, less than the 4 x 4 pixels that are cropped from it"),
    ],
)
def test_uploads_that_do_not_fit_the_input_are_named(
    folder: Path, change: dict[str, object], message: str
) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["preprocessing"] |= change
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        bundle.load(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / MODEL).unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: is missing.*Restore"):
        bundle.load(folder)


def test_a_calibration_of_another_model_is_refused(folder: Path) -> None:
    (folder / MODEL).write_bytes(b"another model")
    reseal(folder)
    with pytest.raises(BundleError, match="belongs to another model") as caught:
        bundle.load(folder)
    assert sha256(folder / MODEL) in str(caught.value)
    assert calibration(folder / MODEL).model_sha256 in str(caught.value)


def test_a_calibration_of_another_graph_version_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="version 1, this guard builds version 2"):
        bundle.load(folder, graph_version=2)


def test_a_calibration_the_manifest_does_not_know_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][CALIBRATION]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="not listed in the manifest"):
        bundle.load(folder)


def test_a_calibration_that_is_to_be_replaced_may_be_in_any_state(folder: Path) -> None:
    good = (folder / CALIBRATION).read_bytes()
    listed = json.loads((folder / MANIFEST).read_text())
    for content in (b"{}", None):  # of another version, missing
        (folder / CALIBRATION).unlink(missing_ok=True)
        if content is not None:
            (folder / CALIBRATION).write_bytes(content)
        with pytest.raises(BundleError, match="run guard calibrate"):
            bundle.load(folder)
        assert bundle.load(folder, recalibrating=True).calibration is None
    (folder / CALIBRATION).write_bytes(good)
    del listed["files"][CALIBRATION]
    (folder / MANIFEST).write_text(json.dumps(listed))
    assert bundle.load(folder, recalibrating=True).calibration is None
    (folder / MODEL).write_bytes(b"another model")
    with pytest.raises(BundleError, match="does not match the manifest"):
        bundle.load(folder, recalibrating=True)


def test_a_file_of_the_manifests_name_further_down_is_listed(folder: Path) -> None:
    (folder / "samples" / MANIFEST).write_text("{}")
    reseal(folder)
    assert f"samples/{MANIFEST}" in bundle.load(folder).manifest.files


def test_an_uncalibrated_bundle_loads_and_says_what_to_do(folder: Path) -> None:
    (folder / CALIBRATION).unlink()
    reseal(folder)
    with pytest.raises(BundleError, match="guard calibrate"):
        bundle.load(folder).calibrated()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"unknown": 1}, "unknown"),
        ({"class_names": "cat"}, "class_names"),
        ({"files": {}}, "lists no model.onnx"),
        ({"files": {MODEL: "0", "../outside": "0"}}, "does not match"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder: Path, change: Any, message: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(BundleError, match=message):
        bundle.load(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "samples/../../outside", "a\0b"])
def test_a_manifest_cannot_reach_outside_its_folder(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: "0", **manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="outside the bundle"):
        bundle.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": NaN}'])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.load(folder)


def test_a_threshold_must_be_a_number(folder: Path) -> None:
    with pytest.raises(ValueError, match="threshold"):
        calibration(folder / MODEL, threshold=float("nan"))


def test_no_folder_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        bundle.load(tmp_path / "absent")
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.load(tmp_path)


def test_a_new_bundle_overwrites_only_bundles(folder: Path, tmp_path: Path) -> None:
    bundle.check_target(folder)
    bundle.check_target(tmp_path / "new")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("work of years")
    for content in (None, '{"manifest_version": 3, "name": "a browser extension"}'):
        if content is not None:
            (tmp_path / "other" / MANIFEST).write_text(content)
        with pytest.raises(BundleError, match="is no bundle"):
            bundle.check_target(tmp_path / "other")
    with pytest.raises(BundleError, match="is a file"):
        bundle.check_target(tmp_path / "other" / "thesis.tex")
