"""The served decision as attacks see it: judged on images of known classes, and differentiated.

An attack on a classifier and its detector together succeeds where the class is wrong *and* the image
accepted, as `Target.verdict` says: the decision that is served, further rows and least radii included.
`target.guards[score]` has to be there. What leads such attacks is an approximation of it, which only costs
them steps where it is off: the test that an image fails by most, its logarithm differentiated with the class
held fixed, through finite differences of gradients.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.attacks import GRADIENT, TINY, Floats, Labels, column, growth, length, misclassified
from guard.bundle import ScoreName
from guard.certificate import effective_slope
from guard.decision import Guard, ratio
from guard.evaluation.target import Classifier, Flags, Target, Values, Verdict
from guard.norms import Norm
from guard.runtime import Measurement

ROWS = 3
"""The Jacobian's rows, of the most probable classes, among which the longest is looked for."""

LONGEST = 0.99
"""A row at least this share of the longest is lowered in its place."""

RADIUS_TESTS: dict[str, Norm] = {"min-radius-l2": "l2", "min-radius-linf": "linf"}
"""The tests for a least radius, by the names that `exceeded` gives them."""

JUDGED = 5
"""Forward passes that a verdict costs, of two rows; few images take more."""

DESCENT = 3 * GRADIENT
"""The same of `descent`: a row's gradient, and one more either side."""


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
    least = {"l2": guard.policy.min_radius_l2 or 0.0, "linf": guard.policy.min_radius_linf or 0.0}
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            name: np.log(ratio(scores, threshold))
            for name, (scores, threshold) in guard.tests(verdict.measurement).items()
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
    size = measured.slope(norm)
    share = (size / np.maximum(effective_slope(measured.logits, size, typical), TINY)) ** 2
    index, order = np.arange(len(images)), np.argsort(-measured.logits, axis=1, kind="stable")
    cotangents = np.zeros_like(measured.logits)
    cotangents[index, order[:, 0]], cotangents[index, order[:, 2]] = 1, -1
    lead = (measured.logits * cotangents).sum(axis=1)
    third = model.vjp(images, cotangents)[1] * column(1 / np.maximum(lead, 1e-6))
    return np.asarray(column(share) * up + column(1 - share) * third, np.float32)
