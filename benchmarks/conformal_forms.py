"""Which form of conformal radius reaches furthest? Several, on training images that the model never saw.

    python -m benchmarks.conformal_forms models/cifar10 --dataset cifar10 --held-out 1000 --images 600 \
        --cache runs/forms --out benchmarks/results/conformal_forms

Distances are those of `guard.attacks.nearest`, 20 steps, on accepted images, and for comparison of
`minimum_norm` alone, which follows the leading class. Each form is calibrated on two thirds of the images and
judged on the rest, 200 random ways: mean radius over mean distance, and the share attacked inside. Beside
them the radii that the bundle serves. The form is chosen here, so that the folds of a calibration stay
unseen. `--cache` keeps distances by piece, to go on where a run stopped.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import held_out
from guard import attacks, statistics
from guard.certificate import effective_slope, first_order_radius
from guard.decision import Guard
from guard.norms import Norm
from guard.runtime import Measurement
from guard.stages import Arrays

Values = NDArray[np.float64]
Indices = NDArray[np.intp]
Form = Callable[[Values, Indices, float], Values]
"""`form(distance, part, alpha)`: radii (n,) of all images, calibrated on the distances of those of `part`."""

STEPS = 20
ALPHAS = (0.01, 0.05)
SPLITS = 200
NORMS: tuple[Norm, Norm] = ("l2", "linf")


def main() -> None:
    given = held_out.parser(__doc__, 600).parse_args()
    guard, images = held_out.load(given)
    measured = guard.measure(images)
    accepted = guard.ratios(measured) <= 1
    images, measured = images[accepted], measured[accepted]
    result = held_out.facts("conformal_forms", guard, images) | {"steps": STEPS, "splits": SPLITS}
    lines = []
    for norm in NORMS:
        both = distances(guard, images, measured.labels, norm, given.cache)
        alone, nearest = both["minimum_norm"], both["nearest"]
        result[norm] = {
            "mean_distance": {name: float(values.mean()) for name, values in both.items()},
            "nearer_by_3_percent": float((nearest < 0.97 * alone).mean()),
            "nearer_by_10_percent": float((nearest < 0.9 * alone).mean()),
            "served": {
                f"{radius.method} {radius.alpha or ''}".strip(): {
                    "mean_radius": float(values.mean()),
                    "attacked_by_minimum_norm": int((alone < values).sum()),
                    "attacked_by_nearest": int((nearest < values).sum()),
                    "at_most": statistics.clopper_pearson_upper(int((nearest < values).sum()), len(values)),
                }
                for radius, values in guard.radii(measured, norm)
            },
        }
        for suite, distance in both.items():
            for name, radii in forms(measured, norm).items():
                found = judged(radii, distance)
                result[norm][f"{suite}, {name}"] = found
                cells = [
                    f"{one['tightness']:.3f} [{one['lower']:.3f}, {one['upper']:.3f}], {one['attacked']:.2%}"
                    for one in found.values()
                ]
                lines.append(f"| {norm} | {suite} | {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    held_out.write(given.out, result)


def distances(
    guard: Guard, images: NDArray[np.float32], labels: NDArray[np.int64], norm: Norm, cache: Path
) -> dict[str, Values]:
    """Smallest distances (n,) by both attacks."""

    def both(rows: NDArray[np.int64]) -> Arrays:
        return {
            run.__name__: run(guard.detector, images[rows], labels[rows], norm=norm, steps=STEPS).distance
            for run in (attacks.minimum_norm, attacks.nearest)
        }

    return held_out.pieces(cache / f"{norm}-distances", guard, images, np.arange(len(images)), both)


def forms(measured: Measurement, norm: Norm) -> dict[str, Form]:
    """The forms by name; rho is the first-order radius, with the third class that of `effective_slope`."""
    gradient = (measured.gradient_l2 if norm == "l2" else measured.gradient_l1).astype(np.float64)
    slope = effective_slope(measured.logits, gradient, float(np.median(gradient)))
    plain = first_order_radius(measured.margin, gradient)
    typical = first_order_radius(measured.margin, slope)

    def scaled(rho: Values) -> Form:
        def radii(distance: Values, part: Indices, alpha: float) -> Values:
            return rho / statistics.conformal_threshold((rho / distance)[part], alpha)

        return radii

    def shortened(rho: Values, power: float) -> Form:
        def radii(distance: Values, part: Indices, alpha: float) -> Values:
            scores = (distance**-power - rho**-power)[part]
            least = max(0.0, statistics.conformal_threshold(scores, alpha))
            return np.asarray((rho**-power + least) ** (-1 / power), np.float64)

        return radii

    def regressed(distance: Values, part: Indices, alpha: float) -> Values:
        """The log distance as a quadratic in log rho, fitted to one half and conformal on the other."""
        logs = np.log(plain)
        columns = np.stack([np.ones_like(logs), logs, logs**2], axis=1)
        fitted, rest = np.array_split(part, 2)
        weights = np.linalg.lstsq(columns[fitted], np.log(distance[fitted]), rcond=None)[0]
        predicted = np.exp(columns @ weights)
        kappa = 1 / statistics.conformal_threshold((predicted / distance)[rest], alpha)
        return np.asarray(kappa * predicted, np.float64)

    return {
        "kappa rho": scaled(plain),
        "log distance by regression": regressed,
        "1/sqrt(rho) + c": shortened(plain, 0.5),
        "1/rho + c": shortened(plain, 1.0),
        "kappa rho, third class (chosen)": scaled(typical),
        "1/sqrt(rho) + c, third class": shortened(typical, 0.5),
    }


def judged(form: Form, distance: Values) -> dict[str, dict[str, float]]:
    """By alpha: mean tightness with the range of 95% of the splits, and the mean share attacked inside."""
    found = {}
    for alpha in ALPHAS:
        generator = np.random.default_rng(0)
        rows = []
        for _ in range(SPLITS):
            order = generator.permutation(len(distance))
            part, rest = np.split(order, [2 * len(order) // 3])
            radius = form(distance, part, alpha)[rest]
            rows.append((radius.mean() / distance[rest].mean(), (distance[rest] < radius).mean()))
        tightness, attacked = np.array(rows).T
        lower, upper = np.quantile(tightness, [0.025, 0.975])
        found[f"{alpha:g}"] = {
            "tightness": float(tightness.mean()),
            "lower": float(lower),
            "upper": float(upper),
            "attacked": float(attacked.mean()),
        }
    return found


if __name__ == "__main__":
    main()
