"""What the stages of a calibration take, about: for the time that is left.

Costs are in passes that give one gradient for one image, and per image where nothing else is said.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from guard.calibration.fitting import EPS, Effort

Folds = Mapping[str, NDArray[np.int64]]

PASS = 1.4
"""Measuring an image."""

LEADERS = 0.05
"""The share of images that get a second look, about."""


def whole(effort: Effort, folds: Folds, classes: int) -> int:
    """What a whole calibration takes."""
    omega = min(effort.omega_images, len(folds["radii"]))
    violations = min(effort.violation_images, len(folds["report"]))
    conformal = min(effort.distance_images, len(folds["conformal"]))
    per_norm = (
        omega * (screening(effort) + effort.kept * ascent(effort))
        + LEADERS * omega * second_look(effort)
        + violations * (nearest(effort) + inside(effort))
        + conformal * nearest(effort)
    )
    longest = min(effort.row_images, len(folds["radii"])) * rows(effort, classes)
    scores = rescoring(folds) + PASS * len(folds["conformal"])
    checked = agreement(classes) * agreement_images(effort, folds, classes)
    return round(2 * per_norm + longest + scores + checked)


def rescoring(folds: Folds) -> int:
    """What new thresholds for another score take at most, about."""
    return round(PASS * (2 * len(folds["threshold"]) + len(folds["radii"]) + len(folds["report"])))


def rows(effort: Effort, classes: int) -> float:
    """The longest Jacobian rows."""
    return 3 * effort.row_steps + min(classes, 16)


def agreement(classes: int) -> int:
    """A full Jacobian, in four variants."""
    return 4 * classes


def agreement_images(effort: Effort, folds: Folds, classes: int) -> int:
    """On how many images decisions are compared: fewer where there are many classes."""
    affordable = max(4, 10 * effort.agreement_images // classes)
    return min(effort.agreement_images, affordable, len(folds["report"]))


def screening(effort: Effort) -> float:
    """The look at all images that omega is fitted to."""
    return effort.starts * (effort.steps // 2 + 1) + 1 + 1.25 * effort.steps + 12


def ascent(effort: Effort) -> float:
    """The remainders at every eps."""
    return len(EPS) * (effort.steps + 1) + 1


def second_look(effort: Effort) -> float:
    """Both again with twice the effort."""
    return 2 * (screening(effort) + ascent(effort))


def nearest(effort: Effort) -> float:
    """The nearest image of another class."""
    return 2.5 * effort.distance_steps + 12


def inside(effort: Effort) -> float:
    """An attack from inside a radius."""
    return effort.violation_restarts * (effort.violation_steps + 1)
