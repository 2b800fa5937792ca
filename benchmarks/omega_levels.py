"""At which level should omega be read? Radii against strong attacks, on training images the model never saw.

    python benchmarks/omega_levels.py models/cifar10 --images 1000 --cache runs/levels \
        --out benchmarks/results/omega_levels

The fits behind a bundle's omega are read at several levels: the share of images whose remainder is to exceed
omega. Each table's radii are compared with the nearest point that `audit.attacks_inside` finds: the attacks
of `guard evaluate` from inside every served radius. `--cache` keeps distances by piece, to go on where a run
stopped.
"""

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from scipy import stats

from guard import data, extremes, statistics
from guard.attacks import Norm
from guard.bundle import Calibration, ExtremeFit
from guard.certificate import OmegaTable, effective_slope, omega_radius
from guard.decision import NORMS, Guard, table_of
from guard.evaluation import audit
from guard.evaluation.target import Target
from guard.progress import Progress
from guard.settings import Policy

Values = NDArray[np.float64]

PIECE = 50
LEVELS = (0.003, 0.001, 0.0005, 0.0003, 0.0002, 0.0001)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--held-out", type=int, default=1000, help="last training images, as in the training")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    guard = Guard.from_bundle(given.bundle, threads=given.threads, policy=Policy())
    calibration = guard.calibration
    dataset = data.load(given.dataset, "train")
    last = np.arange(len(dataset) - given.held_out, len(dataset))
    images = data.to_floats(dataset.images[np.random.default_rng(5).permutation(last)[: given.images]])
    measured = guard.measure(images)
    accepted = guard.ratios(measured) <= 1
    images, measured = images[accepted], measured[accepted]
    result: dict[str, Any] = {
        "command": "python benchmarks/omega_levels.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
        "machine": platform.processor() or platform.machine(),
        "model": guard.bundle.digest,
        "images": len(images),
    }
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
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def distances(guard: Guard, images: NDArray[np.float32], norm: Norm, cache: Path) -> Values:
    """Smallest distances (n,) at which an attack changed the prediction; inf where none did."""
    cache.mkdir(parents=True, exist_ok=True)
    target = Target(guard.detector, {guard.calibration.score: guard})
    pieces: list[Values] = []
    with Progress(len(images), f"attacks {norm}") as progress:
        for start in range(0, len(images), PIECE):
            some = images[start : start + PIECE]
            file = cache / f"{norm}-{start:05d}.npy"
            if not file.is_file():
                measured = guard.measure(some)
                np.save(file, audit.attacks_inside(target, guard.bundle, some, measured, norm, seed=start))
            pieces.append(np.load(file))
            progress.advance(len(some))
    return np.concatenate(pieces)


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
