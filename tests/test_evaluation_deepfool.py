"""DeepFool beyond what all gradient attacks are tested for."""

import numpy as np
import pytest

from guard.evaluation.deepfool import deepfool
from tests.test_evaluation_gradient import linear, optimum


def test_one_step_crosses_the_nearest_boundary_by_the_overshoot() -> None:
    model, weight, images, labels = linear(10)
    exact = optimum(model, weight, images, "l2")
    found = deepfool(model, images, labels, norm="l2", steps=1, overshoot=0.05)
    assert found.success.all()
    assert found.distance == pytest.approx(1.05 * exact, rel=1e-3)


def test_only_the_most_probable_classes_are_looked_at() -> None:
    model, weight, images, labels = linear(10)
    logits = model.logits(images).astype(np.float64)
    order = np.argsort(-logits, axis=1)
    each = np.arange(len(images))
    gap = logits[each, labels] - logits[each, order[:, 1]]
    runner_up = gap / np.linalg.norm(weight[labels] - weight[order[:, 1]], axis=1)
    few = deepfool(model, images, labels, norm="l2", classes=2)
    assert few.success.all()
    # Another class may lie in the way, so the runner-up's boundary is the farthest it goes.
    assert (few.distance <= 1.02 * runner_up + 1e-3).all()
    every = deepfool(model, images, labels, norm="l2")
    assert (every.distance <= few.distance * 1.001).all()
    assert (few.distance > every.distance * 1.05).any()
