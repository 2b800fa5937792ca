"""Attacks on a classifier and its detector together, in numpy, through the gradients of the classifier.

They succeed where the class is wrong *and* the image accepted, as `Target.verdict` says: the decision that is
served, further rows and least radii included. `target.guards[score]` has to be there. What leads them is an
approximation of it, which only costs them steps where it is off: the test that an image fails by most, its
logarithm differentiated with the class held fixed, through finite differences of gradients.

Images are float32 (B, C, H, W) in [0, 1] and attacked images stay there; labels (B,) are the true classes.
Attacks on images of eight bits per channel, as a server gets them, are in `guard.evaluation.over_http`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from guard.attacks import (
    BISECTIONS,
    FORWARD,
    GRADIENT,
    TINY,
    Floats,
    Found,
    Labels,
    Loss,
    Norm,
    column,
    falling,
    growth,
    length,
    minimum_norm,
    misclassified,
    others,
    project,
    random_directions,
    steepest,
)
from guard.bundle import ScoreName
from guard.certificate import effective_slope
from guard.decision import Guard
from guard.evaluation.attack import BUDGETS, Attack, bound
from guard.evaluation.carlini_wagner import INSIDE
from guard.evaluation.target import Classifier, Flags, Target, Values, Verdict
from guard.runtime import Measurement, score_of

SCORES: tuple[ScoreName, ...] = get_args(ScoreName)
DEFAULT: ScoreName = "jacobian"
ROWS = 3
"""The Jacobian's rows, of the most probable classes, among which the longest is looked for."""

LONGEST = 0.99
"""A row at least this share of the longest is lowered in its place."""

OUTWARD = (1.02, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
"""Multiples of the distance to the nearest wrong image at which accepted ones are looked for."""

RADIUS_TESTS: dict[str, Norm] = {"min-radius-l2": "l2", "min-radius-linf": "linf"}
"""The tests for a least radius, by the names that `exceeded` gives them."""

FLOOR: dict[Norm, float] = {"l2": 0.02, "linf": 0.001}
"""The distance taken for images that are wrong without attack."""


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


JOINT = (
    Start("cross-entropy"),
    Start("margin", place=1),
    Start("margin", outward=True),
    Start("margin", place=2),
    Start("cross-entropy", random=True),
)
DEEP = (
    Start("cross-entropy"),
    Start("margin"),
    Start("margin", place=1),
    Start("margin", place=2),
    Start("cross-entropy", random=True),
)


@dataclass(frozen=True)
class Judged:
    """The guard's verdicts on B images of known classes: `wrong`, and `success`: wrong and accepted.

    `excess` (B,) is the logarithm of how far the test that fails by most is exceeded, `worst` its name.
    """

    guard: Guard
    verdict: Verdict
    wrong: Flags
    success: Flags
    excess: Values
    worst: NDArray[np.str_]


def judge(target: Target, images: Floats, labels: Labels, score: ScoreName) -> Judged:
    """The served decisions on images (B, C, H, W), B >= 1, of true classes (B,)."""
    verdict = target.verdict(images, score)
    guard = target.guards[score]
    tests = exceeded(guard, verdict)
    ratios = np.array(list(tests.values()))
    wrong = misclassified(images, verdict.measurement.logits, labels)
    return Judged(
        guard,
        verdict,
        wrong,
        wrong & verdict.accepted,
        ratios.max(axis=0),
        np.array(list(tests))[ratios.argmax(axis=0)],
    )


def exceeded(guard: Guard, verdict: Verdict) -> dict[str, Values]:
    """By test, the logarithm (B,) of score over threshold and of least radius over radius: above 0 the test
    fails. NaN counts as infinite.
    """
    calibration = guard.calibration
    tests: dict[ScoreName, float] = {calibration.score: calibration.threshold}
    if calibration.score == "combined":
        tests = {test.name: test.threshold for test in calibration.tests}
    least = {"l2": guard.policy.min_radius_l2 or 0.0, "linf": guard.policy.min_radius_linf or 0.0}
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            name: np.log(score_of(verdict.measurement, name) / threshold) for name, threshold in tests.items()
        } | {
            name: np.log(least[norm] / verdict.radii[norm])
            for name, norm in RADIUS_TESTS.items()
            if least[norm]
        }
    return {name: np.where(np.isnan(values), np.inf, values) for name, values in found.items()}


def descent(model: Classifier, images: Floats, judged: Judged, rows: NDArray[np.intp]) -> Floats:
    """Where the worst test of images[rows] falls fastest: minus the gradient of its logarithm, (rows, C, H,
    W), the classes held fixed.

    Scores: of the Jacobian, the row that is the longest, log p_i ||u_i||; log ||∇M||₂ - log M of the
    first-order radius; log ||∇M||₂ - log(1 + cosh M) of the margin gradient. A least radius, of whatever
    kind, follows the first-order radius of its norm with the slope that is served (`effective_slope`).
    """
    down = np.zeros_like(images[rows])
    for name in np.unique(judged.worst[rows]):
        at = np.flatnonzero(judged.worst[rows] == name)
        points, measured = images[rows[at]], judged.verdict.measurement[rows[at]]
        if name in ("jacobian", "jacobian-full"):
            down[at] = _row_descent(model, points, measured)
            continue
        if name in RADIUS_TESTS:
            down[at] = _radius_descent(model, judged.guard, points, measured, RADIUS_TESTS[name])
            continue
        margin = growth(model, points, measured.labels, "margin")
        size = measured.margin.astype(np.float64)
        # minus the derivative of the score's logarithm by M, with the gradient's length held fixed
        fall = np.tanh(size / 2) if name == "margin-gradient" else 1 / np.maximum(size, 1e-6)
        down[at] = margin.descent * column(fall) - margin.log_length
    return np.nan_to_num(down, posinf=0.0, neginf=0.0)


def _row_descent(model: Classifier, images: Floats, measured: Measurement) -> Floats:
    """Minus the gradient of the logarithm of the Jacobian's longest row, among those of `ROWS` classes."""
    down = np.zeros_like(images)
    order = np.argsort(-measured.logits, axis=1, kind="stable").astype(np.int64)
    left = np.arange(len(images))
    places = min(ROWS, order.shape[1])
    for place in range(places):
        index = order[left, place]
        row = growth(model, images[left], index, "cross-entropy")
        lengths = measured.probabilities[left, index] * length(row.descent, "l2")
        longest = (lengths >= LONGEST * measured.jacobian[left]) | (place == places - 1)
        down[left[longest]] = -(row.descent + row.log_length)[longest]
        left = left[~longest]
        if not len(left):
            break
    return down


def _radius_descent(
    model: Classifier, guard: Guard, images: Floats, measured: Measurement, norm: Norm
) -> Floats:
    """The gradient of the logarithm of ρ = M / √(g² + (typical M / M3)²), g = ||∇M|| in the dual norm and M3
    the lead over the third class: with w = (ρ g / M)², that is w (∇M / M - ∇g / g) + (1 - w) ∇M3 / M3.
    """
    margin = growth(model, images, measured.labels, "margin", norm=norm)
    up = margin.descent * column(1 / np.maximum(measured.margin, 1e-6)) - margin.log_length
    typical = guard.calibration.radii(norm).slope
    if typical == 0 or measured.logits.shape[1] < 3:
        return up
    size = (measured.gradient_l2 if norm == "l2" else measured.gradient_l1).astype(np.float64)
    share = (size / np.maximum(effective_slope(measured.logits, size, typical), TINY)) ** 2
    index, order = np.arange(len(images)), np.argsort(-measured.logits, axis=1, kind="stable")
    cotangents = np.zeros_like(measured.logits)
    cotangents[index, order[:, 0]], cotangents[index, order[:, 2]] = 1, -1
    lead = (measured.logits * cotangents).sum(axis=1)
    third = model.vjp(images, cotangents)[1] * column(1 / np.maximum(lead, 1e-6))
    return np.asarray(column(share) * up + column(1 - share) * third, np.float32)


def margin_of(logits: Floats, classes: Labels) -> Values:
    """z_a - max_{i≠a} z_i (B,) of classes a (B,)."""
    values = logits.astype(np.float64)
    rival = np.take_along_axis(values, others(logits, classes)[:, None], axis=1)[:, 0]
    return np.asarray(np.take_along_axis(values, classes[:, None], axis=1)[:, 0] - rival, np.float64)


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

    def offer(self, rows: NDArray[np.intp], points: Floats, success: Flags, merit: Values) -> Flags:
        """Takes what is better; returns which were."""
        same = success == self.success[rows]
        better = (success & ~self.success[rows]) | (same & (merit > self.merit[rows]))
        self.images[rows[better]], self.merit[rows[better]] = points[better], merit[better]
        self.success[rows[better]] = success[better]
        return np.asarray(better, np.bool_)


def _merit(judged: Judged, logits: Floats, aims: Labels) -> Values:
    """Wrong before right; of wrong ones the smallest excess, of right ones the largest margin aimed at."""
    # An excess may be infinite, beside a boundary.
    found = np.where(judged.wrong, 1e6 - np.clip(judged.excess, -1e5, 1e5), margin_of(logits, aims))
    return np.asarray(found, np.float64)


def _distinct(starts: Sequence[Start], classes: int) -> Sequence[Start]:
    """The starts without repeats: away from one of two classes is towards the other, whatever the place."""
    if classes > 2:
        return starts
    return list(dict.fromkeys(replace(start, place=None) for start in starts))


def _ascend(
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
        points = _moved(images, points, uphill, falling(eps, step, steps), eps, norm)
    return points, aims


def _moved(images: Floats, points: Floats, pull: Floats, rate: Values, eps: Values, norm: Norm) -> Floats:
    """Points after a step of length `rate` along the pull, inside the ball and the box."""
    shift = project(points - images + column(rate) * steepest(pull, norm), eps, norm)
    return np.asarray(np.clip(images + shift, 0.0, 1.0), np.float32)


def _pull(model: Classifier, points: Floats, judged: Judged, aims: Labels, weight: Values) -> Floats:
    """Up the margin of the classes aimed at; of images that are wrong, also down the worst test, `weight`
    (B,) of the two unit vectors' sum.
    """
    pull = steepest(-model.loss_gradient(points, aims, "margin")[2], "l2")
    rows = np.flatnonzero(judged.wrong)
    if len(rows):
        down = steepest(descent(model, points, judged, rows), "l2")
        share = column(weight[rows])
        pull[rows] = (1 - share) * pull[rows] + share * down
    return pull


def joint(
    target: Target,
    images: Floats,
    labels: Labels,
    eps: Values | float,
    *,
    score: ScoreName,
    norm: Norm,
    steps: int = 20,
    deep_steps: int = 20,
    starts: Sequence[Start] = JOINT,
    adaptive: bool = False,
    seed: int = 0,
) -> Found:
    """Wrong and accepted within eps (a number, or one per image).

    Every start goes deep into a wrong class (`deep_steps`), where gradients are small; then `steps` follow a
    weighted sum of two unit vectors, up the margin of the class aimed at and down the worst test. The weight
    of the second grows by a tenth at every step that ends wrong and rejected, and is halved by one that ends
    right, which also follows the margin alone: first wrong, then accepted, then back. Steps fall linearly
    from eps / 2 to eps / 20; `adaptive` are those of APGD instead, with momentum, halved for images that a
    fifth of all steps did not improve, which then go on from their best point (Croce and Hein 2020). With
    steps = 0 it is the high-confidence attack: the ends of the ascents alone, judged. An image is left alone
    once it is accepted. Of failures the wrong image with the smallest excess is returned.
    """
    budget = np.broadcast_to(np.asarray(eps, np.float64), (len(images),))
    generator = np.random.default_rng(seed)
    kept = Kept.of(images)
    for start in _distinct(starts, target.model.num_classes):
        rows = np.flatnonzero(~kept.success)
        if not len(rows):
            break
        part, y, limit = images[rows], labels[rows], budget[rows]
        points, aims = _ascend(
            target.model, part, y, limit, start, norm=norm, steps=deep_steps, generator=generator
        )
        found = _lower(
            target, part, y, limit, points, aims, score=score, norm=norm, steps=steps, adaptive=adaptive
        )
        kept.charge(rows, _deep_passes(start, deep_steps) + found.passes)
        kept.offer(rows, found.images, found.success, found.merit)
    return _confirmed(target, images, labels, kept, score, norm)


def _lower(
    target: Target,
    images: Floats,
    labels: Labels,
    eps: Values,
    points: Floats,
    aims: Labels,
    *,
    score: ScoreName,
    norm: Norm,
    steps: int,
    adaptive: bool,
) -> Kept:
    """The second half of `joint`, from points that are deep already."""
    kept = Kept.of(images)
    points, before = points.copy(), points.copy()
    weight = np.full(len(images), 0.5)
    rate, mark = eps / 2, np.full(len(images), -np.inf)
    period = max(2, steps // 5)
    for step in range(steps + 1):
        rows = np.flatnonzero(~kept.success)
        if not len(rows):
            break
        here = points[rows]
        judged = judge(target, here, labels[rows], score)
        kept.charge(rows, JUDGED)
        logits = judged.verdict.measurement.logits
        aimed = np.where(aims[rows] >= 0, aims[rows], others(logits, labels[rows]))
        kept.offer(rows, here, judged.success, _merit(judged, logits, aimed))
        if step == steps:
            break
        weight[rows] = np.where(judged.wrong, np.minimum(0.9, weight[rows] + 0.1), weight[rows] / 2)
        pull = _pull(target.model, here, judged, aimed, weight[rows])
        kept.charge(rows, np.where(judged.wrong, PULLED, GRADIENT))
        if not adaptive:
            length_ = falling(eps[rows] / 2, step, steps)
            points[rows] = _moved(images[rows], here, pull, length_, eps[rows], norm)
            continue
        ahead = _moved(images[rows], here, pull, rate[rows], eps[rows], norm)
        momentum = np.asarray(0.75 * (ahead - here) + 0.25 * (here - before[rows]), np.float32)
        shift = project(here + momentum - images[rows], eps[rows], norm)
        before[rows], points[rows] = here, np.clip(images[rows] + shift, 0.0, 1.0)
        if (step + 1) % period == 0:
            stuck = rows[kept.merit[rows] <= mark[rows]]
            rate[stuck] /= 2
            points[stuck] = before[stuck] = kept.images[stuck]
            mark[rows] = kept.merit[rows]
    return kept


def _confirmed(
    target: Target, images: Floats, labels: Labels, kept: Kept, score: ScoreName, norm: Norm
) -> Found:
    """What was found, judged once more in the batch it is returned in: digits may hang on the batch."""
    success = kept.success.copy()
    rows = np.flatnonzero(success)
    if len(rows):
        success[rows] = judge(target, kept.images[rows], labels[rows], score).success
    distance = np.where(success, length(kept.images - images, norm), np.inf)
    return Found(kept.images, success, distance, kept.passes)


def nearest_accepted(
    target: Target,
    images: Floats,
    labels: Labels,
    *,
    score: ScoreName,
    norm: Norm,
    steps: int = 40,
    seed: int = 0,
) -> Found:
    """The nearest wrong and accepted image found.

    From the nearest wrong image (`minimum_norm`, `steps`) outward to growing multiples of its distance
    (`OUTWARD`), at each a few steps of `joint`, until one is accepted. Then, as in FMN, `steps` inside a
    ball that shrinks below the nearest accepted image, and grows again while there is none; last, bisection
    of the segment to the image.
    """
    near = minimum_norm(target.model, images, labels, norm=norm, clip=True, steps=steps)
    reach = np.maximum(near.distance, FLOOR[norm])
    kept = Kept.of(images)
    kept.charge(np.arange(len(images)), _nearest_passes(steps))
    for factor in OUTWARD:
        rows = np.flatnonzero(~kept.success & near.success)
        if not len(rows):
            break
        some, y = images[rows], labels[rows]
        eps = np.asarray(factor * reach[rows], np.float64)
        out = np.clip(some + (near.images[rows] - some) * np.float32(factor), 0.0, 1.0)
        aims = np.full(len(rows), -1)
        found = _lower(target, some, y, eps, out, aims, score=score, norm=norm, steps=4, adaptive=False)
        kept.charge(rows, found.passes)
        kept.offer(rows, found.images, found.success, -length(found.images - some, norm))
        left = ~found.success
        if left.any():
            deep = joint(
                target,
                some[left],
                y[left],
                eps[left],
                score=score,
                norm=norm,
                steps=4,
                deep_steps=8,
                starts=(Start("cross-entropy"),),
                seed=seed,
            )
            if deep.passes is not None:
                kept.charge(rows[left], deep.passes)
            kept.offer(rows[left], deep.images, deep.success, -length(deep.images - some[left], norm))
    _shrink(target, images, labels, kept, score=score, norm=norm, steps=steps)
    _bisect(target, images, labels, kept, score=score, norm=norm)
    return _confirmed(target, images, labels, kept, score, norm)


def _shrink(
    target: Target, images: Floats, labels: Labels, kept: Kept, *, score: ScoreName, norm: Norm, steps: int
) -> None:
    """Looks for nearer successes inside a ball just smaller than the nearest one."""
    rows = np.flatnonzero(kept.success)
    points, radius = kept.images[rows], -kept.merit[rows]
    weight = np.full(len(rows), 0.5)
    for step in range(steps if len(rows) else 0):
        decay = 0.5 * (1 + np.cos(np.pi * step / steps))
        judged = judge(target, points, labels[rows], score)
        kept.offer(rows, points, judged.success, -length(points - images[rows], norm))
        if step == steps - 1:
            break
        nearest = -kept.merit[rows]
        gamma = 0.02 + 0.1 * decay
        grown = np.minimum(radius * (1 + gamma / 2), nearest * 0.995)
        radius = np.where(judged.success, nearest * (1 - gamma), grown)
        weight = np.where(judged.wrong, np.where(judged.success, 0.5, np.minimum(0.9, weight + 0.1)), 0.3)
        aims = others(judged.verdict.measurement.logits, labels[rows])
        pull = _pull(target.model, points, judged, aims, weight)
        rate = radius * (0.05 + 0.45 * decay)
        points = _moved(images[rows], points, pull, rate, radius, norm)


def _bisect(
    target: Target,
    images: Floats,
    labels: Labels,
    kept: Kept,
    *,
    score: ScoreName,
    norm: Norm,
    bisections: int = 10,
) -> None:
    """Moves successes along the segment to their images as far as they stay successes."""
    rows = np.flatnonzero(kept.success & (kept.merit < 0))
    low, high, ends = np.zeros(len(rows)), np.ones(len(rows)), kept.images[rows]
    for _ in range(bisections if len(rows) else 0):
        middle = (low + high) / 2
        points = images[rows] + column(middle) * (ends - images[rows])
        success = judge(target, points, labels[rows], score).success
        kept.offer(rows, points, success, -length(points - images[rows], norm))
        high, low = np.where(success, middle, high), np.where(success, low, middle)


def evasive_carlini_wagner(
    target: Target,
    images: Floats,
    labels: Labels,
    *,
    score: ScoreName,
    steps: int = 60,
    searches: int = 4,
    rate: float = 0.02,
    seed: int = 0,
) -> Found:
    """LIPGEN's evasive Carlini-Wagner attack (section 7): the nearest image in l2 of a loss plus a penalty on
    what the detector measures.

    min ||x' - x||² + c (max(0, -M_a) + max(0, log s / t)), a the most probable wrong class, s / t the worst
    test over its threshold, by Adam on x' = (1 + tanh w / 0.97) / 2, clipped, as in `carlini_wagner`; c by
    `searches` of a bisection per image. LIPGEN penalizes ||∇l||² of a loss it does not name. The logarithm
    has the same direction and works for every score; its gradient gets the length of the margin's, for beside
    the boundary it has no bound.
    """
    del seed  # nothing here is drawn
    kept = Kept.of(images)
    count = len(images)
    low, high, c = np.zeros(count), np.full(count, np.inf), np.full(count, 0.05)
    origin = np.arctanh((2 * images.astype(np.float64) - 1) * INSIDE)
    rows = np.arange(count)
    for _ in range(searches if count else 0):
        w, first, second = origin.copy(), np.zeros_like(origin), np.zeros_like(origin)
        hit = np.zeros(count, np.bool_)
        for step in range(1, steps + 1):
            points = np.clip((1 + np.tanh(w) / INSIDE) / 2, 0.0, 1.0).astype(np.float32)
            judged = judge(target, points, labels, score)
            kept.charge(rows, JUDGED)
            hit |= judged.success
            kept.offer(rows, points, judged.success, -length(points - images, "l2"))
            if step == steps:
                break
            logits = judged.verdict.measurement.logits
            aims = others(logits, labels)
            up = -target.model.loss_gradient(points, aims, "margin")[2]
            loss = np.where(column(margin_of(logits, aims)) < 0, -up, 0)
            failing = np.flatnonzero(judged.wrong & (judged.excess > 0))
            kept.charge(rows, GRADIENT)
            kept.charge(failing, DESCENT)
            if len(failing):
                down = steepest(descent(target.model, points, judged, failing), "l2")
                loss[failing] -= down * column(length(up[failing], "l2"))
            slope = 2.0 * (points - images) + c.reshape(-1, 1, 1, 1) * loss
            slope *= (1 - np.tanh(w) ** 2) / (2 * INSIDE)
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope**2
            w -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        high = np.where(hit, np.minimum(high, c), high)
        low = np.where(hit, low, np.maximum(low, c))
        c = np.where(np.isfinite(high), (low + high) / 2, 10 * c)
    return _confirmed(target, images, labels, kept, score, "l2")


def deny(
    target: Target,
    images: Floats,
    labels: Labels,
    eps: Values | float,
    *,
    score: ScoreName,
    norm: Norm,
    steps: int = 20,
    seed: int = 0,
) -> Found:
    """An image that the detector rejects within eps, whatever its class: success means rejected.

    First up the logarithm of the test nearest to failing, from the image; then again from the image nearest
    to the boundary with another class, where gradients are long. Steps fall linearly from eps / 2.
    """
    del seed  # nothing here is drawn
    budget = np.broadcast_to(np.asarray(eps, np.float64), (len(images),))
    kept = Kept.of(images)
    for boundary in (False, True):
        rows = np.flatnonzero(~kept.success)
        if not len(rows):
            break
        points = images[rows]
        if boundary:
            near = minimum_norm(
                target.model, points, labels[rows], norm=norm, clip=True, steps=steps, bisections=15
            )
            kept.charge(rows, _nearest_passes(steps, 15))
            points = np.clip(points + project(near.images - points, budget[rows], norm), 0.0, 1.0)
        for step in range(steps + 1):
            judged = judge(target, points, labels[rows], score)
            kept.charge(rows, JUDGED)
            kept.offer(rows, points, ~judged.verdict.accepted, judged.excess)
            on = ~kept.success[rows]
            if step == steps or not on.any():
                break
            pull = -descent(target.model, points, judged, np.flatnonzero(on))
            rows, points = rows[on], points[on]
            kept.charge(rows, DESCENT)
            rate = falling(budget[rows] / 2, step, steps)
            points = _moved(images[rows], points, pull, rate, budget[rows], norm)
    rows = np.flatnonzero(kept.success)
    if len(rows):
        kept.success[rows] = ~target.verdict(kept.images[rows], score).accepted
    distance = np.where(kept.success, length(kept.images - images, norm), np.inf)
    return Found(kept.images, kept.success, distance, kept.passes)


def transfer(
    twin: Classifier,
    target: Target,
    images: Floats,
    labels: Labels,
    eps: Values | float,
    *,
    norm: Norm,
    score: ScoreName | None = None,
    steps: int = 40,
    starts: Sequence[Start] = DEEP,
    seed: int = 0,
) -> Found:
    """Attacks made on another network within eps and tried on the target, whose gradients nobody asks for.

    The first start's end alone without a `score`, and success is a wrong class. With one, every start's end
    is tried, and success is a wrong class that is accepted.
    """
    budget = np.broadcast_to(np.asarray(eps, np.float64), (len(images),))
    generator = np.random.default_rng(seed)
    kept = Kept.of(images)
    for start in _distinct(starts if score is not None else starts[:1], twin.num_classes):
        rows = np.flatnonzero(~kept.success)
        if not len(rows):
            break
        points, _ = _ascend(
            twin, images[rows], labels[rows], budget[rows], start, norm=norm, steps=steps, generator=generator
        )
        kept.charge(rows, _deep_passes(start, steps))
        if score is None:
            logits = target.model.logits(points)
            wrong = misclassified(points, logits, labels[rows])
            kept.offer(rows, points, wrong, -margin_of(logits, labels[rows]))
        else:
            judged = judge(target, points, labels[rows], score)
            logits = judged.verdict.measurement.logits
            kept.offer(rows, points, judged.success, _merit(judged, logits, others(logits, labels[rows])))
    if score is not None:
        return _confirmed(target, images, labels, kept, score, norm)
    distance = np.where(kept.success, length(kept.images - images, norm), np.inf)
    return Found(kept.images, kept.success, distance, kept.passes)


JUDGED = 5
"""Forward passes that a verdict costs, of two rows; few images take more."""
DESCENT = 3 * GRADIENT
"""The same of `descent`: a row's gradient, and one more either side."""
PULLED = GRADIENT + DESCENT
"""The same of a step's direction where the image is wrong: the margin's gradient too."""


def _nearest_passes(steps: int, bisections: int = BISECTIONS) -> int:
    """The cost of `minimum_norm`, all of its steps."""
    return (steps + 1) * GRADIENT + bisections * FORWARD


def _deep_passes(start: Start, steps: int) -> int:
    """The cost of `_ascend`."""
    if start.outward:
        return _nearest_passes(steps)
    return steps * GRADIENT + FORWARD * (start.place is not None)


def _joint_passes(starts: Sequence[Start], steps: int, deep_steps: int) -> int:
    """The cost of `joint` for an image that withstands every start."""
    deep = sum(_deep_passes(start, deep_steps) for start in starts)
    return deep + len(starts) * ((steps + 1) * JUDGED + steps * PULLED) + JUDGED


class Budgeted(Protocol):
    """An attack within a budget, its score and norm bound later."""

    def __call__(
        self,
        target: Target,
        images: Floats,
        labels: Labels,
        eps: float,
        /,
        *,
        score: ScoreName,
        norm: Norm,
        seed: int,
    ) -> Found:
        """As `joint`."""
        ...


def named(method: str, score: ScoreName, norm: Norm) -> str:
    """The attack's name on the command line: the default score goes without saying."""
    return f"{method}-{norm}" if score == DEFAULT else f"{method}-{score}-{norm}"


def _within(
    method: str, title: str, attack: Budgeted, score: ScoreName, norm: Norm, *, passes: int, source: str
) -> Attack:
    def run(target: Target, images: Floats, labels: Labels, budget: float | None, seed: int) -> Found:
        return attack(target, images, labels, bound(budget), score=score, norm=norm, seed=seed)

    return Attack(
        name=named(method, score, norm),
        title=f"{title}, knowing {score}",
        run=run,
        norm=norm,
        knowledge="gradients",
        passes=passes,
        source=source,
        budgets=BUDGETS[norm],
        aware=score,
    )


def _nearest(score: ScoreName, norm: Norm) -> Attack:
    def run(target: Target, images: Floats, labels: Labels, budget: float | None, seed: int) -> Found:
        del budget
        return nearest_accepted(target, images, labels, score=score, norm=norm, seed=seed)

    return Attack(
        name=named("nearest-accepted", score, norm),
        title=f"Nearest accepted, knowing {score}",
        run=run,
        norm=norm,
        knowledge="gradients",
        passes=_nearest_passes(40)
        + len(OUTWARD) * (5 * JUDGED + 4 * PULLED + _joint_passes(DEEP[:1], 4, 8))
        + 39 * (JUDGED + PULLED)
        + 12 * JUDGED,
        source="FMN (Pintor et al. 2021) on the served decision",
        aware=score,
    )


def _evasive(score: ScoreName) -> Attack:
    def run(target: Target, images: Floats, labels: Labels, budget: float | None, seed: int) -> Found:
        del budget
        return evasive_carlini_wagner(target, images, labels, score=score, seed=seed)

    return Attack(
        name=named("evasive-cw", score, "l2"),
        title=f"Evasive Carlini-Wagner, knowing {score}",
        run=run,
        norm="l2",
        knowledge="gradients",
        passes=4 * (60 * JUDGED + 59 * PULLED) + JUDGED,
        source="LIPGEN 7",
        aware=score,
    )


def aware_attacks(score: ScoreName) -> tuple[Attack, ...]:
    """The attacks that know the detector of this score, strongest first."""
    attacks = []
    for norm in get_args(Norm):
        attacks += [
            _within(
                "joint-pgd",
                "Joint PGD",
                joint,
                score,
                norm,
                passes=_joint_passes(JOINT, 20, 20),
                source="Tramèr et al. 2020, on the served decision",
            ),
            _within(
                "joint-apgd",
                "Joint APGD",
                partial(joint, adaptive=True, steps=40),
                score,
                norm,
                passes=_joint_passes(JOINT, 40, 20),
                source="Croce and Hein 2020 on the served decision",
            ),
            _within(
                "high-confidence",
                "High confidence",
                partial(joint, steps=0, deep_steps=40, starts=DEEP),
                score,
                norm,
                passes=_joint_passes(DEEP, 0, 40),
                source="Carlini and Wagner 2017, with a budget",
            ),
            _nearest(score, norm),
        ]
    return (*attacks, _evasive(score))


def transfer_attacks(twin: Classifier, scores: Sequence[ScoreName] = SCORES) -> tuple[Attack, ...]:
    """Attacks made on the twin: `transfer-NORM`, which knows nothing of the target, and for every score one
    that tries several and keeps what the target accepts. Costs are passes of the twin.
    """
    attacks = []
    for norm in get_args(Norm):
        for score in (None, *scores):

            def run(
                target: Target,
                images: Floats,
                labels: Labels,
                budget: float | None,
                seed: int,
                norm: Norm = norm,
                score: ScoreName | None = score,
            ) -> Found:
                eps = bound(budget)
                return transfer(twin, target, images, labels, eps, norm=norm, score=score, seed=seed)

            attacks.append(
                Attack(
                    name=f"transfer-{norm}" if score is None else named("transfer-accepted", score, norm),
                    title="Transfer" if score is None else f"Transfer, keeping what {score} accepts",
                    run=run,
                    norm=norm,
                    knowledge="another network",
                    passes=sum(_deep_passes(start, 40) for start in (DEEP if score else DEEP[:1])),
                    source="Papernot et al. 2017",
                    budgets=BUDGETS[norm],
                    aware=score,
                )
            )
    return tuple(attacks)


ATTACKS: tuple[Attack, ...] = tuple(attack for score in SCORES for attack in aware_attacks(score))

OVER_REJECTION: tuple[Attack, ...] = tuple(
    _within(
        "denial",
        "Denial",
        deny,
        score,
        norm,
        passes=2 * (21 * JUDGED + 20 * DESCENT) + _nearest_passes(20, 15) + JUDGED,
        source="PGD on the served score",
    )
    for score in SCORES
    for norm in get_args(Norm)
)
"""Attacks that make clean images rejected: their success is an image that is not accepted, of any class."""
