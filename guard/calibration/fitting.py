"""What calibration fits: bounds of gradients and the modulus of continuity, from block maxima over images.

Everything fitted here is an **estimate** (see `guard.calibration.extremes`). The search effort behind it is
explicit, because too little ascent makes omega too small and radii too large.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from guard import attacks
from guard.attacks import Differentiable, Floats, Labels, Linear
from guard.calibration import extremes
from guard.calibration.extremes import Extreme
from guard.certificate import OmegaTable, effective_slope, first_order_radius
from guard.errors import CalibrationError
from guard.norms import Norm

Values = NDArray[np.float64]

EPS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Grid of the modulus of continuity, in units of each image's first-order radius."""

SCREENED_AT = 4
"""Index in `EPS` of the radius at which images are screened: near where radii end up."""

EXCEEDED = 0.001
"""Share of images whose remainder is to exceed omega, at every eps, as far as the fit is right."""

SECOND_LOOK = 0.15
"""Share of blocks, those with the largest maxima, whose leaders are searched again with twice the effort."""


@dataclass(frozen=True)
class Effort:
    """How hard calibration searches.

    `omega_images` are split into bins of at least `bin_images`, each of `bin_blocks` blocks. All are screened
    at one radius from every start with half the steps; the `kept` share with the largest remainders of each
    block then gets `steps` ascent steps at every eps, from its best start at the first and warm-started from
    there on. Other bounds come from `blocks` blocks of all images.
    """

    omega_images: int = 1000
    bin_images: int = 400
    bin_blocks: int = 50
    blocks: int = 50
    starts: int = 3
    steps: int = 20
    kept: float = 0.3
    row_images: int = 200
    row_steps: int = 8
    violation_images: int = 1000
    violation_steps: int = 20
    violation_restarts: int = 1
    distance_images: int = 1000
    distance_steps: int = 20
    agreement_images: int = 250

    def scaled(self, factor: float) -> Self:
        """The effort with `factor` times the starts and steps (at least 1 and 2), on the same images.

        Above 1 more of the screened images are kept, too.
        """
        return replace(
            self,
            starts=max(1, round(self.starts * factor)),
            steps=max(2, round(self.steps * factor)),
            kept=min(1.0, self.kept * max(1.0, factor)),
            row_steps=max(2, round(self.row_steps * factor)),
            violation_steps=max(2, round(self.violation_steps * factor)),
            distance_steps=max(2, round(self.distance_steps * factor)),
        )


@dataclass(frozen=True)
class Base:
    """Images' predicted labels (B,), logit margins (B,), their gradients (B, C, H, W) and slopes (B,)."""

    images: Floats
    labels: Labels
    margin: Values
    gradient: Floats
    slope: Values

    @property
    def radius(self) -> Values:
        """First-order radii (B,); 0 where there is none (a tie, or a gradient of 0)."""
        radius = first_order_radius(self.margin, self.slope)
        return np.where(np.isfinite(radius), radius, 0.0)

    def relative(self, remainder: Values) -> Values:
        """Remainders (B,) in units of the margin; 0 where there is no first-order radius."""
        usable = self.radius > 0
        return np.where(usable, remainder / np.where(usable, self.margin, 1.0), 0.0)


def base_of(model: Differentiable, images: Floats, norm: Norm, typical: float = 0.0) -> Base:
    """What the remainder of the loss -M is measured from; the gradient is that of the loss.

    The slope is `effective_slope`, with `typical` 0 the gradient's dual norm.
    """
    labels = model.logits(images).argmax(axis=1).astype(np.int64)
    logits, losses, gradient = model.loss_gradient(images, labels, "margin")
    slope = effective_slope(logits, attacks.dual_length(gradient, norm), typical)
    return Base(images, labels, -losses.astype(np.float64), gradient, slope)


def screen(
    model: Differentiable,
    images: Floats,
    norm: Norm,
    effort: Effort,
    generator: np.random.Generator,
    *,
    beyond: Floats | None = None,
    typical: float = 0.0,
    linear: Linear = "steepest",
) -> tuple[Values, Values, Values, Values, Floats]:
    """Margins, slopes, remainders at one radius in units of the margin, longest gradients (B,), best shifts.

    The starts are the gradient's own direction, the way to `beyond` and random ones. `beyond` (B, C, H, W)
    are near points of another class, as `attacks.nearest` finds them: not always of the class that leads at
    the image, which ascent would follow. Images without a finite first-order radius (a tie, or a gradient of
    0) give remainder 0 and are to be left out by the caller.
    """
    base = base_of(model, images, norm, typical)
    eps = EPS[SCREENED_AT] * base.radius
    starts = [attacks.column(eps) * attacks.steepest(base.gradient, norm)]
    if beyond is not None:
        away = beyond - images
        starts.append(attacks.column(eps / np.maximum(attacks.length(away, norm), attacks.TINY)) * away)
    while len(starts) < effort.starts:
        starts.append(attacks.column(eps) * attacks.random_directions(images.shape, norm, generator))
    found = attacks.largest_remainder(
        model,
        images,
        base.labels,
        -base.margin,
        base.gradient,
        starts,
        eps,
        norm=norm,
        steps=max(1, effort.steps // 2),
        linear=linear,
        steepness=base.slope,
    )
    return base.margin, base.slope, base.relative(found.value), found.slope, found.shift


def remainders(
    model: Differentiable,
    images: Floats,
    norm: Norm,
    effort: Effort,
    start: Floats,
    *,
    typical: float = 0.0,
    linear: Linear = "steepest",
) -> tuple[Values, Values]:
    """Remainders (B, E) at every eps of the grid, in units of the margin, and the longest gradients met (B,).

    Each eps starts from the best perturbation of its neighbour on the grid, scaled; the first, at the
    screening radius, from `start`.
    """
    base = base_of(model, images, norm, typical)
    values = np.zeros((len(images), len(EPS)))
    slope = attacks.dual_length(base.gradient, norm)
    best: dict[int, Floats] = {SCREENED_AT: start}
    downward = range(SCREENED_AT, -1, -1)
    for at in [*downward, *range(SCREENED_AT + 1, len(EPS))]:
        neighbour = at if at == SCREENED_AT else at + 1 if at < SCREENED_AT else at - 1
        warm = best[neighbour] * np.float32(EPS[at] / EPS[neighbour])
        found = attacks.largest_remainder(
            model,
            images,
            base.labels,
            -base.margin,
            base.gradient,
            [warm],
            EPS[at] * base.radius,
            norm=norm,
            steps=effort.steps,
            linear=linear,
            steepness=base.slope,
        )
        best[at] = found.shift
        values[:, at] = base.relative(found.value)
        slope = np.fmax(slope, found.slope)
    return np.maximum.accumulate(values, axis=1), slope


@dataclass(frozen=True)
class Layout:
    """Which images form which block: `blocks[b][k]` holds positions of block k of bin b; bins part at
    `edges`.
    """

    blocks: list[list[NDArray[np.intp]]]
    edges: Values
    reach: Values


def layout(radius: Values, effort: Effort) -> Layout:
    """Bins of equally many images by first-order radius (B,), each of random blocks (images come in random
    order).

    Positions with a radius of 0, or without a finite one, belong nowhere. Raises `CalibrationError` where
    none is left.
    """
    usable = np.flatnonzero(np.isfinite(radius) & (radius > 0))
    if not len(usable):
        raise CalibrationError(
            "no image has a finite, positive first-order radius: the model's margin or its gradient is 0 "
            "everywhere. Check the model on these images."
        )
    bins = max(1, len(usable) // effort.bin_images)
    parts = np.array_split(usable[np.argsort(radius[usable], kind="stable")], bins)
    edges = np.array([radius[part[0]] for part in parts[1:]])
    blocks = [np.array_split(np.sort(part), min(effort.bin_blocks, len(part))) for part in parts]
    return Layout(blocks, edges, np.array([radius[part].max() for part in parts]))


def survivors(plan: Layout, screened: Values, effort: Effort) -> NDArray[np.intp]:
    """Positions that may hold their block's maximum: the `kept` share with the largest screened values."""
    chosen = []
    for block in (block for row in plan.blocks for block in row):
        count = max(1, int(np.ceil(effort.kept * len(block))))
        chosen.append(block[np.argsort(-screened[block], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))


def leaders(plan: Layout, values: Values) -> NDArray[np.intp]:
    """Positions that hold the largest block maxima of their bin at some eps; `values` (B, E)."""
    chosen = []
    for row in plan.blocks:
        holders = np.array([block[values[block].argmax(axis=0)] for block in row])
        maxima = np.take_along_axis(values, holders, axis=0)
        top = np.argsort(-maxima, axis=0, kind="stable")[: int(np.ceil(SECOND_LOOK * len(row)))]
        chosen.append(np.take_along_axis(holders, top, axis=0).ravel())
    return np.unique(np.concatenate(chosen))


@dataclass(frozen=True)
class FittedOmega:
    """The table and, per bin and eps, the fit behind each value."""

    table: OmegaTable
    fits: list[list[Extreme]]


def omega(plan: Layout, values: Values) -> FittedOmega:
    """The modulus of continuity relative to each image's margin and first-order radius, per bin of that
    radius.

    `values` (B, E) are the images' remainders at the grid `EPS`. One generalized extreme value fit per bin
    and eps, made monotone along eps; its quantile is the one that a share `EXCEEDED` of images exceeds, which
    does not hang on how many make a block. Status: estimate.
    """
    fits = []
    for row in plan.blocks:
        exceedance = extremes.of_blocks(EXCEEDED, min(len(block) for block in row))
        maxima = np.array([values[block].max(axis=0) for block in row])
        fits.append([extremes.fit(column, exceedance) for column in maxima.T])
    table = OmegaTable(
        eps=np.array(EPS),
        values=np.maximum.accumulate([[one.value for one in row] for row in fits], axis=1),
        reach=plan.reach,
        edges=plan.edges,
        conditioned_on="first-order-radius" if len(plan.edges) else "none",
        relative=True,
    )
    return FittedOmega(table, fits)


def bound(values: Values, blocks: int) -> Extreme:
    """Upper bound of per-image quantities (B,), such as gradient norms, by block maxima. Status: estimate."""
    return extremes.fit(extremes.block_maxima(values, min(blocks, len(values))))


def longest_rows(
    model: Differentiable, images: Floats, eps: float, effort: Effort, *, most: int = 16
) -> tuple[Values, Values]:
    """Largest ||u_i||_2 over the rows of the `most` probable classes, at the images and under attack, (B,)
    each.

    u_i = ∇z_i - Σ_j p_j ∇z_j, so that row i of the Jacobian is p_i u_i. Less probable classes' rows could
    only matter where p_i <= 1 / `most` still lets p_i u_i exceed a threshold. The attack raises the longest
    row of the three most probable classes, within l2 distance eps.
    """
    logits = model.logits(images)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :most].astype(np.int64)
    rows = [
        attacks.length(model.loss_gradient(images, order[:, place], "cross-entropy")[2], "l2")
        for place in range(order.shape[1])
    ]
    lengths = np.stack(rows, axis=1)
    index = np.take_along_axis(order, lengths[:, :3].argmax(axis=1)[:, None], axis=1)[:, 0]
    attacked = attacks.longest_row(model, images, index, eps, steps=effort.row_steps)
    return lengths.max(axis=1), np.fmax(attacked, lengths.max(axis=1))
