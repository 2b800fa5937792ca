"""The Carlini-Wagner attack beyond what all gradient attacks are tested for."""

from typing import Any

import numpy as np
import pytest

from guard.attacks import minimum_norm
from guard.evaluation.carlini_wagner import carlini_wagner
from guard.runtime import Detector
from tests import networks
from tests.test_evaluation_gradient import linear, optimum


def lead(model: Detector, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits = model.logits(images)
    own = logits[np.arange(len(labels)), labels].copy()
    logits[np.arange(len(labels)), labels] = -np.inf
    return np.asarray(logits.max(axis=1) - own)


def test_confidence_is_reached_at_its_own_distance() -> None:
    model, weight, images, labels = linear(2)
    exact = optimum(model, weight, images, "l2")
    found = carlini_wagner(model, images, labels, confidence=2.0)
    assert found.success.all()
    assert (lead(model, found.images, labels) >= 2.0).all()
    further = exact + 2.0 / np.linalg.norm(weight[0] - weight[1])
    assert found.distance == pytest.approx(further, rel=0.01)
    # Barely wrong images do not count yet.
    wrong = carlini_wagner(model, found.images, labels, confidence=3.0)
    assert (wrong.distance > 0).all()


def test_more_searches_come_no_farther() -> None:
    model = Detector(networks.convolutional(scale=20.0), provider="cpu", threads=1)
    images = networks.images(4)
    labels = model.logits(images).argmax(axis=1)
    few, more = (carlini_wagner(model, images, labels, steps=40, searches=n) for n in (2, 5))
    assert (more.distance <= few.distance).all()
    assert more.success.all()


@pytest.mark.parametrize(
    ("settings", "tolerance"), [({"searches": 4, "steps": 50, "rate": 0.02}, 0.1), ({}, 0.01)]
)
def test_pixels_at_the_ends_of_the_box_move(settings: dict[str, Any], tolerance: float) -> None:
    rng = np.random.default_rng(1)
    weight = (2 * rng.normal(size=(3, 48))).astype(np.float32)
    model = Detector(networks.linear(weight, -weight.sum(axis=1) / 2, (1, 6, 8)), provider="cpu", threads=1)
    images = np.round(rng.random((200, 1, 6, 8), dtype=np.float32))
    logits = np.sort(model.logits(images), axis=1)
    lead = logits[:, -1] - logits[:, -2]
    images = images[(lead > 1) & (lead < 5)][:12]
    labels = model.logits(images).argmax(axis=1)
    near = minimum_norm(model, images, labels, norm="l2", steps=100, clip=True)
    found = carlini_wagner(model, images, labels, **settings)
    assert found.success.all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert np.median(found.distance / near.distance) < 1 + tolerance
