"""Long work in resumable pieces: each piece's arrays are kept in a scratch folder until the whole is done."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from guard.files import atomic_open
from guard.progress import Progress

Arrays = dict[str, NDArray[Any]]
Piece = Callable[[NDArray[np.int64]], Arrays]

PIECE = 64
"""Images in one piece: little enough to lose, enough to keep the files few."""


_INDICES = "__indices__"


class Stages:
    """Runs stages over images piece by piece, and takes finished pieces from an interrupted run of the same
    key.

    `key` holds everything that the results depend on; another key never meets these pieces. The scratch
    folder `.<name>.<doing>-<key>` lies beside `target` and goes when the block ends well; an interrupt tells
    where it is. `progress` counts units of work, as `cost` per image.
    """

    def __init__(
        self, target: Path, key: Mapping[str, Any], progress: Progress, *, doing: str = "calibrating"
    ) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = target.resolve().parent / f".{target.resolve().name}.{doing}-{digest[:16]}"
        self._progress = progress

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif kind is KeyboardInterrupt and self.folder.exists():
            raise KeyboardInterrupt(
                f"interrupted: what is finished lies in {self.folder}; the same command goes on from there"
            ) from error

    def run(
        self,
        name: str,
        indices: NDArray[np.int64],
        compute: Piece,
        *,
        cost: float = 1.0,
        size: int = PIECE,
    ) -> Arrays:
        """The arrays that `compute` gives for the images at `indices`, in their order, `size` at a time.

        `compute` gets the indices of a piece, in order, and returns named arrays whose first axis runs over
        them; arrays of another length are joined all the same. It must depend on nothing but the indices and
        the key, or the earlier stages.
        """
        parts = []
        for number, start in enumerate(range(0, len(indices), size)):
            piece = indices[start : start + size]
            file = self.folder / f"{name}-{number:04d}.npz"
            found = _read(file, piece)
            kept = found is not None
            if found is None:
                found = compute(piece)
                with atomic_open(file) as stream:
                    np.savez(stream, allow_pickle=False, **{_INDICES: piece, **found})
            parts.append(found)
            self._progress.advance(round(cost * len(piece)), name, free=kept)
        return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]} if parts else {}


def _read(file: Path, piece: NDArray[np.int64]) -> Arrays | None:
    """A finished piece, or None where there is none, or one of other images or broken."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    known = arrays.pop(_INDICES, None)
    return arrays if known is not None and np.array_equal(known, piece) else None
