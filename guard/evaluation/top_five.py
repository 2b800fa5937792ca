"""Attacks on top-5 accuracy, for models of many classes: the true class has to leave the five most probable.

Source: SCALE counts errors so on ImageNet, and follows the margin over the fifth class.
"""

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from guard import attacks
from guard.attacks import FORWARD, GRADIENT, Floats, Found, Labels, Loss, ranked
from guard.errors import UsageError
from guard.evaluation.attack import BUDGETS, Attack, bound
from guard.evaluation.gradient import smallest_budget
from guard.evaluation.target import Classifier, Target
from guard.norms import NORMS, Norm

FIVE = 5
STEPS = 20
RESTARTS = 2
_EACH = (STEPS + 1) * (GRADIENT + FORWARD)


class TopFive:
    """A classifier whose four most probable classes but the label's are as improbable as the least: its
    prediction is wrong where the label is not among the five most probable. For attacks that ask for
    gradients of the margin alone.
    """

    def __init__(self, model: Classifier) -> None:
        if model.num_classes <= FIVE:
            raise UsageError(
                f"top-5 attacks need {FIVE + 1} classes or more, and the model has {model.num_classes}."
            )
        self.model = model

    def logits(self, images: Floats) -> Floats:
        """Those of the classifier itself: without a label there are no others."""
        return self.model.logits(images)

    def loss_gradient(self, images: Floats, labels: Labels, loss: Loss) -> tuple[Floats, Floats, Floats]:
        """Logits (B, K), z_k - z_y (B,) of the fifth most probable class k but the label's, and its gradient
        (B, C, H, W); raises `ValueError` for another loss than `margin`.
        """
        if loss != "margin":
            raise ValueError(f"loss is {loss!r}; expected 'margin'")
        index = np.arange(len(images))
        found = self.model.logits(images)
        *first, fifth = ranked(found, labels).T[:FIVE]
        cotangents = np.zeros_like(found)
        cotangents[index, fifth], cotangents[index, labels] = 1, -1
        logits, gradient = self.model.vjp(images, cotangents)
        values, least = logits[index, fifth] - logits[index, labels], logits.min(axis=1)
        for classes in first:
            logits[index, classes] = least
        return logits, values, gradient


def pgd(
    model: Classifier,
    images: Floats,
    labels: Labels,
    eps: NDArray[np.float64] | float,
    *,
    norm: Norm,
    restarts: int = RESTARTS,
    seed: int = 0,
) -> Found:
    """PGD of 20 steps of 2.5 eps / 20 on the margin over the fifth class; success: not among the five."""
    found = attacks.pgd(
        TopFive(model),
        images,
        labels,
        eps,
        norm=norm,
        steps=STEPS,
        restarts=restarts,
        rate=2.5 / STEPS,
        clip=True,
        seed=seed,
    )
    # Each of its gradients took a forward pass more, to find the fifth class.
    passes = None if found.passes is None else found.passes * (GRADIENT + FORWARD) // GRADIENT
    return replace(found, passes=passes)


def _within(
    target: Target, images: Floats, labels: Labels, budget: float | None, seed: int, *, norm: Norm
) -> Found:
    return pgd(target.model, images, labels, bound(budget), norm=norm, seed=seed)


def _nearest(
    target: Target, images: Floats, labels: Labels, _budget: float | None, _seed: int, *, norm: Norm
) -> Found:
    def one(some: Floats, classes: Labels, eps: NDArray[np.float64]) -> Found:
        return pgd(target.model, some, classes, eps, norm=norm, restarts=1)

    return smallest_budget(one, images, labels, norm=norm, first=BUDGETS[norm][0])


def _attacks(norm: Norm) -> tuple[Attack, ...]:
    source = "SCALE, on ImageNet; PGD as in Madry et al. 2018"
    return (
        Attack(
            f"top5-pgd-{norm}",
            "PGD out of the five most probable classes",
            partial(_within, norm=norm),
            norm,
            "gradients",
            RESTARTS * _EACH,
            source,
            BUDGETS[norm],
        ),
        Attack(
            f"top5-nearest-{norm}",
            "The nearest image out of the five most probable classes, by PGD of the smallest budget",
            partial(_nearest, norm=norm),
            norm,
            "gradients",
            30 * _EACH,
            source,
        ),
    )


ATTACKS = tuple(attack for norm in NORMS for attack in _attacks(norm))
