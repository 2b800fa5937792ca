"""The LogBarrier attack (Finlay, Pooladian & Oberman 2019): from any wrong image inwards, never leaving the
wrong class. One of the attacks of SCALE.
"""

import numpy as np

from guard.attacks import (
    BISECTIONS,
    FORWARD,
    GRADIENT,
    TINY,
    Floats,
    Found,
    Labels,
    column,
    dual_length,
    length,
    misclassified,
    onto_boundary,
    project,
    steepest,
)
from guard.evaluation.best import Best
from guard.evaluation.target import Classifier
from guard.norms import Norm

SHRINK = 0.75
"""Factor of the barrier's weight from one outer loop to the next (the authors' beta)."""

NOISES = 100
"""Noises tried to find a wrong image to start from; half of them are of standard deviation 1."""


def log_barrier(
    model: Classifier,
    images: Floats,
    labels: Labels,
    *,
    norm: Norm,
    outer: int = 15,
    inner: int = 20,
    step: float = 0.1,
    barrier: float = 0.1,
    backtracks: int = 5,
    seed: int = 0,
) -> Found:
    """The nearest misclassified image, kept off the boundary by a logarithmic barrier that fades.

    Starts from Gaussian noise, louder until the class is wrong; then lowers ||x - x_0||²/2 - α log(max_{i≠y}
    p_i - p_y), in `outer` rounds of `inner` steps with α falling. A step shrinks the perturbation by the
    share `step` (in linf: clips it to that much less) and moves along the steepest ascent of the barrier in
    the attack's norm, at most as far. What falls back into the right class is halved back towards its last
    wrong point. What the barrier kept off the boundary is moved onto it at the end. α is `barrier` in l2; in
    linf it is divided by the number of pixels, as squared distances are. Fails where no noise is
    misclassified. Source: Finlay et al. 2019, Algorithm 1.
    """
    best = Best(images, norm)
    here = _start(model, images, labels, best, seed)
    rows = np.flatnonzero(best.broken & (best.distance > 0))
    here = here[rows]
    weight = barrier / (1 if norm == "l2" else int(np.prod(images.shape[1:])))
    for _ in range(outer if len(rows) else 0):
        for _ in range(inner):
            _, lead, uphill = model.loss_gradient(here, labels[rows], "probability-margin")
            shift = here - images[rows]
            reach = length(shift, norm)
            slope = dual_length(uphill, norm)
            push = weight * slope / np.maximum(lead.astype(np.float64), TINY)
            away = column(np.minimum(step * push, step * reach)) * steepest(uphill, norm)
            nearer = project(shift, (1 - step) * reach, norm) + away
            there = np.clip(images[rows] + nearer, 0.0, 1.0)
            here = _back_into_the_wrong_class(model, here, there, labels[rows], backtracks)
            best.offer(rows, here, np.ones(len(rows), dtype=np.bool_), GRADIENT)
        weight *= SHRINK
    if len(rows):
        wrong = np.ones(len(rows), dtype=np.bool_)
        nearest = onto_boundary(model, images[rows], best.images[rows], labels[rows], wrong)
        best.offer(rows, nearest, wrong, FORWARD * BISECTIONS)
    return best.found()


def _start(model: Classifier, images: Floats, labels: Labels, best: Best, seed: int) -> Floats:
    """Images with the least noise that changes their class; untouched where none does."""
    generators = [np.random.default_rng([seed, number]) for number in range(len(images))]
    found = images.copy()
    rows = np.arange(len(images))
    for loudness in (0.0, *np.minimum(1.0, 0.01 * 1.1 ** np.arange(NOISES))):
        noise = [generators[row].standard_normal(images.shape[1:], dtype=np.float32) for row in rows]
        points = np.clip(images[rows] + np.float32(loudness) * np.stack(noise), 0.0, 1.0)
        wrong = misclassified(points, model.logits(points), labels[rows])
        best.offer(rows, points, wrong, FORWARD)
        found[rows[wrong]] = points[wrong]
        rows = rows[~wrong]
        if not len(rows):
            break
    return found


def _back_into_the_wrong_class(
    model: Classifier, here: Floats, there: Floats, labels: Labels, backtracks: int
) -> Floats:
    """The step from `here`, which is wrong, to `there`, halved until its end is wrong as well."""
    there = there.copy()
    right = np.arange(len(here))
    for _ in range(backtracks):
        right = right[~misclassified(there[right], model.logits(there[right]), labels[right])]
        if not len(right):
            return there
        there[right] = (there[right] + here[right]) / 2
    right = right[~misclassified(there[right], model.logits(there[right]), labels[right])]
    there[right] = here[right]
    return there
