"""The images that an evaluation attacks."""

import zlib
from dataclasses import dataclass

import numpy as np

from guard import data
from guard.attacks import Floats, Labels
from guard.bundle import Bundle
from guard.data import Dataset
from guard.errors import DataError


@dataclass(frozen=True)
class Sample:
    """Images of a dataset, in the order they are attacked: their indices and true classes, both (N,).

    `held_out`: the model was calibrated on this dataset, and they are of its report fold.
    """

    dataset: Dataset
    index: Labels
    labels: Labels
    seed: int
    held_out: bool

    @classmethod
    def draw(cls, dataset: Dataset, found: Bundle, count: int, seed: int) -> "Sample":
        """At most `count` images: of the calibration's report fold where it was calibrated on this dataset,
        else of all.

        Raises `DataError` for data without labels, of another shape than the bundle's input, too few, or
        that the model was trained on; `BundleError` for a bundle that is not calibrated.
        """
        _check(dataset, found)
        if dataset.labels is None:
            raise DataError(
                f"{dataset.name}: has no labels; attacks lead away from the true classes. Give a folder with "
                "one sub-folder per class, or an .npz file with y_test."
            )
        calibration = found.calibrated()
        held_out = calibration.data.get("digest") == dataset.digest
        fold = np.arange(len(dataset))
        if held_out:
            fold = data.folds(len(dataset), calibration.seed)["report"]
        index = np.random.default_rng([seed, 2]).permutation(fold)[:count]
        if len(index) < 2:
            raise DataError(
                f"{dataset.name}: {len(index)} of its images would be evaluated; expected at least 2. "
                "Give more images, or --images a larger number."
            )
        return cls(dataset, index, dataset.labels[index], seed, held_out)

    def __len__(self) -> int:
        return len(self.index)

    def pixels(self, rows: Labels) -> Floats:
        """The images of these rows, float32 (B, C, H, W) in [0, 1]."""
        return data.to_floats(self.dataset.images[self.index[rows]])

    def piece_seed(self, name: str, part: Labels) -> int:
        """Of a piece of an attack's images: attacks that shared one would start at the same points."""
        return zlib.crc32(f"{self.seed} {name} {part[0]}".encode())


def _check(dataset: Dataset, found: Bundle) -> None:
    data.check_shape(dataset, found.manifest.input.shape)
    training = found.manifest.provenance.get("training") or {}
    trained_on = (training.get("data") or {}).get("digest") if isinstance(training, dict) else None
    if trained_on == dataset.digest:
        raise DataError(
            f"{dataset.name}: these are the images that {found.path} was trained on, on which every figure "
            "flatters. Give held-out images."
        )
