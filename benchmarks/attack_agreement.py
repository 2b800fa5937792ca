"""Our attacks beside those of foolbox and pyautoattack: same bundle, same images, same budgets.

    python benchmarks/attack_agreement.py models/cifar10 --val cifar10 --images 100 --threads 1 \
        --out benchmarks/results/attack_agreement

Attacks within a budget are compared by the images they leave standing, with how many only one of the two
breaks; those that look for the nearest image by their median distances and the median of the ratio per image.
Steps and starts are as near as the interfaces allow. Images are rightly classified ones of the calibration's
report fold. Needs the extra `attacks`.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from guard import attacks, data, statistics
from guard.attacks import Floats, Found, Labels
from guard.decision import Guard
from guard.evaluation import libraries
from guard.evaluation.apgd import apgd
from guard.evaluation.carlini_wagner import carlini_wagner
from guard.evaluation.deepfool import deepfool
from guard.evaluation.run import hardware
from guard.evaluation.target import Target
from guard.files import write_text
from guard.norms import Norm
from guard.runtime import Detector
from guard.settings import Policy

BUDGETS: dict[Norm, float] = {"l2": 0.5, "linf": 2 / 255}
STEPS = 20
RATE = 0.1
"""Of the budget, the length of every step of PGD."""


@dataclass(frozen=True)
class Pair:
    """An attack of ours and a library's; `run(images, labels)` for each."""

    name: str
    norm: Norm
    library: str
    ours: Callable[[Floats, Labels], Found]
    theirs: Callable[[Floats, Labels], Found]
    budget: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--val", default="cifar10")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    guard = Guard.from_bundle(given.bundle, threads=given.threads, policy=Policy())
    model = guard.detector
    dataset = data.load(given.val)
    fold = data.folds(len(dataset), guard.calibration.seed)["report"]
    index = np.random.default_rng(7).permutation(fold)[: 2 * given.images]
    images, labels = data.to_floats(dataset.images[index]), np.asarray(dataset.labels)[index]
    right = np.flatnonzero(model.logits(images).argmax(axis=1) == labels)[: given.images]
    images, labels = images[right], labels[right]
    rows = []
    for pair in pairs(model):
        row = compared(pair, images, labels)
        rows.append(row)
        print(line(row), flush=True)
    result: dict[str, Any] = {
        "command": "python benchmarks/attack_agreement.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
        "hardware": hardware(model),
        "model": guard.bundle.digest,
        "images": len(images),
        "pairs": rows,
    }
    if given.out:
        write_text(given.out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")


def pairs(model: Detector) -> list[Pair]:
    target = Target(model)
    found = []
    for norm, budget in BUDGETS.items():
        found += [
            Pair(
                f"PGD-{STEPS} on the cross-entropy",
                norm,
                "foolbox",
                partial(
                    attacks.pgd,
                    model,
                    eps=budget,
                    norm=norm,
                    steps=STEPS,
                    restarts=1,
                    loss="cross-entropy",
                    rate=RATE,
                    clip=True,
                ),
                foolbox_pgd(target, norm, budget),
                budget,
            ),
            Pair(
                "APGD-100 on the cross-entropy",
                norm,
                "pyautoattack",
                partial(apgd, model, eps=budget, norm=norm, loss="cross-entropy"),
                autoattack(target, norm, budget, "apgd-ce"),
                budget,
            ),
            Pair(
                "APGD-100 on the margin, and AutoAttack's targeted one",
                norm,
                "pyautoattack",
                partial(apgd, model, eps=budget, norm=norm, loss="margin", restarts=2),
                autoattack(target, norm, budget, "apgd-t"),
                budget,
            ),
            Pair(
                "FMN, 100 steps",
                norm,
                "foolbox",
                partial(attacks.minimum_norm, model, norm=norm, steps=100, clip=True),
                foolbox(target, norm, partial(libraries.fast_minimum_norm, norm)),
            ),
        ]
    found += [
        Pair(
            "DeepFool",
            "l2",
            "foolbox",
            partial(deepfool, model, norm="l2"),
            foolbox(target, "l2", libraries.deepfool),
        ),
        Pair(
            "Carlini-Wagner, 5 searches of 100 steps, theirs 9",
            "l2",
            "foolbox",
            partial(carlini_wagner, model, steps=100, searches=5),
            foolbox(target, "l2", partial(libraries.carlini_wagner, 100)),
        ),
    ]
    return found


def foolbox(target: Target, norm: Norm, make: libraries.Make) -> Callable[[Floats, Labels], Found]:
    """A minimum-norm attack of foolbox."""

    def run(images: Floats, labels: Labels) -> Found:
        return libraries.with_foolbox(target, images, labels, None, 0, norm=norm, make=make)

    return run


def foolbox_pgd(target: Target, norm: Norm, budget: float) -> Callable[[Floats, Labels], Found]:
    """PGD of foolbox from the image itself."""
    library = libraries.import_foolbox()
    attack = {"l2": library.attacks.L2PGD, "linf": library.attacks.LinfPGD}[norm]

    class Fixed:
        """At one budget, called as minimum-norm attacks are."""

        def run(self, network: object, images: Any, criterion: object) -> Any:
            pgd = attack(steps=STEPS, rel_stepsize=RATE, random_start=False)
            return pgd.run(network, images, criterion, epsilon=budget)

    def run(images: Floats, labels: Labels) -> Found:
        return libraries.with_foolbox(target, images, labels, budget, 0, norm=norm, make=Fixed)

    return run


def autoattack(
    target: Target, norm: Norm, budget: float, part: libraries.Part
) -> Callable[[Floats, Labels], Found]:
    """One part of AutoAttack."""

    def run(images: Floats, labels: Labels) -> Found:
        return libraries.with_autoattack(target, images, labels, budget, 0, norm=norm, parts=(part,))

    return run


def compared(pair: Pair, images: Floats, labels: Labels) -> dict[str, Any]:
    """Both attacks on the same images."""
    seconds, found = [], []
    for run in (pair.ours, pair.theirs):
        started = time.perf_counter()
        found.append(run(images, labels))
        seconds.append(time.perf_counter() - started)
    ours, theirs = found
    row: dict[str, Any] = {
        "attack": pair.name,
        "norm": pair.norm,
        "library": pair.library,
        "budget": pair.budget,
        "n": len(images),
        "broken": {"ours": int(ours.success.sum()), "theirs": int(theirs.success.sum())},
        "only": {
            "ours": int((ours.success & ~theirs.success).sum()),
            "theirs": int((theirs.success & ~ours.success).sum()),
        },
        "seconds": {"ours": seconds[0], "theirs": seconds[1]},
    }
    if pair.budget is not None:
        intervals = [statistics.clopper_pearson(int(one.success.sum()), len(images)) for one in found]
        return row | {"intervals": [[one.lower, one.upper] for one in intervals]}
    both = ours.success & theirs.success
    return row | {
        "median_distance": {
            "ours": float(np.median(ours.distance[both])),
            "theirs": float(np.median(theirs.distance[both])),
        },
        "median_ratio": float(np.median(ours.distance[both] / theirs.distance[both])),
    }


def line(row: dict[str, Any]) -> str:
    start = f"| {row['attack']} | {row['norm']} | {row['library']} |"
    if row["budget"] is not None:
        standing = [row["n"] - row["broken"][side] for side in ("ours", "theirs")]
        only = [row["only"][side] for side in ("ours", "theirs")]
        return f"{start} {standing[0]} and {standing[1]} stand | {only[0]} and {only[1]} |"
    ours, theirs = (row["median_distance"][side] for side in ("ours", "theirs"))
    return f"{start} {ours:.4f} and {theirs:.4f} | {row['median_ratio']:.3f} |"


if __name__ == "__main__":
    main()
