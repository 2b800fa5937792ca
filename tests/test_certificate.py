from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from guard import certificate
from guard.certificate import OmegaTable, Radius
from guard.errors import CalibrationError
from guard.statistics import conformal_rank

EPS = np.array([0.5, 1.0, 2.0, 4.0])


def table(values: Any, **more: Any) -> OmegaTable:
    rows = np.atleast_2d(np.asarray(values, dtype=np.float64))
    defaults = {"eps": EPS, "reach": np.full(len(rows), 100.0), "edges": np.zeros(0)}
    return OmegaTable(values=rows, **(defaults | more))


def test_linear_model_has_no_remainder_and_the_exact_distance() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(2, 12))
    images = generator.normal(size=(50, 12))
    logits = images @ weight.T
    margin = np.abs(logits[:, 0] - logits[:, 1])
    distance = margin / np.linalg.norm(weight[0] - weight[1])
    gradient = np.full(50, np.linalg.norm(weight[0] - weight[1]))
    assert certificate.first_order_radius(margin, gradient) == pytest.approx(distance)
    assert certificate.l_bound(margin, float(gradient[0])) == pytest.approx(distance)
    assert certificate.omega_radius(margin, gradient, table(np.zeros(4))) == pytest.approx(
        np.minimum(distance, 4.0)
    )


def test_worked_example() -> None:
    # eps g + omega <= 3 with g = 1: holds in (0.5, 1] with omega 0.5; in (1, 2] with omega 1.5 up to 3 - 1.5
    # = 1.5.
    assert certificate.omega_radius(3.0, 1.0, table([0.1, 0.5, 1.5, 2.9])) == pytest.approx([1.5])
    # the crossing of the cell (1, 2] lies below it: rounded down to its lower end
    assert certificate.omega_radius(3.0, 1.0, table([0.1, 0.5, 2.5, 2.9])) == pytest.approx([1.0])


def test_relative_table_scales_with_the_image() -> None:
    relative = table([[0.0, 0.25, 1.0]], eps=np.array([0.25, 0.5, 1.0]), relative=True)
    margin, gradient = np.array([2.0, 4.0, 1.0]), np.array([1.0, 1.0, 4.0])
    assert certificate.omega_radius(margin, gradient, relative) == pytest.approx(0.5 * margin / gradient)


def test_without_a_gradient_a_relative_table_states_its_reach_or_nothing() -> None:
    eps = np.array([0.25, 0.5, 1.0])
    high, low = (
        table([[1.5, 1.6, 1.7]], eps=eps, relative=True),
        table([[0.5, 1.6, 1.7]], eps=eps, relative=True),
    )
    assert certificate.omega_radius([2.0, 2.0], [0.0, 1.0], high).tolist() == [0.0, 0.0]
    assert certificate.omega_radius([2.0, 2.0], [0.0, 1.0], low).tolist() == [100.0, 0.5]


def test_the_lipschitz_bound_by_hand() -> None:
    assert certificate.l_bound([3.0, 0.0, np.nan, -1.0], 2.0).tolist() == [1.5, 0.0, 0.0, 0.0]
    assert certificate.l_bound([3.0], 0.0).tolist() == [0.0], "nothing is known of a slope of 0"


def test_nothing_is_stated_beyond_the_grid_or_the_reach() -> None:
    assert certificate.omega_radius(1e9, 1.0, table(np.zeros(4))) == pytest.approx([4.0])
    assert certificate.omega_radius(1e9, 1.0, table(np.zeros(4), reach=np.array([0.7]))) == pytest.approx(
        [0.7]
    )
    relative = table(np.zeros(4), relative=True, reach=np.array([0.7]))
    assert certificate.omega_radius([1.0, 1.0], [0.0, 1e-30], relative) == pytest.approx([0.7, 0.7])


def test_fails_closed() -> None:
    margin = np.array([np.nan, 1.0, 0.0, -1.0, np.inf, 1.0, 1.0])
    gradient = np.array([1.0, np.nan, 1.0, 1.0, 1.0, np.inf, -1.0])
    for relative in (False, True):
        assert (certificate.omega_radius(margin, gradient, table(np.zeros(4), relative=relative)) == 0).all()
    assert (certificate.first_order_radius(margin[:4], gradient[:4]) == 0).all()
    assert certificate.l_bound([np.nan, 0.0, 2.0], 0.0) == pytest.approx([0.0, 0.0, 0.0])
    assert certificate.omega_radius([], [], table(np.zeros(4))).shape == (0,)


def test_each_bin_has_its_own_row() -> None:
    binned = table([np.zeros(4), [1.0, 9.0, 9.0, 9.0]], edges=np.array([2.0]), conditioned_on="gradient")
    radius = certificate.omega_radius([2.0, 2.0, 5.0], [1.0, 2.0, 2.0], binned)
    assert radius == pytest.approx([2.0, 0.5, 0.5])
    by_margin = table([np.zeros(4), np.full(4, 1.0)], edges=np.array([2.0]), conditioned_on="margin")
    assert certificate.omega_radius([1.0, 2.0], [1.0, 1.0], by_margin) == pytest.approx([1.0, 1.0])
    by_radius = table([np.zeros(4), np.ones(4)], edges=np.array([2.0]), conditioned_on="first-order-radius")
    assert certificate.omega_radius([3.0, 4.0], [2.0, 2.0], by_radius) == pytest.approx([1.5, 1.5])


positive = st.floats(1e-6, 1e6)


@given(arrays(np.float64, (3, 4), elements=st.floats(0, 1e3)), positive, positive, positive, st.booleans())
def test_radius_satisfies_the_bound_and_is_monotone(
    raw: np.ndarray[Any, np.dtype[np.float64]], margin: float, gradient: float, factor: float, relative: bool
) -> None:
    omega = table(np.sort(raw, axis=1)[:1], relative=relative)
    radius = float(certificate.omega_radius(margin, gradient, omega)[0])
    first = float(certificate.first_order_radius(margin, gradient))
    assert 0 <= radius <= max(first, 0.0) * (1 + 1e-9)
    if relative:
        above = omega.values[0][np.searchsorted(EPS, radius / first * (1 - 1e-9))]
        assert radius == 0 or radius / first + above <= 1 + 1e-6
    else:
        above = omega.values[0][np.searchsorted(EPS, radius * (1 - 1e-9))]
        assert radius == 0 or radius * gradient + above <= margin * (1 + 1e-6)
    more, less = max(1.0, factor), min(1.0, factor)
    assert certificate.omega_radius(margin * more, gradient, omega)[0] >= radius * (1 - 1e-9)
    assert certificate.omega_radius(margin, gradient * more, omega)[0] <= radius * (1 + 1e-9)
    assert certificate.omega_radius(margin * less, gradient, omega)[0] <= radius * (1 + 1e-9)


@pytest.mark.parametrize(
    "broken",
    [
        {"values": [[0.0, 2.0, 1.0, 3.0]]},
        {"values": [[0.0, np.nan, 1.0, 3.0]]},
        {"values": [[-1.0, 0.0, 1.0, 3.0]]},
        {"values": np.zeros((2, 4))},
        {"values": np.zeros((1, 4)), "eps": np.array([2.0, 1.0, 3.0, 4.0])},
        {"values": np.zeros((1, 4)), "eps": np.array([0.0, 1.0, 3.0, 4.0])},
        {"values": np.zeros((1, 4)), "reach": np.array([np.inf])},
        {"values": np.zeros((2, 4)), "edges": np.ones(1), "reach": np.array([-1.0, 1.0])},
        {"values": np.zeros((1, 0)), "eps": np.zeros(0)},
    ],
)
def test_impossible_tables_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="omega table"):
        table(**broken)


def test_effective_slope_by_hand() -> None:
    logits = [[5.0, 1.0, 9.0, 3.0], [2.0, 0.0, 2.0, 1.0], [4.0, 4.0, 4.0, 0.0]]  # M / M3 = 4 / 6, 0, a tie
    assert certificate.effective_slope(logits, [3.0, 3.0, 3.0], 6.0) == pytest.approx([5.0, 3.0, 3.0])
    assert certificate.effective_slope(logits, [3.0, 0.0, 3.0], 0.0) == pytest.approx([3.0, 0.0, 3.0])
    assert certificate.effective_slope([[1.0, 5.0]], [3.0], 6.0) == pytest.approx([3.0]), "two classes"
    broken = certificate.effective_slope([[np.nan, 1.0, 2.0], [np.inf, np.inf, 0.0]], [1.0, np.inf], 6.0)
    assert not np.isfinite(broken).any()
    assert not certificate.first_order_radius([1.0, 1.0], broken).any()


def test_a_fresh_image_is_attacked_inside_as_often_as_promised_and_no_more() -> None:
    # 99 calibration images and a fresh one, of whatever law: below the fifth smallest ratio with 5%.
    generator = np.random.default_rng(0)
    radius = generator.lognormal(sigma=1.5, size=(4000, 100))
    distance = radius * generator.lognormal(-0.3, 0.4, radius.shape) / (1 + radius)
    distance[generator.random(radius.shape) < 0.2] = np.inf  # attacks that failed
    kappa = np.sort((distance / radius)[:, :-1], axis=1)[:, 99 - conformal_rank(99, 0.05)]
    broken = float((distance[:, -1] < kappa * radius[:, -1]).mean())
    assert broken == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / len(radius)))


def test_strongest_kind_stands_first() -> None:
    radii = [
        Radius(1.0, "estimate", "omega-bound"),
        Radius(0.1, "sound", "proof"),
        Radius(0.5, "conformal", "c", alpha=0.01),
    ]
    assert [r.kind for r in certificate.strongest_first(radii)] == ["sound", "conformal", "estimate"]
