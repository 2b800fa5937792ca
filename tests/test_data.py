"""Data sets by name, as files and as folders; folds."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from guard import data, images
from guard.data import FOLDS, Dataset, aligned, folds, load, take, test_split, to_floats
from guard.errors import DataError

test_split.__test__ = False  # type: ignore[attr-defined]

Arrays = dict[str, NDArray[Any]]


def arrays(**changes: NDArray[Any] | None) -> Arrays:
    rng = np.random.default_rng(0)
    made: dict[str, NDArray[Any] | None] = {
        "x_train": rng.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1], np.uint8),
        "x_test": rng.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8),
        "y_test": np.array([2, 1, 0], np.int32),
        "class_names": np.array(["cat", "dog", "eel"]),
    }
    return {name: array for name, array in (made | changes).items() if array is not None}


def saved(path: Path, contents: Arrays) -> Path:
    with path.open("wb") as file:
        np.savez(file, **contents)  # type: ignore[arg-type]
    return path


def picture(path: Path, level: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color=level if mode == "L" else (level, 0, 0)).save(path)


def test_another_shape_than_the_models_is_refused(tmp_path: Path) -> None:
    dataset = load(saved(tmp_path / "animals.npz", arrays()))
    data.check_shape(dataset, (3, 4, 6))
    expected = (
        r"^animals: images are 3 x 4 x 6, the model takes 1 x 6 x 4 \(channels, height, width\)\. Give "
    )
    with pytest.raises(DataError, match=expected):
        data.check_shape(dataset, (1, 6, 4))


class TestNpz:
    def test_both_splits(self, tmp_path: Path) -> None:
        contents = arrays()
        path = saved(tmp_path / "animals.npz", contents)
        test, train = load(path), load(str(path), "train")
        assert test.name == "animals"
        assert len(test) == 3
        assert len(train) == 5
        assert test.images.dtype == np.uint8
        np.testing.assert_array_equal(test.images, contents["x_test"])
        assert test.labels is not None
        assert test.labels.dtype == np.int64
        assert test.labels.tolist() == [2, 1, 0]
        assert test.class_names == ("cat", "dog", "eel")
        content = contents["x_test"].tobytes() + np.array([2, 1, 0], "<i8").tobytes()
        assert test.digest == hashlib.sha256(content).hexdigest()
        assert train.digest != test.digest

    def test_by_name_in_the_data_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved(tmp_path / "cifar10.npz", arrays())
        monkeypatch.setenv("GUARD_DATA", str(tmp_path))
        assert load("cifar10", "train").name == "cifar10"
        assert data.cache_folder() == tmp_path
        monkeypatch.delenv("GUARD_DATA")
        assert data.cache_folder().name == "guard"

    def test_labels_and_names_are_optional(self, tmp_path: Path) -> None:
        unlabelled = load(saved(tmp_path / "a.npz", arrays(y_test=None)))
        assert unlabelled.labels is None
        assert unlabelled.class_names == ()
        unnamed = load(saved(tmp_path / "b.npz", arrays(class_names=None)))
        assert unnamed.class_names == ("0", "1", "2")

    def test_keras_shapes(self, tmp_path: Path) -> None:
        grey = arrays(x_test=np.zeros((3, 4, 4), np.uint8), y_test=np.array([[0], [1], [2]]))
        found = load(saved(tmp_path / "grey.npz", grey))
        assert found.images.shape == (3, 4, 4, 1)
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x_test": None}, "has no array 'x_test', only x_train, y_train, y_test, class_names"),
            ({"x_test": np.zeros((3, 4, 6, 3))}, r"x_test is float64 \(3, 4, 6, 3\); expected uint8"),
            (
                {"x_test": np.zeros((3, 4, 6, 2), np.uint8)},
                r"\(3, 4, 6, 2\); expected uint8 .* 1 or 3 channels",
            ),
            ({"x_test": np.zeros((3, 4), np.uint8)}, r"uint8 \(3, 4\); expected"),
            ({"x_test": np.zeros((0, 4, 6, 3), np.uint8)}, "holds no image"),
            ({"x_test": np.zeros((3, 0, 6, 3), np.uint8)}, "holds no image"),
            ({"y_test": np.zeros(2, np.int64)}, r"y_test is int64 \(2,\); expected 3 integers"),
            ({"y_test": np.zeros(3)}, "expected 3 integers"),
            ({"y_test": np.array([0, 1, 3])}, "runs from 0 to 3; expected numbers of 3 classes"),
            ({"y_test": np.array([0, 1, -1])}, "runs from -1 to 1"),
            ({"y_test": np.array([0, 1, 2**33]), "class_names": None}, "expected numbers of 1000000 classes"),
            ({"y_test": np.array([0, 1, 2**64 - 1], np.uint64)}, f"runs from 0 to {2**64 - 1}"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=message):
            load(saved(tmp_path / "a.npz", arrays(**change)))

    def test_damaged_files(self, tmp_path: Path) -> None:
        whole = saved(tmp_path / "a.npz", arrays()).read_bytes()
        for content in (b"", b"no archive", whole[:-100], whole[:300]):
            (tmp_path / "a.npz").write_bytes(content)
            with pytest.raises(DataError, match=r"a\.npz: not a sound \.npz file"):
                load(tmp_path / "a.npz")
        flipped = bytearray(whole)
        flipped[flipped.index(b"x_test.npy") + 200] ^= 255
        (tmp_path / "a.npz").write_bytes(flipped)
        with pytest.raises(DataError, match=r"a\.npz: not a sound \.npz file"):
            load(tmp_path / "a.npz")

    def test_other_files_by_that_name(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        with path.open("wb") as file:
            np.save(file, np.zeros((3, 4, 6, 3), np.uint8))
        with pytest.raises(DataError, match=r"a\.npz: not a sound \.npz file"):
            load(path)
        np.savez_compressed(path, **arrays())  # type: ignore[arg-type]
        packed = bytearray(path.read_bytes())
        start = packed.index(b"x_test.npy") + len(b"x_test.npy")
        packed[start + 30 : start + 60] = b"\xff" * 30  # the compressed stream makes no sense
        path.write_bytes(packed)
        with pytest.raises(DataError, match=r"a\.npz: not a sound \.npz file"):
            load(path)

    def test_class_names_as_bytes_or_alone(self, tmp_path: Path) -> None:
        names = np.array([b"cat", b"dog", b"eel"])
        assert load(saved(tmp_path / "a.npz", arrays(class_names=names))).class_names == ("cat", "dog", "eel")
        alone = arrays(class_names=np.array("cat"), y_test=np.zeros(3, np.int64))
        assert load(saved(tmp_path / "b.npz", alone)).class_names == ("cat",)

    def test_pickled_objects_are_not_run(self, tmp_path: Path) -> None:
        hostile = arrays(x_test=np.array([{"an": "object"}], dtype=object))
        with pytest.raises(DataError, match="not a sound"):
            load(saved(tmp_path / "a.npz", hostile))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such file"):
            load(tmp_path / "a.npz")
        with pytest.raises(DataError, match=r"'cifar11' is neither a folder.*\(cifar10, cifar100, mnist"):
            load("cifar11")


class TestFolders:
    def test_one_folder_per_class(self, tmp_path: Path) -> None:
        picture(tmp_path / "dog" / "b.png", 20)
        picture(tmp_path / "dog" / "a.PNG", 10)
        picture(tmp_path / "cat" / "z.bmp", 30)
        (tmp_path / "dog" / "notes.txt").write_text("not an image")
        (tmp_path / "README").write_text("not an image")
        (tmp_path / ".hidden").mkdir()
        found = load(tmp_path)
        assert found.name == tmp_path.name
        assert found.class_names == ("cat", "dog")
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1, 1]
        assert found.images.shape == (3, 4, 6, 3)
        assert found.images[:, 0, 0, 0].tolist() == [30, 10, 20]
        assert found.digest == load(str(tmp_path), "train").digest

    def test_reading_shows_its_progress(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        picture(tmp_path / "photos" / "a.png", 1)
        load(tmp_path / "photos")
        assert "read photos  1/1 done" in capsys.readouterr().err

    def test_images_alone_have_no_labels(self, tmp_path: Path) -> None:
        picture(tmp_path / "b.png", 2)
        picture(tmp_path / "a.png", 1)
        found = load(tmp_path)
        assert found.labels is None
        assert found.images[:, 0, 0, 0].tolist() == [1, 2]

    def test_with_folders_for_the_splits(self, tmp_path: Path) -> None:
        picture(tmp_path / "train" / "cat" / "a.png", 1)
        picture(tmp_path / "test" / "cat" / "a.png", 2)
        assert load(tmp_path, "train").images[0, 0, 0, 0] == 1
        assert load(tmp_path, "test").images[0, 0, 0, 0] == 2

    def test_pictures_that_are_not_read_are_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        picture(tmp_path / "cat" / "a.png", 1)
        (tmp_path / "cat" / "b.gif").write_bytes(b"GIF89a")
        assert len(load(tmp_path)) == 1
        assert "1 images are left out, in formats that are not read (b.gif)" in caplog.text

    def test_labelled_validation_images_stand_before_unlabelled_test_images(self, tmp_path: Path) -> None:
        picture(tmp_path / "train" / "cat" / "a.png", 1)
        picture(tmp_path / "test" / "a.png", 2)
        assert load(tmp_path, "test").images[0, 0, 0, 0] == 2
        assert test_split(tmp_path, ["cat"]) is None
        picture(tmp_path / "val" / "cat" / "a.png", 3)
        found = test_split(tmp_path, ["cat"])
        assert found is not None
        assert found.images[0, 0, 0, 0] == 3

    def test_mixed_sizes_need_a_decoder(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png", 51)
        picture(tmp_path / "b.png", 51, size=(9, 9))
        with pytest.raises(
            DataError, match=r"b\.png: is 9 x 9 pixels, the images before it are 6 x 4 pixels"
        ):
            load(tmp_path)
        found = load(tmp_path, decode=lambda content: images.decode(content, (1, 2, 2), colour="grey"))
        assert found.images.shape == (2, 2, 2, 1)

    def test_pixels_are_exact(self, tmp_path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        np.testing.assert_array_equal(load(tmp_path).images[0], pixels)

    def test_a_picture_on_its_side(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[274] = 6
        Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
        assert load(tmp_path).images.shape == (1, 6, 4, 3)

    def test_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no image"):
            load(tmp_path)
        picture(tmp_path / "cat" / "a.png", 1)
        (tmp_path / "dog").mkdir()
        with pytest.raises(DataError, match="dog: holds no image"):
            load(tmp_path)
        picture(tmp_path / "loose.png", 1)
        with pytest.raises(DataError, match=r"holds images \(loose\.png, \.\.\.\) beside folders \(cat"):
            load(tmp_path)
        (tmp_path / "loose.png").unlink()
        (tmp_path / "dog" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
        with pytest.raises(DataError, match=r"b\.png: .*damaged"):
            load(tmp_path)


class TestFolds:
    @given(st.integers(0, 3000), st.integers(0, 5))
    def test_are_a_partition_with_half_to_report(self, n: int, seed: int) -> None:
        found = folds(n, seed)
        assert list(found) == ["threshold", "radii", "conformal", "report"]
        together = np.concatenate(list(found.values()))
        assert sorted(together.tolist()) == list(range(n))
        assert len(found["report"]) * 2 >= n
        for name, part in found.items():
            assert part.dtype == np.int64
            assert (np.diff(part) > 0).all()
            assert abs(len(part) - FOLDS[name] * n) <= 3

    def test_of_the_cifar10_test_set(self) -> None:
        sizes = {name: len(part) for name, part in folds(10_000, 0).items()}
        assert sizes == {"threshold": 2500, "radii": 1500, "conformal": 1000, "report": 5000}

    def test_the_seed_decides(self) -> None:
        one, same, other = folds(100, 1), folds(100, 1), folds(100, 2)
        assert all((one[name] == same[name]).all() for name in one)
        assert any((one[name] != other[name]).any() for name in one)


class TestHelpers:
    def dataset(self) -> Dataset:
        return Dataset("d", np.zeros((3, 1, 1, 1), np.uint8), np.array([0, 1, 2]), ("a", "b", "c"), "x")

    def test_to_floats(self) -> None:
        pixels = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
        floats = to_floats(pixels)
        assert floats.dtype == np.float32
        assert floats.shape == (2, 3, 3, 4)
        assert floats.flags.c_contiguous
        assert floats[1, 2, 0, 3] == np.float32(pixels[1, 0, 3, 2]) / np.float32(255)
        assert to_floats(np.full((1, 1, 1, 1), 255, np.uint8)).max() == 1

    def test_take(self) -> None:
        some = take(self.dataset(), np.array([2, 0]))
        assert some.labels is not None
        assert some.labels.tolist() == [2, 0]
        assert some.digest == "x"
        assert len(take(self.dataset(), slice(0, 1))) == 1

    def test_aligned_by_name(self) -> None:
        found = aligned(self.dataset(), ["c", "x", "b", "a"])
        assert found.labels is not None
        assert found.labels.tolist() == [3, 2, 0]
        assert found.class_names == ("c", "x", "b", "a")

    def test_aligned_by_order(self, caplog: pytest.LogCaptureFixture) -> None:
        found = aligned(self.dataset(), ["x", "y", "z"])
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1, 2]
        assert "they are taken in order, a as x and so on" in caplog.text
        assert aligned(self.dataset(), ["a", "b", "c"]).labels is not None

    def test_aligned_by_number(self, caplog: pytest.LogCaptureFixture) -> None:
        numbers = tuple(sorted(map(str, range(11))))  # as folders are sorted: 0, 1, 10, 2
        dataset = replace(self.dataset(), class_names=numbers, labels=np.array([1, 2, 10]))
        found = aligned(dataset, [f"class {number}" for number in range(11)])
        assert found.labels is not None
        assert found.labels.tolist() == [1, 10, 9]
        few = aligned(replace(dataset, class_names=("0", "1", "2"), labels=np.array([1, 2, 0])), "abcde")
        assert few.labels is not None
        assert few.labels.tolist() == [1, 2, 0]
        assert not caplog.records
        with pytest.raises(DataError, match="has 11 classes, the model 10"):
            aligned(dataset, [f"class {number}" for number in range(10)])

    def test_one_name_that_differs_is_no_order(self) -> None:
        with pytest.raises(DataError, match="'c' is none of the model's"):
            aligned(self.dataset(), ["b", "a", "C"])

    def test_aligned_with_neither(self) -> None:
        with pytest.raises(DataError, match="has 3 classes, the model 2, and 'c' is none of the model's"):
            aligned(self.dataset(), ["a", "b"])

    def test_the_test_split_beside_a_training_split(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.npz", arrays())
        found = test_split(path, load(path, "train").class_names)
        assert found is not None
        assert len(found) == 3
        path = saved(tmp_path / "b.npz", arrays(x_test=None, y_test=None))
        assert test_split(path, load(path, "train").class_names) is None
        path = saved(tmp_path / "c.npz", arrays(y_test=None))
        assert test_split(path, load(path, "train").class_names) is None
        picture(tmp_path / "folder" / "cat" / "a.png", 1)
        assert test_split(tmp_path / "folder", load(tmp_path / "folder", "train").class_names) is None
