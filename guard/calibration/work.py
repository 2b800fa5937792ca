"""What the stages of a calibration share: what is promised, the images, and where results are kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from guard import data
from guard.bundle import ScoreName
from guard.calibration.fitting import Effort
from guard.data import Dataset
from guard.runtime import Detector
from guard.stages import Stages

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """What is promised. `fpr` is the clean false positive rate of the detector; with `guarantee` "pac" it
    holds with probability 1 - `delta` over the calibration images, with "marginal" on average over them.
    `alphas` are the conformal radii's shares of accepted images with a successful attack inside, in rising
    order. `seed` fixes folds, blocks and the attacks' random starts.
    """

    score: ScoreName = "jacobian"
    fpr: float = 0.05
    guarantee: Literal["marginal", "pac"] = "marginal"
    delta: float = 0.05
    alphas: tuple[float, ...] = (0.01, 0.05)
    seed: int = 0

    @property
    def risk(self) -> float | None:
        """`delta` where it plays a part."""
        return self.delta if self.guarantee == "pac" else None


@dataclass(frozen=True)
class Work:
    """A bundle's detector, the images, and where the stages keep what they finished."""

    detector: Detector
    dataset: Dataset
    folds: Mapping[str, Int64]
    settings: Settings
    effort: Effort
    stages: Stages

    def pixels(self, indices: Int64) -> NDArray[np.float32]:
        """Images (B, C, H, W) in [0, 1]."""
        return data.to_floats(self.dataset.images[indices])

    def generator(self, piece: Int64, salt: int) -> np.random.Generator:
        """Randomness of one piece, whatever was computed before it."""
        return np.random.default_rng([self.settings.seed, salt, int(piece[0])])


def folds_of(dataset: Dataset, seed: int) -> dict[str, Int64]:
    """The folds of `data.folds`, each in random order.

    Data come sorted by class where they are a folder: blocks and subsamples need random order.
    """
    generator = np.random.default_rng([seed, 1])
    return {name: generator.permutation(part) for name, part in data.folds(len(dataset), seed).items()}
