"""Facts about labelled images: exact distances to neighbours, duplicates, the data's Lipschitz constant.

Images are bytes, so that squared l2 distances and linf distances are whole numbers in steps of 1/255. They
are computed as such: a float32 matrix product of 1024 summands within [-128, 127]^2 never leaves the whole
numbers that float32 holds exactly, whatever the order of summation, and longer sums are added as integers.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.errors import DataError
from guard.interrupts import interruptible
from guard.norms import Norm
from guard.progress import Progress

Bytes = NDArray[np.uint8]
Steps = NDArray[np.int64]

_EXACT = 1024  # summands of at most 2^14 that float32 adds without rounding: 2^24 in all
_CENTRE = 128
_INT32_PIXELS = 33_000  # up to here a squared distance, at most 255^2 a pixel, fits into int32
_BLOCK_BYTES = 1 << 24  # of one block of images as float32
_LARGEST_BLOCK = 2048
_FAR = np.iinfo(np.int64).max
_FIRST_PIXELS = 128  # that the linf search compares of every pair; then twice as many of those left, ...
_PROMISING = 32  # images that it compares in full at a time, or up to twice as many
_COLUMNS = 4096  # images that it compares at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class Nearest:
    """Every image's distance to its nearest neighbour, (N,) float64 in pixels of [0, 1]: among all other
    images, and among those of other labels.
    """

    norm: Norm
    any_label: NDArray[np.float64]
    other_label: NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two images by their indices, and their distance."""

    first: int
    second: int
    distance: float


@dataclass(frozen=True)
class Separation:
    """How far apart the classes of a data set lie.

    `closest` is the closest pair of images with different labels, and 1 / its distance the data's Lipschitz
    constant: infinite where it is 0. `conflicting` are the images that have an identical twin with another
    label, ascending; `apart` is the closest pair of the others (None where fewer than two classes remain).
    `duplicates` counts the images that have an identical twin at all.
    """

    nearest: Nearest
    closest: Pair
    conflicting: tuple[int, ...]
    apart: Pair | None
    duplicates: int


def separation(images: Bytes, labels: NDArray[np.int64] | None, norm: Norm = "l2") -> Separation:
    """Nearest neighbours, duplicates and closest pairs of `images`, uint8 (N, H, W, C), with labels (N,).

    Exact. In l2 every pair is computed, at the speed of a matrix product; in linf pairs are dropped as soon
    as some pixels show them to be too far apart. Source of the Lipschitz constant of data: LIP, section 3.2
    and Table 2 (its supremum norm on one-hot labels, which are then 1 apart).

    Raises `DataError` where there are no labels, or all are the same.
    """
    if labels is None:
        raise DataError(
            "the images have no labels, and distances between classes need them. Give an .npz file with "
            "labels, or a folder with one sub-folder per class."
        )
    if labels.min() == labels.max():
        raise DataError(
            f"all {len(labels)} images are of one class; distances between classes need two. Give images "
            "of at least two classes."
        )
    pixels = np.ascontiguousarray(images.reshape(len(images), -1))
    search = _nearest_l2 if norm == "l2" else _nearest_linf
    any_steps, other_steps = search(pixels, labels)
    conflicting = np.flatnonzero(other_steps == 0)
    everything = np.ones(len(pixels), bool)
    kept = other_steps > 0
    closest = _closest(pixels, labels, other_steps, everything, norm)
    apart = closest if kept.all() else _closest(pixels, labels, other_steps, kept, norm)
    if closest is None:  # two labels were found above
        raise DataError("there is no pair of images with different labels.")
    nearest = Nearest(norm, _distance(any_steps, norm), _distance(other_steps, norm))
    return Separation(nearest, closest, tuple(conflicting.tolist()), apart, int((any_steps == 0).sum()))


def stability(
    other_label: NDArray[np.float64], eps: Sequence[float] | NDArray[np.float64]
) -> dict[str, list[float]]:
    """The data-stability curve (LIP 4.1) at perturbations of length `eps`.

    `reached`: the share of images that a perturbation so long can turn into an image with another label;
    `halfway`: the share that it can take half the way there, where no classifier is right about both images
    and holds its answer within eps of both.
    """
    ordered = np.sort(other_label)
    grid = np.asarray(eps, np.float64)

    def share(reach: NDArray[np.float64]) -> list[float]:
        shares: list[float] = (np.searchsorted(ordered, reach, side="right") / len(ordered)).tolist()
        return shares

    return {"eps": grid.tolist(), "reached": share(grid), "halfway": share(2 * grid)}


def lipschitz(pair: Pair) -> float:
    """The Lipschitz constant that two images with different labels force on whatever fits them."""
    return 1 / pair.distance if pair.distance else float("inf")


def _distance(steps: Steps | int, norm: Norm) -> Any:
    return (
        np.sqrt(np.asarray(steps, np.float64)) / 255 if norm == "l2" else np.asarray(steps, np.float64) / 255
    )


def _nearest_l2(pixels: Bytes, labels: NDArray[np.int64]) -> tuple[Steps, Steps]:
    count, size = pixels.shape
    block = min(_LARGEST_BLOCK, max(1, _BLOCK_BYTES // (4 * size)))
    whole = np.int32 if size <= _INT32_PIXELS else np.int64
    far = np.iinfo(whole).max
    norms = np.array([_squared(row, whole) for row in pixels], whole)
    nearest = np.full((2, count), far, whole)
    with Progress(count * (count + 1) // 2, "compare images") as progress:
        for first in range(0, count, block):
            rows = slice(first, min(first + block, count))
            left = _centred(pixels[rows])
            for second in range(first, count, block):
                columns = slice(second, min(second + block, count))
                right = left if second == first else _centred(pixels[columns])
                steps = _products(left, right, whole)
                steps *= -2
                steps += norms[rows, np.newaxis]
                steps += norms[columns]
                if second == first:
                    np.fill_diagonal(steps, far)
                _lower(nearest[0], rows, columns, steps)
                steps[labels[rows, np.newaxis] == labels[columns]] = far
                _lower(nearest[1], rows, columns, steps)
                pairs = steps.size if second != first else len(left) * (len(left) + 1) // 2
                progress.advance(pairs)
    result = nearest.astype(np.int64)
    result[nearest == far] = _FAR
    return result[0], result[1]


def _centred(pixels: Bytes) -> NDArray[np.float32]:
    floats = pixels.astype(np.float32)
    floats -= _CENTRE
    return floats


def _squared(row: Bytes, whole: type[np.signedinteger[Any]]) -> int:
    centred = row.astype(whole) - _CENTRE
    return int(centred @ centred)


def _products(
    left: NDArray[np.float32], right: NDArray[np.float32], whole: type[np.signedinteger[Any]]
) -> NDArray[Any]:
    """The matrix product left @ right.T of whole numbers in [-128, 127], exactly."""
    total = np.zeros((len(left), len(right)), whole)
    for start in range(0, left.shape[1], _EXACT):
        part = slice(start, start + _EXACT)
        total += (left[:, part] @ right[:, part].T).astype(whole)
    return total


def _lower(nearest: NDArray[Any], rows: slice, columns: slice, steps: NDArray[Any]) -> None:
    """Notes the smallest distances of a block of pairs for the images on both of its sides."""
    np.minimum(nearest[rows], steps.min(1), out=nearest[rows])
    np.minimum(nearest[columns], steps.min(0), out=nearest[columns])


def _nearest_linf(pixels: Bytes, labels: NDArray[np.int64]) -> tuple[Steps, Steps]:
    # Pixels that vary come first, but not one beside the other: neighbours mostly say the same.
    varying = pixels.var(0, dtype=np.float32)
    with np.errstate(divide="ignore"):
        ranks = np.random.default_rng(0).exponential(size=len(varying)) / varying
    ordered = np.ascontiguousarray(pixels[:, np.argsort(ranks, kind="stable")])
    across = [
        np.ascontiguousarray(ordered[start : start + _COLUMNS, :_FIRST_PIXELS].T)
        for start in range(0, len(ordered), _COLUMNS)
    ]
    count = len(pixels)
    nearest = np.full((2, count), _FAR, np.int64)
    chunks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]

    def search(chunk: range) -> int:
        for index in chunk:
            nearest[:, index] = _search_linf(index, ordered, across, labels)
        return len(chunk)

    threads = os.cpu_count() or 1
    with Progress(count, "compare images") as progress, ThreadPoolExecutor(threads) as pool:
        for done in interruptible(pool.map(search, chunks)):
            progress.advance(done)
    return nearest[0], nearest[1]


def _search_linf(
    index: int, ordered: Bytes, across: Sequence[Bytes], labels: NDArray[np.int64]
) -> tuple[int, int]:
    """Steps from one image to the nearest other one, and to the nearest one of another label.

    The largest difference over some pixels is at most the distance. So an image is out once that reaches the
    distance of one already found; the most promising ones of each stage are compared in full. `across` holds
    the first pixels of all images, a row per pixel, in blocks.
    """
    image = ordered[index]
    # a whole block against a whole block: numpy is several times as fast as against a column
    wide = np.repeat(image[: len(across[0]), np.newaxis], across[0].shape[1], 1)
    found = np.concatenate([_differences(block, wide[:, : block.shape[1]]).max(0) for block in across])
    found[index] = 255  # the largest distance there is, so that the image itself is out
    left = np.flatnonzero(found < 255)
    found, other = found[left], labels[left] != labels[index]
    seen, best_any, best_other = len(wide), 255, 255
    while left.size:
        if seen >= len(image):
            return min(best_any, int(found.min())), min(best_other, int(found[other].min(initial=255)))
        promising = np.concatenate([_lowest(found), np.flatnonzero(other)[_lowest(found[other])]])
        distances = _differences(ordered[left[promising]], image).max(1)
        best_any = min(best_any, int(distances.min()))
        best_other = min(best_other, int(distances[other[promising]].min(initial=255)))
        keep = found < np.where(other, best_other, best_any).astype(np.uint8)
        left, found, other = left[keep], found[keep], other[keep]
        apart = _differences(ordered[left, seen : 2 * seen], image[seen : 2 * seen])
        found = np.maximum(found, np.ascontiguousarray(apart.T).max(0, initial=0))
        seen *= 2
    return best_any, best_other


def _lowest(values: Bytes) -> NDArray[np.int64]:
    """The positions of some of the smallest values."""
    level = np.searchsorted(np.bincount(values, minlength=256).cumsum(), min(_PROMISING, len(values)))
    return np.flatnonzero(values <= level)[: 2 * _PROMISING]


def _differences(first: Bytes, second: Bytes) -> Bytes:
    """|first - second| of bytes, in bytes."""
    result: Bytes = np.maximum(first, second) - np.minimum(first, second)
    return result


def _closest(
    pixels: Bytes, labels: NDArray[np.int64], other_steps: Steps, among: NDArray[np.bool_], norm: Norm
) -> Pair | None:
    """The closest pair with different labels of the images `among`, the first one where several are.

    An image's distance among all bounds that among fewer from below, so that few images must be looked at.
    """
    best: tuple[int, int, int] | None = None
    members = np.flatnonzero(among)
    for first in members[np.argsort(other_steps[members], kind="stable")]:
        if best is not None and other_steps[first] >= best[0]:
            break
        others = members[labels[members] != labels[first]]
        if not others.size:
            return None
        steps = _steps(pixels, others, pixels[first], norm)
        nearest = int(steps.argmin())
        if best is None or steps[nearest] < best[0]:
            best = (int(steps[nearest]), int(first), int(others[nearest]))
    return None if best is None else Pair(best[1], best[2], float(_distance(best[0], norm)))


def _steps(pixels: Bytes, others: NDArray[np.int64], image: Bytes, norm: Norm) -> Steps:
    """From one image to each of the others."""
    result = np.empty(len(others), np.int64)
    for start in range(0, len(others), _LARGEST_BLOCK):
        part = slice(start, start + _LARGEST_BLOCK)
        apart = _differences(pixels[others[part]], image)
        if norm == "l2":
            # float64 holds the squares and their sum exactly
            result[part] = np.einsum("ij,ij->i", apart, apart, dtype=np.float64).astype(np.int64)
        else:
            result[part] = apart.max(1)
    return result
