from typing import get_args

import numpy as np
import pytest

from guard import attacks
from guard.calibration import fitting
from guard.calibration.fitting import EPS, EXCEEDED, SCREENED_AT, Effort
from guard.certificate import omega_radius
from guard.errors import CalibrationError
from guard.norms import Norm
from guard.runtime import Detector
from tests import networks
from tests.test_attacks import SHAPE, Quadratic

NORMS: tuple[Norm, ...] = get_args(Norm)


def test_layout_covers_every_usable_image_once() -> None:
    radius = np.random.default_rng(0).exponential(size=103)
    radius[[3, 5]] = [0.0, np.inf]
    plan = fitting.layout(radius, Effort(bin_images=25, bin_blocks=5))
    together = np.concatenate([block for row in plan.blocks for block in row])
    assert sorted(together) == [i for i in range(103) if i not in (3, 5)]
    assert [len(row) for row in plan.blocks] == [5, 5, 5, 5]
    for at, row in enumerate(plan.blocks):
        assert set(np.searchsorted(plan.edges, radius[np.concatenate(row)], side="right")) == {at}
        assert plan.reach[at] == radius[np.concatenate(row)].max()


def test_layout_of_few_and_of_no_images() -> None:
    plan = fitting.layout(np.array([1.0, 2.0, 3.0]), Effort())
    assert [len(row) for row in plan.blocks] == [3]
    assert plan.edges.shape == (0,)
    with pytest.raises(CalibrationError, match="no image has a finite, positive first-order radius"):
        fitting.layout(np.array([0.0, np.inf, np.nan]), Effort())


def test_survivors_keep_the_largest_of_every_block() -> None:
    plan = fitting.layout(np.arange(1.0, 41.0), Effort(bin_images=20, bin_blocks=4))
    screened = np.random.default_rng(0).random(40)
    kept = fitting.survivors(plan, screened, Effort(kept=0.4))
    assert len(kept) == 2 * 4 * 2
    for block in (block for row in plan.blocks for block in row):
        assert screened[block].argmax() in np.flatnonzero(np.isin(block, kept))


def test_leaders_hold_the_largest_maxima() -> None:
    plan = fitting.layout(np.arange(1.0, 81.0), Effort(bin_images=40, bin_blocks=8))
    values = np.random.default_rng(0).random((80, len(EPS)))
    leading = fitting.leaders(plan, values)
    for row in plan.blocks:
        together = np.concatenate(row)
        assert np.isin(together[values[together].argmax(axis=0)], leading).all()
    assert len(leading) <= 2 * 2 * len(EPS)


def test_omega_is_exceeded_by_the_stated_share_of_images() -> None:
    generator = np.random.default_rng(0)
    radius, values = np.arange(1.0, 4001.0), generator.exponential(size=(4000, 1)) * np.array(EPS)
    for blocks in (50, 125):
        effort = Effort(bin_images=500, bin_blocks=blocks)
        found = fitting.omega(fitting.layout(radius, effort), values).table.values
        assert np.median(found, axis=0) == pytest.approx(-np.log(EXCEEDED) * np.array(EPS), rel=0.25)


@pytest.mark.parametrize("norm", NORMS)
def test_omega_of_a_quadratic_model(norm: Norm) -> None:
    # Class 0 is predicted with margin M and slope g; the remainder at eps is 12 a eps^2 / 2 or a eps^2 / 2.
    model = Quadratic(np.full(12, 2.0), offset=-20.0)
    images = networks.images(40, SHAPE)
    generator = np.random.default_rng(0)
    effort = Effort(bin_images=10, bin_blocks=10, steps=10)
    margin, slope, screened, _, shift = fitting.screen(
        model, images, norm, effort, generator, linear="aligned"
    )
    values, _ = fitting.remainders(model, images, norm, effort, shift, linear="aligned")
    radius = margin / slope
    eps = np.array(EPS) * radius[:, None]
    exact = (1.0 if norm == "l2" else 12.0) * eps**2 / margin[:, None]
    assert values == pytest.approx(exact, rel=0.02)
    assert screened == pytest.approx(exact[:, SCREENED_AT], rel=0.05)
    fitted = fitting.omega(fitting.layout(radius, effort), values)
    # The table is relative to the image, so it must hold for each of its bins' images.
    stated = omega_radius(margin, slope, fitted.table)
    curvature = 2.0 if norm == "l2" else 24.0
    true = (np.sqrt(slope**2 + 2 * curvature * margin) - slope) / curvature
    assert (stated <= true * 1.001).all()
    assert stated.mean() >= true.mean() * 0.6


def test_ties_and_flat_models_are_left_out() -> None:
    model = Quadratic(np.zeros(12))
    model.slope[:] = 0
    images = networks.images(4, SHAPE)
    generator = np.random.default_rng(0)
    margin, slope, value, _, shift = fitting.screen(model, images, "l2", Effort(), generator)
    assert not slope.any()
    assert not value.any()
    assert not shift.any()
    assert (margin > 0).all()
    values, slope = fitting.remainders(model, images, "l2", Effort(), shift)
    assert not values.any()
    assert not slope.any()


def test_longest_rows_bound_the_jacobian() -> None:
    detector = Detector(networks.convolutional(scale=20.0), score="jacobian-full", provider="cpu")
    images = networks.images(10)
    clean, attacked = fitting.longest_rows(detector, images, 0.5, Effort(row_steps=2))
    measured = detector.measure(images)
    assert (measured.jacobian <= measured.probabilities.max(axis=1) * clean * (1 + 1e-5)).all()
    assert (attacked >= clean).all()
    labels = np.zeros(10, np.int64)
    one = attacks.length(detector.loss_gradient(images, labels, "cross-entropy")[2], "l2")
    assert (one <= clean * (1 + 1e-6)).all()


def test_bound_is_at_least_the_largest() -> None:
    values = np.random.default_rng(0).random(50)
    assert fitting.bound(values, 25).value >= values.max()
    assert fitting.bound(values[:3], 25).value == values[:3].max()


def test_scaled_effort() -> None:
    more = Effort().scaled(2)
    assert (more.starts, more.steps, more.omega_images) == (2 * Effort().starts, 2 * Effort().steps, 1000)
    least = Effort().scaled(0.001)
    assert (least.starts, least.steps) == (1, 2)
