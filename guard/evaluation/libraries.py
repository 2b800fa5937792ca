"""Published attacks as well-kept libraries have them, on any classifier: foolbox, pyautoattack, one of ART.

They see the classifier as a torch network (`torch_models.as_module`), whose gradients are the classifier's
own, so that a bare ONNX bundle will do. What they return is taken for a proposal: it is clipped to [0, 1],
projected where it left the budget, and judged anew by the classifier itself. Images that are wrong to begin
with are not attacked.

What only a library has goes by its own name, what `guard.evaluation.gradient` has too with the library's
before it.
"""

import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from unittest import mock

import numpy as np

from guard import attacks
from guard.attacks import Floats, Found, Labels, column, length, misclassified
from guard.errors import UsageError
from guard.evaluation import wasserstein
from guard.evaluation.attack import BUDGETS, Attack, Run
from guard.evaluation.target import Classifier, Flags, Target
from guard.norms import Norm

Part = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
Make = Callable[[], Any]
Propose = Callable[[Floats, Labels], tuple[Floats, int]]

STANDARD: tuple[Part, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")

ROUNDING = 1e-5
"""By how much less than a budget, relative to it, what lies beyond is projected to: more than the error of
float32, so that it ends inside."""

RESOLVED = 1e-6
"""Pixel values that float32 tells apart: sixteen of its last digits, just below 1."""


def proposed(
    model: Classifier,
    images: Floats,
    labels: Labels,
    norm: Norm | None,
    budget: float | None,
    propose: Propose,
) -> Found:
    """Attacks the images (B, C, H, W) that `model` classifies as their labels (B,), and judges what it finds.

    `propose(images, labels)` is the attack: points (B, C, H, W), and how many forward passes it took for all
    together. Proposals that are not finite count for nothing, those outside [0, 1] are clipped, those outside
    the budget projected. Wrong images succeed at distance 0. With `norm` None the distance of a success is
    the budget, which the attack itself keeps. `passes` is the mean of the images attacked: libraries do not
    say more.
    """
    points, success = images.copy(), misclassified(images, model.logits(images), labels)
    distance, passes = np.where(success, 0.0, np.inf), np.ones(len(images), np.int64)
    rows = np.flatnonzero(~success)
    if len(rows):
        found, spent = propose(images[rows], labels[rows])
        passes[rows] += -(-spent // len(rows))
        finite = np.isfinite(found).all(axis=(1, 2, 3))
        found = np.clip(np.where(finite.reshape(-1, 1, 1, 1), found, images[rows]), 0.0, 1.0)
        if norm is not None and budget is not None:
            found = inside(images[rows], found, norm, budget)
        hit = misclassified(found, model.logits(found), labels[rows])
        reach = np.full(len(rows), budget) if norm is None else length(found - images[rows], norm)
        points[rows], success[rows] = found, hit
        distance[rows] = np.where(hit, reach, np.inf)
    return Found(points, success, distance, passes)


def inside(images: Floats, points: Floats, norm: Norm, budget: float) -> Floats:
    """The points (B, C, H, W), those farther than `budget` from their image moved to within it."""
    shift = points - images
    over = length(shift, norm) > budget
    kept = images + attacks.project(shift, np.full(len(images), budget * (1 - ROUNDING)), norm)
    return np.where(over.reshape(-1, 1, 1, 1), np.clip(kept, 0.0, 1.0), points)


def with_foolbox(
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    seed: int,
    *,
    norm: Norm,
    make: Make,
    starts: bool = False,
) -> Found:
    """A minimum-norm attack of foolbox, made by `make`; one that needs `starts` gets adversarial images to
    start from, and skips those for which there are none.
    """
    import torch

    from guard.evaluation.torch_models import as_module, isolated

    foolbox = import_foolbox()

    def propose(images: Floats, labels: Labels) -> tuple[Floats, int]:
        module = as_module(target.model)

        def logits(images: Floats) -> Floats:
            with torch.no_grad():
                return np.asarray(module(torch.from_numpy(images).to(module.device)).cpu().numpy())

        points, rows, options = images.copy(), np.arange(len(images)), {}
        if starts:
            begin, known = starting_points(logits, images, labels, np.random.default_rng(seed))
            rows = np.flatnonzero(known)
            options = {"starting_points": torch.from_numpy(begin[rows]).to(module.device)}
        if len(rows):
            with isolated(seed):
                # Means over windows of the boundary attack that are still empty.
                warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
                network = foolbox.PyTorchModel(module, bounds=(0, 1), device=module.device)
                truth = torch.from_numpy(labels[rows]).to(module.device)
                there = torch.from_numpy(images[rows]).to(module.device)
                found = make().run(network, there, foolbox.criteria.Misclassification(truth), **options)
            points[rows] = found.detach().cpu().numpy()
        return points, module.passes

    return proposed(target.model, images, labels, norm, budget, propose)


def starting_points(
    logits: Callable[[Floats], Floats],
    images: Floats,
    labels: Labels,
    generator: np.random.Generator,
    *,
    draws: int = 100,
) -> tuple[Floats, Flags]:
    """Images of another class than `labels`, (B, C, H, W), and for which one is known (B,).

    Uniform noise, else the nearest image of the batch that the model takes for another class; the way from
    the image to it is halved ten times. Noise alone will not do: a network may take all of it for one class.
    """
    start, known = images.copy(), np.zeros(len(images), np.bool_)
    for _ in range(draws):
        rows = np.flatnonzero(~known)
        if not len(rows):
            break
        noise = generator.random((len(rows), *images.shape[1:]), dtype=np.float32)
        hit = logits(noise).argmax(axis=1) != labels[rows]
        start[rows[hit]], known[rows[hit]] = noise[hit], True
    predicted = logits(images).argmax(axis=1)
    for row in np.flatnonzero(~known):
        others = np.flatnonzero(predicted != labels[row])
        if len(others):
            nearest = others[length(images[others] - images[row], "l2").argmin()]
            start[row], known[row] = images[nearest], True
    low, high = np.zeros(len(images)), np.ones(len(images))
    for _ in range(10):
        middle = (low + high) / 2
        hit = logits(images + column(middle) * (start - images)).argmax(axis=1) != labels
        high, low = np.where(hit, middle, high), np.where(hit, low, middle)
    return np.where(column(high) < 1, images + column(high) * (start - images), start), known


def import_foolbox() -> Any:
    """The package. On import it warns of scipy's old names, and looks for git, which no attack needs."""
    with warnings.catch_warnings(), mock.patch.dict(os.environ, {"GIT_PYTHON_REFRESH": "quiet"}):
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import foolbox
    return foolbox


def deepfool() -> Any:
    """Moosavi-Dezfooli et al. 2016, as foolbox has it by default."""
    from foolbox.attacks import L2DeepFoolAttack

    return L2DeepFoolAttack(steps=50, candidates=10, overshoot=0.02, loss="logits")


def carlini_wagner(steps: int = 1000) -> Any:
    """Carlini & Wagner 2017, as foolbox has it by default but for the number of steps.

    Where foolbox 3.3.4 finds nothing it returns a black image, which may well be of another class; here the
    image comes back as it was.
    """
    from foolbox.attacks import L2CarliniWagnerAttack

    class Kept(L2CarliniWagnerAttack):
        def run(self, model: Any, inputs: Any, criterion: Any, **options: Any) -> Any:
            found = super().run(model, inputs, criterion, **options)
            return inputs.where((found == 0).all(dim=(1, 2, 3), keepdim=True), found)

    return Kept(
        binary_search_steps=9, steps=steps, stepsize=0.01, confidence=0, initial_const=1e-3, abort_early=True
    )


def decoupled() -> Any:
    """DDN, Rony et al. 2019, as foolbox has it by default."""
    from foolbox.attacks import DDNAttack

    return DDNAttack(init_epsilon=1.0, steps=100, gamma=0.05)


def fast_minimum_norm(norm: Norm) -> Any:
    """FMN, Pintor et al. 2021, as foolbox has it by default.

    Balls are a hair larger here: a point that lands on the boundary itself is on neither side, and the attack
    would stay there. The l2 projection of foolbox 3.3.4 divides a norm by itself and moves no point; this one
    does.
    """
    import eagerpy
    from foolbox.attacks import L2FMNAttack, LInfFMNAttack

    hair = 1 + 1e-4

    class L2(L2FMNAttack):
        def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
            shift = x - x0
            size = eagerpy.maximum(shift.flatten(start=1).norms.l2(axis=-1), 1e-12)
            return x0 + shift * eagerpy.minimum(1, hair * epsilon / size).reshape((-1, 1, 1, 1))

    class Linf(LInfFMNAttack):
        def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
            return super().project(x, x0, hair * epsilon)

    return (L2 if norm == "l2" else Linf)(steps=100, max_stepsize=1.0, gamma=0.05)


def boundary(steps: int = 25_000) -> Any:
    """Brendel et al. 2018, as foolbox has it by default."""
    from foolbox.attacks import BoundaryAttack

    return BoundaryAttack(steps=steps)


def hop_skip_jump(norm: Norm, steps: int = 64) -> Any:
    """Chen et al. 2020, as foolbox has it by default.

    foolbox 3.3.4 scales random directions and the estimated gradient by their norms over the whole batch, so
    that every image's steps shrink with the number of its neighbours; here the norms are per image, and the
    directions are drawn one after another instead of all at once, which bounds the memory. Directions are at
    least so long that pixels move by `RESOLVED`, by root mean square: in linf, on images as large as CIFAR's,
    those of the paper are shorter than the last digit of a float32.
    """
    import eagerpy
    from foolbox.attacks import HopSkipJumpAttack

    class PerImage(HopSkipJumpAttack):
        def select_delta(self, originals: Any, distances: Any, step: int) -> Any:
            shortest = RESOLVED * math.sqrt(math.prod(originals.shape[1:]))
            return eagerpy.maximum(super().select_delta(originals, distances, step), shortest)

        def approximate_gradients(self, is_adversarial: Any, x_advs: Any, steps: int, delta: Any) -> Any:
            width = delta.reshape((-1, 1, 1, 1))
            signs, moves, signed = 0.0 * delta, 0.0 * x_advs, 0.0 * x_advs
            for _ in range(steps):
                draw = (
                    eagerpy.normal(x_advs, x_advs.shape)
                    if self.constraint == "l2"
                    else eagerpy.uniform(x_advs, x_advs.shape, -1, 1)
                )
                near = (x_advs + width * unit(draw)).clip(0, 1)
                move = (near - x_advs) / (width + 1e-8)
                sign = eagerpy.where(is_adversarial(near), 1.0, -1.0)
                signs, moves = signs + sign, moves + move
                signed = signed + sign.reshape((-1, 1, 1, 1)) * move
            mean = (signs / steps).reshape((-1, 1, 1, 1))
            # The mean of the signs is the paper's baseline; where all agree, it would leave nothing.
            return unit(signed - eagerpy.where(mean.abs() == 1, 0.0 * mean, mean) * moves)

    def unit(vectors: Any) -> Any:
        return vectors / (vectors.flatten(start=1).norms.l2(axis=-1).reshape((-1, 1, 1, 1)) + 1e-12)

    return PerImage(steps=steps, constraint=norm)


def with_autoattack(
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    seed: int,
    *,
    norm: Norm,
    parts: tuple[Part, ...] = STANDARD,
) -> Found:
    """Standard AutoAttack of pyautoattack (Croce & Hein 2020), or some of its parts as they run in it, one
    after another, each on what the ones before left standing.

    The targeted parts aim at the nine most probable other classes, or at as many as there are. The targeted
    difference of logits ratio needs four classes: with three the untargeted one stands in for it within the
    whole, with two nothing does. Raises `UsageError` for it on its own, and for Square in l2, on its own or
    not, where its squares do not lie within the images.
    """
    import torch
    from pyautoattack import AutoAttack

    from guard.evaluation.torch_models import as_module, isolated

    classes, (_, height, width) = target.model.num_classes, target.model.input_shape
    if parts == ("apgd-t",) and classes < 4:
        raise UsageError(f"AutoAttack's targeted APGD needs 4 classes or more, and the model has {classes}.")
    if norm == "l2" and "square" in parts and not squares_fit(height, width):
        raise UsageError(
            f"the Square attack in l2 cannot lay its first squares on images of {height} x {width} pixels, "
            "only on 5 x 5 and more but for some sizes, such as 12, 14 or 24. Leave out square-l2 and "
            "autoattack-l2, whose other parts are autoattack-apgd-ce-l2, autoattack-apgd-t-l2 and fab-t-l2."
        )
    if "apgd-t" in parts and classes < 4:
        instead: tuple[Part, ...] = ("apgd-dlr",) if classes == 3 else ()
        at = parts.index("apgd-t")
        parts = parts[:at] + instead + parts[at + 1 :]

    def propose(images: Floats, labels: Labels) -> tuple[Floats, int]:
        module = as_module(target.model)
        with isolated(seed):
            attack = AutoAttack(
                module,
                norm={"l2": "L2", "linf": "Linf"}[norm],
                eps=budget,
                seed=seed,
                version="standard",
                device=module.device,
            )
            attack.verbose = False
            attack.attacks_to_run = list(parts)
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
            found, _ = attack.run_standard_evaluation(
                torch.from_numpy(images).to(module.device),
                torch.from_numpy(labels).to(module.device),
                batch_size=len(images),
            )
        return np.asarray(found.cpu().numpy(), np.float32), module.passes

    return proposed(target.model, images, labels, norm, budget, propose)


def squares_fit(height: int, width: int) -> bool:
    """Whether the squares that Square starts from in l2, a fifth of the height wide, lie within the image.

    pyautoattack 0.2.0 lays as many as the image has room for but begins away from its edge, and fails on a
    square that is cut off. Of those of one pixel none is.
    """
    side = height // 5
    edge = (height - 5 * side) // 2
    return side == 1 or (side > 1 and all(edge + room // side * side <= room for room in (height, width)))


def with_wasserstein(
    target: Target, images: Floats, labels: Labels, budget: float | None, seed: int, *, steps: int = 100
) -> Found:
    """The attack of `guard.evaluation.wasserstein`, which draws nothing: `seed` is ignored."""
    del seed
    if budget is None:
        raise UsageError("the Wasserstein attack needs a budget.")
    propose = partial(wasserstein.attack, target.model, budget=budget, steps=steps)
    return proposed(target.model, images, labels, None, budget, propose)


def _nearest(name: str, title: str, norm: Norm, passes: int, source: str, make: Make) -> Attack:
    return Attack(
        f"{name}-{norm}",
        title,
        partial(with_foolbox, norm=norm, make=make),
        norm,
        "gradients",
        passes,
        f"{source}; foolbox 3.3",
        needs="foolbox",
    )


def _by_decisions(name: str, title: str, norm: Norm, passes: int, source: str, make: Make) -> Attack:
    return Attack(
        f"{name}-{norm}",
        title,
        partial(with_foolbox, norm=norm, make=make, starts=True),
        norm,
        "decisions",
        passes,
        f"{source}; foolbox 3.3",
        needs="foolbox",
    )


# At most, with the checks that precede every run of AutoAttack and the judging of its results.
_PARTS: dict[Part, tuple[str, str, int, str]] = {
    "apgd-ce": ("autoattack-apgd-ce", "APGD on the cross-entropy (AutoAttack)", 320, "100 steps"),
    "apgd-t": ("autoattack-apgd-t", "targeted APGD (AutoAttack)", 2_750, "DLR loss, 9 targets, 100 steps"),
    "fab-t": ("fab-t", "targeted FAB (AutoAttack)", 3_650, "9 targets, 100 steps"),
    "square": ("square", "Square (AutoAttack)", 5_020, "5,000 queries"),
}


def _autoattack(norm: Norm) -> tuple[Attack, ...]:
    budgets = BUDGETS[norm]
    source = "Croce & Hein 2020, standard version; pyautoattack 0.2"
    whole = Attack(
        f"autoattack-{norm}",
        "AutoAttack (standard)",
        partial(with_autoattack, norm=norm),
        norm,
        "gradients",
        sum(passes for _, _, passes, _ in _PARTS.values()),
        source,
        budgets,
        needs="pyautoattack",
    )

    def alone(part: Part) -> Attack:
        name, title, passes, settings = _PARTS[part]
        run: Run = partial(with_autoattack, norm=norm, parts=(part,))
        knowledge: Literal["scores", "gradients"] = "scores" if part == "square" else "gradients"
        cited = f"{source}: {settings}"
        return Attack(
            f"{name}-{norm}", title, run, norm, knowledge, passes, cited, budgets, needs="pyautoattack"
        )

    return (whole, *(alone(part) for part in _PARTS))


ATTACKS: tuple[Attack, ...] = (
    _nearest(
        "foolbox-deepfool",
        "DeepFool (foolbox)",
        "l2",
        1 + 50 * 9 * 3,
        "Moosavi-Dezfooli et al. 2016: 50 steps, 10 candidates, overshoot 0.02",
        deepfool,
    ),
    _nearest(
        "foolbox-cw",
        "Carlini-Wagner (foolbox)",
        "l2",
        9 * 1000 * 3,
        "Carlini & Wagner 2017: 9 searches of at most 1,000 Adam steps (10,000 there), rate 0.01",
        carlini_wagner,
    ),
    _nearest("ddn", "DDN", "l2", 300, "Rony et al. 2019: 100 steps, gamma 0.05", decoupled),
    *(
        _nearest(
            "foolbox-fmn",
            "FMN (foolbox)",
            norm,
            300,
            "Pintor et al. 2021: 100 steps of 1 to 0.01, gamma 0.05",
            partial(fast_minimum_norm, norm),
        )
        for norm in ("l2", "linf")
    ),
    _by_decisions(
        "boundary", "Boundary", "l2", 111 + 27_500, "Brendel et al. 2018: at most 25,000 steps", boundary
    ),
    *(
        _by_decisions(
            "hopskipjump",
            "HopSkipJump",
            norm,
            40_000,
            "Chen et al. 2020: 64 steps, 100 to 800 draws each",
            partial(hop_skip_jump, norm),
        )
        for norm in ("l2", "linf")
    ),
    *_autoattack("l2"),
    *_autoattack("linf"),
    Attack(
        "wasserstein",
        "Wasserstein (projected Sinkhorn)",
        with_wasserstein,
        None,
        "gradients",
        3 + 100 * 4,
        "Wong et al. 2019, MANIFOLD Table 1: 100 steps, regularization 3000; ART 1.20",
        (0.1,),
        needs="art",
        unit="share of the image's mass times pixels moved",
    ),
)
