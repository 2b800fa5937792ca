import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from guard import statistics
from guard.errors import CalibrationError

# Ranks worked by hand from ceil((n + 1)(1 - alpha)).
RANKS = [
    (19, 0.05, 19),
    (20, 0.05, 20),
    (38, 0.05, 38),
    (39, 0.05, 38),
    (99, 0.01, 99),
    (99, 0.1, 90),
    (999, 0.05, 950),
]


@pytest.mark.parametrize(("n", "alpha", "rank"), [*RANKS, (4990, 0.05, 4742), (5000, 0.05, 4751)])
def test_conformal_rank(n: int, alpha: float, rank: int) -> None:
    assert statistics.conformal_rank(n, alpha) == rank


@pytest.mark.parametrize(
    ("n", "alpha", "least"), [(18, 0.05, 19), (0, 0.05, 19), (98, 0.01, 99), (1, 1 / 3, 3)]
)
def test_too_few_images_names_how_many_are_needed(n: int, alpha: float, least: int) -> None:
    with pytest.raises(CalibrationError, match=f"at least {least}"):
        statistics.conformal_rank(n, alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_rates_outside_the_open_unit_interval_are_refused(alpha: float) -> None:
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        statistics.conformal_rank(100, alpha)


@given(st.integers(1, 3000), st.integers(1, 999))
def test_conformal_rank_is_the_ceiling_in_exact_arithmetic(n: int, thousandths: int) -> None:
    if (n + 1) * thousandths < 1000:
        return
    rank = statistics.conformal_rank(n, thousandths / 1000)
    assert rank == -(-(n + 1) * (1000 - thousandths) // 1000)


# Least n of Wilks (1941): 59, 93, 124, ... samples for 95% coverage with 95% confidence, rejecting 0, 1, 2,
# ...
@pytest.mark.parametrize(
    ("n", "rejected"), [(59, 0), (92, 0), (93, 1), (124, 2), (153, 3), (181, 4), (208, 5)]
)
def test_pac_rank_agrees_with_wilks_table(n: int, rejected: int) -> None:
    assert statistics.pac_rank(n, 0.05, 0.05) == n - rejected


@given(st.integers(100, 4000), st.sampled_from([0.05, 0.1, 0.01, 0.123]), st.sampled_from([0.05, 0.3, 0.001]))
def test_pac_rank_is_the_smallest_that_keeps_the_risk(n: int, alpha: float, delta: float) -> None:
    if float(stats.binom.cdf(0, n, alpha)) > delta:
        with pytest.raises(CalibrationError, match="too few"):
            statistics.pac_rank(n, alpha, delta)
        return
    rejected = n - statistics.pac_rank(n, alpha, delta)
    assert stats.binom.cdf(rejected, n, alpha) <= delta * (1 + 1e-9)
    assert stats.binom.cdf(rejected + 1, n, alpha) > delta * (1 - 1e-9)


def test_pac_message_names_the_least_n() -> None:
    with pytest.raises(CalibrationError, match="at least 59"):
        statistics.pac_rank(58, 0.05, 0.05)


def test_threshold_is_the_ranked_score() -> None:
    scores = np.random.default_rng(0).permutation(999).astype(float)
    assert statistics.conformal_threshold(scores, 0.05) == 949.0
    assert statistics.conformal_threshold(scores, 0.05, 0.05) == statistics.pac_rank(999, 0.05, 0.05) - 1


def test_nan_scores_count_as_the_most_suspicious() -> None:
    scores = np.arange(100.0)
    scores[:3] = np.nan
    assert statistics.conformal_threshold(scores, 0.05) == 98.0
    scores[:10] = np.inf
    with pytest.raises(CalibrationError, match="10 of 100 calibration scores are not finite"):
        statistics.conformal_threshold(scores, 0.05)


def test_marginal_coverage_by_simulation() -> None:
    generator = np.random.default_rng(7)
    n, trials, fresh = 59, 4000, 20
    scores = generator.exponential(size=(trials, n + fresh))
    thresholds = np.array([statistics.conformal_threshold(row[:n], 0.1) for row in scores])
    rate = (scores[:, n:] > thresholds[:, None]).mean()
    assert rate == pytest.approx(0.1, abs=0.003)  # (n + 1) alpha is whole: equality holds
    promised = np.array([statistics.conformal_threshold(row[:n], 0.1, 0.2) for row in scores])
    true_rates = np.exp(-promised)
    assert (true_rates > 0.1).mean() <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / trials)
    assert (true_rates > 0.1).mean() > 0.1


def test_predicted_rate_of_the_method_notes() -> None:
    interval = statistics.predicted_rate(4990, statistics.conformal_rank(4990, 0.05), 4990)
    assert (round(interval.lower, 3), round(interval.upper, 3)) == (0.042, 0.059)


@given(st.integers(20, 400), st.integers(1, 300), st.data())
def test_predicted_rate_holds_its_level(n: int, m: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, n))
    interval = statistics.predicted_rate(n, rank, m, 0.9)
    law = stats.betabinom(m, n + 1 - rank, rank)
    low, high = round(interval.lower * m), round(interval.upper * m)
    assert law.cdf(low - 1) <= 0.05 + 1e-9
    assert law.sf(high) <= 0.05 + 1e-9
    assert low <= high


@given(st.integers(1, 3000), st.data())
def test_clopper_pearson_against_beta_quantiles(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    upper = 1.0 if k == n else stats.beta.ppf(0.95, k + 1, n - k)
    assert statistics.clopper_pearson_upper(k, n) == pytest.approx(upper, rel=1e-9)
    both = statistics.clopper_pearson(k, n, 0.9)
    assert both.upper == pytest.approx(upper, rel=1e-9)
    assert both.lower == pytest.approx(0.0 if k == 0 else stats.beta.ppf(0.05, k, n - k + 1), rel=1e-9)


def test_rule_of_three() -> None:
    assert statistics.clopper_pearson_upper(0, 299) < 0.01 < statistics.clopper_pearson_upper(0, 298)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(CalibrationError):
        statistics.clopper_pearson_upper(k, n)


def test_quantile_level_inverts_quantile_curve() -> None:
    reference = np.random.default_rng(1).exponential(size=200)
    levels = np.linspace(0.001, 0.99, 57)
    back = statistics.quantile_level(reference, statistics.quantile_curve(reference, levels))
    assert back == pytest.approx(levels, abs=1e-12)
    assert statistics.quantile_level(
        reference, np.array([np.nan, np.inf, 0.0, reference.max()])
    ) == pytest.approx([1.0, 1.0, 0.0, 200 / 201])
    assert np.isinf(statistics.quantile_curve(reference, 1.0))


def test_quantile_curve_goes_on_beyond_the_reference() -> None:
    reference = np.array([1.0, 2.0, np.nan, 4.0, np.inf])  # only finite scores make the curve
    assert statistics.quantile_curve(reference, [0.75, 0.875, 0.999]) == pytest.approx([4.0, 8.0, 1000.0])
    assert statistics.quantile_level(reference, [4.0, 8.0, 1000.0]) == pytest.approx([0.75, 0.875, 0.999])
    nothing = np.array([np.nan, 0.0])
    assert statistics.quantile_level(nothing, [0.0, 1e-9]).tolist() == [0.5, 1.0]
    assert statistics.quantile_curve(nothing, [0.25, 0.5, 1.0]).tolist() == [0.0, 0.0, np.inf]


def test_joint_thresholds_keep_the_rate_of_the_union() -> None:
    generator = np.random.default_rng(3)
    rejected = []
    for _ in range(400):
        common = generator.exponential(size=(1400, 1))
        scores = np.hstack([common, 0.5 * common + generator.exponential(size=(1400, 1))])
        thresholds, _ = statistics.joint_thresholds(scores[:200], scores[200:399], 0.1)
        rejected.append((scores[400:] > thresholds).any(axis=1).mean())
    assert np.mean(rejected) == pytest.approx(0.1, abs=0.004)


def test_joint_thresholds_accept_at_least_the_rank() -> None:
    generator = np.random.default_rng(4)
    for _ in range(50):
        scores = generator.exponential(size=(600, 3))
        thresholds, level = statistics.joint_thresholds(scores[:400], scores[400:], 0.05)
        accepted = (scores[400:] <= thresholds).all(axis=1).sum()
        assert accepted == statistics.conformal_rank(200, 0.05)
        assert 0.9 < level < 1


def test_joint_thresholds_of_a_small_reference_keep_the_rate() -> None:
    thresholds, level = statistics.joint_thresholds(
        np.ones((2, 2)), np.arange(200.0).reshape(100, 2) + np.array([1, 0]), 0.05
    )
    assert thresholds == pytest.approx([191.0, 191.0])  # 96 of 100 are to be accepted
    assert 0.99 < level < 1


def test_joint_thresholds_need_finite_scores_and_a_reference() -> None:
    scores = np.arange(200.0).reshape(100, 2)
    scores[10:20, 1] = np.inf
    with pytest.raises(CalibrationError, match="10 of 100 calibration images have scores that are not"):
        statistics.joint_thresholds(np.ones((2, 2)), scores, 0.05)
    with pytest.raises(CalibrationError, match="at least one image"):
        statistics.joint_thresholds(np.ones((0, 2)), scores, 0.05)
