"""Our own attacks against linear models, whose nearest adversarial images are known in closed form."""

import itertools
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from guard import attacks
from guard.attacks import FORWARD, GRADIENT, Floats, Found, Labels, Loss, length
from guard.evaluation.apgd import apgd
from guard.evaluation.attack import BUDGETS, Attack
from guard.evaluation.deepfool import deepfool
from guard.evaluation.gradient import ATTACKS, ascent, fgsm, one_direction, smallest_budget
from guard.evaluation.log_barrier import log_barrier
from guard.evaluation.target import Target
from guard.norms import NORMS, Norm
from guard.runtime import Detector
from tests import networks

SHAPE = (1, 3, 4)
PIXELS = 12
COUNT = 16

ALL = {attack.name: attack for attack in ATTACKS}
QUICK = [attack for attack in ATTACKS if not attack.name.startswith("pgd-plus")]
NEAREST = [attack for attack in QUICK if attack.budgets is None]
AT_BUDGET = [attack for attack in QUICK if attack.budgets is not None]
DEEP = [ALL["pgd-deep-l2"], ALL["pgd-deep-linf"]]
"""These go on into the wrong class, to the end of the budget."""

# How far from the optimum an attack may stay on a linear model, relatively; others 0.4%, which is bisection.
TOLERANCE = {
    "deepfool-l2": 0.021,  # it goes too far by 2% on purpose
    "deepfool-linf": 0.021,
    "cw-l2": 0.005,
    "cw-quick-l2": 0.1,
    "logbarrier-l2": 0.01,
    "logbarrier-linf": 0.01,
}
# These follow one direction that several classes share: with more than two they need not be optimal.
SHARED_DIRECTION = ("fgsm", "gradient", "ascent", "i-fgsm", "iterated-gradient")


class Counting:
    """A classifier that counts what it is asked for, in forward passes of single images."""

    def __init__(self, model: Detector) -> None:
        self.model = model
        self.input_shape, self.num_classes = model.input_shape, model.num_classes
        self.passes = 0

    def logits(self, images: Floats) -> Floats:
        self.passes += FORWARD * len(images)
        return self.model.logits(images)

    def loss_gradient(self, images: Floats, labels: Labels, loss: Loss) -> tuple[Floats, Floats, Floats]:
        self.passes += GRADIENT * len(images)
        return self.model.loss_gradient(images, labels, loss)

    def vjp(self, images: Floats, cotangents: Floats) -> tuple[Floats, Floats]:
        self.passes += GRADIENT * len(images)
        return self.model.vjp(images, cotangents)


def linear(classes: int, scale: float = 10.0) -> tuple[Detector, NDArray[np.float64], Floats, Labels]:
    """A linear model with boundaries through the middle of the cube, its weight, and images near them."""
    rng = np.random.default_rng(0)
    weight = (scale * rng.normal(size=(classes, PIXELS))).astype(np.float32)
    bias = -weight.sum(axis=1) / 2
    model = Detector(networks.linear(weight, bias, SHAPE), provider="cpu", threads=1)
    images = (0.3 + 0.4 * rng.random((40 * COUNT, *SHAPE))).astype(np.float32)
    far = optimum(model, weight.astype(np.float64), images, "l2")
    images = images[(far > 0.1) & (far < 0.3)][:COUNT]
    return model, weight.astype(np.float64), images, model.logits(images).argmax(axis=1)


def optimum(model: Detector, weight: NDArray[np.float64], images: Floats, norm: Norm) -> NDArray[np.float64]:
    """Distance (B,) of the nearest other class: |z_y - z_k| / ||w_y - w_k||, in l1 for linf."""
    logits = model.logits(images).astype(np.float64)
    labels = logits.argmax(axis=1)
    size = np.linalg.norm(weight[labels][:, None] - weight, ord=2 if norm == "l2" else 1, axis=2)
    gaps = logits.max(axis=1)[:, None] - logits
    gaps[np.arange(len(labels)), labels] = np.inf
    return np.asarray((gaps / np.maximum(size, 1e-9)).min(axis=1), np.float64)


def run(attack: Attack, model: Any, images: Floats, labels: Labels, budget: float | None = None) -> Found:
    return attack.run(Target(model), images, labels, budget, 0)


def norm_of(attack: Attack) -> Norm:
    assert attack.norm is not None
    return attack.norm


def names(attack: Attack) -> str:
    return attack.name


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("attack", NEAREST, ids=names)
def test_the_nearest_image_of_a_linear_model_is_found(attack: Attack, classes: int) -> None:
    # Carlini-Wagner's constant starts where distances times slopes are a network's, not at steep cliffs.
    model, weight, images, labels = linear(classes, 2.0 if attack.name.startswith("cw") else 10.0)
    exact = optimum(model, weight, images, norm_of(attack))
    found = run(attack, model, images, labels)
    assert found.success.all()
    assert (model.logits(found.images).argmax(axis=1) != labels).all()
    assert (found.distance >= exact * (1 - 1e-3)).all()
    tolerance = TOLERANCE.get(attack.name, 0.004)
    if classes == 2:
        assert (found.distance <= exact * (1 + tolerance)).all()
    elif not attack.name.startswith(SHARED_DIRECTION):
        # Attacks on the runner-up, or on the class that noise has found, may miss the nearest one.
        assert np.median(found.distance / exact) < 1.2 + tolerance


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("attack", AT_BUDGET, ids=names)
def test_a_budget_succeeds_exactly_where_it_reaches_the_boundary(attack: Attack, classes: int) -> None:
    model, weight, images, labels = linear(classes)
    exact = optimum(model, weight, images, norm_of(attack))
    budget = float(np.median(exact))
    found = run(attack, model, images, labels, budget)
    assert not found.success[exact > budget * 1.001].any()
    assert np.isinf(found.distance[~found.success]).all()
    assert (found.distance[found.success] <= budget * (1 + 1e-5)).all()
    within = exact < budget * 0.999
    if classes == 2:
        assert found.success[within].all()
    elif not attack.name.startswith(SHARED_DIRECTION):
        assert found.success[within].mean() >= 0.8


@pytest.mark.parametrize("attack", [attack for attack in QUICK if attack not in DEEP], ids=names)
def test_an_image_of_another_class_is_at_distance_zero(attack: Attack) -> None:
    model, _, images, labels = linear(3)
    found = run(attack, model, images[:4], (labels[:4] + 1) % 3, None if attack.budgets is None else 0.1)
    assert found.success.all()
    assert not found.distance.any()
    assert np.array_equal(found.images, images[:4])


@pytest.mark.parametrize("attack", QUICK, ids=names)
def test_attacks_stay_in_the_cube_and_in_their_budget(attack: Attack) -> None:
    model = Detector(networks.convolutional(scale=20.0), provider="cpu", threads=1)
    images = np.round(networks.images(4))  # on the edge of the cube
    labels = model.logits(images).argmax(axis=1)
    budget = None if attack.budgets is None else attack.budgets[0]
    found = run(attack, model, images, labels, budget)
    assert found.images.dtype == np.float32
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    moved = length(found.images - images, norm_of(attack))
    assert found.distance[found.success] == pytest.approx(moved[found.success], rel=1e-5)
    assert budget is None or (moved <= budget * (1 + 1e-5)).all()
    assert ((model.logits(found.images).argmax(axis=1) != labels) == found.success).all()


@pytest.mark.parametrize("attack", QUICK, ids=names)
def test_the_cost_is_counted_and_never_above_what_is_registered(attack: Attack) -> None:
    model, weight, images, labels = linear(10)
    exact = optimum(model, weight, images, norm_of(attack))
    for factor in (0.5, 2.0):
        counting = Counting(model)
        budget = None if attack.budgets is None else factor * float(exact[0])
        found = run(attack, counting, images[:1], labels[:1], budget)
        assert found.passes is not None
        assert 0 < found.passes[0] <= counting.passes <= attack.passes
        if not found.success[0] or (attack.budgets is not None and attack not in DEEP):
            assert found.passes[0] == counting.passes


@pytest.mark.parametrize("attack", [attack for attack in QUICK if attack not in DEEP], ids=names)
def test_nothing_is_spent_on_broken_images(attack: Attack) -> None:
    model, weight, images, labels = linear(2)
    budget = None if attack.budgets is None else 0.5 * float(optimum(model, weight, images, "l2").min())
    alone, beside = Counting(model), Counting(model)
    run(attack, alone, images[:1], labels[:1], budget)
    wrong = np.concatenate([labels[:1], 1 - labels[1:9]])
    found = run(attack, beside, images[:9], wrong, budget)
    assert found.passes is not None
    assert beside.passes == alone.passes + found.passes[1:].sum()
    assert (found.passes[1:] <= GRADIENT).all()


@pytest.mark.parametrize("attack", DEEP, ids=names)
def test_a_deep_attack_spends_its_whole_budget(attack: Attack) -> None:
    model, weight, images, labels = linear(2)
    norm = norm_of(attack)
    exact = optimum(model, weight, images, norm)
    budget = 1.5 * float(exact.max())
    found = run(attack, model, images, labels, budget)
    assert found.success.all()
    slope = np.linalg.norm(weight[1] - weight[0], ord=2 if norm == "l2" else 1)
    logits = model.logits(found.images).astype(np.float64)
    assert logits.max(axis=1) - logits.min(axis=1) == pytest.approx((budget - exact) * slope, rel=1e-3)


class Cliff(Counting):
    """A classifier whose logits are NaN wherever it would answer another class than `right`."""

    def __init__(self, model: Detector, right: int) -> None:
        super().__init__(model)
        self.right = right

    def logits(self, images: Floats) -> Floats:
        logits = super().logits(images)
        logits[logits.argmax(axis=1) != self.right] = np.nan
        return logits

    def loss_gradient(self, images: Floats, labels: Labels, loss: Loss) -> tuple[Floats, Floats, Floats]:
        return self.logits(images), *super().loss_gradient(images, labels, loss)[1:]


@pytest.mark.parametrize("attack", QUICK, ids=names)
def test_what_is_not_finite_is_never_found(attack: Attack) -> None:
    model, _, images, labels = linear(2, 2.0)
    images = images[labels == 1][:2]
    found = run(attack, Cliff(model, 1), images, np.array([1, 1]), None if attack.budgets is None else 1.0)
    assert not found.success.any()
    assert np.isfinite(found.images).all()
    assert np.isinf(found.distance).all()


@pytest.mark.parametrize("name", ["pgd-l2", "pgd-linf", "apgd-ce-l2", "apgd-dlr-linf", "i-fgsm-linf"])
def test_larger_budgets_break_more(name: str) -> None:
    model = Detector(networks.convolutional(scale=20.0), provider="cpu", threads=1)
    images = networks.images(5)
    labels = model.logits(images).argmax(axis=1)
    scale = 1.0 if name.endswith("l2") else 0.05
    broken = [run(ALL[name], model, images, labels, scale * eps).success for eps in (0.0, 0.05, 0.4, 3.2)]
    assert not broken[0].any()
    assert all((less <= more).all() for less, more in itertools.pairwise(broken))
    assert broken[-1].sum() > broken[1].sum()


EFFORT: dict[str, tuple[Any, dict[str, Any]]] = {
    "ascent": (partial(ascent, step=0.02), {"steps": 4}),
    "deepfool": (deepfool, {"steps": 1}),
    "log_barrier": (log_barrier, {"outer": 2}),
    "apgd": (partial(apgd, eps=0.1, loss="margin", steps=5), {"restarts": 1}),
    "pgd": (partial(attacks.pgd, eps=0.1, steps=3, clip=True), {"restarts": 1}),
}


@pytest.mark.parametrize("name", EFFORT)
def test_more_effort_breaks_no_fewer_images_and_none_farther(name: str) -> None:
    attack, small = EFFORT[name]
    model = Detector(networks.convolutional(scale=20.0), provider="cpu", threads=1)
    images = networks.images(8)
    labels = model.logits(images).argmax(axis=1)
    less = attack(model, images, labels, norm="l2", **small)
    more = attack(model, images, labels, norm="l2", **{key: 4 * value for key, value in small.items()})
    assert (less.success <= more.success).all()
    assert (more.distance <= less.distance * (1 + 1e-6)).all()


def test_the_direction_bends_at_the_edge_of_the_cube() -> None:
    # z_1 - z_0 = 4 x + 3 y - 4.9: the way from (0.8, 0.1) along (4, 3) meets x = 1, then goes up to y = 0.3.
    weight = np.array([[0, 0], [4, 3]], np.float32)
    model = Detector(networks.linear(weight, np.array([4.9, 0], np.float32), (1, 1, 2)), provider="cpu")
    images = np.array([[[[0.8, 0.1]]]], np.float32)
    found = one_direction(model, images, np.array([0]), norm="l2")
    assert found.success.all()
    assert found.images.reshape(2) == pytest.approx([1.0, 0.3], abs=1e-3)


def test_a_step_along_the_unit_gradient_and_along_its_sign() -> None:
    model, weight, images, labels = linear(2)
    difference = (weight[1] - weight[0]).reshape(SHAPE)
    up = np.where(labels == 0, 1.0, -1.0)[:, None, None, None]
    exact = {norm: optimum(model, weight, images, norm) for norm in NORMS}
    steps = {"l2": difference / np.linalg.norm(difference), "linf": np.sign(difference)}
    for norm in NORMS:
        budget = 1.1 * float(exact[norm].max())
        found = fgsm(model, images, labels, budget, norm=norm)
        assert found.success.all()
        assert found.images == pytest.approx(images + budget * up * steps[norm], abs=1e-4)


def test_ascent_gives_up_after_its_steps() -> None:
    model, weight, images, labels = linear(2)
    far = optimum(model, weight, images, "l2") > 0.005
    found = ascent(model, images, labels, norm="l2", step=0.001, steps=5)
    assert (found.success == ~far).all()


def test_a_budget_that_never_suffices_is_a_failure() -> None:
    _, _, images, labels = linear(2)
    tried = []

    def never(some: Floats, _: Labels, eps: NDArray[np.float64]) -> Found:
        tried.append(eps[0])
        return Found(some, np.zeros(len(some), np.bool_), np.full(len(some), np.inf))

    found = smallest_budget(never, images, labels, norm="l2", first=0.1, growths=4)
    assert not found.success.any()
    assert tried == pytest.approx([0.1, 0.15, 0.225, 0.3375])


def test_names_end_in_the_norm_and_are_told_once() -> None:
    assert len(ALL) == len(ATTACKS)
    assert {"pgd-l2", "pgd-linf", "fgsm-linf", "fmn-l2", "cw-l2", "deepfool-linf", "apgd-ce-l2"} <= set(ALL)
    for attack in ATTACKS:
        assert attack.norm is not None
        assert attack.name == attack.name.lower()
        assert attack.name.endswith(f"-{attack.norm}")
        assert attack.needs is None
        assert attack.budgets in (None, BUDGETS[attack.norm])


def test_no_torch_is_needed() -> None:
    code = "import sys, guard.evaluation.gradient\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
