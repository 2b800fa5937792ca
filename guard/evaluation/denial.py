"""The attack that turns the detector round: clean images made such that it rejects them."""

from functools import partial

import numpy as np

from guard.attacks import Floats, Found, Labels, falling, minimum_norm, nearest_passes, project
from guard.bundle import ScoreName
from guard.evaluation.ascent import Kept, moved
from guard.evaluation.attack import SCORES, Attack, knowing
from guard.evaluation.served import DESCENT, JUDGED, descent, judge
from guard.evaluation.target import Target, Values
from guard.norms import NORMS, Norm


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
    to the boundary with another class, where gradients are long. Steps fall linearly from eps / 2, the second
    time at most from a quarter of the boundary's distance: longer ones would leave what lies beside it.
    """
    del seed  # nothing here is drawn
    budget = np.broadcast_to(np.asarray(eps, np.float64), (len(images),))
    kept = Kept.of(images)
    for boundary in (False, True):
        rows = np.flatnonzero(~kept.success)
        if not len(rows):
            break
        points, rate = images[rows], budget / 2
        if boundary:
            near = minimum_norm(target.model, points, labels[rows], norm=norm, clip=True, steps=steps)
            kept.charge(rows, nearest_passes(steps))
            rate[rows] = np.minimum(rate[rows], near.distance / 4)
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
            length = falling(rate[rows], step, steps)
            points = moved(images[rows], points, pull, length, budget[rows], norm)
    rows = np.flatnonzero(kept.success)
    if len(rows):
        kept.success[rows] = ~target.verdict(kept.images[rows], score).accepted
    return kept.found(images, norm)


ATTACKS: tuple[Attack, ...] = tuple(
    knowing(
        "denial",
        "Denial",
        partial(deny, steps=20),
        score,
        norm,
        passes=2 * (21 * JUDGED + 20 * DESCENT) + nearest_passes(20) + JUDGED,
        source="PGD on the served score",
    )
    for score in SCORES
    for norm in NORMS
)
"""Their success is an image that is not accepted, of any class."""
