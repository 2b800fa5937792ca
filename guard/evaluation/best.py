"""What an attack keeps while it runs: the nearest adversarial image of each image, and what it cost."""

import numpy as np
from numpy.typing import NDArray

from guard.attacks import Floats, Found, length
from guard.norms import Norm

Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]
Counts = NDArray[np.int64]


class Best:
    """The nearest adversarial images offered so far, by `norm`, of images (B, C, H, W).

    `distance` (B,) is inf where there is none yet. Costs are in forward passes per image.
    """

    def __init__(self, images: Floats, norm: Norm) -> None:
        self.origin = images
        self.norm = norm
        self.images = images.copy()
        self.distance = np.full(len(images), np.inf)
        self._spent = np.zeros(len(images), dtype=np.int64)

    @property
    def broken(self) -> Flags:
        """Images (B,) that some offer has broken."""
        return np.asarray(np.isfinite(self.distance), dtype=np.bool_)

    def charge(self, rows: Rows, passes: int | Counts) -> None:
        """Books what was spent on images (one number, or (R,)); once an image is broken, nothing more."""
        self._spent[rows] += np.where(self.broken[rows], 0, passes)

    def offer(self, rows: Rows, points: Floats, broken: Flags, passes: int | Counts) -> None:
        """Takes points (R, C, H, W) that are `broken` (R,) where they are nearer; they cost `passes` each."""
        self.charge(rows, passes)
        reach = length(points - self.origin[rows], self.norm)
        nearer = broken & (reach < self.distance[rows])
        self.images[rows[nearer]] = points[nearer]
        self.distance[rows[nearer]] = reach[nearer]

    def found(self) -> Found:
        """The attack's outcome, `passes` being those until the first success."""
        return Found(self.images, self.broken, self.distance, self._spent)
