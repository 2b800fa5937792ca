import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from guard.decision import Guard
from guard.errors import DataError
from guard.offline import Row, classify, sources
from guard.settings import Policy
from tests.serving import CAT, DOG, GREY, colour, write_bundle

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    bundle = write_bundle(tmp_path_factory.mktemp("offline") / "b")
    return Guard.from_bundle(bundle, "cpu", policy=Policy())


def arrays(file: Path, images: NDArray[np.uint8]) -> str:
    np.savez(file, x_test=images, y_test=np.zeros(len(images), np.int64))
    return str(file)


def rows(guard: Guard, *words: str | Path) -> list[Row]:
    return list(classify(guard, sources([str(word) for word in words], guard.detector.input_shape)))


def test_files_and_folders_in_order(guard: Guard, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    (folder / "b.png").write_bytes(CAT)
    (folder / "a.jpg").write_bytes(colour(0, 255, 0, size=40, kind="JPEG"))
    (folder / "sub" / "c.PNG").write_bytes(GREY)
    (folder / "notes.txt").write_text("no image")
    (folder / ".thumbnails" / "d.png").write_bytes(DOG)
    single = tmp_path / "single.bmp"
    single.write_bytes(colour(0, 0, 255, kind="BMP"))
    found = rows(guard, folder, single)
    assert [row.path for row in found] == [
        str(folder / "a.jpg"),
        str(folder / "b.png"),
        str(folder / "sub" / "c.PNG"),
        str(single),
    ]
    decisions = [row.decision for row in found]
    assert [decision.class_name for decision in decisions if decision] == ["dog", "cat", "cat", "ship"]
    assert [row.verdict for row in found] == ["accepted", "accepted", "rejected", "accepted"]


def test_a_row_is_the_answer_with_its_place(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(CAT)
    (row,) = rows(guard, tmp_path / "red.png")
    record = row.record()
    assert record.pop("path") == str(tmp_path / "red.png")
    red = np.zeros((1, *SHAPE), np.float32)
    red[:, 0] = 1
    assert record == guard.classify(red)[0].model_dump(mode="json")
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_bad_images_give_errors_and_the_others_answers(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(CAT)
    (tmp_path / "b.png").write_bytes(CAT[:45])
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "d.png").write_bytes(DOG)
    (tmp_path / "e.gif").write_bytes(b"GIF89a")
    found = rows(guard, tmp_path)
    assert [row.verdict for row in found] == ["accepted", "unread", "unread", "accepted", "unread"]
    errors = [row.record()["error"]["code"] for row in found if row.error]
    assert errors == ["corrupt_image", "empty_image", "unsupported_format"]


def test_arrays(guard: Guard, tmp_path: Path) -> None:
    images = np.zeros((150, 8, 8, 3), np.uint8)
    images[:, :, :, 0] = 255
    images[149] = 128
    file = arrays(tmp_path / "x.npz", images)
    found = rows(guard, file)
    assert [row.index for row in found] == list(range(150))
    assert all(row.path is None for row in found)
    assert [row.verdict for row in found].count("rejected") == 1
    assert found[149].verdict == "rejected"
    (tmp_path / "red.png").write_bytes(CAT)
    mixed = rows(guard, tmp_path / "red.png", file)
    assert (mixed[0].path, mixed[0].index) == (str(tmp_path / "red.png"), None)
    assert (mixed[1].path, mixed[1].index) == (file, 0)


def test_the_servers_limits_hold(guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(CAT)
    monkeypatch.setenv("GUARD_MAX_BYTES", str(len(CAT) - 1))
    (row,) = rows(guard, tmp_path)
    assert row.error is not None
    assert row.error.code == "body_too_large"
    monkeypatch.setenv("GUARD_MAX_BYTES", str(len(CAT)))
    (row,) = rows(guard, tmp_path)
    assert row.error is None


def test_what_stands_for_nothing(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        sources([str(tmp_path / "empty")], SHAPE)
    with pytest.raises(DataError, match="no such file or folder, and no known data set"):
        sources(["cifar11"], SHAPE)
    file = arrays(tmp_path / "x.npz", np.zeros((2, 9, 8, 3), np.uint8))
    with pytest.raises(DataError, match="3 x 9 x 8, the model takes 3 x 8 x 8"):
        sources([file], SHAPE)


def test_an_unreadable_file_is_a_row(guard: Guard, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(CAT)
    given = sources([str(file)], SHAPE)
    file.unlink()
    (row,) = classify(guard, given)
    assert row.record()["error"]["code"] == "unreadable"


def test_nothing_to_classify(guard: Guard) -> None:
    assert list(classify(guard, [])) == []
