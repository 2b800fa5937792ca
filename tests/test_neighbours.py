"""Distances are those of brute force in whole numbers, ties, duplicates and saturated pixels included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from guard import neighbours
from guard.errors import DataError
from guard.neighbours import Pair, lipschitz, separation, stability
from guard.norms import Norm

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def brute_force(images: Images, norm: Norm) -> NDArray[np.float64]:
    """(N, N) distances, infinite to oneself."""
    flat = images.reshape(len(images), -1).astype(np.int64)
    apart = np.abs(flat[:, np.newaxis] - flat)
    steps = np.sqrt((apart**2).sum(-1)) if norm == "l2" else apart.max(-1).astype(np.float64)
    np.fill_diagonal(steps, np.inf)
    return np.asarray(steps / 255, np.float64)


def drawn(
    seed: int, count: int, shape: tuple[int, int, int], high: int, classes: int
) -> tuple[Images, Labels]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, high, (count, *shape), np.uint8, endpoint=True)
    images[:, 0] = 0  # pixels that never vary, as MNIST has
    labels = rng.integers(0, classes, count)
    labels[:2] = 0, 1
    twins = rng.integers(0, count, (2, count // 8))
    images[twins[0]] = images[twins[1]]
    return images, labels


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("high", [1, 3, 255])
@pytest.mark.parametrize(("count", "shape"), [(2, (2, 1, 1)), (70, (3, 3, 1)), (300, (9, 9, 3))])
def test_nearest_neighbours_are_exact(
    norm: Norm, high: int, count: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_LARGEST_BLOCK", 64)
    monkeypatch.setattr(neighbours, "_COLUMNS", 64)
    monkeypatch.setattr(neighbours, "_FIRST_PIXELS", 16)
    monkeypatch.setattr(neighbours, "_PROMISING", 4)
    images, labels = drawn(high, count, shape, high, classes=3)
    found = separation(images, labels, norm)
    distances = brute_force(images, norm)
    same = labels[:, np.newaxis] == labels
    other = np.where(same, np.inf, distances)
    np.testing.assert_allclose(found.nearest.any_label, distances.min(1), rtol=1e-12)
    np.testing.assert_allclose(found.nearest.other_label, other.min(1), rtol=1e-12)
    assert found.duplicates == (distances.min(1) == 0).sum()
    assert found.conflicting == tuple(np.flatnonzero(other.min(1) == 0))
    assert found.closest.distance == pytest.approx(other.min())
    assert other[found.closest.first, found.closest.second] == other.min()
    kept = other.min(1) > 0
    rest = other[np.ix_(kept, kept)]
    if np.isfinite(rest).any():
        assert found.apart is not None
        assert found.apart.distance == pytest.approx(rest.min(), rel=1e-12)
        assert kept[[found.apart.first, found.apart.second]].all()
    else:
        assert found.apart is None


@pytest.mark.parametrize("size", [1024, 3072, 5000])
def test_l2_is_exact_where_float32_would_round(size: int) -> None:
    # one grey step in one pixel, beside distances of nearly the largest there are
    images = np.zeros((4, 1, size, 1), np.uint8)
    images[2:] = 255
    images[1, 0, 7] = images[3, 0, 9] = 1
    found = separation(images, np.array([0, 1, 0, 1]))
    assert found.nearest.any_label.tolist() == pytest.approx(
        [1 / 255, 1 / 255, 254 / 255, 254 / 255], rel=1e-14
    )
    far = separation(images[[0, 2]], np.array([0, 1]))
    assert far.closest.distance == np.sqrt(size * 255.0**2) / 255


def test_squared_distances_beyond_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_INT32_PIXELS", 10)
    images, labels = drawn(0, 40, (4, 4, 3), 255, 2)
    found = separation(images, labels)
    np.testing.assert_allclose(found.nearest.any_label, brute_force(images, "l2").min(1), rtol=1e-12)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.binary(min_size=6, max_size=6), st.integers(0, 2)), min_size=2, max_size=12),
    st.sampled_from(["l2", "linf"]),
)
def test_any_bytes(drawn_images: list[tuple[bytes, int]], norm: Norm) -> None:
    images = np.frombuffer(b"".join(b for b, _ in drawn_images), np.uint8).reshape(-1, 2, 3, 1)
    labels = np.array([label for _, label in drawn_images], np.int64)
    if len(set(labels.tolist())) < 2:
        return
    found = separation(images, labels, norm)
    other = np.where(labels[:, np.newaxis] == labels, np.inf, brute_force(images, norm))
    np.testing.assert_allclose(found.nearest.other_label, other.min(1), rtol=1e-12)
    assert found.closest.distance == pytest.approx(other.min())


def test_conflicting_twins_make_the_constant_infinite() -> None:
    images = np.array([10, 10, 10, 40, 91], np.uint8).reshape(5, 1, 1, 1)
    found = separation(images, np.array([0, 1, 0, 0, 1]))
    assert found.conflicting == (0, 1, 2)
    assert found.duplicates == 3
    assert lipschitz(found.closest) == float("inf")
    assert (found.closest.first, found.closest.second) == (0, 1)
    assert found.apart == Pair(3, 4, 51 / 255)
    assert lipschitz(found.apart) == 5.0
    alone = separation(images[:3], np.array([0, 1, 0]))
    assert alone.apart is None


def test_a_kept_image_nearest_to_a_conflicting_one_is_measured_anew() -> None:
    # image 2 is nearest to the twins 0 and 1, which are left out; then to image 3
    images = np.array([10, 10, 12, 20], np.uint8).reshape(4, 1, 1, 1)
    found = separation(images, np.array([0, 1, 1, 0]))
    assert found.nearest.other_label[2] == 2 / 255
    assert found.apart == Pair(2, 3, 8 / 255)


def test_what_has_no_classes_is_refused() -> None:
    images = np.zeros((3, 2, 2, 1), np.uint8)
    with pytest.raises(DataError, match="have no labels"):
        separation(images, None)
    with pytest.raises(DataError, match="all 3 images are of one class"):
        separation(images, np.full(3, 4))


def test_the_stability_curve_counts_closed_balls() -> None:
    curve = stability(np.array([0.0, 1.0, 2.0, 4.0]), [0, 0.5, 1, 2, 4])
    assert curve["reached"] == [0.25, 0.25, 0.5, 0.75, 1.0]
    assert curve["halfway"] == [0.25, 0.5, 0.75, 1.0, 1.0]
