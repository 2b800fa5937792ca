"""At which level should omega be read? Radii against strong attacks, on training images the model never saw.

    python -m benchmarks.omega_levels models/cifar10 --images 1000 --cache runs/levels \
        --out benchmarks/results/omega_levels

The fits behind a bundle's omega are read at several levels: the share of images whose remainder is to exceed
omega. Each table's radii are compared with the nearest point that `audit.attacks_inside` finds: the attacks
of `guard evaluate` from inside every served radius. `--cache` keeps distances by piece, to go on where a run
stopped.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks import held_out
from guard import statistics
from guard.bundle import Calibration, ExtremeFit
from guard.calibration import extremes
from guard.certificate import OmegaTable, effective_slope, omega_radius
from guard.decision import Guard, table_of
from guard.evaluation import audit
from guard.evaluation.target import Target
from guard.norms import NORMS, Norm
from guard.stages import Arrays

Values = NDArray[np.float64]

LEVELS = (0.003, 0.001, 0.0005, 0.0003, 0.0002, 0.0001)


def main() -> None:
    given = held_out.parser(__doc__, 1000).parse_args()
    guard, images = held_out.load(given)
    calibration = guard.calibration
    measured = guard.measure(images)
    accepted = guard.ratios(measured) <= 1
    images, measured = images[accepted], measured[accepted]
    result = held_out.facts("omega_levels", guard, images)
    for norm in NORMS:
        distance = distances(guard, images, norm, given.cache)
        gradient = measured.gradient_l2 if norm == "l2" else measured.gradient_l1
        slope = effective_slope(measured.logits, gradient, calibration.radii(norm).slope)
        result[norm] = {
            f"{level:g}": judged(
                omega_radius(measured.margin, slope, table(calibration, norm, level)), distance
            )
            for level in LEVELS
        } | {
            f"{radius.method} {radius.alpha or ''}".strip(): judged(values, distance)
            for radius, values in guard.radii(measured, norm)
        }
        for name, one in result[norm].items():
            print(
                f"| {norm} | {name} | {one['tightness']:.3f} | {one['violations']} of {len(images)} "
                f"(<= {one['at_most']:.2%}) |"
            )
    held_out.write(given.out, result)


def distances(guard: Guard, images: NDArray[np.float32], norm: Norm, cache: Path) -> Values:
    """Smallest distances (n,) at which an attack changed the prediction; inf where none did."""
    target = Target(guard.detector, {guard.calibration.score: guard})

    def inside(rows: NDArray[np.int64]) -> Arrays:
        some, seed = images[rows], int(rows[0])
        found = audit.attacks_inside(target, guard.bundle, some, guard.measure(some), norm, seed=seed)
        return {"distance": found}

    return held_out.pieces(cache / f"{norm}-inside", guard, images, np.arange(len(images)), inside)[
        "distance"
    ]


def table(calibration: Calibration, norm: Norm, level: float) -> OmegaTable:
    """The served table, its fits read where a share `level` of images is to exceed omega."""
    record = calibration.radii(norm)
    values = np.array([[read(fit, level) for fit in row] for row in record.omega_fits])
    return replace(table_of(record.omega), values=np.maximum.accumulate(values, axis=1))


def read(fit: ExtremeFit, level: float) -> float:
    """The fit's quantile that a share `level` of images exceeds; never below the largest seen."""
    if fit.method == "largest":
        return fit.largest
    # blocks of ten images, as `Effort` has by default
    law = stats.genextreme(-fit.shape, fit.location, fit.scale)
    return max(fit.largest, float(law.isf(extremes.of_blocks(level, 10))))


def judged(radius: Values, distance: Values) -> dict[str, float]:
    """Tightness, and how many images were attacked inside the radius, with its 95% upper bound."""
    violations = int((distance < radius).sum())
    return {
        "tightness": float(radius.mean() / distance.mean()),
        "violations": violations,
        "at_most": statistics.clopper_pearson_upper(violations, len(radius)),
    }


if __name__ == "__main__":
    main()
