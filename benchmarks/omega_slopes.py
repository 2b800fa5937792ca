"""Omega against the gradient's slope and against one that knows the third class, cross-fitted.

    python -m benchmarks.omega_slopes models/cifar10 --images 300 --norms l2 --cache runs/slopes \
        --out benchmarks/results/omega_slopes

On training images that the model never saw, so that choices leave the folds of a calibration unseen: the
table is fitted to three quarters of the images and its radii judged on the accepted ones of the last quarter,
four ways round, three times. Remainders are searched as calibration does, but for its second look. `--cache`
keeps them by piece, to go on where a run stopped.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import held_out
from benchmarks.held_out import pieces
from guard import attacks
from guard.calibration import fitting
from guard.calibration.fitting import EPS, Effort
from guard.certificate import first_order_radius, omega_radius
from guard.decision import Guard
from guard.norms import Norm
from guard.stages import Arrays

Values = NDArray[np.float64]

ROUNDS, QUARTERS = 3, 4
BINS = ((70, 14), (110, 11), (225, 22))
"""Least images and blocks of a bin."""


def main() -> None:
    parser = held_out.parser(__doc__, 300)
    parser.add_argument("--norms", nargs="+", default=["l2", "linf"])
    given = parser.parse_args()
    guard, images = held_out.load(given)
    measured = guard.measure(images)
    accepted = guard.ratios(measured) <= 1
    result = held_out.facts("omega_slopes", guard, images) | {"accepted": int(accepted.sum())}
    for norm in given.norms:
        gradient = measured.gradient_l2 if norm == "l2" else measured.gradient_l1

        def distances(rows: NDArray[np.int64], norm: Norm = norm) -> Arrays:
            found = attacks.nearest(guard.detector, images[rows], measured.labels[rows], norm=norm)
            return {"distance": found.distance}

        known = pieces(given.cache / f"{norm}-distance", guard, images, np.flatnonzero(accepted), distances)[
            "distance"
        ]
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
    held_out.write(given.out, result)


def remainders(
    guard: Guard, images: NDArray[np.float32], norm: Norm, typical: float, cache: Path
) -> tuple[Values, Values, Values]:
    """Margins and slopes (B,) and remainders (B, E) in units of the margin."""
    effort, detector = Effort(), guard.detector

    def screening(rows: NDArray[np.int64]) -> Arrays:
        some, generator = images[rows], np.random.default_rng([7, int(rows[0])])
        labels = detector.logits(some).argmax(axis=1)
        beyond = attacks.nearest(detector, some, labels, norm=norm, steps=effort.steps // 2).images
        margin, slope, value, _, shift = fitting.screen(
            detector, some, norm, effort, generator, beyond=beyond, typical=typical
        )
        return {"margin": margin, "slope": slope, "value": value, "shift": shift.astype(np.float16)}

    found = pieces(cache.with_name(f"{cache.name}-screen"), guard, images, np.arange(len(images)), screening)
    radius = first_order_radius(found["margin"], found["slope"])
    plan = fitting.layout(radius, Effort(bin_images=len(images) // 4, bin_blocks=10))
    kept = fitting.survivors(plan, found["value"], effort)

    def ascent(rows: NDArray[np.int64]) -> Arrays:
        start = found["shift"][rows].astype(np.float32)
        return {"values": fitting.remainders(detector, images[rows], norm, effort, start, typical=typical)[0]}

    values = np.zeros((len(images), len(EPS)))
    values[kept] = pieces(cache.with_name(f"{cache.name}-ascent"), guard, images, kept, ascent)["values"]
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
