"""Histograms of scores and radii, as a calibration keeps them."""

import numpy as np
from numpy.typing import NDArray

from guard.bundle import Histogram

Values = NDArray[np.float64]

_SPREAD = 2.5  # the scores' even bins end at so many thresholds
_BINS = 50
_RADIUS_BINS = 100
_SMALLEST = 1e-300  # an end below it leaves no room for bins


def of_scores(scores: Values, threshold: float) -> Histogram:
    """Counts of finite scores in even bins up to 2.5 thresholds, and one more bin for those beyond."""
    finite = scores[np.isfinite(scores)]
    end = _SPREAD * threshold if threshold > _SMALLEST else 1.0
    edges = np.linspace(0.0, end, _BINS + 1)
    counts, _ = np.histogram(finite, edges)
    beyond = int((finite > end).sum())
    if beyond:
        edges = np.append(edges, np.nextafter(finite.max(), np.inf))
        counts = np.append(counts, beyond)
    return Histogram(edges=edges.tolist(), counts=counts.tolist())


def of_radii(radii: Values) -> Histogram:
    """Counts of radii in even bins up to the largest; unbounded ones count in the last."""
    finite = radii[np.isfinite(radii)]
    largest = float(finite.max(initial=0.0))
    end = largest if largest > _SMALLEST else 1.0
    counts, edges = np.histogram(np.where(np.isposinf(radii), end, radii), _RADIUS_BINS, (0.0, end))
    return Histogram(edges=edges.tolist(), counts=counts.tolist())
