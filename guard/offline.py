"""Classifying images offline: files, folders, `.npz` files and known data sets, as rows of answers."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from guard import data, images
from guard.archives import ARCHIVES
from guard.decision import Decision, Guard
from guard.errors import DataError, ImageError
from guard.settings import upload_limits

Float32 = NDArray[np.float32]

_BATCH_BYTES = 64 * 2**20  # of decoded images at once; with the next batch being decoded, twice that
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class Row:
    """One image's answer: where it came from, and either its decision or why there is none.

    `path` is the file as it was given, `index` the image's place in an array; a row has one of them, or both
    where arrays of several sources are classified.
    """

    path: str | None
    index: int | None
    decision: Decision | None = None
    error: ImageError | None = None

    @property
    def verdict(self) -> Literal["accepted", "rejected", "unread"]:
        """What became of the image."""
        if self.decision is None:
            return "unread"
        return "accepted" if self.decision.accepted else "rejected"

    def record(self) -> dict[str, Any]:
        """The answer of `POST /classify` with `path` or `index`, or with `error` (`code`, `message`)."""
        place = {"path": self.path, "index": self.index}
        found = {name: value for name, value in place.items() if value is not None}
        if self.decision is not None:
            return found | self.decision.model_dump(mode="json")
        if self.error is None:
            raise ValueError("a row has a decision or an error")
        return found | {"error": {"code": self.error.code, "message": str(self.error)}}


@dataclass(frozen=True)
class Source:
    """Images to classify: files, or the arrays of one data set (`named`: rows say which)."""

    files: tuple[Path, ...] = ()
    arrays: data.Dataset | None = None
    named: str | None = None

    def __len__(self) -> int:
        return len(self.files) if self.arrays is None else len(self.arrays)


def sources(given: Sequence[str], shape: tuple[int, int, int]) -> list[Source]:
    """What the words of a command line stand for; folders are searched to any depth, in order of names.

    `shape` (C, H, W) is the model's. Raises `DataError` where a word stands for nothing, or for arrays of
    another shape.
    """
    found = []
    known = data.SUFFIXES | data.UNREAD  # those get rows that say so
    for word in given:
        path = Path(word)
        if path.is_dir():
            files = tuple(
                file
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in known and file.is_file() and not _hidden(file, path)
            )
            if not files:
                raise DataError(f"{path}: holds no image ({', '.join(sorted(data.SUFFIXES))}).")
            found.append(Source(files=files))
        elif path.suffix == ".npz" or (word in ARCHIVES and not path.exists()):
            dataset = data.load(word)
            data.check_shape(dataset, shape)
            found.append(Source(arrays=dataset, named=word if len(given) > 1 else None))
        elif path.is_file():
            found.append(Source(files=(path,)))
        else:
            raise DataError(f"{word}: no such file or folder, and no known data set ({', '.join(ARCHIVES)}).")
    return found


def classify(guard: Guard, given: Sequence[Source]) -> Iterator[Row]:
    """One row per image, in order; an image that cannot be decoded gives a row with its error.

    The next batch is decoded while one is classified.
    """
    limits = upload_limits()
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[list[_Loaded]] | None = None
        for batch in _batches(guard, given):
            following = pool.submit(_load, guard, batch, limits)
            if ahead is not None:
                yield from _decide(guard, ahead.result())
            ahead = following
        if ahead is not None:
            yield from _decide(guard, ahead.result())


_Place = tuple[Source, int]
_Loaded = tuple[Row, Float32 | None]


def _batches(guard: Guard, given: Sequence[Source]) -> Iterator[list[_Place]]:
    each = 4 * int(np.prod(guard.detector.input_shape))
    size = max(1, min(_LARGEST_BATCH, _BATCH_BYTES // each))
    batch: list[_Place] = []
    for source in given:
        for index in range(len(source)):
            batch.append((source, index))
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def _load(guard: Guard, batch: Sequence[_Place], limits: images.Limits) -> list[_Loaded]:
    return [_load_one(guard, source, index, limits) for source, index in batch]


def _load_one(guard: Guard, source: Source, index: int, limits: images.Limits) -> _Loaded:
    if source.arrays is not None:
        return Row(source.named, index), data.to_floats(source.arrays.images[index : index + 1])[0]
    file = source.files[index]
    try:
        pixels = guard.decode(images.read(file, limits), limits)
    except ImageError as error:
        return Row(str(file), None, error=error), None
    except OSError as error:
        unread = ImageError(f"The file cannot be read ({error.strerror}).", code="unreadable", status=422)
        return Row(str(file), None, error=unread), None
    return Row(str(file), None), pixels


def _decide(guard: Guard, loaded: Sequence[_Loaded]) -> Iterator[Row]:
    pixels = [image for _, image in loaded if image is not None]
    decisions = iter(guard.classify(np.stack(pixels)) if pixels else [])
    for row, image in loaded:
        yield row if image is None else Row(row.path, row.index, decision=next(decisions))


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
