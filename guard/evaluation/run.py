"""`guard evaluate`: attacks on a bundle, what the detector says of them, and what they leave standing.

Every image that an attack returns is judged anew by the decisions that would be served, under every score,
whatever the attack says of it; the headline counts whatever any attack found. Attacks run one after another,
cheap ones first, in pieces that outlive a crash (`guard.stages`); a finished attack's file is final, so that
others can be added later.
"""

import logging
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from guard import bundle as bundles
from guard import data
from guard.attacks import FORWARD, Found, Labels
from guard.bundle import Bundle, Calibration, ScoreName
from guard.calibration import cost
from guard.calibration.run import rescored
from guard.data import Dataset
from guard.decision import Guard
from guard.errors import BundleError, DataError, UsageError
from guard.evaluation import standing
from guard.evaluation.attack import BUDGETS, QUERIES, Attack, Task
from guard.evaluation.closing import LAST, Closing
from guard.evaluation.folder import Folder
from guard.evaluation.judging import judged, measured_at, within_range
from guard.evaluation.report import words
from guard.evaluation.results import (
    ATTACKS_FOLDER,
    CLEAN,
    CLEAN_FILE,
    GALLERY,
    RESULTS,
    AttackResult,
    Check,
    Detection,
    Finished,
    LeftOut,
    RadiusAudit,
    Results,
    detection,
    summary,
)
from guard.evaluation.sample import Sample
from guard.evaluation.served import JUDGED
from guard.evaluation.target import Flags, Target
from guard.files import locked, provenance, write_bytes
from guard.guarded import GRAPH_VERSION
from guard.norms import NORMS, Norm
from guard.progress import Progress, duration
from guard.runtime import Detector
from guard.settings import Policy
from guard.shares import share
from guard.stages import PIECE, Arrays

log = logging.getLogger(__name__)

VERSION = 6
"""Raised whenever an attack, a check or what is kept of them becomes another: results of another version are
not mixed with."""

DEAR = 5000
"""Passes per image from which an attack is dear: it gets fewer images."""

PIECE_PASSES = 100_000
"""Passes in a piece, about: a crash loses no more, but for the dearest attacks."""

FEWEST = 16
"""Images in a piece at least: attacks by queries of four at a time spend a third of their time outside the
model."""


@dataclass(frozen=True)
class Settings:
    """What is evaluated. `scores`: the detectors judged and attacked; empty: the served one. `images`,
    `dear_images`, `query_images`: how many images for most attacks, for those of `DEAR` passes and more, and
    for those by queries. `budgets` are those of the headline. `quick` leaves out the attacks from
    inside the radii, and looks for masked gradients on fewer images.
    """

    scores: tuple[ScoreName, ...] = ()
    budgets: Mapping[Norm, tuple[float, ...]] = field(default_factory=lambda: dict(BUDGETS))
    images: int = 1000
    dear_images: int = 500
    query_images: int = 200
    seed: int = 0
    quick: bool = False

    def count(self, attack: Attack) -> int:
        """Images for an attack, right and wrong ones."""
        if attack.knowledge in QUERIES:
            return min(self.images, self.query_images)
        return min(self.images, self.dear_images) if attack.passes >= DEAR else self.images


def evaluate(
    folder: str | Path,
    dataset: Dataset,
    out: str | Path,
    tasks: Sequence[Task],
    settings: Settings = Settings(),
    *,
    provider: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 0,
    twin: str | None = None,
    joined: Sequence[Path] = (),
    command: str = "",
    arguments: Mapping[str, Any] | None = None,
    silent: bool = False,
) -> Results:
    """Runs the tasks on the calibrated bundle in `folder` and writes the folder `out`; see `results`.

    Images are those of the calibration's report fold where `dataset` is the data it was calibrated on, else
    all, with a warning; in an order that the seed fixes. What `out` holds of an earlier run with the same
    bundle, data, scores, images and seed is kept and not computed again, and so is what the results folders
    `joined` hold. `twin` is the digest of the network that attacks of transfer are made on. An attack that
    cannot take the model, or whose package is not installed, is left out with a warning; the first, unless no
    other is asked for.

    Raises `DataError` for data without labels, of another shape, too few, or that the model was trained on,
    `UsageError` where `out` or a joined folder holds something else, where another run is writing to `out`,
    for a task that knows a score that is not judged, and for a budget that holds all images there are,
    `BundleError` for the bundle, and what `Detector` raises, or the only attack.
    """
    run = _Run(folder, dataset, Path(out), settings, provider, threads, twin, joined, command, arguments)
    whole = Path(out).resolve()
    lock = whole.with_name(f".{whole.name}.lock")
    with locked(lock, f"--out {out}: another guard evaluate is writing there"):
        return run.evaluate(tasks, silent=silent)


class _Run:
    """One evaluation: the target, its clean images, and what is finished."""

    def __init__(
        self,
        folder: str | Path,
        dataset: Dataset,
        out: Path,
        settings: Settings,
        provider: Literal["auto", "cpu", "cuda"],
        threads: int,
        twin: str | None,
        joined: Sequence[Path],
        command: str,
        arguments: Mapping[str, Any] | None,
    ) -> None:
        self.found = bundles.load(folder, graph_version=GRAPH_VERSION)
        self.calibration = self.found.calibrated()
        self.settings, self.twin, self.joined = settings, twin, joined
        self.command, self.arguments = command, arguments or {}
        self.policy = Policy.from_environment()
        served = self.calibration.score
        self.scores: list[ScoreName] = list(dict.fromkeys((served, *settings.scores)))
        self.sample = Sample.draw(dataset, self.found, settings.images, settings.seed)
        if not self.sample.held_out:
            if len(self.scores) > 1:
                raise UsageError(
                    f"{dataset.name} is not the data that {self.found.path} was calibrated on, so that other "
                    f"scores cannot be calibrated: give that data, or --scores {served}."
                )
            log.warning(
                "%s is not the data that %s was calibrated on: images are drawn from all of it, and the "
                "promised rate of false alarms need not hold on them",
                dataset.name,
                self.found.path,
            )
        self.model = Detector(self.found.model, score="jacobian", provider=provider, threads=threads)
        self.folder = Folder(out, self._identity(), self.scores)
        self.clean: Arrays = {}
        self.checks: list[Check] = []
        self.radii: list[RadiusAudit] = []

    def evaluate(self, tasks: Sequence[Task], *, silent: bool) -> Results:
        for task in tasks:
            if task.attack.aware not in (None, *self.scores):
                raise UsageError(
                    f"{task.attack.name} knows the score {task.attack.aware}, which is not judged: add it to "
                    f"the scores (now {', '.join(self.scores)})."
                )
            _check_budget(task, math.prod(self.model.input_shape))
        asked = {(task.attack.name, task.budget): task for task in tasks}
        self.folder.take_up(self.joined, self.twin, {key: task.attack for key, task in asked.items()})
        self.target = self._target(silent=silent)
        self.clean = self._clean(silent=silent)
        self.folder.finished = [
            replace(one, result=one.result.model_copy(update={"detection": self._detection(one.arrays)}))
            for one in self.folder.finished
        ]
        done = {(one.result.name, one.result.budget) for one in self.folder.all}
        left = [task for key, task in asked.items() if key not in done]
        alone = len({task.attack.name for task in tasks}) == 1
        for attack in {task.attack.name: task.attack for task in left}.values():
            self.folder.left_out.pop(attack.name, None)
            if not attack.installed:
                self.folder.leave_out(attack, attack.wanting)
        left = [task for task in left if task.attack.installed]
        total = sum(len(self._eligible(task)) * self._cost(task.attack) for task in left)
        closing = Closing(
            self.folder,
            self.target,
            self.found,
            self.sample,
            self.clean["right"],
            self.settings.budgets,
            self.settings.quick,
        )
        total += closing.passes()
        self._announce(left, total)
        with Progress(total, "evaluate", silent=silent or not total) as progress:
            outstanding = [*map(_outstanding, left), *LAST]
            if left:
                self._write(outstanding)
            for at, task in enumerate(left):
                self._attack(task, progress, outstanding[at + 1 :], alone=alone)
            self.checks = closing.checks(progress)
            self.radii = closing.radii(progress)
            return self._write()

    def _identity(self) -> dict[str, Any]:
        """What another run must share for its attacks to be kept."""
        settings = self.settings
        return {
            "version": VERSION,
            "model": self.found.digest,
            "calibration": self.found.manifest.files[bundles.CALIBRATION],
            "data": self.sample.dataset.digest,
            "provider": self.model.provider,
            "scores": sorted(self.scores),
            "images": len(self.sample),
            "dear images": settings.dear_images,
            "query images": settings.query_images,
            "seed": settings.seed,
            "policy": asdict(self.policy),
        }

    # --- the target and its clean images

    def _target(self, *, silent: bool) -> Target:
        return Target(self.model, {score: self._guard(score, silent=silent) for score in self.scores})

    def _guard(self, score: ScoreName, *, silent: bool) -> Guard:
        calibration = self.calibration
        if score != calibration.score:
            calibration = self._calibration(score, silent=silent)
        detector = self.model
        if score != detector.score:
            detector = Detector(
                self.found.model, score=score, provider=self.model.provider, threads=self.model.threads
            )
        bundle = Bundle(self.found.path, self.found.manifest, calibration)
        return Guard(bundle, detector, self.policy)

    def _calibration(self, score: ScoreName, *, silent: bool) -> Calibration:
        """The calibration of a score that is not served, kept in the results folder."""
        path = self.folder.path / "scores" / f"{score}.json"
        if path.is_file():
            kept = Calibration.model_validate_json(path.read_bytes())
            if kept.model_sha256 == self.calibration.model_sha256:
                return kept
        work = cost.rescoring(data.folds(len(self.sample.dataset), self.calibration.seed))
        with (
            Progress(work, f"calibrate {score}", silent=silent) as progress,
            self.folder.stages(f"calibrate {score}", progress) as stages,
        ):
            found = rescored(
                self.found,
                self.sample.dataset,
                score,
                stages,
                provider=self.model.provider,
                threads=self.model.threads,
            )
            write_bytes(path, bundles.dump(found))
        return found

    def _clean(self, *, silent: bool) -> Arrays:
        names = [f"{what}_{score}" for score in self.scores for what in ("accepted", "ratio")]
        arrays = self.folder.kept(CLEAN_FILE, *CLEAN, *names)
        if not arrays:
            rows = np.arange(len(self.sample))
            with (
                Progress(len(rows), "clean images", silent=silent) as progress,
                self.folder.stages("clean", progress) as stages,
            ):
                arrays = {
                    "index": self.sample.index,
                    "label": self.sample.labels,
                    "image": self.sample.pixels(rows[:GALLERY]),
                    **stages.run("clean", rows, self._clean_piece),
                }
                self.folder.save(CLEAN_FILE, arrays)
        return arrays | {"right": arrays["logits"].argmax(axis=1) == self.sample.labels}

    def _clean_piece(self, rows: Labels) -> Arrays:
        images = self.sample.pixels(rows)
        arrays: Arrays = {}
        for score in self.scores:
            verdict = self.target.verdict(images, score)
            arrays = arrays or measured_at(self.target, images, score, verdict.measurement)
            arrays |= {f"accepted_{score}": verdict.accepted, f"ratio_{score}": verdict.ratio}
            if score == self.calibration.score:
                for norm in NORMS:
                    radii = self.target.guards[score].radii(verdict.measurement, norm)
                    by_method = {radius.method: values for radius, values in radii}
                    arrays |= {f"radius_{norm}": radii[0][1], f"omega_{norm}": by_method["omega-bound"]}
        return arrays

    # --- attacks

    def _eligible(self, task: Task) -> Labels:
        """Rows of the images to attack: right, and accepted by the guard that the attack knows."""
        allowed = self.clean["right"].copy()
        if task.attack.aware is not None:
            allowed &= self.clean[f"accepted_{task.attack.aware}"]
        rows = np.flatnonzero(allowed)
        return rows[rows < self.settings.count(task.attack)]

    def _open(self, task: Task, rows: Labels) -> Labels:
        """Of these rows, those that no finished attack broke for the same score within the budget."""
        attack, budget = task.attack, task.budget
        if not task.skips or attack.norm is None or budget is None:
            return rows
        broken = [np.zeros(0, np.int64)]
        for one in self.folder.finished:
            fell = one.within(attack.norm, budget) & one.arrays[f"accepted_{attack.aware}"]
            broken.append(one.arrays["row"][fell])
        return np.setdiff1d(rows, np.concatenate(broken))

    def _cost(self, attack: Attack) -> int:
        """Passes per image at most, with those that judging it takes."""
        return attack.passes + FORWARD + JUDGED * (len(self.scores) + 1)

    def _attack(self, task: Task, progress: Progress, outstanding: Sequence[str], *, alone: bool) -> None:
        """Runs it and writes what it found, with what is `outstanding` after it; one that cannot take the
        model is left out; `alone` it raises.
        """
        attack = task.attack
        eligible = self._eligible(task)
        if attack.name in self.folder.left_out:
            progress.advance(len(eligible) * self._cost(attack), attack.name, free=True)
            self._write(outstanding)
            return
        rows = self._open(task, eligible)
        progress.advance((len(eligible) - len(rows)) * self._cost(attack), attack.name, free=True)
        if not len(eligible):
            log.info("%s: no image is right and accepted", task.name)
            self._write(outstanding)
            return

        def piece(part: Labels) -> Arrays:
            images, labels = self.sample.pixels(part), self.sample.labels[part]
            started = time.perf_counter()
            seed = self.sample.piece_seed(task.name, part)
            found = attack.run(self.target, images, labels, task.budget, seed)
            shown = part < GALLERY
            attacked = within_range(found.images[shown], images[shown])
            arrays: Arrays = {"row": part, "image": attacked}
            arrays |= judged(self.target, task, images, labels, found)
            return arrays | {"seconds": np.array([time.perf_counter() - started])}

        twin = {"twin": self.twin} if attack.knowledge == "another network" else {}
        with self.folder.stages(
            task.name, progress, passes=attack.passes, keywords=attack.keywords, **twin
        ) as stages:
            size = min(PIECE, max(FEWEST, PIECE_PASSES // max(1, attack.passes)))
            try:
                arrays = stages.run(attack.name, rows, piece, cost=self._cost(attack), size=size)
                arrays = arrays or self._spared(task)
            except (UsageError, DataError) as error:  # it cannot take this model, or these images
                if alone:
                    raise
                self.folder.leave_out(attack, str(error))
                progress.advance(len(rows) * self._cost(attack), attack.name, free=True)
                self._write(outstanding)
                return
            seconds, unconfirmed = float(arrays.pop("seconds").sum()), int(arrays.pop("unconfirmed").sum())
            lost = arrays.pop("lost")
            details = {
                "images": min(self.settings.count(attack), len(self.sample)),
                "skipped": len(eligible) - len(rows),
                "unconfirmed": unconfirmed,
                "command": self.command,
                **twin,
                **attack.keywords,
            }
            result = self._result(task, arrays, lost, seconds, details)
            self.folder.save(result.file, arrays)
            (self.folder.denied if task.denial else self.folder.finished).append(Finished(result, arrays))
            self._write(outstanding)  # before the pieces go

    def _spared(self, task: Task) -> Arrays:
        """The arrays of an attack that no image is left to."""
        none = np.zeros(0, np.int64)
        images = self.sample.pixels(none)
        found = Found(images, np.zeros(0, np.bool_), np.zeros(0))
        arrays: Arrays = {"row": none, "image": images, "seconds": np.zeros(0)}
        return arrays | judged(self.target, task, images, none, found)

    def _result(
        self, task: Task, arrays: Arrays, lost: Flags, seconds: float, details: dict[str, Any]
    ) -> AttackResult:
        attack, success = task.attack, arrays["success"]
        right = ~arrays["wrong"]
        return AttackResult(
            name=attack.name,
            title=attack.title,
            norm=attack.norm,
            unit=attack.unit,
            budget=task.budget,
            knowledge=attack.knowledge,
            aware=attack.aware,
            source=attack.source,
            settings=details,
            n=len(success),
            success=share(success) if len(success) else None,
            distance=summary(arrays["distance"]) if task.budget is None else None,
            passes=float(arrays["passes"].mean()) if len(success) else 0.0,
            seconds=seconds,
            in_files=share(~lost[success]) if success.any() else None,
            detection={} if task.denial else self._detection(arrays),
            false_alarms={
                score: share(~arrays[f"accepted_{score}"][right])
                for score in self.scores
                if right.any() and attack.knowledge == "nothing"
            },
            file=f"{ATTACKS_FOLDER}/{task.name}.npz",
        )

    def _detection(self, arrays: Arrays) -> dict[ScoreName, Detection]:
        """How every score does on an attack's successes; empty where there are none."""
        success = arrays["success"]
        return {
            score: detection(
                arrays[f"accepted_{score}"][success],
                arrays[f"ratio_{score}"][success],
                self.clean[f"ratio_{score}"],
                arrays["row"][success],
            )
            for score in self.scores
            if success.any()
        }

    # --- the record

    def _write(self, outstanding: Sequence[str] = ()) -> Results:
        results = self._results(outstanding)
        write_bytes(self.folder.path / RESULTS, bundles.dump(results))
        return results

    def _results(self, outstanding: Sequence[str]) -> Results:
        settings, clean, found, dataset = self.settings, self.clean, self.found, self.sample.dataset
        jacobian = summary(clean["jacobian"])
        if jacobian is None:
            raise BundleError(f"{found.path}: its Jacobian norms are not finite on {dataset.name}.")
        budgets = standing.headline_budgets(self.folder.finished, settings.budgets)
        seconds = sum(one.result.seconds for one in self.folder.all)
        return Results(
            command=self.command,
            hardware=hardware(self.model),
            seconds=seconds,
            bundle={
                "name": found.manifest.name,
                "path": str(found.path),
                "digest": found.digest,
                "class_names": found.manifest.class_names,
                "fpr": self.calibration.fpr,
                "thresholds": {
                    score: self.target.guards[score].calibration.threshold for score in self.scores
                },
            },
            data={
                "name": dataset.name,
                "digest": dataset.digest,
                "n": len(dataset),
                "fold": "report" if self.sample.held_out else "all",
            },
            settings={
                "identity": self.folder.identity,
                "budgets": {norm: list(values) for norm, values in budgets.items()},
                "seed": settings.seed,
                "quick": settings.quick,
                "images": settings.images,
                "dear_images": settings.dear_images,
                "query_images": settings.query_images,
            },
            images=len(self.sample),
            accuracy=share(clean["right"]),
            scores=self.scores,
            served=self.calibration.score,
            rejected={score: share(~clean[f"accepted_{score}"]) for score in self.scores},
            jacobian=jacobian,
            attacks=_by_name(self.folder.finished),
            standing=standing.standings(self.folder.all, clean, self.scores, budgets),
            over_rejection=_by_name(self.folder.denied),
            outstanding=list(dict.fromkeys((*self.folder.unfinished, *outstanding))),
            left_out=[LeftOut(name=name, reason=reason) for name, reason in self.folder.left_out.items()],
            checks=self.checks,
            radii=self.radii,
            provenance=provenance(self.arguments, seed=settings.seed),
        )

    def _announce(self, left: Sequence[Task], total: int) -> None:
        """Says what the run costs before it starts, from the speed of a few forward passes here."""
        if not total:
            log.info("%s: nothing is left to run", self.folder.path)
            return
        images = self.sample.pixels(np.arange(min(64, len(self.sample))))
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            self.target.model.logits(images)
            seconds.append(time.perf_counter() - started)
        each = min(seconds) / len(images)
        log.info(
            "attacks to run: %d, each at its budgets; at most %.2g forward passes, and most take fewer; so "
            "many take the model alone %s here",
            len({task.attack.name for task in left}),
            total,
            duration(each * total),
        )


def _by_name(finished: Sequence[Finished]) -> list[AttackResult]:
    """Whatever order they were run in, and from whichever folder they come."""
    return sorted((one.result for one in finished), key=lambda one: (one.name, one.budget or 0.0))


def _check_budget(task: Task, size: int) -> None:
    """Raises `UsageError` for a budget that takes any image of so many pixel values into any other."""
    farthest = {"l2": math.sqrt(size), "linf": 1.0}
    norm = task.attack.norm
    if task.budget is not None and norm is not None and task.budget >= farthest[norm]:
        raise UsageError(
            f"{task.attack.name}: the budget {task.budget:g} holds all images there are, as pixel values are "
            f"in [0, 1]: expected less than {farthest[norm]:.4g} in {norm}, such as {BUDGETS[norm][0]:.4g}."
        )


def _outstanding(task: Task) -> str:
    return words.attack_at(task.attack.name, task.budget, task.attack.norm)


def hardware(detector: Detector) -> str:
    """What the run was computed on, in a few words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = detector.threads or usable
    cuda = " with CUDA" if detector.provider == "cuda" else ""
    return f"{cores} {'thread' if cores == 1 else 'threads'} of {name}{cuda}"
