import numpy as np
import pytest

from guard.shares import share, share_at_most, share_of


def test_share_has_an_exact_interval() -> None:
    found = share(np.array([True, False, False, False]))
    assert (found.count, found.n, found.value) == (1, 4, 0.25)
    assert found.lower == pytest.approx(1 - 0.975 ** (1 / 4), abs=1e-6)  # P(at least one) = 0.025
    assert share(np.zeros(10, bool)).upper == pytest.approx(1 - 0.025 ** (1 / 10), abs=1e-6)
    assert share_of(1, 4) == found


def test_a_bound_from_above_spends_all_of_its_level_there() -> None:
    found = share_at_most(np.zeros(10, bool))
    assert (found.count, found.n, found.value, found.lower) == (0, 10, 0.0, 0.0)
    assert found.upper == pytest.approx(1 - 0.05 ** (1 / 10), abs=1e-6)
