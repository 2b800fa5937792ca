"""Attacks on bare ONNX classifiers, in numpy, through the gradients of `guard.runtime.Detector`.

One shape throughout: `attack(model, images, labels, ...)`, images float32 (B, C, H, W) in [0, 1], labels
int64 (B,): the class the attack leads away from (the predicted class where a radius is tested, the true one
where accuracy is). Results are deterministic by `seed`. Perturbations are measured in pixels ([0, 1] scale),
in the l2 or linf norm. `clip` keeps attacked images in [0, 1]; radii speak of every perturbation, so their
checks leave it off.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Norm = Literal["l2", "linf"]
Loss = Literal["margin", "cross-entropy", "probability-margin"]
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

TINY = 1e-30


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


@dataclass(frozen=True)
class Found:
    """Attacked images (B, C, H, W), the attacks' success (B,) and how far they went (B,; inf: failed)."""

    images: Floats
    success: NDArray[np.bool_]
    distance: NDArray[np.float64]


def column(values: NDArray[np.float64] | Floats) -> Floats:
    """Per-image numbers (B,) as float32 (B, 1, 1, 1)."""
    return np.asarray(values, dtype=np.float32).reshape(-1, 1, 1, 1)


def length(vectors: Floats, norm: Norm) -> NDArray[np.float64]:
    """Per-image norm (B,) of vectors (B, C, H, W)."""
    flat = vectors.reshape(len(vectors), -1).astype(np.float64)
    if norm == "l2":
        return np.asarray(np.sqrt(np.einsum("bi,bi->b", flat, flat)), dtype=np.float64)
    return np.asarray(np.abs(flat).max(axis=1, initial=0.0), dtype=np.float64)


def dual_length(vectors: Floats, norm: Norm) -> NDArray[np.float64]:
    """Per-image dual norm (B,): l2 for l2, l1 for linf."""
    if norm == "l2":
        return length(vectors, "l2")
    return np.asarray(
        np.abs(vectors.reshape(len(vectors), -1)).sum(axis=1, dtype=np.float64), dtype=np.float64
    )


def inner(left: Floats, right: Floats) -> NDArray[np.float64]:
    """Per-image inner products (B,)."""
    pair = left.reshape(len(left), -1).astype(np.float64), right.reshape(len(right), -1).astype(np.float64)
    return np.asarray(np.einsum("bi,bi->b", *pair), dtype=np.float64)


def steepest(gradient: Floats, norm: Norm) -> Floats:
    """The unit vector of `norm` along which a function with this gradient grows most; 0 at gradient 0."""
    if norm == "linf":
        return np.sign(gradient)
    return np.asarray(gradient / column(np.maximum(length(gradient, "l2"), TINY)), dtype=np.float32)


def project(vectors: Floats, eps: NDArray[np.float64], norm: Norm) -> Floats:
    """The nearest vectors of norm at most eps (B,)."""
    if norm == "linf":
        return np.clip(vectors, -column(eps), column(eps))
    shrink = np.minimum(1.0, eps / np.maximum(length(vectors, "l2"), TINY))
    return np.asarray(vectors * column(shrink), dtype=np.float32)


def random_directions(shape: tuple[int, ...], norm: Norm, generator: np.random.Generator) -> Floats:
    """Random vectors of unit norm: uniform on the l2 sphere, or random corners of the linf cube."""
    return steepest(generator.standard_normal(shape, dtype=np.float32), norm)


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
    clip: bool = False,
    stop: bool = True,
    seed: int = 0,
) -> Found:
    """Projected gradient ascent on the loss inside the ball of radius eps (a number, or one per image).

    The first restart starts at the image, later ones at random points of the ball. Steps fall linearly from
    eps to eps / 10. With `stop`, an image is left alone at its first flip; without, ascent goes on and the
    image with the largest loss is kept: the high-confidence attack of a fixed budget. `distance` is the norm
    of what was found. Source: Madry et al. 2018; SCALE and LIPGEN use 20 steps.
    """
    budget = np.broadcast_to(np.asarray(eps, dtype=np.float64), (len(images),)).copy()
    generator = np.random.default_rng(seed)
    best = images.copy()
    best_loss = np.full(len(images), -np.inf)
    success = np.zeros(len(images), dtype=np.bool_)
    open_ = budget > 0

    def keep(rows: NDArray[np.intp], points: Floats, logits: Floats, values: Floats) -> None:
        flipped = logits.argmax(axis=1) != labels[rows]
        # A flip beats any loss without one; argmax decides ties as the served prediction does.
        better = (flipped & ~success[rows]) | ((flipped == success[rows]) & (values > best_loss[rows]))
        best[rows[better]] = points[better]
        best_loss[rows[better]] = values[better]
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
                rate = budget[rows] * (1.0 - 0.9 * step / max(1, steps - 1))
                shift = project(
                    points - images[rows] + column(rate) * steepest(gradient, norm), budget[rows], norm
                )
    moved = length(best - images, norm)
    return Found(best, success, np.where(success, moved, np.inf))


def minimum_norm(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    *,
    norm: Norm,
    steps: int = 40,
    bisections: int = 8,
    clip: bool = False,
) -> Found:
    """The nearest point with another prediction that gradient ascent finds, just past the boundary.

    Normalized-gradient ascent on the logit margin loss inside a ball whose radius follows the boundary: while
    no flip is known the radius is where the linearized loss crosses 0; past the boundary it shrinks, before
    it it grows. The step decays by a cosine. At the end the segment from image to flip is bisected. Distance
    0 where the image is not predicted as its label to begin with. Source: Pintor et al. 2021 (FMN), Rony et
    al. 2019 (DDN).
    """
    count = len(images)
    best = images.copy()
    distance = np.full(count, np.inf)
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
        logits, values, gradient = model.loss_gradient(points, labels[rows], "margin")
        flipped = logits.argmax(axis=1) != labels[rows]
        reach = length(moved, norm)
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
    success = np.isfinite(distance)
    rows = np.flatnonzero(success & (distance > 0))
    low, high = np.zeros(len(rows)), np.ones(len(rows))
    for _ in range(bisections if len(rows) else 0):
        middle = (low + high) / 2
        points = images[rows] + column(middle) * (best[rows] - images[rows])
        flipped = model.logits(points).argmax(axis=1) != labels[rows]
        high, low = np.where(flipped, middle, high), np.where(flipped, low, middle)
    best[rows] = images[rows] + column(high) * (best[rows] - images[rows])
    distance[rows] = length(best[rows] - images[rows], norm)
    return Found(best, success, distance)


def remainder_ascent(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    base_loss: NDArray[np.float64],
    base_gradient: Floats,
    starts: list[Floats],
    eps: NDArray[np.float64],
    *,
    norm: Norm,
    steps: int = 20,
    first: float = 1.0,
    last: float = 0.1,
) -> tuple[NDArray[np.float64], Floats]:
    """Max over ||v|| <= eps of l(x + v) - l(x) - <v, grad l(x)>, by projected ascent; remainders (B,) and v.

    l is the logit margin loss with class `labels` held fixed; v is free (not clipped). The remainder's
    gradient is grad l(x + v) - grad l(x). Never below 0, which v = 0 reaches. A lower bound of the supremum.
    """
    best = np.zeros(len(images))
    best_shift = np.zeros_like(images)
    for start in starts:
        shift = project(start, eps, norm)
        for step in range(steps + 1):
            _, values, gradient = model.loss_gradient(images + shift, labels, "margin")
            remainder = values.astype(np.float64) - base_loss - inner(shift, base_gradient)
            better = remainder > best
            best[better], best_shift[better] = remainder[better], shift[better]
            if step < steps:
                rate = eps * (first + (last - first) * step / max(1, steps - 1))
                shift = project(shift + column(rate) * steepest(gradient - base_gradient, norm), eps, norm)
    return best, best_shift
