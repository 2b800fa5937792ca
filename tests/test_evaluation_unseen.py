"""Spatial flow, recoloring and JPEG coefficients: gradients, bounds, and where they must succeed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from guard.attacks import Floats, Found, Labels, Loss
from guard.errors import DataError
from guard.evaluation import unseen
from guard.evaluation.attack import Attack
from guard.evaluation.target import Target
from guard.evaluation.unseen import Doubles, PullBack, Transform
from guard.runtime import Detector
from tests import networks

BY_NAME = {attack.name: attack for attack in unseen.ATTACKS}


def linear_target(weight: Doubles, gap: float, shape: tuple[int, int, int]) -> Target:
    """z_0 = 0, z_1 = w x - gap: the class is 1 where w x > gap."""
    rows = np.stack([np.zeros(weight.size), weight.ravel()]).astype(np.float32)
    bias = np.array([0.0, -gap], np.float32)
    return Target(Detector(networks.linear(rows, bias, shape=shape), provider="cpu"))


def zeros(count: int) -> Labels:
    return np.zeros(count, np.int64)


def a_target() -> Target:
    return Target(Detector(networks.convolutional(shape=(3, 16, 16), width=4), provider="cpu"))


SHAPES = {"spatial-flow": unseen.displacements, "recolor": unseen.lattice, "jpeg": unseen.coefficients}


def start_of(name: str, images: Floats) -> Floats:
    return np.zeros((len(images), *SHAPES[name](images.shape[1:])), np.float32)


TRANSFORMS: dict[str, Transform] = {
    "spatial-flow": unseen.flow,
    "recolor": unseen.recolor,
    "jpeg": unseen.jpeg,
}


def slope_along(
    function: Callable[[Floats], Floats], here: Floats, direction: Floats, cotangent: Floats, step: float
) -> float:
    ahead, behind = function(here + step * direction), function(here - step * direction)
    return float(((ahead.astype(np.float64) - behind) * cotangent).sum() / (2 * step))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 9), (3, 17, 20)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_are_those_of_finite_differences(name: str, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    images = (0.2 + 0.6 * rng.random((2, *shape))).astype(np.float32)
    # Away from whole pixels, where bilinear interpolation has its kinks.
    size = start_of(name, images).shape
    here = (rng.uniform(0.02, 0.05, size) * rng.choice([-1, 1], size)).astype(np.float32)
    cotangent = rng.normal(size=images.shape).astype(np.float32)
    gradient = TRANSFORMS[name](images, here)[1](cotangent)
    assert gradient.shape == here.shape
    scale = float(np.sqrt((gradient.astype(np.float64) ** 2).sum()))
    for _ in range(4):
        direction = rng.choice([-1.0, 1.0], here.shape).astype(np.float32)
        expected = slope_along(
            lambda shift: TRANSFORMS[name](images, shift)[0], here, direction, cotangent, 2e-4
        )
        assert float((gradient * direction).sum()) == pytest.approx(expected, abs=0.01 * scale)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 7), (3, 1, 1)])
def test_no_shift_changes_nothing(name: str, shape: tuple[int, int, int]) -> None:
    images = networks.images(3, shape)
    images[0], images[1] = 0, 1
    attacked, pull_back = TRANSFORMS[name](images, start_of(name, images))
    assert attacked == pytest.approx(images, abs=1e-6)
    assert np.isfinite(pull_back(np.ones_like(images))).all()


@pytest.mark.parametrize("attack", unseen.ATTACKS, ids=lambda attack: attack.name)
def test_budget_zero_finds_only_what_is_wrong_already(attack: Attack) -> None:
    target, images = a_target(), networks.images(2, (3, 16, 16))
    labels = target.model.logits(images).argmax(axis=1)
    labels[1] = (labels[1] + 1) % 10
    found = attack.run(target, images, labels, 0.0, 0)
    assert found.success.tolist() == [False, True]
    assert found.distance.tolist() == [np.inf, 0]
    assert found.images == pytest.approx(images, abs=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_shifts_stay_within_the_budget_and_images_within_the_cube(name: str) -> None:
    images = networks.images(2, (3, 16, 16))
    model = Detector(networks.convolutional(shape=(3, 16, 16), width=4), provider="cpu")
    reached = []

    def watched(points: Floats, shift: Floats) -> tuple[Floats, PullBack]:
        reached.append(np.abs(shift).max())
        return TRANSFORMS[name](points, shift)

    found = unseen.ascend(
        model,
        images,
        model.logits(images).argmin(axis=1),  # wrong from the start: every image stops at once
        start_of(name, images) + 1,
        0.1,
        transform=watched,
        rate=0.03,
    )
    assert reached == [np.float32(0.1)]
    assert found.distance == pytest.approx([0.1, 0.1])
    never = linear_target(np.ones(images[0].size), 1e6, images.shape[1:])
    reached.clear()
    found = unseen.ascend(
        never.model, images, zeros(2), start_of(name, images), 0.1, transform=watched, rate=0.03, steps=8
    )
    assert len(reached) == 9
    assert max(reached) == pytest.approx(0.1)
    assert not found.success.any()
    assert np.isinf(found.distance).all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert found.images.sum() > images.sum()  # the failed attack keeps the largest loss it saw


def test_flow_is_translation_where_all_move_alike() -> None:
    images = networks.images(2, (3, 9, 5))
    shift = start_of("spatial-flow", images)
    shift[..., 0], shift[..., 1] = 2 / 4, -1 / 2  # two of the 8 / 2 pixels down, one of the 4 / 2 to the left
    moved, _ = unseen.flow(images, shift)
    assert moved[:, :, :-2, 1:] == pytest.approx(images[:, :, 2:, :-1], abs=1e-6)
    assert moved[:, :, -1, 1:] == pytest.approx(images[:, :, -1, :-1], abs=1e-6)


def test_flow_is_what_torch_samples() -> None:
    images, cotangent = networks.images(2, (3, 7, 10)), networks.images(2, (3, 7, 10), seed=1)
    shift = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 7, 10, 2)).astype(np.float32)
    moved, pull_back = unseen.flow(images, shift)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 10), indexing="ij")
    offset = torch.tensor(shift, requires_grad=True)
    grid = torch.stack([x, y], dim=-1) + offset.flip(-1)
    theirs = torch.nn.functional.grid_sample(
        torch.tensor(images), grid, mode="bilinear", padding_mode="border", align_corners=True
    )
    (gradient,) = torch.autograd.grad(theirs, offset, torch.tensor(cotangent))
    assert moved == pytest.approx(theirs.detach().numpy(), abs=1e-5)
    assert pull_back(cotangent) == pytest.approx(gradient.numpy(), abs=1e-4)


def test_flow_moves_a_dot_away_from_the_pixel_that_is_looked_at() -> None:
    images = np.zeros((1, 1, 9, 9), np.float32)
    images[0, 0, 4, 4] = 1
    weight = np.zeros((9, 9))
    weight[4, 4] = -1
    # One pixel is a quarter of half a side of 8; with 60% of it, the pixel keeps 40% of its value each way.
    target = linear_target(weight, -0.5, (1, 9, 9))
    attack = BY_NAME["spatial-flow"]
    found = attack.run(target, images, zeros(1), 0.15, 0)
    assert found.success.all()
    assert found.distance[0] <= 0.15
    assert found.images[0, 0, 4, 4] < 0.5
    assert not attack.run(target, images, zeros(1), 0.05, 0).success.any()


@pytest.mark.parametrize(("share", "succeeds"), [(0.98, False), (1.02, True)])
def test_flow_lands_at_the_optimum_of_a_linear_model_on_a_slope(share: float, succeeds: bool) -> None:
    ramp = np.tile(np.linspace(0.1, 0.8, 15), (15, 1))
    weight = np.zeros((15, 15))
    weight[4:11, 4:11] = 1
    eps = 0.2  # of 7 pixels, each 0.05 brighter than its neighbour
    best = (weight * ramp).sum() + weight.sum() * eps * 7 * 0.05
    clean = (weight * ramp).sum()
    target = linear_target(weight, clean + share**-1 * (best - clean), (1, 15, 15))
    found = BY_NAME["spatial-flow"].run(target, ramp[None, None].astype(np.float32), zeros(1), eps, 0)
    assert found.success.all() == succeeds


@pytest.mark.parametrize(("share", "succeeds"), [(0.98, False), (1.02, True)])
def test_recolor_lands_at_the_optimum_of_a_linear_model_in_grey(share: float, succeeds: bool) -> None:
    images = np.full((1, 1, 4, 4), 0.52, np.float32)
    images[0, 0, :, 2:] = 0.3
    weight = np.full((4, 4), 10.0)
    weight[:, 2:] = -10  # the two greys must move apart, which no shift common to all can do
    gap = (weight * images[0, 0]).sum() + np.abs(weight).sum() * 0.06 / share
    found = BY_NAME["recolor"].run(linear_target(weight, gap, (1, 4, 4)), images, zeros(1), 0.06, 0)
    assert found.success.all() == succeeds


def test_recolor_turns_a_mean_colour() -> None:
    images = np.full((2, 3, 4, 4), 0.5, np.float32)
    images[1] += networks.images(1, (3, 4, 4))[0] / 20
    weight = np.zeros((3, 4, 4))
    weight[0], weight[2] = 10, -10  # red against blue
    target = linear_target(weight, 16 * 10 * 0.1, (3, 4, 4))
    found = BY_NAME["recolor"].run(target, images, zeros(2), 0.06, 0)
    assert found.success.all()
    assert (found.distance <= 0.06 + 1e-6).all()
    colours = unseen.to_luv(found.images.transpose(0, 2, 3, 1).astype(np.float64))
    before = unseen.to_luv(images.transpose(0, 2, 3, 1).astype(np.float64))
    assert np.abs(colours - before).max() <= 0.06 + 1e-4
    assert found.images[0].reshape(3, -1).std(axis=1) == pytest.approx(0, abs=1e-6)  # one colour stays one


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 20)])
@pytest.mark.parametrize(("share", "succeeds"), [(0.99, False), (1.01, True)])
def test_jpeg_lands_at_the_optimum_of_a_linear_model(
    shape: tuple[int, int, int], share: float, succeeds: bool
) -> None:
    images = np.full((1, *shape), 0.5, np.float32)
    weight = np.random.default_rng(0).normal(size=shape)
    gradient = unseen.jpeg(images, start_of("jpeg", images))[1](weight[None].astype(np.float32))
    gap = weight.sum() * 0.5 + np.abs(gradient.astype(np.float64)).sum() * 0.125 / share
    found = BY_NAME["jpeg"].run(linear_target(weight, gap, shape), images, zeros(1), 0.125, 0)
    assert found.success.all() == succeeds


def test_jpeg_steps_are_those_of_quality_50() -> None:
    luma, chroma = unseen.quantization()
    assert luma[0].tolist() == [16, 11, 10, 16, 24, 40, 51, 61]
    assert luma[7, 7] == 99
    assert chroma[1].tolist() == [18, 21, 26, 66, 99, 99, 99, 99]
    images = np.full((1, 3, 16, 16), 0.5, np.float32)
    shift = start_of("jpeg", images)
    assert shift.shape == (1, 256 + 64 + 64)
    shift[0, 0] = 1  # the mean brightness of the first block: 16 / 8 levels on all its pixels
    added = unseen.jpeg(images, shift)[0] - images
    assert added[0, :, :8, :8] * 255 == pytest.approx(2, abs=1e-4)
    assert not added[0, :, 8:].any()
    shift[0, 0], shift[0, 256] = 0, 1  # the mean blueness of all 16x16 pixels: 17 / 8 of 1.772 levels
    added = unseen.jpeg(images, shift)[0] - images
    assert added[0, 2] * 255 == pytest.approx(1.772 * 17 / 8, abs=1e-4)
    assert added[0, 0] == pytest.approx(0, abs=1e-6)


def test_luv_of_known_colours_and_back() -> None:
    known = {(0, 0, 0): (0, 0, 0), (1, 1, 1): (100, 0, 0), (1, 0, 0): (53.24, 175.0, 37.8)}
    for colour, expected in known.items():
        scaled = unseen.to_luv(np.array(colour, np.float64))
        luv = scaled * [100, 200, 200] - [0, 100, 100]
        assert luv == pytest.approx(expected, abs=0.2)
    colours = np.random.default_rng(0).random((500, 3)) ** 3
    assert unseen.from_luv(unseen.to_luv(colours))[0] == pytest.approx(colours, abs=1e-9)


def test_the_gradient_through_luv_holds_for_dark_and_impossible_colours() -> None:
    rng = np.random.default_rng(0)
    scaled = rng.uniform([0.01, 0.3, 0.3], [1, 0.7, 0.7], (300, 3))
    cotangent = rng.normal(size=scaled.shape)
    gradient = unseen.from_luv(scaled)[1](cotangent)
    for axis in range(3):
        step = np.zeros(3)
        step[axis] = 1e-7
        ahead, behind = unseen.from_luv(scaled + step)[0], unseen.from_luv(scaled - step)[0]
        expected = ((ahead - behind) * cotangent).sum(axis=1) / 2e-7
        assert gradient[:, axis] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_roughness_counts_every_pair_twice_and_has_its_gradient() -> None:
    field = np.zeros((2, 3, 3, 2), np.float32)
    field[0, 1, 1] = 3, 4
    field[1] = 7
    assert unseen.roughness(field)[0] == pytest.approx([2 * 4 * 5, 0], abs=1e-3)
    rng = np.random.default_rng(0)
    field, direction = (rng.normal(size=(1, 3, 4, 2, 3)).astype(np.float32) for _ in range(2))
    slope = unseen.roughness(field + 1e-3 * direction)[0] - unseen.roughness(field - 1e-3 * direction)[0]
    assert slope / 2e-3 == pytest.approx((unseen.roughness(field)[1] * direction).sum(), rel=1e-3)


def test_smoothness_makes_the_flow_smoother() -> None:
    images = networks.images(1, (1, 8, 8))
    target = linear_target(np.random.default_rng(1).normal(size=(8, 8)), 1e3, (1, 8, 8))
    rough = []
    for smoothness in (0.0, 0.3):
        shifts: list[Floats] = []

        def watched(points: Floats, shift: Floats, shifts: list[Floats] = shifts) -> tuple[Floats, PullBack]:
            shifts.append(shift)
            return unseen.flow(points, shift)

        unseen.ascend(
            target.model,
            images,
            zeros(1),
            start_of("spatial-flow", images),
            0.3,
            transform=watched,
            rate=0.01,
            steps=30,
            smoothness=smoothness,
        )
        rough.append(unseen.roughness(shifts[-1])[0][0])
    assert rough[1] < 0.5 * rough[0]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_image_fares_alike_alone_and_in_company(name: str) -> None:
    run: Callable[..., Found] = BY_NAME[name].run
    target, images = a_target(), networks.images(3, (3, 16, 16))
    labels = target.model.logits(images).argmax(axis=1)
    together = run(target, images, labels, 0.05, 0, steps=10)
    again = run(target, images, labels, 0.05, 0, steps=10)
    alone = run(target, images[2:3], labels[2:3], 0.05, 0, steps=10)
    assert not np.array_equal(together.images, images)
    assert np.array_equal(together.images, again.images)
    assert run(target, images[:0], labels[:0], 0.05, 0).images.shape == (0, 3, 16, 16)
    assert together.success[2:3] == alone.success
    assert together.images[2:3] == pytest.approx(alone.images, abs=1e-3)


@pytest.mark.parametrize("attack", unseen.ATTACKS, ids=lambda attack: attack.name)
def test_an_image_whose_gradient_is_no_number_is_a_failure_and_leaves_the_others_alone(
    attack: Attack,
) -> None:
    class Broken(Detector):
        def loss_gradient(
            self, images: Floats, labels: Labels, loss: Loss = "margin"
        ) -> tuple[Floats, Floats, Floats]:
            logits, values, gradient = super().loss_gradient(images, labels, loss)
            gradient = np.where((images.mean(axis=(1, 2, 3)) < 0.5)[:, None, None, None], np.nan, gradient)
            return logits, values, gradient

    weight = np.stack([np.zeros(768), np.linspace(-1, 1, 768)]).astype(np.float32)
    never = networks.linear(weight, np.array([1e4, 0], np.float32), shape=(3, 16, 16))
    images = networks.images(2, (3, 16, 16))
    images[0] *= 0.5
    found = attack.run(Target(Broken(never, provider="cpu")), images, zeros(2), 0.05, 0)
    assert not found.success.any()
    assert found.images[0] == pytest.approx(images[0], abs=1e-6)
    alone = attack.run(Target(Detector(never, provider="cpu")), images[1:], zeros(1), 0.05, 0)
    assert found.images[1] == pytest.approx(alone.images[0], abs=1e-3)
    assert not np.array_equal(found.images[1], images[1])


@pytest.mark.parametrize("name", ["recolor", "jpeg"])
def test_other_channels_are_refused_by_name(name: str) -> None:
    target = linear_target(np.ones((2, 4, 4)), 1, (2, 4, 4))
    with pytest.raises(DataError, match=f"{name}: .* 2 channels"):
        BY_NAME[name].run(target, networks.images(1, (2, 4, 4)), zeros(1), 0.1, 0)


def test_no_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="budget is None"):
        BY_NAME["jpeg"].run(a_target(), networks.images(1, (3, 16, 16)), zeros(1), None, 0)
