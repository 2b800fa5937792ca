import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from guard.calibration import histograms


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 1e4))
def test_histogram_loses_no_score(values: list[float], threshold: float) -> None:
    scores: NDArray[np.float64] = np.array(values)
    found = histograms.of_scores(scores, threshold)
    assert sum(found.counts) == len(values)
    assert len(found.edges) == len(found.counts) + 1
    assert (np.diff(found.edges) > 0).all()


def test_histogram_leaves_out_what_is_not_finite() -> None:
    found = histograms.of_scores(np.array([0.5, np.nan, np.inf]), 1.0)
    assert sum(found.counts) == 1


@given(st.lists(st.one_of(st.floats(0, 1e6), st.just(float("inf"))), min_size=1, max_size=60))
def test_histogram_counts_unbounded_radii_in_its_last_bin(values: list[float]) -> None:
    radii: NDArray[np.float64] = np.array(values)
    found = histograms.of_radii(radii)
    assert sum(found.counts) == len(values)
    assert found.counts[-1] >= np.isinf(radii).sum()
    assert found.edges[0] == 0
    assert (np.diff(found.edges) > 0).all()
