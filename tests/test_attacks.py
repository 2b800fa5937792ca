"""Attacks against models whose distances, remainders and second derivatives are known in closed form."""

from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from guard import attacks
from guard.attacks import Floats, Labels, Linear, Loss
from guard.norms import Norm
from guard.runtime import Detector
from tests import networks

NORMS: tuple[Norm, Norm] = ("l2", "linf")
SHAPE = (1, 3, 4)


def linear_detector(seed: int = 0, classes: int = 2) -> tuple[Detector, NDArray[np.float64]]:
    weight = np.random.default_rng(seed).normal(size=(classes, 12))
    return Detector(networks.linear(weight.astype(np.float32), shape=SHAPE), provider="cpu"), weight


class Quadratic:
    """Two classes, z_0 = 0 and z_1 = b + w x + x A x / 2, A diagonal: the remainder is v A v / 2 exactly."""

    def __init__(self, curvature: NDArray[np.float64], offset: float = -3.0) -> None:
        self.curvature = curvature
        self.slope = np.random.default_rng(1).normal(size=12)
        self.offset = offset
        self.calls = 0

    def logits(self, images: Floats) -> Floats:
        flat = images.reshape(len(images), -1).astype(np.float64)
        second = self.offset + flat @ self.slope + flat**2 @ self.curvature / 2
        return np.stack([np.zeros(len(flat)), second], axis=1).astype(np.float32)

    def loss_gradient(self, images: Floats, labels: Labels, loss: Loss) -> tuple[Floats, Floats, Floats]:
        self.calls += len(images)
        flat = images.reshape(len(images), -1).astype(np.float64)
        logits = self.logits(images)
        sign = np.where(labels == 0, 1.0, -1.0)
        gradient = (self.slope + flat * self.curvature) * sign[:, None]
        values = (logits[:, 1] - logits[:, 0]) * sign
        return logits, values.astype(np.float32), gradient.reshape(images.shape).astype(np.float32)

    def vjp(self, images: Floats, cotangents: Floats) -> tuple[Floats, Floats]:
        flat = images.reshape(len(images), -1)
        slope = (self.slope + flat * self.curvature).reshape(images.shape).astype(np.float32)
        return self.logits(images), attacks.column(cotangents[:, 1]) * slope


def exact_distance(images: Floats, weight: NDArray[np.float64], norm: Norm) -> NDArray[np.float64]:
    """Distance to the nearest other class of a linear model, in free space."""
    logits = images.reshape(len(images), -1).astype(np.float64) @ weight.T
    labels = logits.argmax(axis=1)
    distances = np.full(logits.shape, np.inf)
    for other in range(len(weight)):
        difference = weight[labels] - weight[other]
        size = np.linalg.norm(difference, ord=2 if norm == "l2" else 1, axis=1)
        different = labels != other
        gap = np.take_along_axis(logits, labels[:, None], 1)[:, 0] - logits[:, other]
        distances[different, other] = gap[different] / size[different]
    nearest: NDArray[np.float64] = distances.min(axis=1)
    return nearest


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_is_the_unit_vector_that_attains_the_dual_norm(norm: Norm) -> None:
    gradient = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype(np.float32)
    direction = attacks.steepest(gradient, norm)
    assert attacks.length(direction, norm) == pytest.approx(np.ones(6), rel=1e-6)
    assert attacks.inner(gradient, direction) == pytest.approx(attacks.dual_length(gradient, norm), rel=1e-5)
    assert not attacks.steepest(np.zeros((1, *SHAPE), np.float32), norm).any()
    assert attacks.steepest(np.float32(1e-36) * gradient, norm) == pytest.approx(direction, rel=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_keeps_the_ball_and_moves_nothing_inside(norm: Norm) -> None:
    vectors = np.random.default_rng(0).normal(size=(8, *SHAPE)).astype(np.float32)
    eps = np.linspace(0, 4, 8)
    projected = attacks.project(vectors, eps, norm)
    assert (attacks.length(projected, norm) <= eps * (1 + 1e-6)).all()
    inside = attacks.length(vectors, norm) <= eps
    assert np.array_equal(projected[inside], vectors[inside])
    assert not projected[0].any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 7])
def test_minimum_norm_finds_the_distance_of_a_linear_model(norm: Norm, classes: int) -> None:
    detector, weight = linear_detector(classes=classes)
    images = networks.images(40, SHAPE)
    labels = detector.logits(images).argmax(axis=1)
    exact = exact_distance(images, weight, norm)
    found = attacks.minimum_norm(detector, images, labels, norm=norm, steps=30)
    assert found.success.all()
    assert (found.distance >= exact * (1 - 1e-4)).all()
    # The runner-up at the image is not always the nearest class, so single images may stay a little above.
    assert np.median(found.distance / exact) < 1.01
    assert (found.distance <= exact * 1.3).all()
    assert (detector.logits(found.images).argmax(axis=1) != labels).all()
    assert attacks.length(found.images - images, norm) == pytest.approx(found.distance)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_nearest_also_sees_classes_that_do_not_lead(norm: Norm, classes: int) -> None:
    detector, weight = linear_detector(classes=classes)
    images = networks.images(40, SHAPE)
    labels = detector.logits(images).argmax(axis=1)
    exact = exact_distance(images, weight, norm)
    found = attacks.nearest(detector, images, labels, norm=norm, steps=30)
    assert found.success.all()
    assert found.distance == pytest.approx(exact, rel=0.01)
    assert (found.distance >= exact * (1 - 1e-4)).all()
    assert (detector.logits(found.images).argmax(axis=1) != labels).all()
    assert attacks.length(found.images - images, norm) == pytest.approx(found.distance)
    alone = attacks.minimum_norm(detector, images, labels, norm=norm, steps=30)
    assert (found.distance <= alone.distance).all()
    assert found.passes is not None
    assert alone.passes is not None
    assert (found.passes == alone.passes).all(), "what was found at first was not nearest, but found"


@pytest.mark.parametrize("norm", NORMS)
def test_attacks_from_inside_a_radius_stay_out_of_what_no_attack_can_break(norm: Norm) -> None:
    detector, weight = linear_detector(classes=3)
    images = networks.images(30, SHAPE)
    labels = detector.logits(images).argmax(axis=1)
    exact = exact_distance(images, weight, norm)
    kept = attacks.inside(detector, images, labels, 0.999 * exact, norm=norm)
    assert not kept.success.any()
    assert np.isinf(kept.distance).all()
    broken = attacks.inside(detector, images, labels, 1.2 * exact, norm=norm, restarts=1)
    assert broken.success.all()
    assert broken.distance == pytest.approx(exact, rel=0.1)
    assert (broken.distance >= exact * (1 - 1e-5)).all()
    assert (detector.logits(broken.images).argmax(axis=1) != labels).all()
    none = attacks.inside(detector, images, labels, np.where(exact > 0.1, 0, np.inf), norm=norm)
    assert not none.success.any(), "neither a radius of 0 nor an unbounded one is attacked"


@pytest.mark.parametrize("norm", NORMS)
def test_attacks_on_radii_reach_beyond_valid_images(norm: Norm) -> None:
    detector = Detector(networks.linear(np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]])), provider="cpu")
    dark = np.zeros((1, 1, 2, 2), np.float32)
    dark[0, 0, 0, 0] = 0.25  # class 0 down to an intensity of 0
    found = attacks.inside(detector, dark, np.array([0]), np.array([0.5]), norm=norm)
    assert found.success.all()
    assert found.images.min() < 0


def test_clipped_attacks_stay_in_the_cube_and_succeed_less_often() -> None:
    detector, _ = linear_detector()
    images = networks.images(60, SHAPE)
    labels = detector.logits(images).argmax(axis=1)
    free = attacks.minimum_norm(detector, images, labels, norm="linf")
    kept = attacks.minimum_norm(detector, images, labels, norm="linf", clip=True)
    assert kept.images.min() >= 0
    assert kept.images.max() <= 1
    assert (kept.distance >= free.distance * (1 - 1e-3)).all()
    deep = attacks.pgd(detector, images, labels, 0.4, norm="linf", clip=True, stop=False)
    assert deep.images.min() >= 0
    assert deep.images.max() <= 1


class Needle(Quadratic):
    """Class 1 at these images alone, to the last digit."""

    def __init__(self, wrong: Floats) -> None:
        super().__init__(np.zeros(12))
        self.wrong = wrong

    def logits(self, images: Floats) -> Floats:
        there = (images[:, None] == self.wrong).all(axis=(2, 3, 4)).any(axis=1)
        return np.stack([np.zeros(len(images)), 2.0 * there - 1], axis=1).astype(np.float32)


@pytest.mark.parametrize(("beyond", "within"), [(0.003, 3e-4), (0.03, 3e-4), (0.5, 4e-4), (9.0, 3e-3)])
def test_images_are_brought_back_to_the_boundary(beyond: float, within: float) -> None:
    detector, weight = linear_detector()
    difference, images = weight[1] - weight[0], networks.images(12, SHAPE)
    logits = detector.logits(images).astype(np.float64)
    labels = logits.argmax(axis=1).astype(np.int64)
    exact = np.abs(logits[:, 0] - logits[:, 1]) / np.linalg.norm(difference)
    reach = exact * (1 + beyond) * np.where(labels == 0, 1, -1) / np.linalg.norm(difference)
    there = (images + np.multiply.outer(reach, difference.reshape(SHAPE))).astype(np.float32)
    found = attacks.onto_boundary(detector, images, there, labels, np.ones(12, np.bool_))
    assert (detector.logits(found).argmax(axis=1) != labels).all()
    assert attacks.length(found - images, "l2") == pytest.approx(exact, rel=within)


def test_what_cannot_be_moved_to_the_boundary_is_returned_to_the_last_digit() -> None:
    images, wrong = np.split(networks.images(40, SHAPE) * np.float32(0.3), 2)
    assert (images + (wrong - images) != wrong).any(axis=(1, 2, 3)).any(), "rounding would change some"
    found = attacks.onto_boundary(Needle(wrong), images, wrong, np.zeros(20, np.int64), np.ones(20, np.bool_))
    assert np.array_equal(found, wrong)


class Broken(Quadratic):
    """Beyond the boundary of class 0 some `part` is NaN; pixels that are NaN look like class 1, as behind a
    maximum that passes them by.
    """

    def __init__(self, part: str) -> None:
        super().__init__(np.zeros(12))
        self.num_classes = 2
        self.part = part

    def logits(self, images: Floats) -> Floats:
        broken = np.isnan(images).any(axis=(1, 2, 3))
        found = super().logits(np.nan_to_num(images))
        beyond = found[:, 1] > 0
        found[broken] = [0, 9]
        if self.part == "logits":
            found[beyond, 1] = np.nan
        return found

    def loss_gradient(self, images: Floats, labels: Labels, loss: Loss) -> tuple[Floats, Floats, Floats]:
        _, values, gradient = super().loss_gradient(np.nan_to_num(images), labels, loss)
        if self.part == "gradient":
            gradient[:] = np.nan
        return self.logits(images), values, gradient

    def vjp(self, images: Floats, cotangents: Floats) -> tuple[Floats, Floats]:
        gradient = super().vjp(np.nan_to_num(images), cotangents)[1]
        return self.logits(images), gradient * np.float32(np.nan if self.part == "gradient" else 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("part", ["logits", "gradient"])
def test_what_is_not_finite_is_never_found(part: str, norm: Norm) -> None:
    model = Broken(part)
    images = networks.images(40, SHAPE)
    images = images[model.logits(images)[:, 1] < 0][:6]
    assert len(images) == 6
    labels = np.zeros(6, np.int64)
    tries = [
        attacks.pgd(model, images, labels, 0.1, norm=norm, restarts=1, stop=stop) for stop in (True, False)
    ]
    tries.append(attacks.pgd(model, images, labels, 30.0, norm=norm) if part == "logits" else tries[0])
    tries += [attack(model, images, labels, norm=norm) for attack in (attacks.minimum_norm, attacks.nearest)]
    for found in tries:
        assert not found.success.any()
        assert np.isinf(found.distance).all()
        assert np.isfinite(found.images).all()
    away = networks.images(6, SHAPE) * np.float32(np.nan)
    kept = attacks.onto_boundary(model, images, away, labels, np.ones(6, np.bool_))
    assert not np.isfinite(kept).any(), "no point on the way to what is not finite is taken"
    _, values, gradient = model.loss_gradient(images, labels, "margin")
    loss = values.astype(np.float64)
    starts = [np.full_like(images, np.nan), np.full_like(images, 30.0)]
    found_remainder = attacks.largest_remainder(
        model, images, labels, loss - 1, np.nan_to_num(gradient), starts, np.full(6, 1e3), norm=norm, steps=1
    )
    assert np.isfinite(found_remainder.shift).all()
    assert np.isfinite(found_remainder.value).all()


def test_an_image_of_another_class_is_at_distance_zero() -> None:
    detector, _ = linear_detector()
    images = networks.images(5, SHAPE)
    wrong = 1 - detector.logits(images).argmax(axis=1)
    found = attacks.minimum_norm(detector, images, wrong, norm="l2")
    assert found.success.all()
    assert not found.distance.any()
    assert np.array_equal(found.images, images)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_succeeds_exactly_beyond_the_distance(norm: Norm) -> None:
    detector, weight = linear_detector()
    images = networks.images(30, SHAPE)
    labels = detector.logits(images).argmax(axis=1)
    exact = exact_distance(images, weight, norm)
    short = attacks.pgd(detector, images, labels, 0.999 * exact, norm=norm)
    assert not short.success.any()
    assert np.isinf(short.distance).all()
    far = attacks.pgd(detector, images, labels, 1.001 * exact, norm=norm)
    assert far.success.all()
    assert (far.distance <= 1.001 * exact * (1 + 1e-5)).all()
    assert not attacks.pgd(detector, images, labels, 0.0, norm=norm).success.any()


def test_without_stop_the_loss_is_maximal_and_with_it_images_are_left_early() -> None:
    model = Quadratic(np.zeros(12))
    images = networks.images(20, SHAPE)
    labels = model.logits(images).argmax(axis=1)
    deep = attacks.pgd(model, images, labels, 2.0, norm="l2", steps=10, restarts=1, stop=False)
    _, values, _ = model.loss_gradient(deep.images, labels, "margin")
    _, before, _ = model.loss_gradient(images, labels, "margin")
    assert values == pytest.approx(before + 2.0 * np.linalg.norm(model.slope), rel=1e-3)
    everything = model.calls
    model.calls = 0
    attacks.pgd(model, images, labels, 2.0, norm="l2", steps=10, restarts=3)
    assert model.calls < everything


def test_attacks_are_deterministic_by_seed() -> None:
    detector = Detector(networks.convolutional(), provider="cpu")
    images = networks.images(6)
    labels = detector.logits(images).argmax(axis=1)
    options: dict[str, Any] = {"norm": "l2", "steps": 0, "restarts": 5, "stop": False}
    first, again, other = (
        attacks.pgd(detector, images, labels, 0.5, seed=seed, **options).images for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("linear", get_args(Linear))
def test_remainder_of_a_linear_model_is_nothing(norm: Norm, linear: Linear) -> None:
    detector, weight = linear_detector()
    images = networks.images(10, SHAPE)
    labels = detector.logits(images).argmax(axis=1)
    _, losses, gradient = detector.loss_gradient(images, labels, "margin")
    starts = [attacks.random_directions(images.shape, norm, np.random.default_rng(0))]
    found = attacks.largest_remainder(
        detector,
        images,
        labels,
        losses.astype(float),
        gradient,
        starts,
        np.full(10, 0.7),
        norm=norm,
        linear=linear,
    )
    assert found.value == pytest.approx(np.zeros(10), abs=1e-4)
    expected = np.linalg.norm(weight[0] - weight[1], ord=2 if norm == "l2" else 1)
    assert found.slope == pytest.approx(np.full(10, expected), rel=1e-5)


@pytest.mark.parametrize(("norm", "expected"), [("l2", 0.5 * 0.25 * 5.0), ("linf", 0.5 * 0.25 * 5.0 * 12)])
def test_remainder_of_a_quadratic_model(norm: Norm, expected: float) -> None:
    curvature = np.full(12, 5.0) if norm == "linf" else np.array([5.0] + [1.0] * 11)
    model = Quadratic(curvature)
    images = networks.images(4, SHAPE)
    labels = np.zeros(4, np.int64)
    _, losses, gradient = model.loss_gradient(images, labels, "margin")
    starts = [attacks.random_directions(images.shape, norm, np.random.default_rng(2))]
    found = attacks.largest_remainder(
        model,
        images,
        labels,
        losses.astype(float),
        gradient,
        starts,
        np.full(4, 0.5),
        norm=norm,
        steps=40,
        linear="aligned",
    )
    assert found.value == pytest.approx(np.full(4, expected), rel=0.01)
    assert (attacks.length(found.shift, norm) <= 0.5 * (1 + 1e-6)).all()


def test_steepest_remainder_is_what_the_loss_rises_above_its_slope() -> None:
    # l(x + v) - l(x) = <w + A x, v> + v A v / 2; with A = a I the best v lies along the gradient.
    model = Quadratic(np.full(12, 5.0))
    images = networks.images(4, SHAPE)
    labels = np.zeros(4, np.int64)
    _, losses, gradient = model.loss_gradient(images, labels, "margin")
    start = [attacks.random_directions(images.shape, "l2", np.random.default_rng(2))]
    found, aligned = (
        attacks.largest_remainder(
            model,
            images,
            labels,
            losses.astype(float),
            gradient,
            start,
            np.full(4, 0.5),
            norm="l2",
            linear=linear,
        )
        for linear in get_args(Linear)
    )
    assert found.value == pytest.approx(np.full(4, 0.5 * 0.25 * 5.0), rel=0.01)
    direction = attacks.steepest(gradient, "l2")
    aim = attacks.inner(attacks.steepest(found.shift, "l2"), direction)
    assert aim == pytest.approx(np.ones(4), abs=0.01)
    assert (found.value <= aligned.value * 1.01).all()


def test_concave_remainders_count_as_zero() -> None:
    model = Quadratic(np.full(12, -5.0))
    images = networks.images(4, SHAPE)
    labels = np.zeros(4, np.int64)
    _, losses, gradient = model.loss_gradient(images, labels, "margin")
    starts = [attacks.steepest(gradient, "l2")]
    found = attacks.largest_remainder(
        model, images, labels, losses.astype(float), gradient, starts, np.full(4, 0.5), norm="l2"
    )
    assert found.value == pytest.approx(np.zeros(4), abs=1e-6)


def test_growth_of_two_linear_classes() -> None:
    detector, weight = linear_detector()
    images = networks.images(10, SHAPE)
    found = attacks.growth(detector, images, np.ones(10, np.int64), "cross-entropy")
    difference = weight[1] - weight[0]
    p1 = 1 / (1 + np.exp(found.logits[:, 0].astype(float) - found.logits[:, 1]))
    # u_1 = (1 - p_1)(w_1 - w_0), and the gradient of log ||u_1|| is that of log(1 - p_1) = -p_1 (w_1 - w_0).
    assert found.descent.reshape(10, -1) == pytest.approx((1 - p1)[:, None] * difference, rel=1e-4)
    assert found.log_length.reshape(10, -1) == pytest.approx(-p1[:, None] * difference, rel=5e-3, abs=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_growth_of_a_quadratic_margin(norm: Norm) -> None:
    model = Quadratic(np.arange(12.0))
    images = networks.images(6, SHAPE)
    found = attacks.growth(model, images, np.zeros(6, np.int64), "margin", norm=norm)
    gradient = model.slope + images.reshape(6, -1).astype(float) * model.curvature
    assert found.descent.reshape(6, -1) == pytest.approx(-gradient, rel=1e-5)
    # ∇ log ||g||₂ = A g / ||g||₂², ∇ log ||g||₁ = A sign(g) / ||g||₁
    along = gradient / np.linalg.norm(gradient, axis=1, keepdims=True) if norm == "l2" else np.sign(gradient)
    size = np.linalg.norm(gradient, ord=2 if norm == "l2" else 1, axis=1, keepdims=True)
    expected = model.curvature * along / size
    assert found.log_length.reshape(6, -1) == pytest.approx(expected, abs=1e-3)


def test_longest_row_grows_to_its_bound() -> None:
    detector, weight = linear_detector()
    images = networks.images(10, SHAPE)
    index = np.ones(10, np.int64)
    here = attacks.length(detector.loss_gradient(images, index, "cross-entropy")[2], "l2")
    found = attacks.longest_row(detector, images, index, 5.0, steps=12)
    assert (found >= here * (1 - 1e-6)).all()
    assert (found <= np.linalg.norm(weight[1] - weight[0]) * (1 + 1e-5)).all()
    assert found.mean() > here.mean()


def test_hiding_attack_lengthens_the_third_row() -> None:
    detector = Detector(networks.convolutional(scale=20.0), score="jacobian-full", provider="cpu")
    images = networks.images(12)

    def advantage(batch: Floats) -> NDArray[np.float64]:
        measured = detector.measure(batch)
        order = np.argsort(-measured.logits, axis=1)
        rows = np.stack(
            [detector.row_norms(batch, measured.probabilities, order[:, k].copy()) for k in range(3)], axis=1
        )
        return np.asarray(np.log(rows[:, 2]) - np.log(rows[:, :2].max(axis=1)), np.float64)

    hidden = attacks.hide_row(detector, images, 1.0, steps=6)
    assert hidden.min() >= 0
    assert hidden.max() <= 1
    assert (attacks.length(hidden - images, "l2") <= 1.0 + 1e-4).all()
    assert (advantage(hidden) >= advantage(images) - 1e-4).all()
    assert advantage(hidden).mean() > advantage(images).mean() + 0.1
