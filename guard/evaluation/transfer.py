"""Attacks made on another network, an undefended twin, and tried on the target."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from guard.attacks import Floats, Found, Labels, misclassified, others
from guard.bundle import ScoreName
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
)
from guard.evaluation.attack import BUDGETS, SCORES, Attack, bound, named
from guard.evaluation.served import judge
from guard.evaluation.target import Classifier, Target, Values
from guard.norms import NORMS, Norm


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
    for start in distinct(starts if score is not None else starts[:1], twin.num_classes):
        rows = np.flatnonzero(~kept.success)
        if not len(rows):
            break
        points, _ = ascend(
            twin, images[rows], labels[rows], budget[rows], start, norm=norm, steps=steps, generator=generator
        )
        kept.charge(rows, deep_passes(start, steps))
        if score is None:
            logits = target.model.logits(points)
            wrong = misclassified(points, logits, labels[rows])
            kept.offer(rows, points, wrong, -margin_of(logits, labels[rows]))
        else:
            judged = judge(target, points, labels[rows], score)
            logits = judged.verdict.measurement.logits
            kept.offer(rows, points, judged.success, merit(judged, logits, others(logits, labels[rows])))
    if score is not None:
        return confirmed(target, images, labels, kept, score, norm)
    return kept.found(images, norm)


def attacks(twin: Classifier, scores: Sequence[ScoreName] = SCORES) -> tuple[Attack, ...]:
    """Attacks made on the twin: `transfer-NORM`, which knows nothing of the target, and for every score one
    that tries several and keeps what the target accepts. Costs are passes of the twin.
    """
    return tuple(
        Attack(
            name=f"transfer-{norm}" if score is None else named("transfer-accepted", score, norm),
            title="Transfer" if score is None else f"Transfer, keeping what {score} accepts",
            run=partial(_run, twin, norm=norm, score=score, steps=40),
            norm=norm,
            knowledge="another network",
            passes=sum(deep_passes(start, 40) for start in (DEEP if score else DEEP[:1])),
            source="Papernot et al. 2017",
            budgets=BUDGETS[norm],
            aware=score,
        )
        for norm in NORMS
        for score in (None, *scores)
    )


def _run(
    twin: Classifier,
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    seed: int,
    *,
    norm: Norm,
    score: ScoreName | None,
    steps: int,
) -> Found:
    return transfer(
        twin, target, images, labels, bound(budget), norm=norm, score=score, steps=steps, seed=seed
    )
