"""What is attacked: a classifier with its gradients, and the decisions that are served with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from guard.attacks import Floats, Labels, WithRows
from guard.bundle import ScoreName
from guard.decision import Guard
from guard.norms import Norm
from guard.runtime import Measurement

Flags = NDArray[np.bool_]
Values = NDArray[np.float64]


class Classifier(WithRows, Protocol):
    """A classifier that attacks can differentiate: a `guard.runtime.Detector`, or a network in torch."""

    input_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Verdict:
    """What the server would answer to B images: predicted classes (B,), and which are accepted (B,).

    `ratio` (B,) is the largest score over its threshold, at most 1 exactly where every test of the detector
    passes, infinite where not finite; `radii` (B,) by norm are those that a least radius is compared with,
    before rejection set them to 0; `measurement` is what the decision was made from.
    """

    labels: Labels
    accepted: Flags
    ratio: Values
    radii: Mapping[Norm, Values]
    measurement: Measurement


@dataclass(frozen=True)
class Target:
    """A classifier and, by score, the guards that would serve it; without guards, the classifier alone."""

    model: Classifier
    guards: Mapping[ScoreName, Guard] = field(default_factory=dict)

    def verdict(self, images: Floats, score: ScoreName) -> Verdict:
        """The served decisions on images (B, C, H, W) in [0, 1], B >= 1, under the guard of `score`."""
        guard = self.guards[score]
        measurement = guard.measure(images)
        decisions = list(guard.decide(measurement))
        ratio = guard.ratios(measurement)
        return Verdict(
            np.array([decision.label for decision in decisions], np.int64),
            np.array([decision.accepted for decision in decisions], np.bool_),
            np.where(np.isnan(ratio), np.inf, ratio),
            {
                "l2": np.array([decision.measured.l2 for decision in decisions], np.float64),
                "linf": np.array([decision.measured.linf for decision in decisions], np.float64),
            },
            measurement,
        )
