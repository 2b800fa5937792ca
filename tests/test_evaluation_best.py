"""Bookkeeping of attacks: the nearest image counts, and costs end with the first success."""

import numpy as np
import pytest

from guard.evaluation.best import Best


def test_the_nearest_offer_is_kept_and_costs_end_at_the_first_success() -> None:
    images = np.zeros((3, 1, 1, 2), np.float32)
    best = Best(images, "l2")
    everyone = np.arange(3)

    def at(*lengths: float) -> np.ndarray:
        return np.array([[0.0, value] for value in lengths], np.float32).reshape(-1, 1, 1, 2)

    best.offer(everyone, at(0.9, 0.8, 0.7), np.array([True, False, False]), 3)
    best.offer(everyone, at(0.5, 0.6, 0.7), np.array([True, True, False]), 3)
    best.offer(np.array([0, 1]), at(0.6, 0.1), np.array([True, False]), 1)
    best.charge(everyone, np.array([10, 10, 2]))
    found = best.found()
    assert found.success.tolist() == [True, True, False]
    assert found.distance == pytest.approx([0.5, 0.6, np.inf])
    assert found.passes is not None
    assert found.passes.tolist() == [3, 6, 8]
    assert found.images.reshape(3, 2) == pytest.approx(np.array([[0, 0.5], [0, 0.6], [0, 0]]))
    assert not images.any()


def test_distances_are_in_the_norm_of_the_attack() -> None:
    best = Best(np.zeros((1, 1, 1, 2), np.float32), "linf")
    best.offer(np.array([0]), np.array([[[[0.3, -0.4]]]], np.float32), np.array([True]), 1)
    assert best.found().distance == pytest.approx([0.4])


def test_a_point_that_is_not_a_number_is_never_taken() -> None:
    best = Best(np.zeros((1, 1, 1, 1), np.float32), "l2")
    best.offer(np.array([0]), np.full((1, 1, 1, 1), np.nan, np.float32), np.array([True]), 1)
    assert not best.found().success.any()
