"""Attacks on bare ONNX classifiers, in numpy, through the gradients of `guard.runtime.Detector`.

One shape throughout: `attack(model, images, labels, ...)`, images float32 (B, C, H, W) in [0, 1], labels
int64 (B,): the class the attack leads away from (the predicted class where a radius is tested, the true one
where accuracy is). Results are deterministic by `seed`. Perturbations are measured in pixels ([0, 1] scale),
in the l2 or linf norm. `clip` keeps attacked images in [0, 1]; radii speak of every perturbation, so their
checks leave it off. A point that is not finite, or whose logits are not, never counts as found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from guard.norms import Norm

Loss = Literal["margin", "cross-entropy", "probability-margin"]
Linear = Literal["steepest", "aligned"]
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Rows = NDArray[np.intp]

TINY = 1e-30

BISECTIONS = 12
"""Of the way back from an adversarial image to the boundary."""

FORWARD, GRADIENT = 1, 3
"""Cost per image of logits and of a gradient, in forward passes: a backward pass takes about two."""

INSIDE = 1 - 1e-4
"""Share of a radius that counts as strictly inside it, whatever the rounding."""

LOSSES: tuple[Loss, ...] = ("margin", "cross-entropy", "probability-margin")
"""What `inside` climbs. The margin follows the class that leads, cross-entropy looks at all."""

CLASSES = 9
"""Most probable other classes that `nearest` looks at, the runner-up among them."""

WITHIN = 1.5
"""`nearest` is led only towards classes that seem at most so many times as far as the nearest found."""


class Differentiable(Protocol):
    """What attacks need of a model; `guard.runtime.Detector` is one."""

    def logits(self, images: Floats) -> Floats:
        """Logits (B, K) of images (B, C, H, W)."""
        ...

    def loss_gradient(self, images: Floats, labels: Labels, loss: Loss) -> tuple[Floats, Floats, Floats]:
        """Logits (B, K), per-image loss (B,) and its gradient (B, C, H, W).

        `margin` is max_{i != y} z_i - z_y, positive once the prediction is no longer y; `cross-entropy` is
        -log p_y.
        """
        ...


class WithRows(Differentiable, Protocol):
    """A model of `num_classes` that can also be led towards a class; `guard.runtime.Detector` is one."""

    num_classes: int

    def vjp(self, images: Floats, cotangents: Floats) -> tuple[Floats, Floats]:
        """Logits (B, K) and the gradient (B, C, H, W) of Σ_k cotangents[k] z_k(x), per image; cotangents (B,
        K).
        """
        ...


@dataclass(frozen=True)
class Found:
    """Attacked images (B, C, H, W), the attacks' success (B,) and how far they went (B,; inf: failed).

    `passes` (B,), where it was counted, is the cost of each image in forward passes until the attack first
    succeeded, and all it spent where it failed; `spent` (B,), where that was counted, is all in either case.
    """

    images: Floats
    success: NDArray[np.bool_]
    distance: NDArray[np.float64]
    passes: NDArray[np.int64] | None = None
    spent: NDArray[np.int64] | None = None


def column(values: NDArray[np.float64] | Floats) -> Floats:
    """Per-image numbers (B,) as float32 (B, 1, 1, 1)."""
    return np.asarray(values, dtype=np.float32).reshape(-1, 1, 1, 1)


def length(vectors: Floats, norm: Norm) -> NDArray[np.float64]:
    """Per-image norm (B,) of vectors (B, C, H, W)."""
    flat = _flat(vectors)
    if norm == "l2":
        return np.asarray(np.sqrt(np.einsum("bi,bi->b", flat, flat)), dtype=np.float64)
    return np.asarray(np.abs(flat).max(axis=1, initial=0.0), dtype=np.float64)


def dual_length(vectors: Floats, norm: Norm) -> NDArray[np.float64]:
    """Per-image dual norm (B,): l2 for l2, l1 for linf."""
    if norm == "l2":
        return length(vectors, "l2")
    return np.asarray(np.abs(_flat(vectors)).sum(axis=1), dtype=np.float64)


def inner(left: Floats, right: Floats) -> NDArray[np.float64]:
    """Per-image inner products (B,)."""
    return np.asarray(np.einsum("bi,bi->b", _flat(left), _flat(right)), dtype=np.float64)


def _flat(vectors: Floats) -> NDArray[np.float64]:
    """(B, C, H, W) as float64 (B, C * H * W), B = 0 too."""
    return vectors.reshape(len(vectors), int(np.prod(vectors.shape[1:]))).astype(np.float64)


def misclassified(points: Floats, logits: Floats | NDArray[np.float64], labels: Labels) -> NDArray[np.bool_]:
    """Whether points (B, C, H, W) of logits (B, K) are predicted as another class than labels (B,).

    Never where a pixel or a logit is not finite: the argmax would say nothing there, and max pooling passes
    NaN by.
    """
    return np.asarray(finite(points, logits) & (logits.argmax(axis=1) != labels), dtype=np.bool_)


def finite(points: Floats, logits: Floats | NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether all pixels of points (B, C, H, W) and all their logits (B, K) are finite (B,)."""
    return np.asarray(
        np.isfinite(points).all(axis=(1, 2, 3)) & np.isfinite(logits).all(axis=1), dtype=np.bool_
    )


def ranked(logits: Floats | NDArray[np.float64], labels: Labels) -> Labels:
    """The classes (B, K - 1) other than the labels, the most probable first."""
    masked = logits.astype(np.float64)
    np.put_along_axis(masked, labels[:, None], -np.inf, axis=1)
    return np.asarray(np.argsort(-masked, axis=1, kind="stable")[:, :-1], np.int64)


def others(logits: Floats | NDArray[np.float64], labels: Labels, place: int = 1) -> Labels:
    """The class (B,) that is the most probable but the labels' one (place 1), the next (2), ...; the last
    where there are fewer.
    """
    return np.asarray(ranked(logits, labels)[:, min(place, logits.shape[1] - 1) - 1], np.int64)


def steepest(gradient: Floats, norm: Norm) -> Floats:
    """The unit vector of `norm` along which a function with this gradient grows most; 0 at gradient 0."""
    if norm == "linf":
        return np.sign(gradient)
    size = length(gradient, "l2")
    return np.asarray(gradient / column(np.where(size > 0, size, 1.0)), dtype=np.float32)


def project(vectors: Floats, eps: NDArray[np.float64], norm: Norm) -> Floats:
    """The nearest vectors of norm at most eps (B,)."""
    if norm == "linf":
        return np.clip(vectors, -column(eps), column(eps))
    shrink = np.minimum(1.0, eps / np.maximum(length(vectors, "l2"), TINY))
    return np.asarray(vectors * column(shrink), dtype=np.float32)


def random_directions(shape: tuple[int, ...], norm: Norm, generator: np.random.Generator) -> Floats:
    """Random vectors of unit norm: uniform on the l2 sphere, or random corners of the linf cube."""
    return steepest(generator.standard_normal(shape, dtype=np.float32), norm)


def falling(eps: NDArray[np.float64], step: int, steps: int, last: float = 0.1) -> NDArray[np.float64]:
    """Step lengths (B,), falling linearly from eps to `last` * eps."""
    return eps * (1.0 - (1.0 - last) * step / max(1, steps - 1))


def pgd(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    eps: NDArray[np.float64] | float,
    *,
    norm: Norm,
    steps: int = 20,
    restarts: int = 2,
    loss: Loss = "margin",
    rate: float | None = None,
    clip: bool = False,
    stop: bool = True,
    seed: int = 0,
) -> Found:
    """Projected gradient ascent on the loss inside the ball of radius eps (a number, or one per image).

    The first restart starts at the image, later ones at random points on the edge of the ball. Steps fall
    linearly from eps to eps / 10, or are all of length `rate` * eps. With `stop`, an image is left alone at
    its first flip; without, ascent goes on and the image with the largest loss is kept: the high-confidence
    attack of a fixed budget. `distance` is the norm of what was found. Source: Madry et al. 2018; SCALE and
    LIPGEN use 20 steps.
    """
    budget = np.broadcast_to(np.asarray(eps, dtype=np.float64), (len(images),)).copy()
    generator = np.random.default_rng(seed)
    best = images.copy()
    best_loss = np.full(len(images), -np.inf)
    success = np.zeros(len(images), dtype=np.bool_)
    passes = np.zeros(len(images), dtype=np.int64)
    open_ = budget > 0

    def keep(rows: NDArray[np.intp], points: Floats, logits: Floats, values: Floats) -> None:
        flipped = misclassified(points, logits, labels[rows])
        values = np.where(finite(points, logits), values, -np.inf)
        # A flip beats any loss without one; argmax decides ties as the served prediction does.
        better = (flipped & ~success[rows]) | ((flipped == success[rows]) & (values > best_loss[rows]))
        best[rows[better]] = points[better]
        best_loss[rows[better]] = values[better]
        passes[rows[~success[rows]]] += GRADIENT
        success[rows] |= flipped
        if stop:
            open_[rows[flipped]] = False

    for restart in range(restarts):
        rows = np.flatnonzero(open_)
        if not len(rows):
            break
        start = random_directions(images.shape, norm, generator)[rows]
        shift = project(start * column(budget[rows] * (restart > 0)), budget[rows], norm)
        for step in range(steps + 1):
            still = open_[rows]
            rows, shift = rows[still], shift[still]
            if not len(rows):
                break
            points = images[rows] + shift
            if clip:
                points = np.clip(points, 0.0, 1.0)
            logits, values, gradient = model.loss_gradient(points, labels[rows], loss)
            keep(rows, points, logits, values)
            if step < steps:
                far = falling(budget[rows], step, steps) if rate is None else rate * budget[rows]
                shift = project(
                    points - images[rows] + column(far) * steepest(gradient, norm), budget[rows], norm
                )
    moved = length(best - images, norm)
    return Found(best, success, np.where(success, moved, np.inf), passes)


def inside(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    radius: NDArray[np.float64],
    *,
    norm: Norm,
    losses: Sequence[Loss] = LOSSES,
    steps: int = 20,
    restarts: int = 2,
    seed: int = 0,
) -> Found:
    """PGD strictly inside each image's `radius` (B,), on every loss, from the image and from random points.

    `labels` (B,) are the predicted classes. Attacked images may leave [0, 1], since a radius speaks of every
    perturbation. A success is moved back to just past the boundary, so that its distance also counts against
    smaller radii; an image broken by one loss is spared the others. Radii of 0 and infinite ones are not
    attacked. Source: Madry et al. 2018.
    """
    best = Found(images.copy(), np.zeros(len(images), np.bool_), np.full(len(images), np.inf))
    for at, loss in enumerate(losses):
        rows = np.flatnonzero(~best.success & np.isfinite(radius) & (radius > 0))
        if not len(rows):
            break
        found = pgd(
            model,
            images[rows],
            labels[rows],
            INSIDE * radius[rows],
            norm=norm,
            steps=steps,
            restarts=restarts,
            loss=loss,
            seed=seed + 1000 * at,
        )
        found_images = onto_boundary(model, images[rows], found.images, labels[rows], found.success)
        best.images[rows], best.success[rows] = found_images, found.success
        moved = length(found_images - images[rows], norm)
        best.distance[rows] = np.where(found.success, moved, np.inf)
    return best


def minimum_norm(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    *,
    norm: Norm,
    steps: int = 40,
    clip: bool = False,
) -> Found:
    """The nearest point with another prediction that gradient ascent finds, just past the boundary.

    Normalized-gradient ascent on the logit margin loss inside a ball whose radius follows the boundary: while
    no flip is known the radius is where the linearized loss crosses 0; past the boundary it shrinks, before
    it it grows. The step decays by a cosine. At the end the segment from image to flip is bisected. Distance
    0 where the image is not predicted as its label to begin with. Source: Pintor et al. 2021 (FMN), Rony et
    al. 2019 (DDN).
    """

    def ascent(points: Floats, rows: Rows) -> tuple[Floats, Floats, Floats]:
        return model.loss_gradient(points, labels[rows], "margin")

    return _minimum_norm(model, images, labels, ascent, norm=norm, steps=steps, clip=clip)


def nearest(
    model: WithRows,
    images: Floats,
    labels: Labels,
    *,
    norm: Norm,
    steps: int = 20,
    classes: int = CLASSES,
    clip: bool = False,
) -> Found:
    """The nearest of `minimum_norm` and of the same ascent led towards each of the likeliest other classes.

    Ascent on the margin follows whichever class leads; where another one's boundary is nearer, it stays
    unseen. So each of the `classes` most probable others but the runner-up gets an attack of its own, on z_k
    - z_c, for the images whose linearized distance to it is below `WITHIN` times the nearest found so far.
    """
    best = minimum_norm(model, images, labels, norm=norm, steps=steps, clip=clip)
    spent = np.where(best.distance > 0, nearest_passes(steps), GRADIENT)
    passes = spent.copy() if best.passes is None else best.passes
    open_ = np.flatnonzero(best.distance > 0)
    if not len(open_):
        return replace(best, spent=spent)

    def charge(rows: Rows, cost: int | NDArray[np.int64]) -> None:
        passes[rows] += np.where(best.success[rows], 0, cost)

    charge(open_, FORWARD)
    spent[open_] += FORWARD
    for target in ranked(model.logits(images[open_]), labels[open_]).T[1:classes]:
        _, values, gradient = _towards(model, images[open_], labels[open_], target)
        charge(open_, GRADIENT)
        spent[open_] += GRADIENT
        linear = -values / np.maximum(dual_length(gradient, norm), TINY)
        here = np.flatnonzero(linear < WITHIN * best.distance[open_])
        if not len(here):
            continue
        rows = open_[here]
        found = _nearest_towards(
            model, images[rows], labels[rows], target[here], norm=norm, steps=steps, clip=clip
        )
        if found.passes is not None:
            charge(rows, found.passes)
        spent[rows] += nearest_passes(steps)
        nearer = found.distance < best.distance[rows]
        best.images[rows[nearer]] = found.images[nearer]
        best.success[rows[nearer]], best.distance[rows[nearer]] = True, found.distance[nearer]
    return Found(best.images, best.success, best.distance, passes, spent)


def nearest_passes(steps: int, classes: int = 1) -> int:
    """The most that `minimum_norm` costs, or `nearest` led towards so many classes."""
    once = (steps + 1) * GRADIENT + BISECTIONS * FORWARD
    return once + (classes > 1) * (FORWARD + (classes - 1) * (GRADIENT + once))


def _nearest_towards(
    model: WithRows, images: Floats, labels: Labels, target: Labels, *, norm: Norm, steps: int, clip: bool
) -> Found:
    def ascent(points: Floats, rows: Rows) -> tuple[Floats, Floats, Floats]:
        return _towards(model, points, labels[rows], target[rows])

    return _minimum_norm(model, images, labels, ascent, norm=norm, steps=steps, clip=clip)


def _towards(
    model: WithRows, images: Floats, labels: Labels, target: Labels
) -> tuple[Floats, Floats, Floats]:
    """Logits (B, K), z_target - z_label (B,) and its gradient (B, C, H, W)."""
    index = np.arange(len(images))
    cotangents = np.zeros((len(images), model.num_classes), np.float32)
    cotangents[index, target] = 1
    cotangents[index, labels] -= 1
    logits, gradient = model.vjp(images, cotangents)
    return logits, logits[index, target] - logits[index, labels], gradient


def _minimum_norm(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    ascent: Callable[[Floats, Rows], tuple[Floats, Floats, Floats]],
    *,
    norm: Norm,
    steps: int,
    clip: bool,
) -> Found:
    """`minimum_norm` on the loss of `ascent(points, rows)`: logits, loss, positive beyond the boundary, and
    gradient.
    """
    count = len(images)
    best = images.copy()
    distance = np.full(count, np.inf)
    passes = np.zeros(count, dtype=np.int64)
    shift = np.zeros_like(images)
    eps = np.zeros(count)
    open_ = np.ones(count, dtype=np.bool_)
    for step in range(steps + 1):
        rows = np.flatnonzero(open_)
        if not len(rows):
            break
        points = images[rows] + shift[rows]
        if clip:
            points = np.clip(points, 0.0, 1.0)
        moved = points - images[rows]
        logits, values, gradient = ascent(points, rows)
        flipped = misclassified(points, logits, labels[rows])
        reach = length(moved, norm)
        passes[rows[~np.isfinite(distance[rows])]] += GRADIENT
        nearer = flipped & (reach < distance[rows])
        best[rows[nearer]] = points[nearer]
        distance[rows[nearer]] = reach[nearer]
        if step == 0:
            open_[rows[flipped]] = False
        if step == steps:
            break
        decay = 0.5 * (1 + np.cos(np.pi * step / steps))
        slope = np.maximum(dual_length(gradient, norm), TINY)
        linear = inner(gradient, moved)
        # Distance from the image to the hyperplane where the loss linearized at this point is 0.
        crossing = np.maximum((linear - values) / slope, 0.0)
        gamma = 0.02 + 0.1 * decay
        unknown = ~np.isfinite(distance[rows])
        known = np.where(
            flipped, np.minimum(eps[rows], distance[rows]) * (1 - gamma), eps[rows] * (1 + gamma)
        )
        eps[rows] = np.where(
            unknown, np.maximum(crossing, eps[rows]) * 1.02, np.minimum(known, distance[rows])
        )
        rate = eps[rows] * np.maximum(decay, 0.05)
        shift[rows] = project(moved + column(rate) * steepest(gradient, norm), eps[rows], norm)
    best = onto_boundary(model, images, best, labels, np.isfinite(distance) & (distance > 0))
    success = np.isfinite(distance)
    distance[success] = length(best - images, norm)[success]
    return Found(best, success, distance, passes)


def onto_boundary(
    model: Differentiable,
    images: Floats,
    adversarial: Floats,
    labels: Labels,
    where: NDArray[np.bool_],
) -> Floats:
    """The adversarial images (B, C, H, W), those of `where` (B,) moved back towards their images as far as a
    bisection of the straight segment between them finds the prediction still another than the label.
    """
    best = adversarial.copy()
    rows = np.flatnonzero(where)
    low, high = np.zeros(len(rows)), np.ones(len(rows))
    for _ in range(BISECTIONS if len(rows) else 0):
        middle = (low + high) / 2
        points = images[rows] + column(middle) * (best[rows] - images[rows])
        flipped = misclassified(points, model.logits(points), labels[rows])
        high, low = np.where(flipped, middle, high), np.where(flipped, low, middle)
    # What did not move stays as it is: an end computed anew may differ in its last digits, and be right.
    rows, high = rows[high < 1], high[high < 1]
    best[rows] = images[rows] + column(high) * (best[rows] - images[rows])
    return best


@dataclass(frozen=True)
class Remainder:
    """Largest remainders found (B,), the perturbations that reach them (B, C, H, W), and the longest gradient
    of the loss met on the way, in the dual norm (B,).
    """

    value: NDArray[np.float64]
    shift: Floats
    slope: NDArray[np.float64]


def largest_remainder(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    base_loss: NDArray[np.float64],
    base_gradient: Floats,
    starts: Sequence[Floats],
    eps: NDArray[np.float64],
    *,
    norm: Norm,
    steps: int = 20,
    linear: Linear = "steepest",
    steepness: NDArray[np.float64] | None = None,
) -> Remainder:
    """How far the loss can rise above its linear part for ||v||_q <= eps (B,), by projected ascent from each
    start.

    l is the logit margin loss with class `labels` held fixed, `base_loss` and `base_gradient` its value and
    gradient at the images; v is free, not clipped. With `linear` "aligned" the remainder is SCALE's (eq. 5),
    l(x + v) - l(x) - <v, ∇l(x)>, whose gradient is ∇l(x + v) - ∇l(x). With "steepest" it is l(x + v) - l(x) -
    ||v||_q ||∇l(x)||_{q*}: at most SCALE's, and what its bound (eq. 6) needs; the ascent follows ∇l(x + v).
    `steepness` (B,) then stands for ||∇l(x)||_{q*}, which it must not fall below.
    Steps fall linearly from eps to eps / 10. Never below 0, which v = 0 reaches. A lower bound of the
    supremum.
    """
    value = np.zeros(len(images))
    shift = np.zeros_like(images)
    slope = dual_length(base_gradient, norm)
    base_slope = slope if steepness is None else steepness
    for start in starts:
        here = project(start, eps, norm)
        for step in range(steps + 1):
            points = images + here
            logits, losses, gradient = model.loss_gradient(points, labels, "margin")
            slope = np.fmax(slope, dual_length(gradient, norm))
            rise = losses.astype(np.float64) - base_loss
            if linear == "aligned":
                remainder, uphill = rise - inner(here, base_gradient), gradient - base_gradient
            else:
                remainder, uphill = rise - length(here, norm) * base_slope, gradient
            better = finite(points, logits) & (remainder > value)
            value[better], shift[better] = remainder[better], here[better]
            if step < steps:
                here = project(here + column(falling(eps, step, steps)) * steepest(uphill, norm), eps, norm)
    return Remainder(value, shift, slope)


@dataclass(frozen=True)
class Growth:
    """Logits (B, K), a loss's descent direction -∇l and the gradient of log ||∇l||, both (B, C, H, W)."""

    logits: Floats
    descent: Floats
    log_length: Floats


def growth(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    loss: Loss,
    *,
    norm: Norm = "l2",
    difference: float = 0.01,
) -> Growth:
    """How the length of a loss's gradient changes, in the dual of `norm`: l2 for l2, l1 for linf.

    With `cross-entropy` of class i the descent direction is u_i = ∇ log p_i, and row i of the Jacobian of the
    probabilities is p_i u_i; with `margin` of the predicted class it is ∇M. The gradient of a gradient's
    length is a Hessian-vector product, along the gradient itself in l2 and along its signs in linf, taken
    here as a central difference of two gradients `difference` (in l2) either side: bare ONNX has no second
    derivatives.
    """
    logits, _, gradient = model.loss_gradient(images, labels, loss)
    direction = steepest(gradient, norm)
    size = np.maximum(length(direction, "l2"), TINY)
    along = np.asarray(direction * column(difference / size), dtype=np.float32)
    ahead = model.loss_gradient(images + along, labels, loss)[2]
    behind = model.loss_gradient(images - along, labels, loss)[2]
    scale = column(size / (2 * difference * np.maximum(dual_length(gradient, norm), TINY)))
    return Growth(logits, -gradient, np.asarray((ahead - behind) * scale, dtype=np.float32))


def longest_row(
    model: Differentiable,
    images: Floats,
    index: Labels,
    eps: float,
    *,
    steps: int = 8,
) -> NDArray[np.float64]:
    """Largest ||u_i||_2 (B,), u_i = ∇ log p_i of class i = `index`, that ascent finds within l2 distance eps.

    Attacked images stay in [0, 1]. u_i p_i is row i of the Jacobian of the probabilities. At least the length
    at the image itself.
    """
    budget = np.full(len(images), eps)
    best = np.zeros(len(images))
    points = images
    for step in range(steps):
        row = growth(model, points, index, "cross-entropy")
        best = np.fmax(best, length(row.descent, "l2"))
        moved = points - images + column(falling(budget, step, steps)) * steepest(row.log_length, "l2")
        points = np.clip(images + project(moved, budget, "l2"), 0.0, 1.0)
    return np.fmax(best, length(model.loss_gradient(points, index, "cross-entropy")[2], "l2"))


def hide_row(model: Differentiable, images: Floats, eps: float, *, steps: int = 8) -> Floats:
    """Images within l2 distance eps whose third row is long while the rows of the two top classes are short.

    Aimed at a detector that computes two rows of the Jacobian: ascent on log p_k ||u_k|| of the third most
    probable class k minus that of the longer of the first two. Returns the images (B, C, H, W) in [0, 1]
    where that difference was largest.
    """
    budget = np.full(len(images), eps)
    best, best_value = images.copy(), np.full(len(images), -np.inf)
    points = images
    for step in range(steps):
        logits = model.logits(points).astype(np.float64)
        order = np.argsort(-logits, axis=1, kind="stable")
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        sizes, pulls = [], []
        for place in range(3):
            index = order[:, min(place, order.shape[1] - 1)].astype(np.int64)
            row = growth(model, points, index, "cross-entropy")
            log_p = np.take_along_axis(log_probabilities, index[:, None], axis=1)[:, 0]
            sizes.append(log_p + np.log(np.maximum(length(row.descent, "l2"), TINY)))
            pulls.append(row.descent + row.log_length)
        first = sizes[0] >= sizes[1]
        value = sizes[2] - np.where(first, sizes[0], sizes[1])
        better = value > best_value
        best[better], best_value[better] = points[better], value[better]
        pull = pulls[2] - np.where(first.reshape(-1, 1, 1, 1), pulls[0], pulls[1])
        moved = points - images + column(falling(budget, step, steps)) * steepest(pull, "l2")
        points = np.clip(images + project(moved, budget, "l2"), 0.0, 1.0)
    return best
