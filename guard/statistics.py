"""Finite-sample statistics of the detector: conformal ranks, the rates they promise, and exact intervals.

Ranks are computed in exact rational arithmetic, because the guarantee hangs on one unit of the rank.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from guard.errors import CalibrationError


def _fraction(value: float, name: str) -> Fraction:
    """The decimal that was written: 0.05 means 1/20, not the binary number next to it."""
    if not 0 < value < 1:
        raise CalibrationError(f"{name} is {value}: expected a number strictly between 0 and 1.")
    return Fraction(repr(float(value)))


def conformal_rank(n: int, alpha: float) -> int:
    """Rank k (1 = smallest) such that the k-th smallest of n scores is the split-conformal threshold.

    k = n + 1 - floor((n + 1) alpha), which equals ceil((n + 1)(1 - alpha)). For scores exchangeable with a
    fresh one, P(fresh score > k-th smallest) <= alpha: finite-sample, marginal over the calibration draw.
    Raises `CalibrationError` where n is too small for any rank to promise alpha (n < 19 at alpha = 0.05).
    Source: Vovk, Gammerman & Shafer 2005; Lei et al. 2018, section 2.
    """
    share = _fraction(alpha, "the false positive rate")
    rank = n + 1 - math.floor((n + 1) * share)
    if rank > n:
        raise CalibrationError(
            f"{n} calibration images are too few for a false positive rate of {alpha}: "
            f"expected at least {least_number(alpha)}. Give more images or allow a higher rate."
        )
    return rank


def pac_rank(n: int, alpha: float, delta: float) -> int:
    """Smallest rank k with P(true false positive rate > alpha) <= delta over the calibration draw.

    Given n continuous scores, the rate above the k-th smallest is Beta(n + 1 - k, k), and P(Beta(n + 1 - k,
    k) > alpha) = P(Binomial(n, alpha) <= n - k), summed here in integers, exactly. Ties only lower the rate.
    Raises `CalibrationError` where n is too small. Source: Vovk 2012, proposition 2a.
    """
    share, risk = _fraction(alpha, "the false positive rate"), _fraction(delta, "delta")
    success, failure = share.numerator, share.denominator - share.numerator
    allowed = share.denominator**n * risk.numerator // risk.denominator
    term = failure**n  # C(n, j) success^j failure^(n-j), over the common denominator
    total, rejected = term, -1
    while total <= allowed:
        rejected += 1
        term = term * (n - rejected) * success // ((rejected + 1) * failure)
        total += term
    if rejected < 0:
        raise CalibrationError(
            f"{n} calibration images are too few for a false positive rate of {alpha} with probability "
            f"{1 - delta:g}: expected at least {least_number(alpha, delta)}. "
            "Give more images, or allow a higher rate or delta."
        )
    return n - rejected


def least_number(alpha: float, delta: float | None = None) -> int:
    """The fewest scores from which `rank_of` has a rank."""
    share = _fraction(alpha, "the false positive rate")
    marginal = math.ceil(1 / share) - 1
    if delta is None:
        return marginal
    return max(marginal, math.ceil(math.log(_fraction(delta, "delta")) / math.log1p(-share)))


def rank_of(n: int, alpha: float, delta: float | None = None) -> int:
    """The marginal rank, or with `delta` the PAC rank (never below the marginal one)."""
    marginal = conformal_rank(n, alpha)
    return marginal if delta is None else max(marginal, pac_rank(n, alpha, delta))


def smallest(scores: ArrayLike, rank: int) -> float:
    """The `rank`-th smallest score (1 = smallest); NaN counts as larger than every number (fails closed)."""
    values = np.asarray(scores, dtype=np.float64).ravel()
    if not 1 <= rank <= values.size:
        raise CalibrationError(f"rank {rank} of {values.size} scores does not exist.")
    return float(np.sort(np.where(np.isnan(values), np.inf, values))[rank - 1])


def conformal_threshold(scores: ArrayLike, alpha: float, delta: float | None = None) -> float:
    """Split-conformal threshold t: reject a score that is not <= t.

    Marginal guarantee P(rejected) <= alpha; with `delta`, rate <= alpha with probability 1 - delta over the
    calibration draw. Raises `CalibrationError` where n is too small or the threshold would be infinite.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    threshold = smallest(values, rank_of(values.size, alpha, delta))
    if not math.isfinite(threshold):
        raise CalibrationError(
            f"{int(np.sum(~np.isfinite(values)))} of {values.size} calibration scores are not finite: no "
            f"threshold can keep a false positive rate of {alpha}. Check the model on these images, or "
            "choose another score."
        )
    return threshold


def _log_beta(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])
    return np.asarray(log_gamma(a) + log_gamma(b) - log_gamma(a + b), dtype=np.float64)


def beta_binomial_pmf(m: int, a: float, b: float) -> NDArray[np.float64]:
    """P(X = 0..m), shape (m + 1,), for X ~ BetaBinomial(m, a, b)."""
    counts = np.arange(m + 1, dtype=np.float64)
    one = np.ones_like(counts)
    log_choose = -np.log(m + 1.0) - _log_beta(counts + 1, m - counts + 1)
    mass = np.exp(log_choose + _log_beta(counts + a, m - counts + b) - _log_beta(a * one, b * one))
    return np.asarray(mass / mass.sum(), dtype=np.float64)


@dataclass(frozen=True)
class Interval:
    """A closed interval of shares in [0, 1] that holds with probability `level`."""

    lower: float
    upper: float
    level: float


def predicted_rate(n: int, rank: int, m: int, level: float = 0.95) -> Interval:
    """Central interval of the share of m fresh scores above the `rank`-th smallest of n.

    The count is BetaBinomial(m, n + 1 - rank, rank), exactly, for continuous exchangeable scores (ties lower
    it). Each tail holds at most (1 - level) / 2.
    """
    if m < 1 or not 1 <= rank <= n:
        raise CalibrationError(f"no rate to predict for rank {rank} of {n} scores and {m} fresh images.")
    cdf = np.cumsum(beta_binomial_pmf(m, n + 1 - rank, rank))
    tail = (1 - level) / 2
    lower = int(np.searchsorted(cdf, tail, side="right"))
    upper = int(np.searchsorted(cdf, 1 - tail, side="left"))
    return Interval(min(lower, m) / m, min(upper, m) / m, level)


def _binomial_tail(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k) in floating point."""
    if p <= 0 or k >= n:
        return 1.0
    if p >= 1 or k < 0:
        return 0.0
    log_choose = np.array(
        [math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) for j in range(k + 1)]
    )
    j = np.arange(k + 1)
    return min(1.0, float(np.exp(log_choose + j * math.log(p) + (n - j) * math.log1p(-p)).sum()))


def _solve(k: int, n: int, target: float) -> float:
    """The p with P(Binomial(n, p) <= k) = target (decreasing in p)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _binomial_tail(k, n, middle) > target:
            low = middle
        else:
            high = middle
    return high


def clopper_pearson_upper(k: int, n: int, level: float = 0.95) -> float:
    """One-sided upper confidence bound for a share seen k times in n: exact, coverage at least `level`."""
    _check_count(k, n)
    return 1.0 if k == n else _solve(k, n, 1 - level)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """Two-sided exact confidence interval for a share seen k times in n (Clopper & Pearson 1934)."""
    _check_count(k, n)
    tail = (1 - level) / 2
    upper = 1.0 if k == n else _solve(k, n, tail)
    lower = 0.0 if k == 0 else _solve(k - 1, n, 1 - tail)
    return Interval(lower, upper, level)


def _check_count(k: int, n: int) -> None:
    if not 0 <= k <= n or n < 1:
        raise CalibrationError(f"{k} of {n} is not a share: expected 0 <= count <= n and n >= 1.")


def _knots(reference: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The finite `reference` scores after a 0, ascending, and the level of each: level j / (n + 1) is the
    j-th smallest.
    """
    values = np.sort(np.asarray(reference, dtype=np.float64).ravel())
    values = np.concatenate([[0.0], values[np.isfinite(values)]])
    return values, np.arange(values.size) / values.size


def quantile_curve(reference: ArrayLike, level: ArrayLike) -> NDArray[np.float64]:
    """Interpolated quantiles of non-negative `reference` scores: level j / (n + 1) is the j-th smallest.

    Above n / (n + 1) the curve goes on as 1 / (1 - level) does, to +inf at level 1.
    """
    values, grid = _knots(reference)
    levels = np.asarray(level, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.where(levels < 1, values[-1] / (values.size * (1 - levels)), np.inf)
    return np.asarray(np.where(levels > grid[-1], beyond, np.interp(levels, grid, values)), dtype=np.float64)


def quantile_level(reference: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """Level of each score among non-negative `reference` scores, in [0, 1]: the inverse of `quantile_curve`.

    1 for infinity and NaN.
    """
    values, grid = _knots(reference)
    asked = np.asarray(scores, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.where(asked > values[-1], 1 - values[-1] / (values.size * asked), 1.0)
    return np.asarray(np.where(asked <= values[-1], np.interp(asked, values, grid), beyond), dtype=np.float64)


def joint_thresholds(
    reference: NDArray[np.float64], calibration: NDArray[np.float64], alpha: float, delta: float | None = None
) -> tuple[NDArray[np.float64], float]:
    """Thresholds of K tests at one joint level, so that rejecting when any test exceeds its own keeps alpha.

    `reference` (N, K) and `calibration` (n, K) hold non-negative scores of disjoint exchangeable images. The
    reference fixes, for every level u, one threshold per test (its u-quantile), growing with u. An image's
    joint score is the smallest level at which every test accepts it, the largest of its K levels; the
    conformal threshold u* of these on the calibration images gives the K thresholds. Finite-sample, like
    `conformal_threshold`, because the reference is independent of calibration and fresh images. Returns
    thresholds (K,) and u*. Raises `CalibrationError` where u* leaves a test without a finite threshold: too
    many scores are not finite.
    """
    if reference.shape[0] < 1 or reference.ndim != 2 or calibration.ndim != 2:
        raise CalibrationError("the combined score needs a reference fold with at least one image.")
    tests = range(reference.shape[1])
    joint = np.max([quantile_level(reference[:, k], calibration[:, k]) for k in tests], axis=0)
    level = smallest(joint, rank_of(joint.size, alpha, delta))
    accepted = calibration[joint <= level]
    # The second term undoes rounding: what is accepted at the level stays accepted by the thresholds.
    thresholds = np.array(
        [max(float(quantile_curve(reference[:, k], level)), accepted[:, k].max()) for k in tests]
    )
    if not np.isfinite(thresholds).all():
        unusable = int((~np.isfinite(calibration)).any(axis=1).sum())
        raise CalibrationError(
            f"{unusable} of {len(calibration)} calibration images have scores that are not finite: no "
            f"thresholds can keep a false positive rate of {alpha}. Check the model on these images, or "
            "choose another score."
        )
    return thresholds, level
