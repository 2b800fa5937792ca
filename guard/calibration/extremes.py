"""Extreme values from block maxima: a generalized extreme value fit by maximum likelihood, and its quantile.

Everything here is an **estimate**: the fit extrapolates a supremum from the maxima that were seen.
Source: Weng et al. 2018 (CLEVER), SCALE section 2.2 (quantile at 1 - 0.001).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from guard.errors import CalibrationError

EXCEEDANCE = 0.001
SHAPE_LIMIT = (
    0.5  # beyond it a GEV has no variance: a shape fitted there says the sample is too small, not heavy
)
LEAST_BLOCKS = 10
OUTSIDE = 1e10  # stands for an infinite likelihood loss

Method = Literal["gev", "gumbel", "largest"]


@dataclass(frozen=True)
class Extreme:
    """An upper quantile of block maxima and how it was found.

    `value` is never below the largest maximum seen. `shape` is the usual xi (scipy's `c` is minus it),
    `p_value` the Kolmogorov-Smirnov agreement of the maxima with the fit (optimistic, since the fit saw
    them).
    """

    value: float
    method: Method
    largest: float
    blocks: int
    shape: float = 0.0
    location: float = 0.0
    scale: float = 0.0
    p_value: float = 1.0


def block_maxima(values: ArrayLike, blocks: int) -> NDArray[np.float64]:
    """Maxima of `blocks` consecutive runs of the values, as equal in length as they divide; shape (blocks,).

    Values are exchangeable images here, so consecutive runs are random blocks. NaN is refused: a maximum over
    it would mean nothing.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if not 1 <= blocks <= array.size:
        raise CalibrationError(
            f"{array.size} values do not make {blocks} blocks: expected at least one value each."
        )
    if not np.isfinite(array).all():
        raise CalibrationError(
            f"{int(np.sum(~np.isfinite(array)))} of {array.size} values are not finite: the gradients "
            "overflow on these images. Check the model and the images' range."
        )
    return np.array([part.max() for part in np.array_split(array, blocks)])


def of_blocks(exceedance: float, length: int) -> float:
    """How likely the maximum of `length` independent values exceeds what one exceeds with `exceedance`."""
    return -math.expm1(length * math.log1p(-exceedance))


def fit(maxima: ArrayLike, exceedance: float = EXCEEDANCE) -> Extreme:
    """The quantile at 1 - `exceedance` of the distribution of block maxima, by maximum likelihood.

    Tried in turn: the full GEV; with a shape outside [-1, 0.5], or no fit, the Gumbel (shape 0); with maxima
    all but equal, or too few of them, the largest one. `method` says which held. Status: estimate.
    """
    values = np.sort(np.asarray(maxima, dtype=np.float64).ravel())
    if not values.size or not np.isfinite(values).all():
        raise CalibrationError("an extreme value fit needs at least one block maximum, all of them finite.")
    largest = float(values[-1])
    spread = float(values.std())
    if values.size < LEAST_BLOCKS or spread <= 1e-9 * max(1e-300, float(np.abs(values).max())):
        return Extreme(largest, "largest", largest, values.size)
    centre = float(values.mean())
    scaled = (values - centre) / spread  # the optimizer's tolerances are absolute
    method: Method = "gev"
    shape, location, scale = _fit_gev(scaled)
    if not (math.isfinite(shape) and math.isfinite(location) and scale > 1e-6 and -1 <= shape <= SHAPE_LIMIT):
        location, scale = stats.gumbel_r.fit(scaled)
        method, shape = "gumbel", 0.0
    law = stats.genextreme(-shape, location, scale)
    value = centre + spread * float(law.isf(exceedance))
    return Extreme(
        value=max(value, largest),
        method=method,
        largest=largest,
        blocks=values.size,
        shape=shape,
        location=centre + spread * location,
        scale=spread * scale,
        p_value=float(stats.kstest(scaled, law.cdf).pvalue),
    )


def _fit_gev(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Maximum-likelihood (shape xi, location, scale) of sorted values; NaN where no search converges."""
    for start in (_moments(values), (0.01, *_gumbel(values))):
        shape, location, scale = start
        found = optimize.minimize(
            _likelihood,
            np.array([shape, location, math.log(scale)]),
            args=(values,),
            jac=True,
            method="BFGS",
            options={"maxiter": 50},
        )
        if found.fun < OUTSIDE and float(np.abs(found.jac).max()) < 1e-3 * values.size:
            return float(found.x[0]), float(found.x[1]), math.exp(float(found.x[2]))
    return math.nan, math.nan, math.nan


def _likelihood(
    parameters: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Minus the log-likelihood of sorted values and its gradient in shape, location and log scale."""
    shape, location, log_scale = (float(part) for part in parameters)
    if abs(log_scale) > 20:
        return OUTSIDE, np.zeros(3)
    inverse = math.exp(-log_scale)
    z = (values - location) * inverse
    base = 1 + shape * z
    if base[0] <= 0 or base[-1] <= 0:
        return OUTSIDE, np.zeros(3)  # a maximum outside the support
    if abs(shape) < 1e-6:  # the series avoids 0 / 0
        y, by_shape = z - shape * z * z / 2, -z * z / 2
    else:
        y = np.log(base) / shape
        by_shape = (z / base - y) / shape
    with np.errstate(over="ignore"):
        tail = np.exp(-y)
    value = float(((1 + shape) * y + tail).sum()) + values.size * log_scale
    if not math.isfinite(value):
        return OUTSIDE, np.zeros(3)
    pull = 1 + shape - tail
    by_z = pull / base
    gradient = [(y + pull * by_shape).sum(), -inverse * by_z.sum(), values.size - (z * by_z).sum()]
    return value, np.array(gradient, dtype=np.float64)


def _gumbel(values: NDArray[np.float64]) -> tuple[float, float]:
    """Location and scale of a Gumbel law of the same mean and deviation."""
    scale = math.sqrt(6) / math.pi * float(values.std())
    return float(values.mean()) - float(np.euler_gamma) * scale, scale


def _moments(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Shape, location and scale from probability-weighted moments (Hosking, Wallis & Wood 1985) of sorted
    values.
    """
    n = values.size
    rank = np.arange(n)
    b0 = float(values.mean())
    b1 = float((values * rank).sum() / (n * (n - 1)))
    b2 = float((values * rank * (rank - 1)).sum() / (n * (n - 1) * (n - 2)))
    c = (2 * b1 - b0) / (3 * b2 - b0) - math.log(2) / math.log(3)
    k = 7.8590 * c + 2.9554 * c * c  # minus the shape
    if not abs(k) < 0.9 or abs(k) < 1e-6:
        return 0.01, *_gumbel(values)
    gamma = math.gamma(1 + k)
    scale = (2 * b1 - b0) * k / (gamma * (1 - 2**-k))
    return -k, b0 + scale * (gamma - 1) / k, scale
