import numpy as np
import pytest
from scipy import stats

from guard.calibration import extremes
from guard.errors import CalibrationError


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.2])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_quantile_is_recovered_from_simulated_maxima(shape: float, scale: float) -> None:
    law = stats.genextreme(-shape, 3 * scale, 0.5 * scale)
    maxima = law.rvs(size=2000, random_state=5)
    found = extremes.fit(maxima)
    assert found.method == "gev"
    assert found.shape == pytest.approx(shape, abs=0.06)
    assert found.location == pytest.approx(3 * scale, rel=0.02)
    assert found.scale == pytest.approx(0.5 * scale, rel=0.06)
    fitted = stats.genextreme(-found.shape, found.location, found.scale)
    assert found.value == pytest.approx(max(fitted.isf(0.001), maxima.max()))
    assert fitted.isf(0.001) == pytest.approx(law.isf(0.001), rel=0.12)
    assert found.p_value > 0.01


def test_agrees_with_scipys_own_likelihood_maximum() -> None:
    maxima = stats.genextreme.rvs(0.1, size=100, random_state=0)
    shape, location, scale = stats.genextreme.fit(maxima)
    found = extremes.fit(maxima)
    assert (-found.shape, found.location, found.scale) == pytest.approx((shape, location, scale), abs=1e-3)


def test_maxima_of_normals_need_no_more_than_the_tail_says() -> None:
    values = np.random.default_rng(2).standard_normal(20_000)
    found = extremes.fit(extremes.block_maxima(values, 200))
    # the exact 0.999 quantile of the maximum of 100 standard normals
    assert found.value == pytest.approx(float(stats.norm.isf(1 - 0.999**0.01)), rel=0.1)


@pytest.mark.parametrize("length", [1, 4, 25])
def test_the_quantile_of_single_values_whatever_the_length_of_blocks(length: int) -> None:
    values = np.random.default_rng(4).gumbel(size=500 * length)
    exceedance = extremes.of_blocks(0.001, length)
    found = extremes.fit(extremes.block_maxima(values, 500), exceedance)
    quantile = stats.genextreme(-found.shape, found.location, found.scale).isf(exceedance)
    assert quantile == pytest.approx(float(stats.gumbel_r.isf(0.001)), rel=0.12)
    assert found.value == pytest.approx(max(found.largest, quantile))


def test_never_below_what_was_seen() -> None:
    for seed in range(30):
        maxima = -np.asarray(stats.expon.rvs(size=20, random_state=seed))  # a hard end at 0
        found = extremes.fit(maxima)
        assert found.value >= found.largest == maxima.max()


@pytest.mark.parametrize("maxima", [np.full(50, 2.5), np.zeros(50), [3.0], np.arange(5.0)])
def test_degenerate_maxima_fall_back_to_the_largest(maxima: list[float]) -> None:
    found = extremes.fit(maxima)
    assert (found.value, found.method) == (np.max(np.asarray(maxima)), "largest")


def test_heavy_tails_fall_back_to_gumbel() -> None:
    found = extremes.fit(stats.genextreme.rvs(-1.5, size=60, random_state=1))
    assert (found.method, found.shape) == ("gumbel", 0.0)
    assert np.isfinite(found.value)
    assert found.p_value < 0.05  # and the diagnostics say that it does not fit


def test_blocks() -> None:
    assert extremes.block_maxima([1, 5, 2, 4, 3], 2).tolist() == [5, 4]
    assert extremes.block_maxima([1, 5, 2], 3).tolist() == [1, 5, 2]
    with pytest.raises(CalibrationError, match="do not make 4 blocks"):
        extremes.block_maxima([1, 2, 3], 4)
    with pytest.raises(CalibrationError, match="1 of 3 values are not finite"):
        extremes.block_maxima([1, np.nan, 3], 2)
    with pytest.raises(CalibrationError, match="at least one"):
        extremes.fit([])
    with pytest.raises(CalibrationError, match="finite"):
        extremes.fit([1.0, np.inf])
