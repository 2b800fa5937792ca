"""Labelled images as arrays, without torch: data sets known by name, `.npz` files and folders of images."""

import hashlib
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guard import images as uploads
from guard.archives import ARCHIVES, FORMAT, fetch
from guard.errors import DataError, ImageError
from guard.progress import track

log = logging.getLogger(__name__)

Split = Literal["train", "test"]
Decode = Callable[[bytes], NDArray[np.float32]]

FOLDS = {"threshold": 0.25, "radii": 0.15, "conformal": 0.10, "report": 0.50}
MOST_CLASSES = 1_000_000
"""Classes, at most, of an `.npz` file that does not name them."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
UNREAD = frozenset({".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2"})
"""Suffixes of pictures in formats that are not read."""


@dataclass(frozen=True)
class Dataset:
    """Images and what is known of them.

    `images` is uint8 (N, H, W, C), N at least 1; `labels` int64 (N,), numbers of `class_names`, or None where
    unlabelled (`class_names` is then empty); `digest` the hexadecimal sha256 of images and labels.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.images)


def cache_folder() -> Path:
    """Where known data sets lie: `$GUARD_DATA`, else `guard` in the user's cache folder."""
    chosen = os.environ.get("GUARD_DATA")
    if chosen:
        return Path(chosen)
    import pooch

    return Path(pooch.os_cache("guard"))


def load(source: str | Path, split: Split = "test", *, decode: Decode | None = None) -> Dataset:
    """Reads one split of a data set.

    `source` is a known name (cifar10, cifar100, mnist, fashion-mnist: `<name>.npz` in the cache folder,
    fetched there once where absent), the path of an `.npz` file of the same arrays, or a folder of images:
    one sub-folder per class, whose name is the class's, or images alone, which then have no labels. A folder
    is taken whole for either split unless it has a sub-folder of the split's name (`val` does for `test`).

    `decode` turns the bytes of a folder's image into float32 (C, H, W) in [0, 1]; without it images become
    RGB at their own size, which must be the same for all.

    Raises `DataError` where there is no such data, or it is not what it should be.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(split_folder(path, split) or path, path.name or "images", decode)
    if path.suffix == ".npz":
        return _from_npz(path, path.stem, split)
    name = str(source)
    if name not in ARCHIVES:
        raise DataError(
            f"{name!r} is neither a folder, nor an .npz file, nor a known data set ({', '.join(ARCHIVES)})."
        )
    path = cache_folder() / f"{name}.npz"
    if not path.is_file():
        fetch(name, path)
    return _from_npz(path, name, split)


def test_split(source: str | Path, class_names: Sequence[str]) -> Dataset | None:
    """The labelled test split beside a training split of these classes; None where there is none of its own.

    Raises what `load` raises where it is there and is not what it should be.
    """
    path = Path(source)
    if path.is_dir():
        if split_folder(path, "test") is None:
            return None
    elif path.suffix == ".npz":
        with path.open("rb") as file, np.load(file) as archive:
            if "x_test" not in archive:
                return None
    test = load(source, "test")
    return None if test.labels is None else aligned(test, class_names)


def split_folder(folder: Path, split: Split) -> Path | None:
    """The sub-folder of a folder of images that holds the split, if there is one; one with classes first."""
    names = ("train",) if split == "train" else ("test", "val")
    there = [folder / name for name in names if (folder / name).is_dir()]
    labelled = [path for path in there if any(child.is_dir() for child in path.iterdir())]
    return next(iter(labelled or there), None)


def folds(n: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Splits n images at random into disjoint folds: `threshold` (25%), `radii` (15%), `conformal` (10%) and
    `report` (at least half). Each is an ascending array of indices, the same for the same (n, seed).

    The folds' shares are fixed so that no choice can look at the report fold.
    """
    order = np.random.default_rng(seed).permutation(n)
    cuts = np.floor(np.cumsum([share for name, share in FOLDS.items() if name != "report"]) * n + 1e-9)
    parts = np.split(order, cuts.astype(np.int64))
    return {name: np.sort(part) for name, part in zip(FOLDS, parts, strict=True)}


def take(dataset: Dataset, indices: NDArray[np.int64] | slice) -> Dataset:
    """The images at `indices`; the digest stays that of the whole."""
    labels = None if dataset.labels is None else dataset.labels[indices]
    return replace(dataset, images=dataset.images[indices], labels=labels)


def to_floats(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1], contiguous."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def check_shape(dataset: Dataset, shape: tuple[int, int, int]) -> None:
    """Raises `DataError` where the images are not of a model's input shape (C, H, W)."""
    height, width, channels = dataset.images.shape[1:]
    if (channels, height, width) != shape:
        raise DataError(
            f"{dataset.name}: images are {channels} x {height} x {width}, the model takes "
            f"{' x '.join(map(str, shape))} (channels, height, width). Give images of that size, or image "
            "files, which are resized as the manifest says."
        )


def aligned(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """The data set with its labels renumbered to a model's classes, by name.

    Names that are all whole numbers are numbers of the model's classes. Where none of the data's names is the
    model's, but there are as many, their order is taken to be the model's, with a warning. Raises `DataError`
    where neither names nor numbers fit.
    """
    if dataset.labels is None or tuple(class_names) == dataset.class_names:
        return dataset
    labels = aligned_labels(dataset.name, dataset.labels, dataset.class_names, class_names)
    return replace(dataset, labels=labels, class_names=tuple(class_names))


def aligned_labels(
    name: str, labels: NDArray[np.int64], names: Sequence[str], class_names: Sequence[str]
) -> NDArray[np.int64]:
    """Labels that number `names`, renumbered to `class_names` as `aligned` does; `name` is the data's."""
    numbers = {name: number for number, name in enumerate(class_names)}
    strangers = [name for name in names if name not in numbers]
    if strangers and all(name.isdecimal() and int(name) < len(class_names) for name in names):
        numbers, strangers = {name: int(name) for name in names}, []
    if not strangers:
        return np.array([numbers[name] for name in names], dtype=np.int64)[labels]
    stranger = strangers[0]
    if len(class_names) == len(names) == len(strangers):
        log.warning(
            "%s: no class is named as one of the model's; they are taken in order, %s as %s and so on",
            name,
            stranger,
            class_names[0],
        )
        return labels
    raise DataError(
        f"{name}: has {len(names)} classes, the model {len(class_names)}, and {stranger!r} is none of the "
        "model's. Name classes as the model's are named: the folders, or class_names in an .npz."
    )


def digest_of(images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> str:
    """Hexadecimal sha256 of the images' bytes, then the labels' (little-endian int64)."""
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _from_npz(path: Path, name: str, split: Split) -> Dataset:
    x, y = f"x_{split}", f"y_{split}"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if x not in archive:
                raise DataError(
                    f"{path}: has no array {x!r}, only {', '.join(archive.files)}. Expected {FORMAT}."
                )
            images = archive[x]
            labels = archive.get(y)
            names = archive.get("class_names")
            names = None if names is None else names.ravel().astype(str)  # bytes become text
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    # TypeError: the file is one bare array; RuntimeError: it is encrypted, or packed as numpy never does.
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # numpy's advice for arrays of Python objects is to trust them.
        reason = "" if "pickle" in str(error) else f" ({error})"
        raise DataError(
            f"{path}: not a sound .npz file of plain arrays{reason}. Expected {FORMAT}."
        ) from error
    if images.ndim == 3:  # grey images without the channel axis, as Keras stores MNIST
        images = images[..., np.newaxis]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        scale = ""
        if images.dtype.kind == "f" and images.size:
            low, high = float(images.min()), float(images.max())
            advice = "bring them to 0 to 255 and round"
            if low >= 0 and high <= 255:
                advice = "multiply by 255 and round" if high <= 1 else "round them and store them as uint8"
            scale = f" These are from {low:.4g} to {high:.4g}: {advice}."
        raise DataError(
            f"{path}: {x} is {images.dtype} {images.shape}; expected uint8 (N, H, W, C) with 1 or 3 "
            f"channels.{scale}"
        )
    if not images.size:
        raise DataError(f"{path}: {x} holds no image, its shape is {images.shape}.")
    if labels is None:
        return Dataset(name, images, None, (), digest_of(images, None))
    if labels.ndim == 2 and labels.shape[1] == 1:  # as Keras stores CIFAR
        labels = labels[:, 0]
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: {y} is {labels.dtype} {labels.shape}; expected {len(images)} integers.")
    first, last = int(labels.min()), int(labels.max())
    classes = min(last + 1, MOST_CLASSES) if names is None else len(names)
    if first < 0 or last >= classes:
        raise DataError(
            f"{path}: {y} runs from {first} to {last}; expected numbers of {max(classes, 0)} classes, from 0."
        )
    labels = labels.astype(np.int64)
    class_names = tuple(map(str, range(classes) if names is None else names))
    return Dataset(name, images, labels, class_names, digest_of(images, labels))


def listing(folder: Path) -> tuple[list[Path], NDArray[np.int64] | None, tuple[str, ...]]:
    """The images of a folder, their labels and the classes' names; no labels and names where it has no
    sub-folders. Raises `DataError` where a class has no image, and where images lie beside folders.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = _images_in(folder)
    if classes and loose:
        raise DataError(
            f"{folder}: holds images ({loose[0].name}, ...) beside folders ({classes[0].name}, ...). "
            "Expected one folder per class with the images inside, or images alone."
        )
    members = [_images_in(one) for one in classes] if classes else [loose]
    for one, files in zip(classes or [folder], members, strict=True):
        if not files:
            raise DataError(f"{one}: holds no image ({', '.join(sorted(SUFFIXES))}).")
    paths = [file for files in members for file in files]
    others = [file for one in classes or [folder] for file in _images_in(one, UNREAD)]
    if others:
        log.warning(
            "%s: %d images are left out, in formats that are not read (%s)",
            folder,
            len(others),
            others[0].name,
        )
    if not classes:
        return paths, None, ()
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in members])
    return paths, labels, tuple(one.name for one in classes)


def _from_folder(folder: Path, name: str, decode: Decode | None) -> Dataset:
    paths, labels, class_names = listing(folder)
    images = np.empty(0, np.uint8)
    for index, file in enumerate(track(paths, f"read {name}")):
        image = _read_image(file, decode)
        if index == 0:
            images = np.empty((len(paths), *image.shape), np.uint8)
        elif image.shape != images.shape[1:]:
            raise DataError(
                f"{file}: is {_size(image.shape)}, the images before it are {_size(images.shape[1:])}. "
                "Bring all to one size."
            )
        images[index] = image
    return Dataset(name, images, labels, class_names, digest_of(images, labels))


def _images_in(folder: Path, suffixes: Container[str] = SUFFIXES) -> list[Path]:
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()
    )


def _read_image(file: Path, decode: Decode | None) -> NDArray[np.uint8]:
    """One image as uint8 (H, W, C)."""
    try:
        data = file.read_bytes()
        pixels = _decode_whole(data) if decode is None else decode(data)
    except ImageError as error:
        raise DataError(f"{file}: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    return np.rint(pixels.transpose(1, 2, 0) * 255).astype(np.uint8)


def _decode_whole(data: bytes) -> NDArray[np.float32]:
    """At its own size, in RGB."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = uploads.upright_size(picture)
    except Exception:  # whatever a decoder trips over: the call below says what is wrong with these bytes
        height = width = 1
    return uploads.decode(data, (3, height, width))


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels"
