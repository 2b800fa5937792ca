"""APGD: projected gradient ascent with momentum that halves its steps by itself (Croce & Hein 2020)."""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from guard.attacks import (
    FORWARD,
    GRADIENT,
    TINY,
    Floats,
    Found,
    Labels,
    column,
    misclassified,
    project,
    random_directions,
    steepest,
)
from guard.evaluation.best import Best
from guard.evaluation.target import Classifier, Flags
from guard.norms import Norm

AscentLoss = Literal["cross-entropy", "dlr", "margin"]

MOMENTUM = 0.75
IMPROVING = 0.75
"""A step is halved where fewer than this share of the steps since the last checkpoint raised the loss."""

Values = NDArray[np.float64]


def apgd(
    model: Classifier,
    images: Floats,
    labels: Labels,
    eps: float,
    *,
    norm: Norm,
    loss: AscentLoss = "cross-entropy",
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """Auto-PGD inside the ball of radius eps around images (B, C, H, W) and [0, 1].

    Every restart starts at a random point on the edge of the ball with steps of 2 eps. At checkpoints a step
    is halved, and the ascent taken up again from the best point so far, where too few steps raised the loss
    or neither step nor best loss has changed since the last. Images are left alone at their first flip.
    `dlr` is the difference-of-logits ratio, invariant to the scale of the logits; its gradient costs a
    forward pass more. Source: Croce & Hein 2020, Algorithm 1; 100 steps as in AutoAttack.
    """
    best = Best(images, norm)
    everyone = np.arange(len(images))
    best.offer(everyone, images, misclassified(images, model.logits(images), labels), FORWARD)
    generator = np.random.default_rng(seed)
    for _ in range(restarts):
        starts = random_directions(images.shape, norm, generator) * np.float32(eps)
        rows = np.flatnonzero(~best.broken)
        if len(rows):
            _ascend(model, images, labels, rows, starts[rows], best, eps, norm, loss, steps)
    return best.found()


def _ascend(
    model: Classifier,
    images: Floats,
    labels: Labels,
    rows: NDArray[np.intp],
    shift: Floats,
    best: Best,
    eps: float,
    norm: Norm,
    loss: AscentLoss,
    steps: int,
) -> None:
    """One restart for the images `rows`; what it breaks goes to `best`."""

    def into_ball(points: Floats) -> Floats:
        kept = project(points - images[rows], np.full(len(rows), eps), norm)
        return np.asarray(np.clip(images[rows] + kept, 0.0, 1.0), dtype=np.float32)

    here = into_ball(images[rows] + shift)
    before = here
    rate = np.full(len(rows), 2.0 * eps)
    highest = np.full(len(rows), -np.inf)
    summit, summit_gradient = here.copy(), np.zeros_like(here)
    value = highest
    raised = np.zeros(len(rows), dtype=np.int64)
    at_last = highest
    halved_last = np.ones(len(rows), dtype=np.bool_)
    checks = checkpoints(steps)
    since = 0
    for step in range(steps + 1):
        logits, now, gradient = loss_gradient(model, here, labels[rows], loss)
        flipped = misclassified(here, logits, labels[rows])
        best.offer(rows, here, flipped, GRADIENT + FORWARD * (loss == "dlr"))
        if step:
            raised += now > value
        higher = now > highest
        summit[higher], summit_gradient[higher] = here[higher], gradient[higher]
        highest, value = np.where(higher, now, highest), now
        if step in checks:
            halved = slowed(raised, step - since, halved_last, highest, at_last)
            rate = np.where(halved, rate / 2, rate)
            back = halved.reshape(-1, 1, 1, 1)
            here = np.where(back, summit, here)
            before = np.where(back, summit, before)
            gradient = np.where(back, summit_gradient, gradient)
            value = np.where(halved, highest, value)
            halved_last, at_last, since = halved, highest, step
            raised = np.zeros_like(raised)
        if step == steps:
            break
        still = ~flipped
        if not still.any():
            break
        rows, here, before, gradient = rows[still], here[still], before[still], gradient[still]
        rate, highest, value, raised = rate[still], highest[still], value[still], raised[still]
        summit, summit_gradient = summit[still], summit_gradient[still]
        at_last, halved_last = at_last[still], halved_last[still]
        momentum = MOMENTUM if step else 1.0
        ahead = into_ball(here + column(rate) * steepest(gradient, norm))
        mixed = here + momentum * (ahead - here) + (1 - momentum) * (here - before)
        here, before = into_ball(np.asarray(mixed, dtype=np.float32)), here


def slowed(
    raised: NDArray[np.int64],
    steps: int | NDArray[np.int64],
    halved: Flags,
    highest: Values,
    at_last: Values,
) -> Flags:
    """Whose step is to be halved (B,): of the `steps` since it was looked at last too few `raised` the value,
    or, unless it was `halved` then, the `highest` value is what it was then.
    """
    return np.asarray((raised < IMPROVING * steps) | (~halved & (highest == at_last)), np.bool_)


def checkpoints(steps: int) -> frozenset[int]:
    """The steps after which step lengths are reconsidered: 22% of all, then ever closer, by 3% to 6%."""
    last, percent = 0, 22
    found = []
    while percent <= 100:
        found.append(math.ceil(percent * steps / 100))
        last, percent = percent, percent + max(percent - last - 3, 6)
    return frozenset(found)


def loss_gradient(
    model: Classifier, images: Floats, labels: Labels, loss: AscentLoss
) -> tuple[Floats, Values, Floats]:
    """Logits (B, K), loss (B,) and its gradient (B, C, H, W).

    `dlr` is (max_{i≠y} z_i - z_y) / (z_(1) - z_(3)), z_(k) the k-th largest logit; with two classes, which
    have no third, it is the margin.
    """
    if loss != "dlr":
        logits, losses, gradient = model.loss_gradient(images, labels, loss)
        return logits, losses.astype(np.float64), gradient
    logits = model.logits(images)
    values, cotangents = difference_of_logits_ratio(logits, labels)
    return logits, values, model.vjp(images, cotangents)[1]


def difference_of_logits_ratio(logits: Floats, labels: Labels) -> tuple[Values, Floats]:
    """The ratio (B,) and its derivative by the logits (B, K), the order of the logits held fixed."""
    wide = logits.astype(np.float64)
    row = np.arange(len(labels))
    order = np.argsort(-wide, axis=1, kind="stable")
    rival = np.where(order[:, 0] == labels, order[:, 1], order[:, 0])
    gap = wide[row, rival] - wide[row, labels]
    by_logits = np.zeros_like(wide)
    by_logits[row, rival] += 1
    by_logits[row, labels] -= 1
    if wide.shape[1] < 3:
        return gap, by_logits.astype(np.float32)
    first, third = order[:, 0], order[:, 2]
    spread = np.maximum(wide[row, first] - wide[row, third], TINY)
    values = gap / spread
    by_spread = np.zeros_like(wide)
    by_spread[row, first] += 1
    by_spread[row, third] -= 1
    cotangents = (by_logits - values[:, None] * by_spread) / spread[:, None]
    return values, cotangents.astype(np.float32)
