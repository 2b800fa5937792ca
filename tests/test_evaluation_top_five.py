"""Attacks on top-5 accuracy against a linear model, where the fifth class's boundary is known."""

from typing import Any

import numpy as np
import pytest

from guard.attacks import FORWARD, GRADIENT, Floats, Labels, dual_length
from guard.errors import UsageError
from guard.evaluation import top_five
from guard.evaluation.target import Target
from guard.norms import Norm
from guard.runtime import Detector
from tests import networks

SHAPE = (1, 3, 4)
CLASSES = 12


def linear() -> tuple[Detector, Floats]:
    weight = np.random.default_rng(0).normal(size=(CLASSES, 12)).astype(np.float32)
    return Detector(networks.linear(weight, shape=SHAPE), provider="cpu", threads=1), weight


def right_images(model: Detector) -> tuple[Floats, Labels]:
    """Images in the middle of [0, 1], so that no edge is met, and the classes the model gives them."""
    images = 0.5 + 0.02 * (networks.images(24, SHAPE) - np.float32(0.5))
    return images, model.logits(images).argmax(axis=1).astype(np.int64)


def out_of_five(logits: Floats, labels: Labels) -> Any:
    return (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1) >= 5


def least(images: Floats, labels: Labels, weight: Floats, norm: Norm) -> Any:
    """A lower bound (B,) of the distance out of the five: five classes have to be passed, so at least the
    fifth nearest of them.
    """
    logits = images.reshape(len(images), -1).astype(np.float64) @ weight.T.astype(np.float64)
    own = logits[np.arange(len(labels)), labels][:, None]
    slope = np.stack([dual_length(weight[label] - weight, norm) for label in labels])
    return np.sort(np.where(slope > 0, (own - logits) / np.where(slope > 0, slope, 1), np.inf))[:, 4]


@pytest.mark.parametrize("attack", top_five.ATTACKS, ids=lambda attack: attack.name)
def test_success_is_leaving_the_five(attack: Any) -> None:
    model, weight = linear()
    images, labels = right_images(model)
    budget = None if attack.budgets is None else 0.83 if attack.norm == "l2" else 0.36
    found = attack.run(Target(model), images, labels, budget, 0)
    outside = out_of_five(model.logits(found.images), labels)
    assert (outside == found.success).all()
    assert outside.any()
    assert (found.distance >= least(images, labels, weight, attack.norm) * (1 - 1e-4)).all()
    assert ((found.images >= 0) & (found.images <= 1)).all()
    if budget is None:
        assert outside.all()
    else:
        assert (found.distance[outside] <= budget * (1 + 1e-5)).all()
    assert found.passes is not None
    assert found.passes.max() <= attack.passes


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_nearest_lies_where_the_attack_of_its_budget_begins_to_succeed(norm: Norm) -> None:
    model, _ = linear()
    images, labels = right_images(model)
    attack = next(one for one in top_five.ATTACKS if one.name == f"top5-nearest-{norm}")
    distance = attack.run(Target(model), images, labels, None, 0).distance
    shorter = top_five.pgd(model, images, labels, 0.97 * distance, norm=norm, restarts=1)
    longer = top_five.pgd(model, images, labels, 1.01 * distance, norm=norm, restarts=1)
    assert shorter.success.sum() <= 2
    assert longer.success.mean() >= 0.9


def test_every_pass_is_booked() -> None:
    model, _ = linear()
    images, labels = right_images(model)
    found = top_five.pgd(model, images, labels, 1e-3, norm="l2", restarts=1)
    assert not found.success.any()
    assert found.passes is not None
    assert (found.passes == (top_five.STEPS + 1) * (GRADIENT + FORWARD)).all()


def test_models_of_few_classes_are_refused() -> None:
    weight = np.ones((5, 12), np.float32)
    model = Detector(networks.linear(weight, shape=SHAPE), provider="cpu", threads=1)
    images = networks.images(2, SHAPE)
    with pytest.raises(UsageError, match="top-5 attacks need 6 classes or more, and the model has 5"):
        top_five.ATTACKS[0].run(Target(model), images, np.zeros(2, np.int64), 0.5, 0)


def test_only_the_margin_is_followed() -> None:
    model, _ = linear()
    images, labels = right_images(model)
    with pytest.raises(ValueError, match="expected 'margin'"):
        top_five.TopFive(model).loss_gradient(images, labels, "cross-entropy")
