"""Radii in one norm: fitted on two folds, then audited on the report fold by attacks."""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard import attacks, statistics
from guard.bundle import ConformalScale, ExtremeFit, OmegaRecord, RadiusCalibration
from guard.calibration import cost, fitting, histograms
from guard.calibration.extremes import Extreme
from guard.calibration.fitting import FittedOmega
from guard.calibration.thresholds import Thresholds
from guard.calibration.work import Work
from guard.certificate import OmegaTable, effective_slope, first_order_radius, l_bound, omega_radius
from guard.errors import CalibrationError
from guard.norms import NORMS, Norm
from guard.runtime import Measurement
from guard.shares import share_at_most
from guard.stages import Arrays

Values = NDArray[np.float64]
Int64 = NDArray[np.int64]

SUITE = {norm: [f"minimum-norm {norm}", f"minimum-norm {norm} towards each likely class"] for norm in NORMS}
"""The attacks behind conformal radii."""


@dataclass(frozen=True)
class Measured:
    """Measurements of the folds that radii come from and are audited on."""

    radii: Measurement
    conformal: Measurement
    report: Measurement


def fit(work: Work, norm: Norm, measured: Measured, thresholds: Thresholds) -> RadiusCalibration:
    """The radii's parameters in one norm, and what attacks on accepted report images make of them.

    Omega and L are estimates; the scales are conformal, relative to `SUITE`; violations are measured on the
    fold `report`, which nothing was fitted to. Raises `CalibrationError` where the thresholds accept no
    report image, or no image has a first-order radius.
    """
    effort, report = work.effort, measured.report
    rejected = thresholds.rejects(report)
    accepted = np.flatnonzero(~rejected)
    if not len(accepted):
        raise CalibrationError("the detector rejects every report image; its threshold is of no use.")
    known = _finite(_slope(measured.radii, norm))
    typical = float(np.median(known)) if len(known) else 0.0
    slopes, fitted, change = _fit_omega(work, norm, measured.radii, typical)
    lipschitz = fitting.bound(slopes, effort.blocks)
    scales = _conformal_scales(work, norm, measured.conformal, thresholds, typical)

    slope = _slope(report, norm, typical)
    radius = omega_radius(report.margin, slope, fitted.table)
    tried = accepted[: effort.violation_images]
    indices, limit = work.folds["report"][tried], radius[tried]
    distance = _nearest(work, f"distances-{norm}", norm, indices)
    # What `nearest` left unbroken is attacked from inside its radius, on another loss.
    rows = np.flatnonzero(distance >= limit)
    distance[rows] = np.minimum(distance[rows], _inside(work, norm, indices[rows], limit[rows]))
    usable, reached = _finite(limit), np.isfinite(distance) & np.isfinite(limit)
    near = float(limit[reached].mean()) if reached.any() else 0.0
    mean_distance = float(distance[reached].mean()) if reached.any() else 0.0
    first_order = first_order_radius(report.margin, slope)
    stated = [np.minimum(scale.kappa * first_order, fitted.table.reach.max()) for scale in scales]
    judged = [
        scale.model_copy(
            update={
                "violations": share_at_most(distance < values[tried]),
                "mean_radius": float(values[tried].mean()),
            }
        )
        for scale, values in zip(scales, stated, strict=True)
    ]
    return RadiusCalibration(
        lipschitz=lipschitz.value,
        slope=typical,
        lipschitz_fit=_record(lipschitz),
        omega=_omega_record(fitted.table),
        omega_fits=[[_record(fit) for fit in row] for row in fitted.fits],
        violations=share_at_most(distance < limit),
        mean_radius=float(usable.mean()) if len(usable) else 0.0,
        mean_distance=mean_distance,
        tightness=near / mean_distance if mean_distance else 0.0,
        attack={
            "images": "report images that the detector accepts; attacks are not clipped to [0, 1]",
            "violations": {
                "name": "those of distance, and PGD on the cross-entropy inside the radius",
                "steps": effort.violation_steps,
                "restarts": effort.violation_restarts,
            },
            "distance": {
                "name": " and ".join(SUITE[norm]),
                "steps": effort.distance_steps,
                "n": len(tried),
                "found": int(reached.sum()),
                "median": float(np.median(distance)) if reached.all() else None,
            },
        },
        effort={"images": len(slopes), "exceeded": fitting.EXCEEDED, **change},
        ablation={
            "l_bound": float(l_bound(report.margin[tried], lipschitz.value).mean()),
            "first_order": float(
                _finite(first_order_radius(report.margin, _slope(report, norm))[tried]).mean()
            ),
        },
        conformal=judged,
        histogram=histograms.of_radii(np.where(rejected, 0.0, (stated or [radius])[0])),  # the first served
    )


def _fit_omega(
    work: Work, norm: Norm, measured: Measurement, typical: float
) -> tuple[Values, FittedOmega, dict[str, Any]]:
    """Longest gradients met (B,), the table, and what a second look with twice the effort changed."""
    effort, detector, stages = work.effort, work.detector, work.stages
    indices = work.folds["radii"][: effort.omega_images]
    place = {int(index): at for at, index in enumerate(indices)}

    def screening(part: Int64) -> Arrays:
        images = work.pixels(part)
        _, _, value, slope, shift = fitting.screen(
            detector,
            images,
            norm,
            effort,
            work.generator(part, NORMS.index(norm)),
            beyond=_beyond(work, images, norm),
            typical=typical,
        )
        # Half precision is enough for a start, and halves the largest of the kept arrays.
        return {"value": value, "slope": slope, "shift": shift.astype(np.float16)}

    screened = stages.run(f"omega-{norm}-screen", indices, screening, cost=cost.screening(effort))
    some = measured[: len(indices)]
    plan = fitting.layout(first_order_radius(some.margin, _slope(some, norm, typical)), effort)

    def ascent(part: Int64) -> Arrays:
        at = np.array([place[int(index)] for index in part])
        start = screened["shift"][at].astype(np.float32)
        values, slope = fitting.remainders(detector, work.pixels(part), norm, effort, start, typical=typical)
        return {"values": values, "slope": slope}

    chosen = fitting.survivors(plan, screened["value"], effort)
    found = stages.run(f"omega-{norm}", indices[chosen], ascent, cost=cost.ascent(effort))
    values = np.zeros((len(indices), len(fitting.EPS)))
    values[chosen] = found["values"]
    slopes = screened["slope"].copy()
    slopes[chosen] = np.fmax(slopes[chosen], found["slope"])

    # A second look, from other starts and with twice the steps, at the images that hold a block's maximum.
    leading = fitting.leaders(plan, values)
    again = effort.scaled(2)

    def second(part: Int64) -> Arrays:
        images = work.pixels(part)
        generator = work.generator(part, 10 + NORMS.index(norm))
        beyond = _beyond(work, images, norm)
        shift = fitting.screen(detector, images, norm, again, generator, beyond=beyond, typical=typical)[4]
        found_values, slope = fitting.remainders(detector, images, norm, again, shift, typical=typical)
        return {"values": found_values, "slope": slope}

    looked = stages.run(f"omega-{norm}-again", indices[leading], second, cost=cost.second_look(effort))
    first = fitting.omega(plan, values)
    values[leading] = np.fmax(values[leading], looked["values"])
    slopes[leading] = np.fmax(slopes[leading], looked["slope"])
    fitted = fitting.omega(plan, values)
    return slopes, fitted, {"second_look": _change(first.table, fitted.table), "leaders": len(leading)}


def _beyond(work: Work, images: NDArray[np.float32], norm: Norm) -> NDArray[np.float32]:
    """Near points of another class (B, C, H, W), by half the steps: they only start a search."""
    labels = work.detector.logits(images).argmax(axis=1)
    steps = max(1, work.effort.steps // 2)
    return attacks.nearest(work.detector, images, labels, norm=norm, steps=steps).images


def _conformal_scales(
    work: Work, norm: Norm, measured: Measurement, thresholds: Thresholds, typical: float
) -> list[ConformalScale]:
    """The finite-sample scales by alpha; none for an alpha with too few accepted images, or where only the
    scale 0 would keep the promise.

    No scale is above 1: where models are linear, all that lies beyond the first-order radius is the attack's
    own overshoot, and a smaller radius keeps the promise as well. `typical` comes from the radii fold, so the
    scores of this one stay exchangeable with a fresh image's.
    """
    radius = first_order_radius(measured.margin, _slope(measured, norm, typical))
    accepted = np.flatnonzero(~thresholds.rejects(measured) & np.isfinite(radius) & (radius > 0))
    accepted = accepted[: work.effort.distance_images]
    ranks = {}
    for alpha in work.settings.alphas:
        with suppress(CalibrationError):
            # The floor((n + 1) alpha)-th smallest of n, counted from the other end.
            ranks[alpha] = len(accepted) + 1 - statistics.conformal_rank(len(accepted), alpha)
    if not ranks:
        return []
    distance = _nearest(work, f"conformal-{norm}", norm, work.folds["conformal"][accepted])
    scores = np.sort(distance / radius[accepted])
    return [
        ConformalScale(alpha=alpha, kappa=min(kappa, 1.0), n=len(accepted), suite=list(SUITE[norm]))
        for alpha, rank in ranks.items()
        if 0 < (kappa := float(scores[rank - 1])) < math.inf
    ]


def _nearest(work: Work, name: str, norm: Norm, indices: Int64) -> Values:
    """Distances (B,) of the nearest images of another class that minimum-norm attacks find."""
    effort, detector = work.effort, work.detector

    def piece(part: Int64) -> Arrays:
        images = work.pixels(part)
        labels = detector.logits(images).argmax(axis=1)
        found = attacks.nearest(detector, images, labels, norm=norm, steps=effort.distance_steps)
        return {"distance": found.distance}

    found = work.stages.run(name, indices, piece, cost=cost.nearest(effort))
    return np.asarray(found["distance"], dtype=np.float64)


def _inside(work: Work, norm: Norm, indices: Int64, radius: Values) -> Values:
    """Distances (B,) of images of another class that PGD finds inside the radii (B,), else infinite."""
    effort, detector = work.effort, work.detector
    limit = {int(index): float(value) for index, value in zip(indices, radius, strict=True)}

    def piece(part: Int64) -> Arrays:
        images = work.pixels(part)
        found = attacks.inside(
            detector,
            images,
            detector.logits(images).argmax(axis=1),
            np.array([limit[int(index)] for index in part]),
            norm=norm,
            losses=("cross-entropy",),
            steps=effort.violation_steps,
            restarts=effort.violation_restarts,
            seed=int(part[0]),
        )
        return {"distance": found.distance}

    found = work.stages.run(f"violations-{norm}", indices, piece, cost=cost.inside(effort))
    return np.asarray(found.get("distance", np.empty(0)), dtype=np.float64)


def _slope(measured: Measurement, norm: Norm, typical: float = 0.0) -> Values:
    """The margin's slope (B,), as radii take it; with `typical` 0 the dual norm of its gradient."""
    return effective_slope(measured.logits, measured.slope(norm), typical)


def _finite(values: Values) -> Values:
    """The finite ones of them."""
    return values[np.isfinite(values)]


def _record(fit: Extreme) -> ExtremeFit:
    return ExtremeFit(**asdict(fit))


def _omega_record(table: OmegaTable) -> OmegaRecord:
    return OmegaRecord(
        eps=table.eps.tolist(),
        edges=table.edges.tolist(),
        values=table.values.tolist(),
        reach=table.reach.tolist(),
        conditioned_on=table.conditioned_on,
        relative=table.relative,
    )


def _change(first: OmegaTable, second: OmegaTable) -> dict[str, float]:
    """Largest relative growth of omega, over the whole grid and where radii end up (omega between 0.2 and
    0.8).
    """
    growth = (second.values - first.values) / np.maximum(first.values, 1e-12)
    near = (first.values > 0.2) & (first.values < 0.8)
    return {
        "largest_growth": float(np.where(first.values > 1e-6, growth, 0.0).max()),
        "growth_where_radii_end": float(growth[near].max()) if near.any() else 0.0,
    }
