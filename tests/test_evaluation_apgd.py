"""APGD's checkpoints and its loss; how far it gets is tested with the other gradient attacks."""

import numpy as np
import pytest

from guard.attacks import Floats, Labels, Loss
from guard.evaluation.apgd import (
    apgd,
    checkpoints,
    difference_of_logits_ratio,
    loss_gradient,
    slowed,
)
from guard.norms import Norm
from guard.runtime import Detector
from tests import networks


def test_a_step_is_halved_by_either_condition_of_the_paper() -> None:
    highest, at_last = np.array([2.0, 2.0, 2.0, 2.0]), np.array([2.0, 2.0, 1.0, 1.0])
    halved = np.array([False, True, False, False])
    raised = np.array([6, 6, 6, 5])
    assert slowed(raised, 8, halved, highest, at_last).tolist() == [True, False, False, True]


def test_checkpoints_are_those_of_the_paper() -> None:
    # p_1 = 0.22, and every period is 0.03 shorter than the last, but at least 0.06 (Croce & Hein 2020, 3.4).
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_the_ratio_is_invariant_to_scale_and_shift_and_its_derivative_is_right() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    labels = np.arange(20) % 6
    values, derivative = difference_of_logits_ratio(logits, labels)
    scaled, _ = difference_of_logits_ratio(7 * logits + 3, labels)
    assert scaled == pytest.approx(values, abs=1e-5)
    assert ((values > 0) == (logits.argmax(axis=1) != labels)).all()
    ordered = np.sort(logits, axis=1)
    right = logits.argmax(axis=1) == labels
    expected = -(ordered[:, -1] - ordered[:, -2]) / (ordered[:, -1] - ordered[:, -3])
    assert values[right] == pytest.approx(expected[right], rel=1e-4)
    for k in range(6):
        moved = logits.astype(np.float64)
        moved[:, k] += 1e-5
        ahead, _ = difference_of_logits_ratio(moved.astype(np.float64), labels)
        assert (ahead - values) / 1e-5 == pytest.approx(derivative[:, k], rel=1e-3, abs=1e-3)


def test_with_two_classes_the_ratio_is_the_margin() -> None:
    model = Detector(networks.convolutional(classes=2), provider="cpu", threads=1)
    images, labels = networks.images(4), np.array([0, 1, 0, 1])
    by_ratio, by_margin = (loss_gradient(model, images, labels, loss) for loss in ("dlr", "margin"))
    assert by_ratio[1] == pytest.approx(by_margin[1], rel=1e-5)
    assert by_ratio[2] == pytest.approx(by_margin[2], rel=1e-4, abs=1e-6)


class Ridge:
    """Two classes, z_1 - z_0 = 0.1 y - |x - 0.5| - 1: steep on both sides of a ridge along which it rises."""

    input_shape, num_classes = (1, 1, 2), 2

    def __init__(self) -> None:
        self.seen: list[Floats] = []

    def logits(self, images: Floats) -> Floats:
        x, y = images[:, 0, 0, 0], images[:, 0, 0, 1]
        return np.stack([np.ones(len(x)), 0.1 * y - np.abs(x - 0.5)], axis=1).astype(np.float32)

    def loss_gradient(self, images: Floats, labels: Labels, loss: Loss) -> tuple[Floats, Floats, Floats]:
        self.seen.append(images.reshape(2))
        logits = self.logits(images)
        slope = np.full_like(images, 0.1)
        slope[:, 0, 0, 0] = -np.sign(images[:, 0, 0, 0] - 0.5)
        return logits, logits[:, 1] - logits[:, 0], slope

    def vjp(self, images: Floats, cotangents: Floats) -> tuple[Floats, Floats]:
        raise NotImplementedError


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_steps_that_overshoot_are_halved_until_the_ridge_is_climbed(norm: Norm) -> None:
    model = Ridge()
    image = np.full((1, 1, 1, 2), 0.5, np.float32)
    found = apgd(model, image, np.zeros(1, np.int64), 0.25, norm=norm, loss="margin")
    assert not found.success.any()
    points = np.array(model.seen)
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    assert lengths[-3:].max() < 0.1 * lengths[:20].max()
    best = points[np.argmax(0.1 * points[:, 1] - np.abs(points[:, 0] - 0.5))]
    assert best == pytest.approx([0.5, 0.75], abs=0.02)
