"""What attacks on the served decision share: ascents deep into a wrong class, steps that stay inside the ball
and the box, and the best images so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from guard.attacks import (
    FORWARD,
    GRADIENT,
    TINY,
    Floats,
    Found,
    Labels,
    Loss,
    column,
    falling,
    length,
    minimum_norm,
    nearest_passes,
    others,
    project,
    random_directions,
    steepest,
)
from guard.bundle import ScoreName
from guard.evaluation.served import Judged, judge
from guard.evaluation.target import Classifier, Flags, Target, Values
from guard.norms import Norm


@dataclass(frozen=True)
class Start:
    """Where the search for an accepted image begins: at the end of an ascent as deep into a wrong class as
    the budget allows, on `loss`.

    Away from the true class, or with `place` towards the most probable of the other classes (1), the next
    (2), ...; from the image or from a `random` point of the ball. `outward` instead: the image nearest beyond
    the boundary, pushed out to the end of the budget.
    """

    loss: Loss = "margin"
    place: int | None = None
    random: bool = False
    outward: bool = False


DEEP = (
    Start("cross-entropy"),
    Start("margin"),
    Start("margin", place=1),
    Start("margin", place=2),
    Start("cross-entropy", random=True),
)


@dataclass
class Kept:
    """The best attacked images so far: success beats none, then `merit` (B,) counts.

    `passes` (B,) is what was spent until the first success, in forward passes.
    """

    images: Floats
    success: Flags
    merit: Values
    passes: NDArray[np.int64]

    @classmethod
    def of(cls, images: Floats) -> "Kept":
        """Nothing found yet."""
        count = len(images)
        return cls(
            images.copy(), np.zeros(count, np.bool_), np.full(count, -np.inf), np.zeros(count, np.int64)
        )

    def charge(self, rows: NDArray[np.intp], passes: int | NDArray[np.int64]) -> None:
        """Books what was spent on images (one number, or (R,)); on successes nothing more."""
        self.passes[rows] += np.where(self.success[rows], 0, passes)

    def offer(self, rows: NDArray[np.intp], points: Floats, success: Flags, merit: Values) -> None:
        """Takes what is better."""
        same = success == self.success[rows]
        better = (success & ~self.success[rows]) | (same & (merit > self.merit[rows]))
        self.images[rows[better]], self.merit[rows[better]] = points[better], merit[better]
        self.success[rows[better]] = success[better]

    def found(self, images: Floats, norm: Norm) -> Found:
        """The attack's outcome on the images (B, C, H, W) it began with."""
        distance = np.where(self.success, length(self.images - images, norm), np.inf)
        return Found(self.images, self.success, distance, self.passes)


def margin_of(logits: Floats, classes: Labels) -> Values:
    """z_a - max_{i≠a} z_i (B,) of classes a (B,)."""
    values = logits.astype(np.float64)
    rival = np.take_along_axis(values, others(logits, classes)[:, None], axis=1)[:, 0]
    return np.asarray(np.take_along_axis(values, classes[:, None], axis=1)[:, 0] - rival, np.float64)


def merit(judged: Judged, logits: Floats, aims: Labels) -> Values:
    """Wrong before right; of wrong ones the smallest excess, of right ones the largest margin aimed at."""
    # An excess may be infinite, beside a boundary.
    found = np.where(judged.wrong, 1e6 - np.clip(judged.excess, -1e5, 1e5), margin_of(logits, aims))
    return np.asarray(found, np.float64)


def distinct(starts: Sequence[Start], classes: int) -> Sequence[Start]:
    """The starts without repeats, random ones apart: away from one of two classes is towards the other,
    whatever the place.
    """
    if classes > 2:
        return starts
    alike = [replace(start, place=None) for start in starts]
    return [start for at, start in enumerate(alike) if start.random or start not in alike[:at]]


def ascend(
    model: Classifier,
    images: Floats,
    labels: Labels,
    eps: Values,
    start: Start,
    *,
    norm: Norm,
    steps: int,
    generator: np.random.Generator,
) -> tuple[Floats, Labels]:
    """Points deep inside a wrong class, and the classes aimed at (B,): -1 where any other will do."""
    if start.outward:
        near = minimum_norm(model, images, labels, norm=norm, clip=True, steps=steps)
        away = near.images - images
        scale = eps / np.maximum(length(away, norm), TINY)
        return np.clip(images + away * column(scale), 0.0, 1.0), np.full(len(images), -1)
    aims = np.full(len(images), -1)
    if start.place is not None:
        aims = others(model.logits(images), labels, start.place)
    random = random_directions(images.shape, norm, generator)
    points = np.clip(images + random * column(eps * start.random), 0.0, 1.0)
    for step in range(steps):
        if start.place is None:
            uphill = model.loss_gradient(points, labels, start.loss)[2]
        else:
            uphill = -model.loss_gradient(points, aims, start.loss)[2]
        points = moved(images, points, uphill, falling(eps, step, steps), eps, norm)
    return points, aims


def moved(images: Floats, points: Floats, pull: Floats, rate: Values, eps: Values, norm: Norm) -> Floats:
    """Points after a step of length `rate` along the pull, inside the ball and the box."""
    shift = project(points - images + column(rate) * steepest(pull, norm), eps, norm)
    return np.asarray(np.clip(images + shift, 0.0, 1.0), np.float32)


def confirmed(
    target: Target, images: Floats, labels: Labels, kept: Kept, score: ScoreName, norm: Norm
) -> Found:
    """What was found, judged once more in the batch it is returned in: digits may hang on the batch."""
    rows = np.flatnonzero(kept.success)
    if len(rows):
        kept.success[rows] = judge(target, kept.images[rows], labels[rows], score).success
    return kept.found(images, norm)


def deep_passes(start: Start, steps: int) -> int:
    """The cost of `ascend`."""
    if start.outward:
        return nearest_passes(steps)
    return steps * GRADIENT + FORWARD * (start.place is not None)
