"""Attacks on a classifier and its detector together, in numpy, through the gradients of the classifier.

They succeed where the class is wrong *and* the image accepted, as `guard.evaluation.served` says. Images are
float32 (B, C, H, W) in [0, 1] and attacked images stay there; labels (B,) are the true classes. Attacks on
images of eight bits per channel, as a server gets them, are in `guard.evaluation.over_http`.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from guard.attacks import (
    CLASSES,
    FORWARD,
    GRADIENT,
    Floats,
    Found,
    Labels,
    column,
    falling,
    length,
    misclassified,
    nearest,
    nearest_passes,
    others,
    project,
    steepest,
)
from guard.bundle import ScoreName
from guard.evaluation.apgd import MOMENTUM, slowed
from guard.evaluation.ascent import (
    DEEP,
    Kept,
    Start,
    ascend,
    confirmed,
    deep_passes,
    distinct,
    margin_of,
    merit,
    moved,
)
from guard.evaluation.attack import SCORES, Attack, knowing, named
from guard.evaluation.carlini_wagner import INSIDE
from guard.evaluation.served import DESCENT, JUDGED, Judged, descent, judge
from guard.evaluation.target import Classifier, Target, Values
from guard.norms import NORMS, Norm

OUTWARD = (1.02, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
"""Multiples of the distance to the nearest wrong image at which accepted ones are looked for."""

FLOOR: dict[Norm, float] = {"l2": 0.02, "linf": 0.001}
"""The distance taken for images that are wrong without attack."""

PULLED = GRADIENT + DESCENT
"""Forward passes that the direction of a step costs where the image is wrong: the margin's gradient, and
`descent`."""

JOINT = (
    Start("cross-entropy"),
    Start("margin", place=1),
    Start("margin", outward=True),
    Start("margin", place=2),
    Start("cross-entropy", random=True),
)

RESTARTS = (
    *(Start("margin", place=place) for place in (1, 2, 3)),
    *(Start("margin", random=True),) * 2,
    *(Start("cross-entropy", random=True),) * 2,
)
"""Starts for what those of `JOINT` leave: towards one class more, random ones drawn anew, and the others
again for the finer steps that they are used with."""


def joint(
    target: Target,
    images: Floats,
    labels: Labels,
    eps: Values | float,
    *,
    score: ScoreName,
    norm: Norm,
    steps: int = 20,
    first_steps: int | None = None,
    deep_steps: int = 20,
    starts: Sequence[Start] = JOINT,
    last: float = 0.1,
    only_wrong: bool = False,
    adaptive: bool = False,
    seed: int = 0,
) -> Found:
    """Wrong and accepted within eps (a number, or one per image).

    Every start goes deep into a wrong class (`deep_steps`), where gradients are small; then `steps`, of the
    first start `first_steps` where they are given, follow a weighted sum of two unit vectors, up the margin
    of the class aimed at and down the worst test. The weight of the second grows by a tenth at every step
    that ends wrong and rejected, and is halved by one that ends right, which also follows the margin alone:
    first wrong, then accepted, then back. Steps fall linearly from eps / 2 to `last` of that; `adaptive` ones
    are those of APGD instead, with momentum, halved after every fifth of all steps for images of which too
    few steps were better than the one before, or, unless they were just halved, none better than the best,
    and which then go on from their best point (Croce and Hein 2020). With steps = 0 it is the high-confidence
    attack: the ends of the ascents alone, judged. An image is left alone once it is accepted, and with
    `only_wrong` a start whose ascent ends right. Of failures the wrong image with the smallest excess is
    returned.
    """
    budget = np.broadcast_to(np.asarray(eps, np.float64), (len(images),))
    generator = np.random.default_rng(seed)
    kept = Kept.of(images)
    for place, start in enumerate(distinct(starts, target.model.num_classes)):
        rows = np.flatnonzero(~kept.success)
        if not len(rows):
            break
        descent_steps = steps if place or first_steps is None else first_steps
        part, y, limit = images[rows], labels[rows], budget[rows]
        points, aims = ascend(
            target.model, part, y, limit, start, norm=norm, steps=deep_steps, generator=generator
        )
        kept.charge(rows, deep_passes(start, deep_steps) + FORWARD * only_wrong)
        if only_wrong:
            wrong = np.flatnonzero(misclassified(points, target.model.logits(points), y))
            rows, part, y, limit = rows[wrong], part[wrong], y[wrong], limit[wrong]
            points, aims = points[wrong], aims[wrong]
        found = _lower(
            target,
            part,
            y,
            limit,
            points,
            aims,
            score=score,
            norm=norm,
            steps=descent_steps,
            last=last,
            adaptive=adaptive,
        )
        kept.charge(rows, found.passes)
        kept.offer(rows, found.images, found.success, found.merit)
    return confirmed(target, images, labels, kept, score, norm)


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
    last: float = 0.1,
    adaptive: bool = False,
) -> Kept:
    """The second half of `joint`, from points that are deep already."""
    kept = Kept.of(images)
    points, before = points.copy(), points.copy()
    weight = np.full(len(images), 0.5)
    rate, period = eps / 2, max(2, steps // 5)
    at_last, value = np.full(len(images), -np.inf), np.full(len(images), np.nan)  # NaN: compares with nothing
    raised, compared = np.zeros(len(images), np.int64), np.zeros(len(images), np.int64)
    halved = np.ones(len(images), np.bool_)
    for step in range(steps + 1):
        rows = np.flatnonzero(~kept.success)
        if not len(rows):
            break
        here = points[rows]
        judged = judge(target, here, labels[rows], score)
        kept.charge(rows, JUDGED)
        logits = judged.verdict.measurement.logits
        aimed = np.where(aims[rows] >= 0, aims[rows], others(logits, labels[rows]))
        now = merit(judged, logits, aimed)
        kept.offer(rows, here, judged.success, now)
        if step == steps:
            break
        weight[rows] = np.where(judged.wrong, np.minimum(0.9, weight[rows] + 0.1), weight[rows] / 2)
        pull = _pull(target.model, here, judged, aimed, weight[rows])
        kept.charge(rows, np.where(judged.wrong, PULLED, GRADIENT))
        if not adaptive:
            length_ = falling(eps[rows] / 2, step, steps, last)
            points[rows] = moved(images[rows], here, pull, length_, eps[rows], norm)
            continue
        ahead = moved(images[rows], here, pull, rate[rows], eps[rows], norm)
        share = MOMENTUM if step else 1.0
        mixed = np.asarray(share * (ahead - here) + (1 - share) * (here - before[rows]), np.float32)
        shift = project(here + mixed - images[rows], eps[rows], norm)
        before[rows], points[rows] = here, np.clip(images[rows] + shift, 0.0, 1.0)
        raised[rows] += now > value[rows]
        compared[rows] += ~np.isnan(value[rows])
        value[rows] = now
        if (step + 1) % period == 0 and step + 1 < steps:
            halved = slowed(raised, compared, halved, kept.merit, at_last)
            rate[halved] /= 2
            points[halved] = before[halved] = kept.images[halved]
            value[halved], at_last = np.nan, kept.merit.copy()
            raised[:] = compared[:] = 0
    return kept


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


def nearest_accepted(
    target: Target,
    images: Floats,
    labels: Labels,
    *,
    score: ScoreName,
    norm: Norm,
    steps: int = 40,
    classes: int = CLASSES,
    seed: int = 0,
) -> Found:
    """The nearest wrong and accepted image found.

    From the nearest wrong image (`nearest`, half the `steps`, led towards `classes`) outward to growing
    multiples of its distance (`OUTWARD`), at each a few steps of `joint`, until one is accepted. Then, as in
    FMN, `steps` inside a ball that shrinks below the nearest accepted image, and grows again while there is
    none; last, bisection of the segment to the image.
    """
    near = nearest(target.model, images, labels, norm=norm, clip=True, steps=steps // 2, classes=classes)
    reach = np.maximum(near.distance, FLOOR[norm])
    kept = Kept.of(images)
    if near.spent is not None:
        kept.charge(np.arange(len(images)), near.spent)
    for factor in OUTWARD:
        rows = np.flatnonzero(~kept.success & near.success)
        if not len(rows):
            break
        some, y = images[rows], labels[rows]
        eps = np.asarray(factor * reach[rows], np.float64)
        out = np.clip(some + (near.images[rows] - some) * np.float32(factor), 0.0, 1.0)
        aims = np.full(len(rows), -1)
        found = _lower(target, some, y, eps, out, aims, score=score, norm=norm, steps=4)
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
    return confirmed(target, images, labels, kept, score, norm)


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
        points = moved(images[rows], points, pull, rate, radius, norm)


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
    rate: float = 0.04,
    seed: int = 0,
) -> Found:
    """LIPGEN's evasive Carlini-Wagner attack (section 7): the nearest image in l2 of a loss plus a penalty on
    what the detector measures.

    min ||x' - x||² + c (max(0, -M_a) + max(0, log s / t)), a the most probable wrong class, s / t the worst
    test over its threshold, by Adam on x' = (1 + tanh w / 0.97) / 2, clipped, as in `carlini_wagner`, at a
    rate that falls to a fifteenth. c comes by `searches` of a bisection per image; each goes on from the
    nearest success so far, at a quarter of the rate. LIPGEN penalizes ||∇l||² of a loss it does not name. The
    logarithm has the same direction and works for every score; its gradient gets the length of the margin's,
    for beside the boundary it has no bound.
    """
    del seed  # nothing here is drawn
    kept = Kept.of(images)
    count = len(images)
    low, high, c = np.zeros(count), np.full(count, np.inf), np.full(count, 0.05)
    rows = np.arange(count)
    for _ in range(searches if count else 0):
        w = np.arctanh((2 * kept.images.astype(np.float64) - 1) * INSIDE)
        first, second = np.zeros_like(w), np.zeros_like(w)
        rates = column(np.where(kept.success, rate / 4, rate))
        hit = np.zeros(count, np.bool_)
        for step in range(1, steps + 1):
            points = np.clip((1 + np.tanh(w) / INSIDE) / 2, 0.0, 1.0).astype(np.float32)
            judged = judge(target, points, labels, score)
            kept.charge(rows, JUDGED)
            if 2 * step > steps:  # the start may be a success of another c
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
            direction = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            w -= rates * (1 - 0.95 * step / steps) * direction
        high = np.where(hit, np.minimum(high, c), high)
        low = np.where(hit, low, np.maximum(low, c))
        c = np.where(np.isfinite(high), (low + high) / 2, 10 * c)
    return confirmed(target, images, labels, kept, score, "l2")


def joint_passes(starts: Sequence[Start], steps: int, deep_steps: int, first_steps: int | None = None) -> int:
    """The cost of `joint` for an image that withstands every start."""
    deep = sum(deep_passes(start, deep_steps) for start in starts)
    descents = (len(starts) - 1) * steps + (steps if first_steps is None else first_steps)
    return deep + descents * (JUDGED + PULLED) + (len(starts) + 1) * JUDGED


def _run_nearest(
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    seed: int,
    *,
    score: ScoreName,
    norm: Norm,
    classes: int,
) -> Found:
    del budget
    return nearest_accepted(target, images, labels, score=score, norm=norm, classes=classes, seed=seed)


def _nearest(score: ScoreName, norm: Norm) -> Attack:
    return Attack(
        name=named("nearest-accepted", score, norm),
        title=f"Nearest accepted, knowing {score}",
        run=partial(_run_nearest, score=score, norm=norm, classes=CLASSES),
        norm=norm,
        knowledge="gradients",
        passes=nearest_passes(20, CLASSES)
        + len(OUTWARD) * (5 * JUDGED + 4 * PULLED + joint_passes(DEEP[:1], 4, 8))
        + 39 * (JUDGED + PULLED)
        + 12 * JUDGED,
        source="FMN (Pintor et al. 2021) on the served decision",
        aware=score,
    )


def _run_evasive(
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    seed: int,
    *,
    score: ScoreName,
    steps: int,
    searches: int,
) -> Found:
    del budget
    return evasive_carlini_wagner(
        target, images, labels, score=score, steps=steps, searches=searches, seed=seed
    )


def _evasive(score: ScoreName) -> Attack:
    return Attack(
        name=named("evasive-cw", score, "l2"),
        title=f"Evasive Carlini-Wagner, knowing {score}",
        run=partial(_run_evasive, score=score, steps=60, searches=4),
        norm="l2",
        knowledge="gradients",
        passes=4 * (60 * JUDGED + 59 * PULLED) + JUDGED,
        source="LIPGEN 7",
        aware=score,
    )


def aware_attacks(score: ScoreName) -> tuple[Attack, ...]:
    """The attacks that know the detector of this score."""
    attacks = []
    for norm in NORMS:
        attacks += [
            knowing(
                "joint-pgd",
                "Joint PGD",
                partial(joint, starts=JOINT, deep_steps=20, first_steps=100, steps=20),
                score,
                norm,
                passes=joint_passes(JOINT, 20, 20, first_steps=100),
                source="Tramèr et al. 2020, on the served decision",
            ),
            knowing(
                "joint-apgd",
                "Joint APGD",
                partial(joint, starts=JOINT, deep_steps=20, steps=40, adaptive=True),
                score,
                norm,
                passes=joint_passes(JOINT, 40, 20),
                source="Croce and Hein 2020 on the served decision",
            ),
            knowing(
                "joint-restarts",
                "Joint PGD, other starts and finer steps",
                partial(joint, starts=RESTARTS, deep_steps=20, steps=30, last=0.01, only_wrong=True),
                score,
                norm,
                passes=joint_passes(RESTARTS, 30, 20) + len(RESTARTS) * FORWARD,
                source="Tramèr et al. 2020, on the served decision",
            ),
            knowing(
                "high-confidence",
                "High confidence",
                partial(joint, starts=DEEP, deep_steps=40, steps=0),
                score,
                norm,
                passes=joint_passes(DEEP, 0, 40),
                source="Carlini and Wagner 2017, with a budget",
            ),
            _nearest(score, norm),
        ]
    return (*attacks, _evasive(score))


ATTACKS: tuple[Attack, ...] = tuple(attack for score in SCORES for attack in aware_attacks(score))
