"""Omega against the gradient's slope and against one that knows the third class, cross-fitted.

    python benchmarks/omega_slopes.py models/cifar10 --images 300 --norms l2 --cache runs/slopes \
        --out benchmarks/results/omega_slopes

On training images that the model never saw, so that choices leave the folds of a calibration unseen: the
table is fitted to three quarters of the images and its radii judged on the accepted ones of the last quarter,
four ways round, three times. Remainders are searched as calibration does, but for its second look. `--cache`
keeps them by piece, to go on where a run stopped.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import scipy
from numpy.typing import NDArray

from guard import attacks, data, fitting
from guard.attacks import Norm
from guard.certificate import first_order_radius, omega_radius
from guard.decision import Guard
from guard.fitting import EPS, Effort
from guard.progress import Progress
from guard.settings import Policy

Values = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

PIECE = 50
ROUNDS, QUARTERS = 3, 4
BINS = ((70, 14), (110, 11), (225, 22))
"""Least images and blocks of a bin."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--held-out", type=int, default=1000, help="last training images, as in the training")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--norms", nargs="+", default=["l2", "linf"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    guard = Guard.from_bundle(given.bundle, threads=given.threads, policy=Policy())
    dataset = data.load(given.dataset, "train")
    last = np.arange(len(dataset) - given.held_out, len(dataset))
    images = data.to_floats(dataset.images[np.random.default_rng(5).permutation(last)[: given.images]])
    measured = guard.measure(images)
    accepted = guard.ratios(measured) <= 1
    given.cache.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": "python benchmarks/omega_slopes.py " + " ".join(sys.argv[1:]),
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "scipy": scipy.__version__,
        },
        "machine": platform.processor() or platform.machine(),
        "model": guard.bundle.digest,
        "images": len(images),
        "accepted": int(accepted.sum()),
    }
    for norm in given.norms:
        gradient = measured.gradient_l2 if norm == "l2" else measured.gradient_l1

        def distances(rows: NDArray[np.intp], norm: Norm = norm) -> Arrays:
            found = attacks.nearest(guard.detector, images[rows], measured.labels[rows], norm=norm)
            return {"distance": found.distance}

        known = pieces(given.cache / f"{norm}-distance", np.flatnonzero(accepted), distances)["distance"]
        distance = np.full(len(images), np.inf)
        distance[accepted] = known
        for name, typical in (("plain", 0.0), ("third class", float(np.median(gradient)))):
            margin, slope, values = remainders(guard, images, norm, typical, given.cache / f"{norm}-{name}")
            for least, blocks in BINS:
                effort = Effort(bin_images=least, bin_blocks=blocks)
                radius = cross_fitted(margin, slope, values, effort)[:, accepted]
                entry = {
                    "tightness": float(radius.mean() / distance[accepted].mean()),
                    "attacked_inside": float((distance[accepted] < radius).mean()),
                }
                result[f"{norm}, {name}, bins of {least}"] = entry
                print(norm, name, least, entry)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def pieces(name: Path, rows: NDArray[np.intp], compute: Callable[[NDArray[np.intp]], Arrays]) -> Arrays:
    """What `compute` gives for the images at `rows`, from the cache where it is there."""
    parts = []
    with Progress(len(rows), name.name) as progress:
        for start in range(0, len(rows), PIECE):
            file = name.with_name(f"{name.name}-{start:05d}.npz")
            if not file.is_file():
                np.savez(file, allow_pickle=False, **compute(rows[start : start + PIECE]))
            with np.load(file) as archive:
                parts.append(dict(archive))
            progress.advance(len(rows[start : start + PIECE]))
    return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}


def remainders(
    guard: Guard, images: NDArray[np.float32], norm: Norm, typical: float, cache: Path
) -> tuple[Values, Values, Values]:
    """Margins and slopes (B,) and remainders (B, E) in units of the margin."""
    effort, detector = Effort(), guard.detector

    def screening(rows: NDArray[np.intp]) -> Arrays:
        some, generator = images[rows], np.random.default_rng([7, int(rows[0])])
        labels = detector.logits(some).argmax(axis=1)
        beyond = attacks.nearest(detector, some, labels, norm=norm, steps=effort.steps // 2).images
        margin, slope, value, _, shift = fitting.screen(
            detector, some, norm, effort, generator, beyond=beyond, typical=typical
        )
        return {"margin": margin, "slope": slope, "value": value, "shift": shift.astype(np.float16)}

    found = pieces(cache.with_name(f"{cache.name}-screen"), np.arange(len(images)), screening)
    radius = first_order_radius(found["margin"], found["slope"])
    plan = fitting.layout(radius, Effort(bin_images=len(images) // 4, bin_blocks=10))
    kept = fitting.survivors(plan, found["value"], effort)

    def ascent(rows: NDArray[np.intp]) -> Arrays:
        start = found["shift"][rows].astype(np.float32)
        return {"values": fitting.remainders(detector, images[rows], norm, effort, start, typical=typical)[0]}

    values = np.zeros((len(images), len(EPS)))
    values[kept] = pieces(cache.with_name(f"{cache.name}-ascent"), kept, ascent)["values"]
    return found["margin"], found["slope"], values


def cross_fitted(margin: Values, slope: Values, values: Values, effort: Effort) -> Values:
    """Radii (rounds, B) of all images, each by tables fitted without its quarter."""
    count = len(margin)
    radius = np.zeros((ROUNDS, count))
    for round_ in range(ROUNDS):
        order = np.random.default_rng(round_).permutation(count)
        for quarter in range(QUARTERS):
            rest = order[quarter::QUARTERS]
            fitted = np.setdiff1d(order, rest)
            fitted = np.random.default_rng(round_ + 50).permutation(fitted)
            plan = fitting.layout(first_order_radius(margin[fitted], slope[fitted]), effort)
            table = fitting.omega(plan, values[fitted]).table
            radius[round_, rest] = omega_radius(margin[rest], slope[rest], table)
    return radius


if __name__ == "__main__":
    main()
