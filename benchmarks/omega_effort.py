"""Does twice the search change omega? The modulus of continuity at an effort and at its double.

    python benchmarks/omega_effort.py models/cifar10 --val cifar10 --out benchmarks/results/omega_effort.json

Both fits use the same images and blocks, those that calibration fits radii on; the double has twice the
starts, steps and kept images. The change of omega must stay below 5% where radii end; beside it the
change of what the fit is made of, the mean of block maxima, since a quantile far out of 25 maxima moves with
any of them. With it, the radii on the report fold; with `--scale`, also those of omega as SCALE defines it
(the remainder against <v, ∇l(x)> instead of ||v|| ||∇l(x)||).
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import scipy
from numpy.typing import NDArray

from guard import bundle as bundles
from guard.attacks import Linear
from guard.calibration import fitting
from guard.calibration.fitting import EPS, Effort
from guard.certificate import OmegaTable, first_order_radius, omega_radius
from guard.data import folds, load, to_floats
from guard.norms import Norm
from guard.progress import Progress
from guard.runtime import Detector

BATCH = 64


def fit_omega(
    detector: Detector, images: NDArray[np.float32], norm: Norm, effort: Effort, linear: Linear, seed: int
) -> tuple[OmegaTable, NDArray[np.float64]]:
    """The table, as calibration fits it in stages but without the second look, and the mean block maxima
    (bins, E).
    """
    radius, screened, shifts = [], [], []
    for start in range(0, len(images), BATCH):
        generator = np.random.default_rng([seed, start])
        batch = images[start : start + BATCH]
        margin, slope, value, _, shift = fitting.screen(
            detector, batch, norm, effort, generator, linear=linear
        )
        radius.append(first_order_radius(margin, slope))
        screened.append(value)
        shifts.append(shift)
    plan = fitting.layout(np.concatenate(radius), effort)
    kept = fitting.survivors(plan, np.concatenate(screened), effort)
    starts = np.concatenate(shifts)
    values = np.zeros((len(images), len(EPS)))
    with Progress(len(kept), f"omega {norm} {linear}, {effort.steps} steps") as progress:
        for some in np.array_split(kept, -(-len(kept) // BATCH)):
            values[some], _ = fitting.remainders(
                detector, images[some], norm, effort, starts[some], linear=linear
            )
            progress.advance(len(some))
    maxima = [np.mean([values[block].max(axis=0) for block in row], axis=0) for row in plan.blocks]
    return fitting.omega(plan, values).table, np.array(maxima)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--val", default="cifar10")
    parser.add_argument("--images", type=int, default=Effort().omega_images)
    parser.add_argument("--norms", nargs="+", choices=get_args(Norm), default=get_args(Norm))
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    bundle = bundles.load(given.bundle)
    dataset = load(given.val, "test")
    detector = Detector(bundle.model, threads=given.threads)
    parts = folds(len(dataset), given.seed)
    order = np.random.default_rng([given.seed, 1])
    fold = {name: order.permutation(part) for name, part in parts.items()}
    images = to_floats(dataset.images[fold["radii"][: given.images]])
    measured = detector.measure(to_floats(dataset.images[fold["report"][:1000]]))
    once = Effort()
    runs: dict[str, tuple[Effort, Linear]] = {
        "once": (once, "steepest"),
        "twice": (once.scaled(2), "steepest"),
    }
    if given.scale:
        runs["scale"] = (once, "aligned")
    result: dict[str, Any] = {
        "command": "python benchmarks/omega_effort.py " + " ".join(sys.argv[1:]),
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "scipy": scipy.__version__,
        },
        "machine": platform.processor() or platform.machine(),
        "model": bundle.digest,
        "images": len(images),
        "eps": list(EPS),
    }
    for norm in given.norms:
        slope = measured.gradient_l2 if norm == "l2" else measured.gradient_l1
        first = first_order_radius(measured.margin, slope)
        entry: dict[str, Any] = {"mean_first_order_radius": float(first[np.isfinite(first)].mean())}
        tables: dict[str, OmegaTable] = {}
        maxima: dict[str, NDArray[np.float64]] = {}
        for name, (effort, linear) in runs.items():
            start = time.perf_counter()
            tables[name], maxima[name] = fit_omega(detector, images, norm, effort, linear, given.seed)
            entry[name] = {
                "omega": tables[name].values.tolist(),
                "mean_radius": float(omega_radius(measured.margin, slope, tables[name]).mean()),
                "mean_block_maxima": maxima[name].tolist(),
                "seconds": time.perf_counter() - start,
            }
        change = tables["twice"].values / np.maximum(tables["once"].values, 1e-12) - 1
        ends = at_the_end(tables["once"])
        entry["change_where_radii_end"] = change[ends].tolist()
        entry["change_of_mean_maxima_where_radii_end"] = (maxima["twice"] / maxima["once"] - 1)[ends].tolist()
        entry["mean_change"] = float(change[tables["once"].values > 0.05].mean())
        result[norm] = entry
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")


def at_the_end(table: OmegaTable) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Per bin, the cell of the grid that decides the radius: the first with eps + omega > 1."""
    beyond = table.eps + table.values > 1
    cells = np.where(beyond.any(axis=1), beyond.argmax(axis=1), len(table.eps) - 1)
    return np.arange(len(table.values)), cells


if __name__ == "__main__":
    main()
