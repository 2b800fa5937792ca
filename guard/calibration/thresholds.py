"""The detector's thresholds, and whether they decide as those of the full Jacobian would."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from guard import attacks, statistics
from guard.bundle import Agreement, ScoreName, ScoreThreshold
from guard.calibration import cost, fitting
from guard.calibration.extremes import Extreme
from guard.calibration.work import Settings, Work
from guard.certificate import first_order_radius
from guard.decision import ratio
from guard.guarded import Score
from guard.runtime import Detector, Measurement, score_of
from guard.stages import Arrays

Flags = NDArray[np.bool_]
Values = NDArray[np.float64]
Int64 = NDArray[np.int64]

TESTS: tuple[Literal["jacobian", "radius"], ...] = ("jacobian", "radius")
"""The tests of the score `combined`."""


def counts_rows(score: ScoreName) -> bool:
    """Whether the score is decided from fewer rows than the Jacobian has."""
    return score in ("jacobian", "combined")


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of a score's tests; `row_bound` is G, with which rows are left out."""

    score: ScoreName
    tests: Mapping[Score, float]
    row_bound: float

    @property
    def value(self) -> float:
        """What the served score is compared with."""
        return 1.0 if self.score == "combined" else self.tests[self.score]

    @property
    def limits(self) -> dict[str, float]:
        """What `Detector.measure` needs to compute every row that could matter to the threshold."""
        if not counts_rows(self.score):
            return {}
        return {"threshold": self.tests["jacobian"], "row_bound": self.row_bound}

    def records(self) -> list[ScoreThreshold]:
        """One for each test of a score that has several."""
        if self.score != "combined":
            return []
        return [ScoreThreshold(name=name, threshold=self.tests[name]) for name in TESTS]

    def rejects(self, measured: Measurement) -> Flags:
        """Rejections (B,), as `guard.decision` has them."""
        passed = [score_of(measured, name) <= threshold for name, threshold in self.tests.items()]
        rejected: Flags = ~np.all([measured.finite, *passed], axis=0)
        return rejected


def measure(
    work: Work, fold: str, thresholds: Thresholds | None = None, *, stage: str = "scores"
) -> Measurement:
    """Measurements of a fold, in order; with every row that could matter to the `thresholds`."""
    limits = thresholds.limits if thresholds else {}

    def piece(part: Int64) -> Arrays:
        return dict(vars(work.detector.measure(work.pixels(part), **limits)))

    return Measurement(**work.stages.run(f"{stage}-{fold}", work.folds[fold], piece, cost=cost.PASS))


def fit_rows(work: Work, measured: Measurement) -> Extreme:
    """G: how long u_i gets, at images of the fold `radii` and under attack. Status: estimate; `agreement`
    checks what hangs on it.
    """
    effort = work.effort
    indices = work.folds["radii"][: effort.row_images]
    radius = first_order_radius(measured.margin, measured.gradient_l2)
    usable = radius[np.isfinite(radius) & (radius > 0)]
    eps = float(np.median(usable)) if len(usable) else 0.0

    def piece(part: Int64) -> Arrays:
        lengths, attacked = fitting.longest_rows(work.detector, work.pixels(part), eps, effort)
        return {"clean": lengths, "attacked": attacked}

    per_image = cost.rows(effort, work.detector.num_classes)
    found = work.stages.run("rows", indices, piece, cost=per_image)
    return fitting.bound(found["attacked"], effort.blocks)


def fit(
    work: Work, clean: Measurement, reference: Measurement, row_bound: float
) -> tuple[Thresholds, Values]:
    """The thresholds, and the scores (n,) that they come from: measured are the folds `threshold` and, as a
    reference where tests are several, `radii`.

    Conformal, for clean images exchangeable with the fold `threshold`: a rejection has at most probability
    `fpr`, on average over calibration sets or for a share 1 - `delta` of them (`Settings.guarantee`). Raises
    `CalibrationError` where scores are not finite.

    The threshold is that of the full Jacobian's scores, though most rows are never computed: rows beyond
    the first two are computed for images at or below the threshold that could lie above it, and again
    for the threshold that follows, until it stays where it is. Then, as far as `row_bound` holds, which is an
    estimate, exactly those images lie at or below it whose full Jacobian does. The promised rate does not
    hang on it: what is served is decided by the same rows.
    """
    settings, score = work.settings, work.settings.score
    scores, levels = _columns(score, clean), _columns(score, reference)
    found, look = _from_scores(settings, scores, levels, row_bound), 0
    while counts_rows(score):
        before, look = found, look + 1
        decided = measure(work, "threshold", before, stage=f"rows-{look}")
        scores = np.maximum(scores, _columns(score, decided))
        found = _from_scores(settings, scores, levels, row_bound)
        if found == before:
            break
    if score == "combined":
        ratios = [ratio(scores[:, at], found.tests[name]) for at, name in enumerate(TESTS)]
        scores = np.max(ratios, axis=0)
    return found, scores.ravel()


def _columns(score: ScoreName, measured: Measurement) -> Values:
    """Scores (B, T) of the score's tests."""
    names: tuple[Score, ...] = TESTS if score == "combined" else (score,)
    return np.stack([score_of(measured, name) for name in names], axis=1)


def _from_scores(settings: Settings, scores: Values, levels: Values, row_bound: float) -> Thresholds:
    """From the scores (n, T) of the threshold fold; `levels` are for several tests."""
    score, fpr, risk = settings.score, settings.fpr, settings.risk
    if score != "combined":
        tests: dict[Score, float] = {score: statistics.conformal_threshold(scores, fpr, risk)}
    else:
        thresholds, _ = statistics.joint_thresholds(levels, scores, fpr, risk)
        tests = dict(zip(TESTS, thresholds.tolist(), strict=True))
    return Thresholds(score, tests, row_bound)


def agreement(work: Work, thresholds: Thresholds) -> list[Agreement]:
    """Served decisions beside those of the full Jacobian, on clean and on attacked report images; none for a
    score that is decided from all its rows.
    """
    if not counts_rows(thresholds.score):
        return []
    effort, detector = work.effort, work.detector
    classes = detector.num_classes
    indices = work.folds["report"][: cost.agreement_images(effort, work.folds, classes)]
    full = Detector(
        detector.model, score="jacobian-full", provider=detector.provider, threads=detector.threads
    )

    def piece(part: Int64) -> Arrays:
        images = work.pixels(part)
        labels = detector.logits(images).argmax(axis=1)
        nearest = attacks.minimum_norm(
            detector, images, labels, norm="l2", steps=effort.distance_steps, clip=True
        )
        eps = 2 * float(np.median(nearest.distance[nearest.success])) if nearest.success.any() else 0.1
        deep = attacks.pgd(detector, images, labels, eps, norm="l2", restarts=1, clip=True, stop=False)
        sets = {
            "clean": images,
            "minimum-norm l2": nearest.images,
            "PGD l2 at twice the median distance": deep.images,
            "third row hidden": attacks.hide_row(detector, images, eps),
        }
        return {
            name: thresholds.rejects(detector.measure(batch, **thresholds.limits))
            == thresholds.rejects(full.measure(batch))
            for name, batch in sets.items()
        }

    found = work.stages.run("agreement", indices, piece, cost=cost.agreement(classes))
    return [Agreement(images=name, n=len(same), agree=int(same.sum())) for name, same in found.items()]
