"""A small planted results folder to make reports from."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.attacks import Found, length
from guard.bundle import ScoreName, dump
from guard.evaluation.attack import Knowledge
from guard.evaluation.results import (
    ATTACKS_FOLDER,
    CLEAN_FILE,
    GALLERY,
    MEASURED,
    RESULTS,
    AttackResult,
    Check,
    Detection,
    RadiusAudit,
    Results,
    Standing,
    auroc,
    summary,
)
from guard.norms import Norm
from guard.shares import share_of

Arrays = dict[str, NDArray[Any]]
Images = NDArray[np.float32]


@dataclass
class Folder:
    """A results folder as it comes together; `measure` gives measurements and acceptance of images."""

    path: Path
    images: Images
    labels: NDArray[np.int64]
    scores: list[ScoreName]
    measure: Callable[[Images], Arrays]
    attacks: list[AttackResult] = field(default_factory=list)
    arrays: list[Arrays] = field(default_factory=list)
    clean: Arrays = field(init=False)

    def __post_init__(self) -> None:
        self.clean = self.measure(self.images)
        self.clean["index"] = np.arange(len(self.images))
        self.clean["label"], self.clean["image"] = self.labels, self.images[:GALLERY]

    @property
    def right(self) -> NDArray[np.bool_]:
        return np.asarray(self.clean["logits"].argmax(axis=1) == self.labels, np.bool_)

    def attack(
        self,
        name: str,
        title: str,
        run: Callable[[Images, NDArray[np.int64]], Found],
        norm: Norm | None,
        budget: float | None = None,
        *,
        aware: ScoreName | None = None,
        knowledge: Knowledge = "gradients",
        passes: int = 60,
        first: int | None = None,
        unit: str = "pixel values",
    ) -> None:
        eligible = self.right if aware is None else self.right & self.clean[f"accepted_{aware}"]
        rows = np.flatnonzero(eligible[:first])
        before = time.monotonic()
        found = run(self.images[rows], self.labels[rows])
        seconds = time.monotonic() - before
        measured = self.measure(found.images)
        for array in MEASURED:
            measured[array] = np.where(
                found.success.reshape(-1, *[1] * (measured[array].ndim - 1)), measured[array], np.nan
            )
        shift = found.images - self.images[rows]
        spent = np.random.default_rng(len(self.attacks)).integers(passes // 3, passes + 1, len(rows))
        arrays = {
            "row": rows,
            "success": found.success,
            "wrong": found.success,
            "distance": found.distance,
            "l2": np.where(found.success, length(shift, "l2"), np.inf),
            "linf": np.where(found.success, length(shift, "linf"), np.inf),
            "passes": spent,
            "image": found.images[rows < GALLERY],
        } | measured
        hit = found.success
        detection = {
            score: Detection(
                rejected=share_of(int((~arrays[f"accepted_{score}"])[hit].sum()), int(hit.sum())),
                auroc=auroc(arrays["jacobian"][hit], self.clean["jacobian"]),
            )
            for score in self.scores
            if hit.any()
        }
        file = f"{ATTACKS_FOLDER}/{name}{'' if budget is None else f'@{budget:.6g}'}.npz"
        self.arrays.append(arrays)
        self.attacks.append(
            AttackResult(
                name=name,
                title=title,
                norm=norm,
                unit=unit,
                budget=budget,
                knowledge=knowledge,
                aware=aware,
                source="guard.attacks",
                settings={"images": len(self.labels) if first is None else first},
                n=len(rows),
                success=share_of(int(hit.sum()), len(rows)),
                distance=summary(found.distance) if hit.any() else None,
                passes=float(spent.mean()),
                seconds=seconds,
                detection=detection,
                file=file,
            )
        )

    def standing(self, score: ScoreName, norm: Norm, budget: float) -> Standing:
        kept = self.right & self.clean[f"accepted_{score}"]
        left = kept.copy()
        fallen: dict[str, int] = {}
        for result, arrays in zip(self.attacks, self.arrays, strict=True):
            down = arrays["success"] & arrays[f"accepted_{score}"] & (arrays[norm] <= budget * (1 + 1e-6))
            rows = arrays["row"][down]
            fallen[result.name] = max(int(kept[rows].sum()), fallen.get(result.name, 0))
            left[rows] = False
        return Standing(
            score=score,
            norm=norm,
            budget=budget,
            standing=share_of(int(left.sum()), len(left)),
            clean=share_of(int(kept.sum()), len(kept)),
            worst=max(fallen, key=lambda name: fallen[name], default=None),
            fallen=fallen,
            meant=dict.fromkeys(fallen, int(kept.sum())),
        )

    def write(self, **more: Any) -> Results:
        (self.path / ATTACKS_FOLDER).mkdir(parents=True, exist_ok=True)
        np.savez_compressed(self.path / CLEAN_FILE, **self.clean)  # type: ignore[arg-type]
        for result, arrays in zip(self.attacks, self.arrays, strict=True):
            np.savez_compressed(self.path / result.file, **arrays)  # type: ignore[arg-type]
        count = len(self.labels)
        settings: dict[str, Any] = {
            "command": "guard evaluate models/planted --val planted --out results",
            "hardware": "one core of a planted machine",
            "seconds": 12.0,
            "bundle": {"name": "planted", "digest": "sha256:0", "thresholds": {"jacobian": 0.5}},
            "data": {"name": "planted", "digest": "0", "n": count},
            "settings": {"seed": 0},
            "images": count,
            "accuracy": share_of(int(self.right.sum()), count),
            "scores": self.scores,
            "served": self.scores[0],
            "rejected": {
                score: share_of(int((~self.clean[f"accepted_{score}"]).sum()), count) for score in self.scores
            },
            "jacobian": summary(self.clean["jacobian"]),
            "attacks": self.attacks,
            "standing": [
                self.standing(score, norm, budget)
                for score in self.scores
                for norm, budgets in BUDGETS.items()
                for budget in budgets
            ],
            "provenance": {"versions": {"guard": "0.1.0"}},
        }
        results = Results(**(settings | more))
        (self.path / RESULTS).write_bytes(dump(results))
        return results


BUDGETS: Mapping[Norm, tuple[float, ...]] = {"l2": (0.25, 0.5, 1.0), "linf": (2 / 255, 8 / 255)}

CHECKS = [
    Check(
        name="more steps are stronger",
        verdict="passed",
        expected="PGD of 100 steps succeeds at least as often as of 20",
        found="88% against 87% (n = 60)",
        numbers={"long": 0.88, "short": 0.87},
    ),
    Check(
        name="unbounded attack succeeds",
        verdict="failed",
        expected="100% at an unbounded budget",
        found="97% (n = 60)",
        numbers={"success": 0.97},
    ),
    Check(name="black box is weaker", verdict="not run", expected="square below PGD", found="square not run"),
]


def radii(count: int = 60) -> list[RadiusAudit]:
    entries: list[tuple[Norm, str, str, bool, int, float, float, float | None]] = [
        ("l2", "estimate", "omega-bound", True, 1, 0.2356, 0.4071, None),
        ("l2", "conformal", "scaled-first-order", False, 0, 0.251, 0.4071, 0.01),
        ("l2", "estimate", "l-bound", False, 0, 0.0612, 0.4071, None),
        ("linf", "estimate", "omega-bound", True, 0, 0.0062, 0.0113, None),
    ]
    return [
        RadiusAudit(
            norm=norm,
            kind=kind,
            method=method,
            served=served,
            violations=share_of(broken, count),
            found=count,
            mean_radius=mean,
            mean_distance=distance,
            tightness=mean / distance,
            tightness_error=0.01,
            alpha=alpha,
        )
        for norm, kind, method, served, broken, mean, distance, alpha in entries
    ]


def planted(path: Path, *, count: int = 40, classes: int = 3, **more: Any) -> Folder:
    """A results folder of a linear classifier of 4 x 4 images, attacked in closed form."""
    generator = np.random.default_rng(0)
    images = generator.random((count, 3, 4, 4), dtype=np.float32)
    weight = generator.standard_normal((classes, 48)).astype(np.float32) / 4
    labels = (images.reshape(count, -1) @ weight.T).argmax(axis=1)
    labels[::8] = (labels[::8] + 1) % classes  # some are wrong from the start

    def measure(some: Images) -> Arrays:
        logits = some.reshape(len(some), -1) @ weight.T
        order = np.sort(logits, axis=1)
        top = np.argsort(-logits, axis=1)[:, :2]
        difference = weight[top[:, 0]] - weight[top[:, 1]]
        margin = order[:, -1] - order[:, -2]
        steep = np.sqrt((difference**2).sum(axis=1))
        jacobian = steep / (1 + np.cosh(margin))
        return {
            "logits": logits,
            "margin": margin,
            "gradient_l2": steep,
            "gradient_l1": np.abs(difference).sum(axis=1),
            "jacobian": jacobian,
            "radius_l2": margin / steep,
            "radius_linf": margin / np.abs(difference).sum(axis=1),
            "omega_l2": margin / steep,
            "omega_linf": margin / np.abs(difference).sum(axis=1),
            "accepted_jacobian": jacobian <= 0.95 * steep / 2,
            "accepted_radius": margin / steep >= 0.01,
        }

    def step(some: Images, truth: NDArray[np.int64], far: float, norm: Norm, *, exact: bool) -> Found:
        logits = some.reshape(len(some), -1) @ weight.T
        other = np.where(np.arange(classes) == truth[:, None], -np.inf, logits).argmax(axis=1)
        direction = (weight[other] - weight[truth]).reshape(some.shape)
        if norm == "linf":
            direction = np.sign(direction)
        gap = logits[np.arange(len(some)), truth] - logits[np.arange(len(some)), other]
        slope = ((weight[other] - weight[truth]) * direction.reshape(len(some), -1)).sum(axis=1)
        needed = gap / slope * length(direction, norm)
        reach = needed * 1.001 if exact else np.full(len(some), far)
        unit = direction / length(direction, norm).reshape(-1, 1, 1, 1)
        moved = (some + (unit * reach.reshape(-1, 1, 1, 1))).astype(np.float32)
        success = needed < reach
        return Found(moved, success, np.where(success, reach, np.inf))

    folder = Folder(path, images, labels, ["jacobian", "radius"], measure)
    nearest = partial(step, far=0.0, exact=True)
    folder.attack("fmn-l2", "FMN", partial(nearest, norm="l2"), "l2")
    folder.attack("cw-l2", "Carlini-Wagner", partial(nearest, norm="l2"), "l2", passes=900)
    folder.attack(
        "boundary-l2",
        "Boundary",
        partial(nearest, norm="l2"),
        "l2",
        knowledge="decisions",
        passes=5000,
        first=20,
    )
    noise = partial(step, far=0.1, norm="l2", exact=False)
    folder.attack("gaussian-noise", "Noise", noise, None, 3.0, knowledge="nothing", unit="severity")
    for norm, budgets in BUDGETS.items():
        for budget in budgets:
            run = partial(step, far=budget, norm=norm, exact=False)
            folder.attack(f"pgd-{norm}", "PGD", run, norm, budget)
            folder.attack(f"joint-pgd-{norm}", "Joint PGD", run, norm, budget, aware="jacobian")
    folder.write(**({"checks": CHECKS, "radii": radii()} | more))
    return folder
