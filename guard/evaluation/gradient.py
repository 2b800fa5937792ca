"""Our own attacks by gradients, in numpy, on any classifier: no torch.

Single steps and plain ascents stand here; APGD, DeepFool, Carlini-Wagner and LogBarrier in modules of their
own, PGD and the FMN-like minimum-norm attack in `guard.attacks`. `ATTACKS` names them all, with the settings
of the papers where those state them.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from guard import attacks
from guard.attacks import (
    BISECTIONS,
    FORWARD,
    GRADIENT,
    Floats,
    Found,
    Labels,
    Loss,
    column,
    misclassified,
    onto_boundary,
    steepest,
)
from guard.evaluation.apgd import AscentLoss, apgd
from guard.evaluation.attack import BUDGETS, Attack, Run
from guard.evaluation.best import Best
from guard.evaluation.carlini_wagner import carlini_wagner
from guard.evaluation.deepfool import deepfool
from guard.evaluation.log_barrier import NOISES, log_barrier
from guard.evaluation.target import Classifier, Target
from guard.norms import Norm

Budgets = NDArray[np.float64]


def fgsm(model: Classifier, images: Floats, labels: Labels, eps: float, *, norm: Norm) -> Found:
    """One step of length eps up the cross-entropy: along the sign of its gradient in linf (FGSM), along the
    unit gradient in l2. Source: Goodfellow et al. 2014; LIP 2.2 for both norms.
    """
    best = Best(images, norm)
    rows = np.arange(len(images))
    logits, _, gradient = model.loss_gradient(images, labels, "cross-entropy")
    best.offer(rows, images, misclassified(images, logits, labels), GRADIENT)
    rows = np.flatnonzero(~best.broken)
    if len(rows):
        points = np.clip(images[rows] + np.float32(eps) * steepest(gradient[rows], norm), 0.0, 1.0)
        best.offer(rows, points, misclassified(points, model.logits(points), labels[rows]), FORWARD)
    return best.found()


def one_direction(
    model: Classifier,
    images: Floats,
    labels: Labels,
    *,
    norm: Norm,
    points: int = 70,
    nearest: float = 1e-3,
) -> Found:
    """LIP's gradient attack (l2) and FGSM (linf): the first wrong image on the straight way up the
    cross-entropy from the image.

    The way is looked at in `points` places, the distance growing evenly in its logarithm from `nearest` (in
    l2 times sqrt of the number of pixels) to the length that crosses [0, 1], and bisected before the first
    wrong one. Source: LIP 4.2 (a single step, its length searched, as in Foolbox 1).
    """
    best = Best(images, norm)
    rows = np.arange(len(images))
    logits, _, gradient = model.loss_gradient(images, labels, "cross-entropy")
    best.offer(rows, images, misclassified(images, logits, labels), GRADIENT)
    direction = steepest(gradient, norm)
    across = np.sqrt(images[0].size) if norm == "l2" else 1.0
    before = np.zeros(len(images))
    for distance in across * np.geomspace(nearest, 1, points):
        rows = np.flatnonzero(~best.broken)
        if not len(rows):
            break
        there = np.clip(images[rows] + np.float32(distance) * direction[rows], 0.0, 1.0)
        wrong = misclassified(there, model.logits(there), labels[rows])
        best.offer(rows, there, wrong, FORWARD)
        before[rows[~wrong]] = distance
    # The way bends where it meets the edge of [0, 1]: bisected between its last two points, not from afar.
    rows = np.flatnonzero(best.broken & (best.distance > 0))
    low = np.clip(images[rows] + column(before[rows]) * direction[rows], 0.0, 1.0)
    return _settled(model, best, rows, low, labels)


def ascent(
    model: Classifier,
    images: Floats,
    labels: Labels,
    *,
    norm: Norm,
    step: float,
    steps: int = 100,
) -> Found:
    """Normalized-gradient ascent: steps of one length up the cross-entropy, in no ball, until the class
    flips; the last step is bisected. Source: LIP 2.3, LIPGEN 3.
    """
    best = Best(images, norm)
    here, last = images.copy(), images.copy()
    for taken in range(steps + 1):
        rows = np.flatnonzero(~best.broken)
        if not len(rows):
            break
        logits, _, gradient = model.loss_gradient(here[rows], labels[rows], "cross-entropy")
        wrong = misclassified(here[rows], logits, labels[rows])
        best.offer(rows, here[rows], wrong, GRADIENT)
        if taken < steps:
            rows, gradient = rows[~wrong], gradient[~wrong]
            last[rows] = here[rows]
            here[rows] = np.clip(here[rows] + np.float32(step) * steepest(gradient, norm), 0.0, 1.0)
    rows = np.flatnonzero(best.broken & (best.distance > 0))
    return _settled(model, best, rows, last[rows], labels)


def _settled(model: Classifier, best: Best, rows: NDArray[np.intp], right: Floats, labels: Labels) -> Found:
    """The adversarial images of `rows` moved towards points `right` of them that are not wrong."""
    if len(rows):
        wrong = np.ones(len(rows), dtype=np.bool_)
        there = onto_boundary(model, right, best.images[rows], labels[rows], wrong)
        best.offer(rows, there, wrong, FORWARD * BISECTIONS)
    return best.found()


def smallest_budget(
    attack: Callable[[Floats, Labels, Budgets], Found],
    images: Floats,
    labels: Labels,
    *,
    norm: Norm,
    first: float,
    growths: int = 20,
    bisections: int = 10,
) -> Found:
    """The nearest image that an attack of fixed budgets finds when its budget is searched for, per image.

    From `first` the budget grows by half until the attack succeeds, `growths` times at most; then it is
    bisected. This is how the papers' Foolbox 1 turned PGD and I-FGSM into distances (LIPGEN 6, LIP 4.2).
    """
    best = Best(images, norm)
    low, budget = np.zeros(len(images)), np.full(len(images), first)
    high = np.full(len(images), np.inf)
    rows = np.arange(len(images))
    for turn in range(growths + bisections):
        if turn >= growths:
            rows = np.flatnonzero(best.broken & (best.distance > 0))
        elif turn:
            rows = np.flatnonzero(~best.broken)
        if not len(rows):
            continue
        found = attack(images[rows], labels[rows], budget[rows])
        passes = np.zeros(len(rows), np.int64) if found.passes is None else found.passes
        best.charge(rows, passes)
        best.offer(rows, found.images, found.success, 0)
        high[rows[found.success]] = budget[rows[found.success]]
        low[rows[~found.success]] = budget[rows[~found.success]]
        budget = np.where(np.isfinite(high), (low + high) / 2, 1.5 * budget)
    return best.found()


def _run(
    attack: Callable[..., Found],
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    _seed: int,
    **settings: object,
) -> Found:
    """An attack of this module's shape, bound to its settings, as a `guard.evaluation.attack.Run`."""
    eps = {} if budget is None else {"eps": budget}
    return attack(target.model, images, labels, **eps, **settings)


def _run_seeded(
    attack: Callable[..., Found],
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    seed: int,
    **settings: object,
) -> Found:
    return _run(attack, target, images, labels, budget, seed, seed=seed, **settings)


def _searched_pgd(
    model: Classifier, images: Floats, labels: Labels, *, norm: Norm, steps: int, rate: float
) -> Found:
    """`smallest_budget` of PGD on the cross-entropy from the image itself."""

    def one(some: Floats, classes: Labels, eps: Budgets) -> Found:
        return attacks.pgd(
            model,
            some,
            classes,
            eps,
            norm=norm,
            steps=steps,
            restarts=1,
            loss="cross-entropy",
            rate=rate,
            clip=True,
        )

    return smallest_budget(one, images, labels, norm=norm, first=BUDGETS[norm][0])


MANIFOLD = "Madry et al. 2018; 20 steps of 2.5 eps / 20, 10 restarts: MANIFOLD, appendix B"
FOOLBOX = "10 steps of eps / 6: Foolbox 1, whose defaults LIP 4.2 and LIPGEN 6 use"
APGD_LOSSES: tuple[tuple[AscentLoss, str, str, int], ...] = (
    ("cross-entropy", "ce", "cross-entropy", GRADIENT),
    ("dlr", "dlr", "difference-of-logits ratio", GRADIENT + FORWARD),
    ("margin", "margin", "logit margin", GRADIENT),
)


def _attacks(norm: Norm) -> tuple[Attack, ...]:
    """All attacks of one norm."""
    at = BUDGETS[norm]

    def attack(
        name: str, title: str, run: Run, passes: int, source: str, budgets: tuple[float, ...] | None
    ) -> Attack:
        return Attack(f"{name}-{norm}", title, run, norm, "gradients", passes, source, budgets)

    def pgd(steps: int, restarts: int, loss: Loss) -> Run:
        return partial(
            _run_seeded,
            attacks.pgd,
            norm=norm,
            steps=steps,
            restarts=restarts,
            loss=loss,
            rate=2.5 / steps,
            clip=True,
        )

    return (
        attack(
            "fgsm",
            "FGSM" if norm == "linf" else "One gradient step",
            partial(_run, fgsm, norm=norm),
            GRADIENT + FORWARD,
            "Goodfellow et al. 2014; LIP 2.2",
            at,
        ),
        attack(
            "gradient",
            "Gradient attack (one direction, its length searched)",
            partial(_run, one_direction, norm=norm, points=70),
            GRADIENT + (70 + BISECTIONS) * FORWARD,
            "LIP 4.2",
            None,
        ),
        attack(
            "ascent",
            "Normalized-gradient ascent",
            partial(_run, ascent, norm=norm, step=0.05 if norm == "l2" else 1 / 255, steps=100),
            101 * GRADIENT + BISECTIONS * FORWARD,
            "LIP 2.3",
            None,
        ),
        attack(
            "i-fgsm" if norm == "linf" else "iterated-gradient",
            "I-FGSM" if norm == "linf" else "Iterated gradient steps",
            partial(
                _run_seeded,
                attacks.pgd,
                norm=norm,
                steps=10,
                restarts=1,
                loss="cross-entropy",
                rate=1 / 6,
                clip=True,
            ),
            11 * GRADIENT,
            f"Kurakin et al. 2016; {FOOLBOX}",
            at,
        ),
        attack(
            "i-fgsm-search" if norm == "linf" else "pgd-search",
            "I-FGSM, its budget searched" if norm == "linf" else "PGD, its budget searched",
            partial(_run, _searched_pgd, norm=norm, steps=10, rate=1 / 6),
            30 * 11 * GRADIENT,
            FOOLBOX,
            None,
        ),
        attack("pgd", "PGD-20, two starts", pgd(20, 2, "margin"), 2 * 21 * GRADIENT, MANIFOLD, at),
        attack(
            "pgd-deep",
            "PGD-20, two starts, as deep as the budget allows",
            partial(
                _run_seeded,
                attacks.pgd,
                norm=norm,
                steps=20,
                restarts=2,
                loss="cross-entropy",
                clip=True,
                stop=False,
            ),
            2 * 21 * GRADIENT,
            "Madry et al. 2018; steps falling from eps to eps / 10",
            at,
        ),
        attack(
            "pgd-restarts",
            "PGD-20, 10 starts, on the cross-entropy",
            pgd(20, 10, "cross-entropy"),
            10 * 21 * GRADIENT,
            MANIFOLD,
            at,
        ),
        attack(
            "pgd-restarts-margin",
            "PGD-20, 10 starts, on the logit margin",
            pgd(20, 10, "margin"),
            10 * 21 * GRADIENT,
            MANIFOLD,
            at,
        ),
        attack(
            "pgd-plus",
            "PGD+: 500 steps, 20 starts",
            pgd(500, 20, "cross-entropy"),
            20 * 501 * GRADIENT,
            "Madry et al. 2018; 500 steps, 20 restarts: MANIFOLD, appendix C",
            at,
        ),
        *(
            attack(
                f"apgd-{short}",
                f"APGD on the {words}",
                partial(_run_seeded, apgd, norm=norm, loss=loss, steps=100, restarts=2),
                FORWARD + 2 * 101 * cost,
                "Croce & Hein 2020, Algorithm 1",
                at,
            )
            for loss, short, words, cost in APGD_LOSSES
        ),
        attack(
            "fmn",
            "FMN-like minimum norm",
            partial(_run, attacks.minimum_norm, norm=norm, steps=100, clip=True),
            attacks.nearest_passes(100),
            "Pintor et al. 2021; Rony et al. 2019",
            None,
        ),
        attack(
            "fmn-targeted",
            "FMN-like minimum norm, also towards each likely class",
            partial(_run, attacks.nearest, norm=norm, steps=40, classes=attacks.CLASSES, clip=True),
            attacks.nearest_passes(40, attacks.CLASSES),
            "Pintor et al. 2021, targeted",
            None,
        ),
        attack(
            "deepfool",
            "DeepFool",
            partial(_run, deepfool, norm=norm, steps=50, classes=10),
            51 * FORWARD + 50 * 9 * GRADIENT,
            "Moosavi-Dezfooli et al. 2016",
            None,
        ),
        attack(
            "logbarrier",
            "LogBarrier",
            partial(_run_seeded, log_barrier, norm=norm, outer=15, inner=20, backtracks=5),
            (1 + NOISES + BISECTIONS) * FORWARD + 15 * 20 * (GRADIENT + 6 * FORWARD),
            "Finlay, Pooladian & Oberman 2019; SCALE 4",
            None,
        ),
    )


def _carlini_wagner(name: str, title: str, *, searches: int, steps: int, rate: float) -> Attack:
    run = partial(_run, carlini_wagner, searches=searches, steps=steps, rate=rate)
    passes = FORWARD + searches * steps * GRADIENT
    return Attack(name, title, run, "l2", "gradients", passes, "Carlini & Wagner 2017, V-B")


ATTACKS: tuple[Attack, ...] = (
    *_attacks("l2"),
    *_attacks("linf"),
    _carlini_wagner("cw-l2", "Carlini-Wagner", searches=5, steps=200, rate=0.01),
    _carlini_wagner("cw-quick-l2", "Carlini-Wagner, short", searches=4, steps=50, rate=0.02),
)
