"""Other people's attacks on linear models, whose nearest other class is known, and beside our own."""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from guard import attacks
from guard.attacks import Floats, Labels
from guard.errors import UsageError
from guard.evaluation import libraries
from guard.evaluation.apgd import apgd
from guard.evaluation.libraries import ATTACKS, Make, Part
from guard.evaluation.target import Target
from guard.norms import Norm
from guard.runtime import Detector
from guard.statistics import clopper_pearson
from tests import networks

SHAPE = (3, 6, 6)
COUNT = 8
BY_NAME = {attack.name: attack for attack in ATTACKS}


class Linear:
    """A linear model, images in the middle of the cube, their classes and distances to the nearest other."""

    def __init__(self, classes: int) -> None:
        weight = np.random.default_rng(classes).normal(size=(classes, 108)).astype(np.float32)
        self.images = 0.1 + 0.8 * networks.images(COUNT, SHAPE, seed=1)
        bias = -weight @ self.images.reshape(COUNT, -1).mean(axis=0)  # so that there are several classes
        model = networks.linear(weight, bias, shape=SHAPE)
        self.detector = Detector(model, provider="cpu", threads=1)
        self.target = Target(self.detector)
        logits = self.detector.logits(self.images).astype(np.float64)
        self.labels: Labels = logits.argmax(axis=1)
        self.distance: dict[Norm, NDArray[np.float64]] = {}
        orders: dict[Norm, int] = {"l2": 2, "linf": 1}
        for norm, order in orders.items():
            sizes = np.linalg.norm(
                (weight[self.labels][:, None] - weight).astype(np.float64), ord=order, axis=2
            )
            gaps = logits[np.arange(COUNT), self.labels][:, None] - logits
            gaps[np.arange(COUNT), self.labels] = np.inf
            self.distance[norm] = (gaps / np.maximum(sizes, 1e-9)).min(axis=1)


LINEAR = {classes: Linear(classes) for classes in (2, 4, 10)}


# The attack, and how far above the optimum it may end with 2 classes and with 10: relatively, and in pixels.
MINIMUM: tuple[tuple[str, Norm, Make, dict[int, float], float], ...] = (
    ("deepfool-l2", "l2", libraries.deepfool, {2: 0.021, 10: 0.021}, 5e-4),  # overshoots by 2% and by 1e-4
    # Adam moves every pixel by 0.01 at first.
    ("carlini-wagner-l2", "l2", partial(libraries.carlini_wagner, 120), {2: 0.05, 10: 0.1}, 0.02),
    # It follows the cross-entropy, which leads away from several classes at once.
    ("ddn-l2", "l2", libraries.decoupled, {2: 0.01, 10: 0.3}, 0),
    ("fmn-l2", "l2", partial(libraries.fast_minimum_norm, "l2"), {2: 0.001, 10: 0.001}, 0),
    ("fmn-linf", "linf", partial(libraries.fast_minimum_norm, "linf"), {2: 0.001, 10: 0.001}, 0),
)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize(
    ("norm", "make", "above", "absolute"), [case[1:] for case in MINIMUM], ids=[name for name, *_ in MINIMUM]
)
def test_minimum_norm_attacks_end_at_the_nearest_other_class(
    norm: Norm, make: Make, above: dict[int, float], absolute: float, classes: int
) -> None:
    linear = LINEAR[classes]
    found = libraries.with_foolbox(linear.target, linear.images, linear.labels, None, 0, norm=norm, make=make)
    optimum = linear.distance[norm]
    assert found.success.all()
    assert (found.distance >= optimum * (1 - 1e-4)).all()
    assert (found.distance <= optimum * (1 + above[classes]) + absolute).all()
    assert (linear.detector.logits(found.images).argmax(axis=1) != linear.labels).all()
    assert attacks.length(found.images - linear.images, norm) == pytest.approx(found.distance)


def test_carlini_wagner_returns_no_black_image_where_it_fails() -> None:
    # Class 1 begins where the mean is below 0.05, and until there the gradient is 0.
    flat = networks.model(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("Gemm", ["flat", "mean", "dark"], ["depth"], transB=1),
            helper.make_node("Relu", ["depth"], ["ramp"]),
            helper.make_node("Gemm", ["ramp", "steep", "bias"], ["logits"], transB=1),
        ],
        {
            "mean": np.full((1, 4), -0.25, np.float32),
            "dark": np.array([0.05], np.float32),
            "steep": np.array([[0], [1000]], np.float32),
            "bias": np.array([1, 0], np.float32),
        },
        (1, 2, 2),
        2,
    )
    target = Target(Detector(flat, provider="cpu", threads=1))
    images, labels = np.full((2, 1, 2, 2), 0.5, np.float32), np.zeros(2, np.int64)
    assert target.model.logits(0 * images).argmax(axis=1).tolist() == [1, 1]
    make = partial(libraries.carlini_wagner, 10)
    found = libraries.with_foolbox(target, images, labels, None, 0, norm="l2", make=make)
    assert not found.success.any()
    assert np.array_equal(found.images, images)


@pytest.mark.parametrize(
    ("norm", "make", "median"),
    [
        ("l2", partial(libraries.hop_skip_jump, "l2", 8), 1.1),
        ("linf", partial(libraries.hop_skip_jump, "linf", 8), 1.3),
        ("l2", partial(libraries.boundary, 1000), 5.0),
    ],
    ids=["hopskipjump-l2", "hopskipjump-linf", "boundary-l2"],
)
def test_attacks_by_decisions_come_near_the_nearest_other_class(
    norm: Norm, make: Make, median: float
) -> None:
    linear = LINEAR[2]
    run = partial(libraries.with_foolbox, norm=norm, make=make, starts=True)
    found = run(linear.target, linear.images, linear.labels, None, 0)
    ratio = found.distance / linear.distance[norm]
    assert found.success.all()
    assert ratio.min() >= 1 - 1e-4
    assert np.median(ratio) <= median


def test_directions_of_hopskipjump_are_seen_by_float32() -> None:
    shape = (3, 32, 32)
    slope = np.random.default_rng(0).normal(size=3072).astype(np.float32)
    image = 0.1 + 0.8 * networks.images(1, shape, seed=1)
    bias = np.array([2 - image.ravel() @ slope, 0], np.float32)
    target = Target(
        Detector(networks.linear(np.stack([slope, 0 * slope]), bias, shape), provider="cpu", threads=1)
    )
    make = partial(libraries.hop_skip_jump, "linf", 10)
    run = partial(libraries.with_foolbox, norm="linf", make=make, starts=True)
    found = run(target, image, np.zeros(1, np.int64), None, 0)
    assert found.distance[0] < 4 * 2 / np.abs(slope).sum()


def test_directions_of_hopskipjump_do_not_shrink_with_the_batch() -> None:
    linear = LINEAR[2]
    make = partial(libraries.hop_skip_jump, "l2", 4)
    run = partial(libraries.with_foolbox, norm="l2", make=make, starts=True)
    alone = run(linear.target, linear.images[:1], linear.labels[:1], None, 0)
    many = run(linear.target, np.repeat(linear.images[:1], 24, 0), np.repeat(linear.labels[:1], 24), None, 0)
    assert np.median(many.distance) == pytest.approx(alone.distance[0], rel=0.1)


def test_starting_points_are_noise_or_else_neighbours_of_another_class() -> None:
    model = LINEAR[2].detector
    images, labels = LINEAR[2].images, LINEAR[2].labels
    start, known = libraries.starting_points(model.logits, images, labels, np.random.default_rng(0))
    assert known.all()
    assert (model.logits(start).argmax(axis=1) != labels).all()
    assert len(set(labels)) == 2
    start, known = libraries.starting_points(model.logits, images, labels, np.random.default_rng(0), draws=0)
    assert known.all()
    assert (model.logits(start).argmax(axis=1) != labels).all()
    one = np.flatnonzero(labels == labels[0])
    start, known = libraries.starting_points(
        model.logits, images[one], labels[one], np.random.default_rng(0), draws=0
    )
    assert not known.any()
    found = libraries.proposed(model, images[one], labels[one], "l2", None, lambda images, _: (images, 0))
    assert not found.success.any()
    assert np.isinf(found.distance).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("part", ["apgd-ce", "apgd-t", "fab-t"])
def test_parts_of_autoattack_break_what_lies_within_the_budget(part: Part, norm: Norm) -> None:
    linear = LINEAR[4]
    distance = linear.distance[norm]
    budget = float(np.median(distance))
    # A single run of APGD, which starts at random and steps far, need not find the very nearest point.
    near = distance < budget * {"apgd-ce": 0.8, "apgd-t": 0.97, "fab-t": 0.97}[part]
    found = libraries.with_autoattack(
        linear.target, linear.images, linear.labels, budget, 0, norm=norm, parts=(part,)
    )
    assert found.success[near].all()
    assert not found.success[distance > budget].any()
    assert (attacks.length(found.images - linear.images, norm) <= budget).all()
    assert found.passes is not None
    attack = next(attack for attack in ATTACKS if part in attack.name and attack.norm == norm)
    assert 300 < found.passes.mean() <= attack.passes
    assert found.images.min() >= 0
    assert found.images.max() <= 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_square_succeeds_with_three_times_the_distance_and_keeps_the_budget(norm: Norm) -> None:
    linear = LINEAR[2]
    rows = slice(0, 3)
    budget = float(3 * linear.distance[norm][rows].max()) + 0.01
    run = partial(libraries.with_autoattack, norm=norm, parts=("square",))
    found = run(linear.target, linear.images[rows], linear.labels[rows], budget, 0)
    assert found.success.all()
    assert (found.distance <= budget).all()


def convolutional(seed: int = 0) -> tuple[Detector, Floats, Labels]:
    detector = Detector(networks.convolutional(seed=seed, classes=5), provider="cpu", threads=1)
    images = networks.images(48, seed=seed)
    return detector, images, detector.logits(images).argmax(axis=1)


def test_autoattack_is_never_weaker_than_its_parts_and_stops_where_it_succeeds() -> None:
    detector, images, labels = convolutional()
    images, labels = images[:12], labels[:12]
    passes = []

    class Counting(Detector):
        def logits(self, images: Floats) -> Floats:
            passes.append(len(images))
            return super().logits(images)

    distance = attacks.minimum_norm(detector, images, labels, norm="l2", clip=True).distance
    budget = float(np.quantile(distance, 0.9))
    run = partial(libraries.with_autoattack, norm="l2")
    whole: tuple[Part, ...] = (
        "apgd-ce",
        "apgd-t",
        "fab-t",
    )  # 5,000 queries of Square on what stands would take their time
    all_parts = run(Target(detector), images, labels, budget, 0, parts=whole)
    first = run(Target(detector), images, labels, budget, 0, parts=("apgd-ce",))
    assert (all_parts.success >= first.success).all()
    assert (all_parts.distance[all_parts.success] <= budget).all()
    assert first.success.any()
    # Broken by the first part: the others cost nothing.
    easy = Counting(networks.convolutional(classes=5), provider="cpu", threads=1)
    broken = run(Target(easy), images, labels, 20 * float(distance.max()), 0, parts=libraries.STANDARD)
    assert broken.success.all()
    assert sum(passes) < 130 * len(images)


def agreement(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> bool:
    """Whether the 95% intervals of two shares overlap."""
    first, second = (clopper_pearson(int(flags.sum()), len(flags)) for flags in (ours, theirs))
    return max(first.lower, second.lower) <= min(first.upper, second.upper)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_our_pgd_and_minimum_norm_agree_with_foolbox(norm: Norm) -> None:
    detector, images, labels = convolutional(seed=1)
    target = Target(detector)
    nearest = attacks.minimum_norm(detector, images, labels, norm=norm, clip=True)
    make = partial(libraries.fast_minimum_norm, norm)
    fmn = libraries.with_foolbox(target, images, labels, None, 0, norm=norm, make=make)
    assert nearest.success.mean() == pytest.approx(fmn.success.mean(), abs=0.1)
    both = nearest.success & fmn.success
    assert np.median(nearest.distance[both] / fmn.distance[both]) == pytest.approx(1, abs=0.05)
    budget = float(np.median(nearest.distance))
    foolbox = libraries.import_foolbox()
    theirs = {"l2": foolbox.attacks.L2PGD, "linf": foolbox.attacks.LinfPGD}[norm]

    class Fixed:
        """PGD of foolbox at one budget, called as its minimum-norm attacks are."""

        def run(self, network: object, images: torch.Tensor, criterion: object) -> torch.Tensor:
            found: torch.Tensor = theirs(steps=40, rel_stepsize=0.1).run(
                network, images, criterion, epsilon=budget
            )
            return found

    pgd = libraries.with_foolbox(target, images, labels, budget, 0, norm=norm, make=Fixed)
    ours = attacks.pgd(detector, images, labels, budget, norm=norm, steps=40, clip=True)
    assert agreement(ours.success, pgd.success)
    assert 0 < ours.success.mean() < 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_our_apgd_agrees_with_autoattacks(norm: Norm) -> None:
    detector, images, labels = convolutional(seed=1)
    nearest = attacks.minimum_norm(detector, images, labels, norm=norm, clip=True)
    budget = float(np.median(nearest.distance))
    parts: tuple[Part, ...] = ("apgd-ce",)
    theirs = libraries.with_autoattack(Target(detector), images, labels, budget, 0, norm=norm, parts=parts)
    ours = apgd(detector, images, labels, budget, norm=norm, loss="cross-entropy", restarts=1)
    assert agreement(ours.success, theirs.success)
    assert 0 < ours.success.mean() < 1
    # An image that only one of them breaks lies near the budget.
    apart = ours.success != theirs.success
    assert nearest.distance[apart] == pytest.approx(budget, rel=0.05)


def test_runs_are_deterministic_and_leave_the_generators_alone() -> None:
    linear = LINEAR[4]
    budget = float(np.median(linear.distance["l2"]))
    runs: list[Callable[[int], attacks.Found]] = [
        lambda seed: libraries.with_autoattack(
            linear.target, linear.images, linear.labels, budget, seed, norm="l2", parts=("apgd-ce",)
        ),
        lambda seed: libraries.with_foolbox(
            linear.target,
            linear.images,
            linear.labels,
            None,
            seed,
            norm="l2",
            make=partial(libraries.boundary, 50),
            starts=True,
        ),
    ]
    torch_state = torch.get_rng_state()
    handlers = list(logging.root.handlers)
    for run in runs:
        first, again, other = run(5), run(5), run(6)
        assert np.array_equal(first.images, again.images)
        assert not np.array_equal(first.images, other.images)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert logging.root.handlers == handlers


def test_wrong_images_are_at_distance_zero_and_are_not_attacked() -> None:
    linear = LINEAR[2]
    labels = linear.labels.copy()
    labels[:3] = 1 - labels[:3]
    asked = []

    def propose(images: Floats, labels: Labels) -> tuple[Floats, int]:
        asked.append(len(images))
        return np.full_like(images, np.nan), 6

    found = libraries.proposed(linear.detector, linear.images, labels, "l2", 0.1, propose)
    assert asked == [COUNT - 3]
    assert not found.distance[:3].any()
    assert np.isinf(found.distance[3:]).all()
    assert np.array_equal(found.images, linear.images)
    assert found.passes is not None
    assert found.passes.tolist() == [1] * 3 + [3] * (COUNT - 3)  # a share of 6, rounded up, and one to look
    everything = libraries.proposed(linear.detector, linear.images, 1 - linear.labels, "l2", 0.1, propose)
    assert asked == [COUNT - 3]
    assert everything.success.all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_proposals_outside_are_brought_back_inside(norm: Norm) -> None:
    linear = LINEAR[2]
    far = np.random.default_rng(0).normal(size=linear.images.shape).astype(np.float32)
    found = libraries.proposed(
        linear.detector, linear.images, linear.labels, norm, 0.05, lambda images, _: (images + far, 0)
    )
    assert (attacks.length(found.images - linear.images, norm) <= 0.05).all()
    assert found.images.min() >= 0
    near = linear.images + np.float32(1e-4) * attacks.steepest(far, "linf")
    assert np.array_equal(libraries.inside(linear.images, near, norm, 0.05), near)


def test_few_classes_have_what_autoattack_there_is() -> None:
    linear = LINEAR[2]
    budget = float(linear.distance["linf"].max() * 2)
    run = partial(libraries.with_autoattack, linear.target, linear.images, linear.labels, budget, 0)
    assert run(norm="linf").success.all()
    with pytest.raises(UsageError, match="4 classes"):
        run(norm="linf", parts=("apgd-t",))


@pytest.mark.parametrize(
    ("sides", "fit"),
    [
        ((2, 2), False),
        ((5, 5), True),
        ((9, 6), True),
        ((12, 12), False),
        ((24, 24), False),
        ((28, 28), True),
        ((32, 48), False),
        ((48, 32), True),
    ],
)
def test_square_in_l2_is_refused_where_its_squares_do_not_fit(sides: tuple[int, int], *, fit: bool) -> None:
    shape = (1, *sides)
    weight = np.random.default_rng(0).normal(size=(2, sides[0] * sides[1])).astype(np.float32)
    model = networks.linear(weight, -weight.sum(axis=1) / 2, shape=shape)
    target, images = Target(Detector(model, provider="cpu", threads=1)), np.full((2, *shape), 0.5, np.float32)
    images[:, 0, 0, 0] = 0, 1  # a little to either side of the boundary
    labels = target.model.logits(images).argmax(axis=1)
    run = partial(libraries.with_autoattack, target, images, labels, 4.0, 0, norm="l2", parts=("square",))
    if fit:
        assert run().success.all()
    else:
        with pytest.raises(UsageError, match=rf"{sides[0]} x {sides[1]} pixels.* autoattack-apgd-ce-l2"):
            run()


def test_names_budgets_and_needs() -> None:
    assert len(BY_NAME) == len(ATTACKS)
    for attack in ATTACKS:
        assert attack.name == attack.name.lower()
        assert attack.norm is None or attack.name.endswith(f"-{attack.norm}")
        assert attack.needs in ("foolbox", "pyautoattack", "art")
        assert (attack.budgets is None) == (attack.needs == "foolbox")
        assert attack.passes > 0
    assert BY_NAME["autoattack-l2"].budgets == (0.25, 0.5, 1.0)
    assert BY_NAME["square-linf"].knowledge == "scores"
    assert BY_NAME["boundary-l2"].knowledge == "decisions"
