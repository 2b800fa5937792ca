"""Radii under attack: how often some attack breaks them, and how far short of the nearest attack they fall.

A radius is broken, "violated", where some attack of the run changed the prediction strictly inside it. The
promise is about images that the detector accepts, so these are the ones counted; distances are of any
perturbation that an attack found, clipped to [0, 1] or not. No figure here certifies anything: a stronger
attack may break more.
"""

import math
from collections.abc import Mapping

import numpy as np

from guard import attacks
from guard.attacks import Differentiable, Floats, column
from guard.bundle import Bundle
from guard.calibration import fitting
from guard.calibration.fitting import EPS, Effort
from guard.certificate import OmegaTable, Radius, first_order_radius, l_bound, omega_radius
from guard.decision import Guard
from guard.evaluation.results import RadiusAudit
from guard.evaluation.target import Flags, Target, Values
from guard.norms import NORMS, Norm
from guard.runtime import Measurement
from guard.shares import share_at_most
from guard.stages import Arrays

DIRECTIONS = 4
"""Random directions per image for the ablation of the modulus of continuity."""

RANDOM_PASSES = 1 + 3 + DIRECTIONS * len(EPS)
"""Cost of `random_remainders` per image in forward passes."""

STEPS = 20
"""Of the attacks that start inside radii."""


def inside_passes(restarts: int) -> int:
    """Cost of `attacks_inside` per image in forward passes, about."""
    return 3 * (60 + 3 * restarts * (STEPS + 1))


def radii(
    target: Target,
    bundle: Bundle,
    measurement: Measurement,
    distances: Mapping[Norm, Values],
    *,
    random: Mapping[Norm, OmegaTable] | None = None,
) -> list[RadiusAudit]:
    """Every radius that the bundle serves, strongest first, and unserved ablations, against all attacks.

    `measurement` is of the n clean images, by the guard of the bundle's calibrated score; `distances` (n,)
    are, per norm, the smallest at which any attack of the run changed the prediction, inf where none did.
    Ablations: SCALE's L-bound, the first-order radius (LIPGEN 3.7), and, with the tables of `random_omega`,
    the omega-bound of an omega from random perturbations. Nothing where no image is accepted.
    """
    calibration = bundle.calibrated()
    guard = target.guards[calibration.score]
    accepted = _accepted(guard, measurement)
    if not accepted.any():
        return []
    found = []
    for norm, distance in distances.items():
        margin = measurement.margin[accepted].astype(np.float64)
        slope = measurement.slope(norm)[accepted]
        ablations = {
            "L-bound": l_bound(margin, calibration.radii(norm).lipschitz),
            "first-order": first_order_radius(margin, slope),
        }
        if random:
            ablations["omega-bound, random perturbations"] = omega_radius(margin, slope, random[norm])
        stated = [(radius, values[accepted], True) for radius, values in guard.radii(measurement, norm)]
        stated += [
            (Radius(radius=math.nan, kind="estimate", method=method), values, False)
            for method, values in ablations.items()
        ]
        found += [
            audited(radius, values, distance[accepted], norm=norm, served=served)
            for radius, values, served in stated
        ]
    return found


def audited(radius: Radius, values: Values, distance: Values, *, norm: Norm, served: bool) -> RadiusAudit:
    """The audit of one kind of radius: `values` (n,) against the nearest attack at `distance` (n,), n >= 1.

    Violations have a one-sided 95% Clopper-Pearson bound (`upper`).
    """
    usable = np.isfinite(distance) & np.isfinite(values)
    mean_radius = float(values[usable].mean()) if usable.any() else 0.0
    mean_distance = float(distance[usable].mean()) if usable.any() else 0.0
    tightness = mean_radius / mean_distance if mean_distance else 0.0
    return RadiusAudit(
        norm=norm,
        kind=radius.kind,
        method=radius.method,
        served=served,
        violations=share_at_most(distance < values),
        found=int(usable.sum()),
        mean_radius=mean_radius,
        mean_distance=mean_distance,
        tightness=tightness,
        tightness_error=_error_of_ratio(values[usable], distance[usable], tightness),
        alpha=radius.alpha,
    )


def attacks_inside(
    target: Target,
    bundle: Bundle,
    images: Floats,
    measurement: Measurement,
    norm: Norm,
    *,
    restarts: int = 2,
    seed: int = 0,
) -> Values:
    """Smallest distance (n,) at which attacks aimed at radii changed the prediction; inf where none did.

    They lead away from the predicted class, right or wrong, so they reach images that attacks on the accuracy
    leave out; merge them with those by `np.minimum` before the audit. First `attacks.nearest`, then
    `attacks.inside` of every radius that the bundle serves and that is not broken yet, the largest first, and
    smaller ones only where a larger one broke; with `restarts` 0 not at all. Rejected images are left alone
    (inf). Rarely costs twice `inside_passes`.
    """
    guard = target.guards[bundle.calibrated().score]
    accepted = _accepted(guard, measurement)
    labels, rows = measurement.labels, np.flatnonzero(accepted)
    found = np.full(len(images), np.inf)
    if len(rows):
        found[rows] = attacks.nearest(target.model, images[rows], labels[rows], norm=norm).distance
    radii = np.sort([values for _, values in guard.radii(measurement, norm)], axis=0)[::-1]
    open_ = accepted if restarts else np.zeros_like(accepted)
    for values in radii:
        rows = np.flatnonzero(open_ & (found >= values))
        if len(rows):
            broken = attacks.inside(
                target.model,
                images[rows],
                labels[rows],
                values[rows],
                norm=norm,
                steps=STEPS,
                restarts=restarts,
                seed=seed,
            )
            found[rows] = np.minimum(found[rows], broken.distance)
        open_ = open_ & ((found < values) | ~np.isfinite(values))
    return found


def random_remainders(model: Differentiable, images: Floats, norm: Norm, *, seed: int = 0) -> Arrays:
    """What `random_omega` is fitted to: `radius` (B,), first-order, and `remainder` (B, E) at the grid `EPS`.

    Instead of the served table's ascent `DIRECTIONS` random directions per image, and the remainder against
    <v, ∇l(x)> (SCALE eq. 5). Costs `RANDOM_PASSES` per image.
    """
    generator = np.random.default_rng([seed, NORMS.index(norm)])
    base = fitting.base_of(model, images, norm)
    values = np.zeros((len(images), len(EPS)))
    index = np.arange(len(images))
    for _ in range(DIRECTIONS):
        direction = attacks.random_directions(images.shape, norm, generator)
        linear = attacks.inner(direction, base.gradient)
        for at, eps in enumerate(EPS):
            reach = eps * base.radius
            logits = model.logits(images + column(reach) * direction).astype(np.float64)
            own = logits[index, base.labels]
            logits[index, base.labels] = -np.inf
            remainder = logits.max(axis=1) - own + base.margin - reach * linear
            values[:, at] = np.fmax(values[:, at], base.relative(remainder))
    return {"radius": base.radius, "remainder": np.maximum.accumulate(values, axis=1)}


def random_omega(remainders: Arrays, effort: Effort = Effort()) -> OmegaTable:  # noqa: B008 - immutable
    """SCALE's modulus of continuity from random perturbations alone, an ablation: far too small.

    `remainders` are those of `random_remainders`, of the fold that omega was fitted to; fit and size of bins
    are the served table's. Status: estimate, of radii known to be too large.
    """
    plan = fitting.layout(remainders["radius"], effort)
    return fitting.omega(plan, remainders["remainder"]).table


def _error_of_ratio(values: Values, distance: Values, ratio: float) -> float:
    """Standard error of mean(values) / mean(distance), of n pairs, by the delta method; 0 below two."""
    if len(values) < 2 or not ratio:
        return 0.0
    return float((values - ratio * distance).std(ddof=1) / math.sqrt(len(values)) / distance.mean())


def _accepted(guard: Guard, measurement: Measurement) -> Flags:
    return np.array([decision.accepted for decision in guard.decide(measurement)], np.bool_)
