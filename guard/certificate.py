"""Radii within which the prediction should not change, from one margin and the norm of its gradient.

With logits z, predicted class c and runner-up r, M(x) = z_c - z_r >= 0 is the margin and l = max_{i != c} z_i
- z_c the loss that an attacker raises from -M to 0 (SCALE's modified Carlini-Wagner loss, here on logits,
with c held fixed). For a perturbation v and g = ||∇M(x)||_{q*} in the dual norm (l2 for l2, l1 for linf), let

    omega(eps) = sup over ||v||_q <= eps of  l(x + v) - l(x) - ||v||_q g

be how far l can rise above its steepest linear part. Then l(x + v) <= -M + eps g + omega(eps), and no
perturbation up to eps changes the prediction while eps g + omega(eps) <= M (SCALE, Prop. 2.2; its omega
subtracts <v, ∇l(x)> instead, which is at most ||v|| g: ours is never larger, and the proof needs no more). So

    omega-bound          the largest such eps
    L-bound              M / L,  L >= sup g            (a Lipschitz constant instead of the local gradient)
    first-order radius   rho = M / g                   (omega left out: LIPGEN 3.7; no bound at all)

omega and L are fitted to held-out images (`guard.calibration`), so the omega-bound that is served is an
**estimate**; the share of held-out images for which an attack still succeeds inside it is measured and served
beside it. Where calibration images suffice, **conformal** radii kappa rho are served too. Let d be the
smallest distance at which an attack of a named suite changes the prediction (inf: it fails), and kappa the
floor((n + 1) alpha)-th smallest of d_i / rho_i over n held-out images that the detector accepts. For a fresh
accepted image exchangeable with them, the suite succeeds strictly inside, d < kappa rho, only where its d /
rho is below that order statistic: with probability at most alpha, for any model and any n, over the draw of
all n + 1 images (Vovk et al. 2005; Lei et al. 2018, section 2). That says nothing of attacks outside the
suite.

Both proofs hold for any slope g at least ||∇M(x)||_{q*}, in omega's definition too. Served gradients know the
runner-up alone, and where its margin is unusually flat, a third class may be the nearer one; so g is
`effective_slope`, which takes the third class for as steep as classes usually are.

omega grows with the image's own scale, so it is tabulated relative to it: eps in units of rho, omega in units
of M. Then eps g + omega(eps) <= M reads t + omega(t) <= 1 with t = eps / rho. A table may have several rows,
one per bin of a quantity known for every image (its gradient norm, margin or first-order radius).

Radii are in pixels of the model's input, [0, 1] scale, in l2 or linf. numpy only.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from guard.errors import CalibrationError

Kind = Literal["estimate", "conformal", "probabilistic", "sound"]
"""What a radius rests on. `estimate`: a fit to data. `conformal`: a finite-sample promise against a named
attack suite. `probabilistic`: randomized smoothing, with its alpha. `sound`: a proof. Only the last two
certify."""

Conditioning = Literal["none", "gradient", "margin", "first-order-radius"]

STRENGTH: dict[Kind, int] = {"estimate": 0, "conformal": 1, "probabilistic": 2, "sound": 3}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Radius:
    """One stated radius of one image, with what it rests on.

    `violation_rate` is the measured share of held-out images attacked successfully inside such a radius and
    `violation_upper` its 95% Clopper-Pearson bound, None where not measured; `alpha` belongs to conformal and
    probabilistic radii.
    """

    radius: float
    kind: Kind
    method: str
    violation_rate: float | None = None
    violation_upper: float | None = None
    alpha: float | None = None


def strongest_first(radii: list[Radius]) -> list[Radius]:
    """Radii by kind, the strongest first; within a kind in the order given."""
    return sorted(radii, key=lambda radius: -STRENGTH[radius.kind])


@dataclass(frozen=True)
class OmegaTable:
    """A fitted modulus of continuity for one norm: estimate.

    `values[b, i]` (bins, E) is omega at `eps[i]` (E,) for images of bin b; both grow along eps. Bin b holds
    images whose `conditioned_on` quantity lies in [edges[b - 1], edges[b]). `reach[b]` is the largest radius
    in pixels that was examined in bin b: nothing is stated beyond. With `relative`, eps are in units of the
    first-order radius and values in units of the margin.
    """

    eps: Floats
    values: Floats
    reach: Floats
    edges: Floats
    conditioned_on: Conditioning = "none"
    relative: bool = False

    def __post_init__(self) -> None:
        bins = len(self.edges) + 1
        if self.values.shape != (bins, len(self.eps)) or self.reach.shape != (bins,) or not len(self.eps):
            raise CalibrationError(
                f"omega table: values {self.values.shape} and reach {self.reach.shape} do not fit {bins} "
                f"bins of {len(self.eps)} eps. Calibrate again."
            )
        parts = (self.eps, self.values, self.reach, self.edges)
        if not all(np.isfinite(part).all() for part in parts) or min(self.values.min(), self.reach.min()) < 0:
            raise CalibrationError("omega table: expected finite, non-negative numbers. Calibrate again.")
        if self.eps[0] <= 0 or any((np.diff(part) < 0).any() for part in (self.eps, self.values, self.edges)):
            raise CalibrationError("omega table: eps, values and edges must not fall. Calibrate again.")

    def bins(self, margin: Floats, gradient_norm: Floats) -> NDArray[np.intp]:
        """The bin of each image, (B,)."""
        known = {
            "none": np.zeros_like(margin),
            "gradient": gradient_norm,
            "margin": margin,
            "first-order-radius": first_order_radius(margin, gradient_norm),
        }
        return np.searchsorted(self.edges, known[self.conditioned_on], side="right")


def first_order_radius(margin: ArrayLike, gradient_norm: ArrayLike) -> Floats:
    """M / ||grad M||_{q*}, (B,): where the linearized margin vanishes. An ablation (LIPGEN 3.7), no bound.

    0 at margin 0 and where anything is NaN; inf at a positive margin with gradient 0.
    """
    m, g = np.asarray(margin, dtype=np.float64), np.asarray(gradient_norm, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((m > 0) & (g >= 0), m / g, 0.0)


def l_bound(margin: ArrayLike, lipschitz: float) -> Floats:
    """M / L_q, (B,) (SCALE Prop. 2.2). An estimate, as L is fitted; 0 where the margin is NaN or L is 0."""
    m = np.asarray(margin, dtype=np.float64)
    return np.where((m > 0) & (lipschitz > 0), m / (lipschitz or 1.0), 0.0)


def effective_slope(logits: ArrayLike, gradient_norm: ArrayLike, typical: float) -> Floats:
    """How steeply the margin is taken to fall, (B,): √(g² + (`typical` M / M3)²), g its gradient's norm.

    M3 = z_c - z_3 is the lead over the third class of the logits (B, K). A served gradient knows the
    runner-up alone: where its margin is unusually flat, a class further behind may be the nearer one, at
    about M3 / `typical` if its slope is the usual one. M over this slope is about the smaller of the two
    distances. With two classes, or `typical` 0, it is g.
    """
    z, g = np.asarray(logits, dtype=np.float64), np.asarray(gradient_norm, dtype=np.float64)
    if z.shape[1] < 3 or typical == 0:
        return g
    third, second, first = np.sort(np.partition(z, z.shape[1] - 3, axis=1)[:, -3:], axis=1).T
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(first == third, 0.0, (first - second) / (first - third))
    return np.asarray(np.hypot(g, typical * share), dtype=np.float64)


def omega_radius(margin: ArrayLike, gradient_norm: ArrayLike, table: OmegaTable) -> Floats:
    """The omega-bound, (B,): the largest eps with eps ||grad M||_{q*} + omega(eps) <= M, rounded down.

    Between two grid points omega is taken at the upper one, and nothing is stated beyond the grid's end or
    the table's reach, which is also what a gradient of 0 gives. Never grows when the margin falls or the
    gradient grows, within a bin. 0 where either is NaN, infinite or negative, or the margin is 0. Status:
    estimate.
    """
    m, g = (
        np.atleast_1d(np.asarray(margin, dtype=np.float64)),
        np.atleast_1d(np.asarray(gradient_norm, np.float64)),
    )
    usable = np.isfinite(m) & np.isfinite(g) & (m > 0) & (g >= 0)
    m, g = np.where(usable, m, 0.0), np.where(usable, g, 1.0)
    bins = table.bins(m, g)
    # Relative tables are solved for margin 1 and gradient 1, and scaled back by the first-order radius.
    height, slope = (np.ones_like(m), np.ones_like(g)) if table.relative else (m, g)
    with np.errstate(divide="ignore"):
        crossing = (height[:, None] - table.values[bins]) / slope[:, None]  # inf where the slope is 0
    crossing = np.where(np.isnan(crossing), 0.0, crossing)
    below = np.concatenate([[0.0], table.eps[:-1]])
    # In the cell (below, eps] the condition holds up to min(eps, crossing), and nowhere if that is not above
    # `below`.
    cells = np.where(crossing > below, np.minimum(crossing, table.eps), 0.0)
    radius = cells.max(axis=1)
    if table.relative:
        radius = np.multiply(radius, first_order_radius(m, g), out=np.zeros_like(m), where=radius > 0)
    return np.asarray(np.where(usable, np.minimum(radius, table.reach[bins]), 0.0), dtype=np.float64)
