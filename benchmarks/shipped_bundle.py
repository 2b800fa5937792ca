"""A bundle beside its undefended twin: accuracy, Jacobian norms, distances, detection, and attacks that know
it.

    python benchmarks/shipped_bundle.py models/cifar10 runs/twin-bundle --val cifar10 --out
    benchmarks/results/shipped_bundle

Everything is measured on images of the report fold, which no choice has looked at; thresholds of the three
scores are set on the threshold fold at the same false positive rate (`combined` with the radii fold as
reference). Attacked images are those that the model classifies rightly; attacks stay in [0, 1] and lead away
from the true class. Detection counts successful attacks only. Beside it, because detection of an attack that
ignores the detector says little: robust accuracy with rejection, the share of all images, right or wrong,
that are accepted and right when clean and for which no attack found within the ball an image that is wrong
and accepted, attacks on the detector included (`guard.evaluation.adaptive.joint`; what counts there is the
decision that is served). Bundles have to be calibrated; their own threshold is not used.
Writes OUT.json, after every bundle, and OUT.md; bundles that OUT.json holds already, measured with the same
settings, are not measured again. With `--card` the tables also go into the first bundle's card.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from guard import attacks, statistics
from guard import bundle as bundles
from guard.card import with_section
from guard.data import Dataset, folds, load, to_floats
from guard.decision import Guard
from guard.evaluation import adaptive
from guard.evaluation.target import Target
from guard.files import atomic_folder, write_text
from guard.progress import Progress
from guard.runtime import Detector, Measurement, score_of
from guard.settings import Policy

Floats = NDArray[np.float32]
Values = NDArray[np.float64]
Flags = NDArray[np.bool_]
Labels = NDArray[np.int64]
Score = Literal["jacobian", "radius", "combined"]

SCORES: tuple[Score, ...] = get_args(Score)
BUDGETS = (0.25, 0.5)
DEEP: tuple[attacks.Loss, attacks.Loss] = ("cross-entropy", "margin")
BATCH = 64


@dataclass(frozen=True)
class Judge:
    """Thresholds of the three scores; an image is accepted where its ratio is at most 1. `target` has the
    guards that would serve them.
    """

    detector: Detector
    thresholds: dict[Score, dict[Literal["jacobian", "radius"], float]]
    target: Target

    def ratios(self, measured: Measurement, score: Score) -> Values:
        """Largest score over its threshold (B,); NaN counts as infinite."""
        pairs = self.thresholds[score].items()
        ratio = np.max([score_of(measured, name) / threshold for name, threshold in pairs], axis=0)
        return np.asarray(np.where(np.isnan(ratio), np.inf, ratio), dtype=np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--val", default="cifar10")
    parser.add_argument("--fpr", type=float, default=0.05)
    parser.add_argument("--images", type=int, default=1000, help="for attacks that ignore the detector")
    parser.add_argument("--adaptive-images", type=int, default=200, help="for attacks on the detector")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    dataset = load(given.val, "test")
    settings = {
        name: getattr(given, name) for name in ("fpr", "images", "adaptive_images", "steps", "seed")
    } | {"data": {"name": dataset.name, "digest": dataset.digest}, "attack on the detector": "joint PGD"}
    path = given.out.with_suffix(".json")
    known: dict[str, dict[str, Any]] = {}
    if path.exists():
        before = json.loads(path.read_text())
        if before["settings"] == settings:
            known = {entry["model"]: entry for entry in before["bundles"]}
    result: dict[str, Any] = {
        "command": "python benchmarks/shipped_bundle.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
        "machine": platform.processor() or platform.machine(),
        "settings": settings,
        "bundles": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for folder in given.bundles:
        bundle = bundles.load(folder)
        entry = known.get(bundle.digest) or measure(bundle, dataset, given)
        entry["radii"] = None if bundle.calibration is None else radii(bundle.calibration)
        known[bundle.digest] = entry
        result["bundles"].append(entry)
        # What was measured before stays in the file until the end.
        write_json(path, result | {"bundles": list(known.values())})
    write_json(path, result)
    text = markdown(result)
    write_text(given.out.with_suffix(".md"), text)
    if given.card:
        first = bundles.load(given.bundles[0])
        with atomic_folder(first.path, keep=True) as folder:
            card = folder / bundles.CARD
            write_text(card, with_section(card.read_text(), "## Attacks" + text[text.index("\n") :]))
            bundles.seal(folder, first.manifest)
    print(text)


def write_json(path: Path, result: dict[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=1) + "\n")


def measure(bundle: bundles.Bundle, dataset: Dataset, given: argparse.Namespace) -> dict[str, Any]:
    detector = Detector(bundle.model, threads=given.threads)
    order = np.random.default_rng([given.seed, 1])
    parts = {name: order.permutation(part) for name, part in folds(len(dataset), given.seed).items()}
    if dataset.labels is None:
        raise SystemExit(f"{dataset.name}: has no labels; attacks need the true classes.")
    labels = dataset.labels[parts["report"]]
    name = bundle.manifest.name

    clean = {fold: measured(detector, dataset, part, f"{name}: clean") for fold, part in parts.items()}
    judge = calibrated(bundle, detector, clean, given.fpr)
    report = clean["report"]
    right = report.labels == labels
    entry: dict[str, Any] = {
        "name": name,
        "model": bundle.digest,
        "accuracy": share(right),
        "jacobian_norm": summary(report.jacobian.astype(np.float64)),
        "clean_rejected": {score: share(judge.ratios(report, score) > 1) for score in SCORES},
    }

    chosen = np.flatnonzero(right)[: given.images]
    images, truth = to_floats(dataset.images[parts["report"][chosen]]), labels[chosen]
    ratios = {score: judge.ratios(report, score)[chosen] for score in SCORES}

    def attack(title: str, run: Callable[[Floats, Labels, int], attacks.Found]) -> attacks.Found:
        found = []
        with Progress(len(images), f"{name}: {title}") as progress:
            for at in range(0, len(images), BATCH):
                found.append(run(images[at : at + BATCH], truth[at : at + BATCH], at))
                progress.advance(len(found[-1].images))
        return attacks.Found(
            *(
                np.concatenate([getattr(part, field) for part in found])
                for field in ("images", "success", "distance")
            )
        )

    def minimum_norm(batch: Floats, y: Labels, _: int) -> attacks.Found:
        return attacks.minimum_norm(detector, batch, y, norm="l2", steps=given.steps, clip=True)

    def deep(eps: float, loss: attacks.Loss, batch: Floats, y: Labels, at: int) -> attacks.Found:
        return attacks.pgd(
            detector,
            batch,
            y,
            eps,
            norm="l2",
            steps=given.steps,
            restarts=1,
            loss=loss,
            clip=True,
            stop=False,
            seed=at,
        )

    nearest = attack("minimum-norm", minimum_norm)
    entry["distance"] = summary(nearest.distance) | {"found": share(nearest.success)}
    entry["attacks"] = {"minimum-norm l2": detection(judge, nearest)}
    # An image falls to a score's detector where some attack within the budget is wrong and accepted.
    fallen = {(score, eps): np.zeros(len(images), bool) for score in SCORES for eps in BUDGETS}
    near = {score: accepted(judge, nearest, score) for score in SCORES}
    for eps in BUDGETS:
        for score in SCORES:
            fallen[score, eps] |= near[score] & (nearest.distance <= eps)
        for loss in DEEP:
            found = attack(f"PGD {eps} {loss}", partial(deep, eps, loss))
            entry["attacks"][f"PGD l2 {eps}, {loss}"] = detection(judge, found)
            for score in SCORES:
                fallen[score, eps] |= accepted(judge, found, score)

    # The rightly classified ones of the first images of the fold; the others are lost without an attack.
    count = min(given.adaptive_images, len(right))
    few = slice(int(right[:count].sum()))
    entry["adaptive"] = {}
    for score in SCORES:
        for eps in BUDGETS:
            success = np.zeros(len(images[few]), bool)
            with Progress(len(success), f"{name}: evading {score} at {eps}") as progress:
                for at in range(0, len(success), BATCH):
                    some = slice(at, min(at + BATCH, len(success)))
                    success[some] = adaptive.joint(
                        judge.target,
                        images[some],
                        truth[some],
                        eps,
                        score=score,
                        norm="l2",
                        steps=given.steps // 2,
                        seed=at,
                    ).success
                    progress.advance(some.stop - some.start)
            taken = ratios[score][few] <= 1
            entry["adaptive"][f"{score}, l2 {eps}"] = {
                "evaded": share(success),
                "fallen_to_any_attack": share(success | fallen[score, eps][few]),
                "robust_accuracy_with_rejection": share(
                    padded(taken & ~success & ~fallen[score, eps][few], count)
                ),
                "clean_accuracy_with_rejection": share(padded(taken, count)),
            }
    return entry


def padded(flags: Flags, count: int) -> Flags:
    """Flags of the images classified rightly, with False for the others: (count,)."""
    return np.concatenate([flags, np.zeros(count - len(flags), dtype=np.bool_)])


def measured(detector: Detector, dataset: Dataset, part: NDArray[np.int64], title: str) -> Measurement:
    pieces = []
    with Progress(len(part), title) as progress:
        for at in range(0, len(part), BATCH):
            pieces.append(detector.measure(to_floats(dataset.images[part[at : at + BATCH]])))
            progress.advance(len(pieces[-1]))
    return Measurement.concatenate(pieces)


def calibrated(
    bundle: bundles.Bundle, detector: Detector, clean: dict[str, Measurement], fpr: float
) -> Judge:
    single: dict[Score, dict[Literal["jacobian", "radius"], float]] = {
        name: {name: statistics.conformal_threshold(score_of(clean["threshold"], name), fpr)}
        for name in ("jacobian", "radius")
    }
    columns = [
        np.stack([score_of(clean[fold], name) for name in ("jacobian", "radius")], axis=1)
        for fold in ("radii", "threshold")
    ]
    joint, _ = statistics.joint_thresholds(columns[0], columns[1], fpr)
    thresholds = single | {"combined": {"jacobian": float(joint[0]), "radius": float(joint[1])}}
    guards: dict[bundles.ScoreName, Guard] = {
        score: guard_of(bundle, detector, score, tests) for score, tests in thresholds.items()
    }
    return Judge(detector, thresholds, Target(detector, guards))


def guard_of(
    bundle: bundles.Bundle,
    detector: Detector,
    score: Score,
    tests: dict[Literal["jacobian", "radius"], float],
) -> Guard:
    """The bundle as it would be served with these thresholds."""
    several = score == "combined"
    listed = [bundles.ScoreThreshold(name=name, threshold=value) for name, value in tests.items()]
    changes = {
        "score": score,
        "threshold": 1.0 if several else listed[0].threshold,
        "tests": listed if several else [],
    }
    calibration = bundle.calibrated().model_copy(update=changes)
    served = Detector(detector.model, score=score, provider=detector.provider, threads=detector.threads)
    return Guard(replace(bundle, calibration=calibration), served, Policy())


def accepted(judge: Judge, found: attacks.Found, score: Score) -> Flags:
    """Successful attacks that the detector accepts."""
    return np.asarray(found.success & judge.target.verdict(found.images, score).accepted, dtype=np.bool_)


def detection(judge: Judge, found: attacks.Found) -> dict[str, Any]:
    """Success, and detection among the successes."""
    success = found.success
    entry: dict[str, Any] = {"success": share(success)}
    if success.any():
        hit = judge.detector.measure(found.images[success])
        entry["median_jacobian_norm"] = float(np.median(hit.jacobian))
        entry["detected"] = {score: share(judge.ratios(hit, score) > 1) for score in SCORES}
    return entry


def radii(calibration: bundles.Calibration) -> dict[str, Any]:
    return {
        norm: {
            "mean_radius": fitted.mean_radius,
            "mean_distance": fitted.mean_distance,
            "tightness": fitted.tightness,
            "violations": fitted.violations.model_dump(),
            "ablation": fitted.ablation,
            "conformal": [scale.model_dump() for scale in fitted.conformal],
        }
        for norm, fitted in (("l2", calibration.l2), ("linf", calibration.linf))
    }


def share(flags: Flags) -> dict[str, float]:
    count, n = int(flags.sum()), len(flags)
    interval = statistics.clopper_pearson(count, n)
    return {"count": count, "n": n, "value": count / n, "lower": interval.lower, "upper": interval.upper}


def summary(values: Values) -> dict[str, float]:
    """Mean with its standard error, and median with its 95% interval from order statistics."""
    finite = np.sort(values[np.isfinite(values)])
    n = len(finite)
    spread = 0.98 * np.sqrt(n)
    low, high = max(0, int(n / 2 - spread)), min(n - 1, int(np.ceil(n / 2 + spread)))
    return {
        "n": n,
        "mean": float(finite.mean()),
        "standard_error": float(finite.std(ddof=1) / np.sqrt(n)),
        "median": float(np.median(finite)),
        "median_lower": float(finite[low]),
        "median_upper": float(finite[high]),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as tables, the bundle beside its twin."""
    pair = result["bundles"]
    lines = [
        "# A bundle beside its undefended twin",
        "",
        f"`{result['command']}`, onnxruntime {result['versions']['onnxruntime']}. 95% intervals in brackets.",
        "",
        f"| | {' | '.join(entry['name'] for entry in pair)} |",
        f"|---|{len(pair) * '---|'}",
    ]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} |")

    row("clean accuracy", [percent(entry["accuracy"]) for entry in pair])
    norms = [entry["jacobian_norm"] for entry in pair]
    row("mean Jacobian norm", [f"{one['mean']:.3f} ± {1.96 * one['standard_error']:.3f}" for one in norms])
    distances = [entry["distance"] for entry in pair]
    row(
        "median minimum-norm l2 distance",
        [
            f"{one['median']:.3f} [{one['median_lower']:.3f}, {one['median_upper']:.3f}] (n = {one['n']})"
            for one in distances
        ],
    )
    for score in SCORES:
        row(f"clean images rejected by {score}", [percent(entry["clean_rejected"][score]) for entry in pair])
    for name in pair[0]["attacks"]:
        both = [entry["attacks"][name] for entry in pair]
        row(f"**{name}**: success", [percent(one["success"]) for one in both])
        for score in SCORES:
            row(f"detected by {score}", [percent(one.get("detected", {}).get(score)) for one in both])
    for name in pair[0]["adaptive"]:
        both = [entry["adaptive"][name] for entry in pair]
        row(
            f"**evading {name}**: success, the attacker knowing the detector",
            [percent(one["evaded"]) for one in both],
        )
        row(
            "robust accuracy with rejection, all attacks; without attack",
            [
                f"{percent(one['robust_accuracy_with_rejection'])}; "
                f"{one['clean_accuracy_with_rejection']['value']:.1%}"
                for one in both
            ],
        )
    for norm in ("l2", "linf"):
        fitted = [None if entry["radii"] is None else entry["radii"][norm] for entry in pair]
        row(
            f"mean {norm} omega-bound radius / mean smallest distance",
            [
                f"{one['mean_radius']:.4f} / {one['mean_distance']:.4f} = {one['tightness']:.2f}"
                if one
                else "-"
                for one in fitted
            ],
        )
        row(
            f"attacked inside the {norm} radius",
            [
                f"{one['violations']['count']} of {one['violations']['n']} "
                f"(at most {one['violations']['upper']:.2%})"
                if one
                else "-"
                for one in fitted
            ],
        )
    return "\n".join(lines) + "\n"


def percent(entry: dict[str, float] | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['value']:.1%} [{entry['lower']:.1%}, {entry['upper']:.1%}] (n = {entry['n']})"


if __name__ == "__main__":
    main()
