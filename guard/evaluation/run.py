"""`guard evaluate`: attacks on a bundle, what the detector says of them, and what they leave standing.

Every image that an attack returns is judged anew by the decisions that would be served, under every score,
whatever the attack says of it; the headline counts whatever any attack found. Attacks run one after another,
cheap ones first, in pieces that outlive a crash (`guard.stages`); a finished attack's file is final, so that
others can be added later.
"""

import json
import logging
import os
import platform
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from guard import bundle as bundles
from guard import data
from guard.attacks import FORWARD, Floats, Found, Labels, Norm
from guard.bundle import Bundle, Calibration, ScoreName
from guard.calibration import rescored, rescoring_work
from guard.certificate import OmegaTable
from guard.data import Dataset
from guard.decision import NORMS, Guard
from guard.errors import BundleError, DataError, UsageError
from guard.evaluation import audit, masking, standing
from guard.evaluation.adaptive import JUDGED
from guard.evaluation.attack import BUDGETS, Attack, Task
from guard.evaluation.judging import judged, measured_at, within_range
from guard.evaluation.results import (
    ARRAYS,
    ATTACKS_FOLDER,
    CLEAN,
    CLEAN_FILE,
    GALLERY,
    RESULTS,
    SETTINGS,
    AttackResult,
    Check,
    Detection,
    Finished,
    LeftOut,
    RadiusAudit,
    Results,
    detection,
    load,
    load_arrays,
    share,
    summary,
)
from guard.evaluation.target import Flags, Target, Values
from guard.files import atomic_open, locked, provenance, write_bytes, write_text
from guard.guarded import GRAPH_VERSION
from guard.progress import Progress, duration
from guard.runtime import Detector, Measurement
from guard.settings import Policy
from guard.stages import PIECE, Arrays, Stages

log = logging.getLogger(__name__)

VERSION = 4
"""Raised whenever an attack, a check or what is kept of them becomes another: results of another version are
not mixed with."""

DEAR = 5000
"""Passes per image from which an attack is dear: it gets fewer images."""

PIECE_PASSES = 100_000
"""Passes in a piece, about: a crash loses no more."""

RANDOM_OMEGA = 500
"""Images of the radii fold that the ablation of omega by random perturbations is fitted to."""

MASKING = "masking.npz"

LAST = ("signs of masked gradients", "audit of the radii")
"""What a run ends with, once all attacks have run."""

PROBED, PROBED_QUICK = 100, 32
"""Images that the masking checks' own attacks are run on."""

_NEAREST, _INSIDE = 3 * 60, 3 * 3 * 2 * 21  # passes of the attacks aimed at radii: nearest, and from inside


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
        if attack.knowledge in ("scores", "decisions"):
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
    and for a task that knows a score that is not judged, `BundleError` for the bundle, and what `Detector`
    raises, or the only attack.
    """
    run = _Run(folder, dataset, Path(out), settings, provider, threads, twin, joined, command, arguments)
    whole = run.out.resolve()
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
        self.dataset, self.out, self.settings = dataset, out, settings
        self.provider, self.threads, self.twin, self.joined = provider, threads, twin, joined
        self.command, self.arguments = command, arguments or {}
        self.policy = Policy.from_environment()
        served = self.calibration.score
        self.scores: list[ScoreName] = list(dict.fromkeys((served, *settings.scores)))
        _check(dataset, self.found)
        self.same_data = self.calibration.data.get("digest") == dataset.digest
        if not self.same_data:
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
        self.index = _images(dataset, self.calibration, settings, same=self.same_data)
        if len(self.index) < 2:
            raise DataError(
                f"{dataset.name}: {len(self.index)} of its images would be evaluated; expected at least 2. "
                "Give more images, or --images a larger number."
            )
        self.labels: Labels = _labels(dataset)[self.index]
        self.model = Detector(self.found.model, score="jacobian", provider=provider, threads=threads)
        self.clean: Arrays = {}
        self.finished: list[Finished] = []
        self.denied: list[Finished] = []
        self.left_out: dict[str, str] = {}
        self.checks: list[Check] = []
        self.radii: list[RadiusAudit] = []

    def evaluate(self, tasks: Sequence[Task], *, silent: bool) -> Results:
        for task in tasks:
            if task.attack.aware not in (None, *self.scores):
                raise UsageError(
                    f"{task.attack.name} knows the score {task.attack.aware}, which is not judged: add it to "
                    f"the scores (now {', '.join(self.scores)})."
                )
        self._take_up()
        self.target = self._target(silent=silent)
        self.clean = self._clean(silent=silent)
        self.finished = [
            replace(one, result=one.result.model_copy(update={"detection": self._detection(one.arrays)}))
            for one in self.finished
        ]
        done = {(one.result.name, one.result.budget): one.result for one in (*self.finished, *self.denied)}
        asked = {(task.attack.name, task.budget): task for task in tasks}
        for key in asked.keys() & done.keys():
            self._compare(asked[key].attack, done[key])
        left = [task for key, task in asked.items() if key not in done]
        self.alone = len({task.attack.name for task in tasks}) == 1
        for attack in {task.attack.name: task.attack for task in left}.values():
            self.left_out.pop(attack.name, None)
            if not attack.installed:
                self._leave_out(attack, attack.wanting)
        left = [task for task in left if task.attack.installed]
        total = sum(len(self._eligible(task)) * self._cost(task.attack) for task in left)
        total += self._last_passes()
        self._announce(left, total)
        with Progress(total, "evaluate", silent=silent or not total) as progress:
            names = [task.attack.name for task in left]
            for at, task in enumerate(left):
                self._write([*names[at:], *LAST])
                self._attack(task, progress)
            if left:
                self._write(LAST)
            self._mask(progress)
            self._audit(progress)
            return self._write()

    # --- what was done before

    def _identity(self) -> dict[str, Any]:
        """What another run must share for its attacks to be kept."""
        settings = self.settings
        return {
            "version": VERSION,
            "model": self.found.digest,
            "calibration": self.found.manifest.files[bundles.CALIBRATION],
            "data": self.dataset.digest,
            "provider": self.model.provider,
            "scores": sorted(self.scores),
            "images": len(self.index),
            "dear images": settings.dear_images,
            "query images": settings.query_images,
            "seed": settings.seed,
            "policy": asdict(self.policy),
        }

    def _take_up(self) -> None:
        """Takes finished attacks from the results folder and the joined ones; raises where they are of
        something else.
        """
        path = self.out / SETTINGS
        begun = path.is_file()
        if not begun and self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UsageError(f"--out {self.out}: holds files but no evaluation. Choose a new folder.")
        folders = [(f"--out {self.out}", self.out)] * begun
        folders += [(f"--join {folder}", folder) for folder in self.joined]
        for where, folder in folders:
            self._check_settings(where, folder)
        twin, copied = self.twin, []
        for where, folder in folders:
            for one in self._take(folder):
                made_on = one.result.settings.get("twin")
                twin = twin or made_on
                if made_on not in (None, twin):
                    raise UsageError(
                        f"{where}: holds attacks made on another twin: {_short(made_on)}, now "
                        f"{_short(twin)}. Choose another folder."
                    )
                copied += [one] * (folder is not self.out)
        if not begun:
            write_text(path, json.dumps(self._identity(), indent=1) + "\n")
        for one in copied:
            _save(self.out / one.result.file, one.arrays)
        if self.finished or self.denied:
            log.info("%s: goes on after %d finished attacks", self.out, len(self.finished) + len(self.denied))

    def _check_settings(self, where: str, folder: Path) -> None:
        """Raises where a results folder's settings are others, or cannot be read."""
        path = folder / SETTINGS
        if not path.is_file():
            raise UsageError(f"{where}: holds no evaluation. Give the --out of another guard evaluate.")
        try:
            before = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}: holds no settings that can be read ({error}). Evaluate again into a new folder."
            ) from error
        for name, value in self._identity().items():
            if before.get(name) != value:
                raise UsageError(
                    f"{where}: holds an evaluation with other {name}: {_short(before.get(name))}, "
                    f"now {_short(value)}. Choose another folder, or give the same settings."
                )

    def _take(self, folder: Path) -> list[Finished]:
        """Takes what is finished in a folder and not yet taken from another."""
        if not (folder / RESULTS).is_file():
            return []
        results = load(folder)
        needed = (*ARRAYS, *(f"accepted_{score}" for score in self.scores))
        taken = []
        for some, into in ((results.attacks, self.finished), (results.over_rejection, self.denied)):
            done = {(one.result.name, one.result.budget) for one in into}
            for one in some:
                if (one.name, one.budget) in done:
                    continue
                try:
                    finished = Finished(one, load_arrays(folder / one.file, needed))
                except DataError as error:
                    log.warning(
                        "%s counts no longer, and is run again where it is asked for: %s", one.name, error
                    )
                    continue
                into.append(finished)
                taken.append(finished)
        names = {one.result.name for one in (*self.finished, *self.denied)}
        left_out = {one.name: one.reason for one in results.left_out} | self.left_out
        self.left_out = {name: reason for name, reason in left_out.items() if name not in names}
        return taken

    def _compare(self, attack: Attack, before: AttackResult) -> None:
        """Raises where a finished attack of this name has other settings."""
        for name, value in _keywords(attack.run).items():
            if before.settings.get(name) != value:
                raise UsageError(
                    f"--out {self.out}: holds {attack.name} with other {name}: "
                    f"{_short(before.settings.get(name))}, now {_short(value)}. Choose another folder."
                )

    def _stages(self, name: str, progress: Progress, **more: object) -> Stages:
        key = {"graph": GRAPH_VERSION, "name": name, **self._identity(), **more}
        return Stages(self.out, key, progress, doing="evaluating")

    # --- the target and its clean images

    def _target(self, *, silent: bool) -> Target:
        return Target(self.model, {score: self._guard(score, silent=silent) for score in self.scores})

    def _guard(self, score: ScoreName, *, silent: bool) -> Guard:
        calibration = self.calibration
        if score != calibration.score:
            calibration = self._calibration(score, silent=silent)
        detector = self.model
        if score != detector.score:
            detector = Detector(self.found.model, score=score, provider=self.provider, threads=self.threads)
        bundle = Bundle(self.found.path, self.found.manifest, calibration)
        return Guard(bundle, detector, self.policy)

    def _calibration(self, score: ScoreName, *, silent: bool) -> Calibration:
        """The calibration of a score that is not served, kept in the results folder."""
        path = self.out / "scores" / f"{score}.json"
        if path.is_file():
            kept = Calibration.model_validate_json(path.read_bytes())
            if kept.model_sha256 == self.calibration.model_sha256:
                return kept
        work = rescoring_work(data.folds(len(self.dataset), self.calibration.seed))
        with (
            Progress(work, f"calibrate {score}", silent=silent) as progress,
            self._stages(f"calibrate {score}", progress) as stages,
        ):
            found = rescored(
                self.found, self.dataset, score, stages, provider=self.provider, threads=self.threads
            )
            write_bytes(path, bundles.dump(found))
        return found

    def _clean(self, *, silent: bool) -> Arrays:
        path = self.out / CLEAN_FILE
        names = [f"{what}_{score}" for score in self.scores for what in ("accepted", "ratio")]
        if path.is_file():
            arrays = load_arrays(path, (*CLEAN, *names))
        else:

            def piece(rows: Labels) -> Arrays:
                return self._clean_piece(rows)

            rows = np.arange(len(self.index))
            with (
                Progress(len(rows), "clean images", silent=silent) as progress,
                self._stages("clean", progress) as stages,
            ):
                arrays = {
                    "index": self.index,
                    "label": self.labels,
                    "image": self._pixels(rows[:GALLERY]),
                    **stages.run("clean", rows, piece),
                }
                _save(path, arrays)
        return arrays | {"right": arrays["logits"].argmax(axis=1) == self.labels}

    def _clean_piece(self, rows: Labels) -> Arrays:
        images = self._pixels(rows)
        arrays: Arrays = {}
        for score in self.scores:
            verdict = self.target.verdict(images, score)
            arrays = arrays or measured_at(self.target, images, score, verdict.measurement)
            arrays |= {f"accepted_{score}": verdict.accepted, f"ratio_{score}": verdict.ratio}
            if score == self.calibration.score:
                decisions = self.target.guards[score].decide(verdict.measurement)
                radii = np.array([(one.measured.l2, one.measured.linf) for one in decisions], np.float64)
                arrays |= {"radius_l2": radii[:, 0], "radius_linf": radii[:, 1]}
        return arrays

    def _pixels(self, rows: Labels) -> Floats:
        return data.to_floats(self.dataset.images[self.index[rows]])

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
        for one in self.finished:
            fell = one.within(attack.norm, budget) & one.arrays[f"accepted_{attack.aware}"]
            broken.append(one.arrays["row"][fell])
        return np.setdiff1d(rows, np.concatenate(broken))

    def _cost(self, attack: Attack) -> int:
        """Passes per image at most, with those that judging it takes."""
        return attack.passes + FORWARD + JUDGED * (len(self.scores) + 1)

    def _seed(self, name: str, part: Labels) -> int:
        """Of a piece of an attack's images: attacks that shared one would start at the same points."""
        return zlib.crc32(f"{self.settings.seed} {name} {part[0]}".encode())

    def _attack(self, task: Task, progress: Progress) -> None:
        attack = task.attack
        eligible = self._eligible(task)
        if attack.name in self.left_out:
            progress.advance(len(eligible) * self._cost(attack), attack.name)
            return
        rows = self._open(task, eligible)
        progress.advance((len(eligible) - len(rows)) * self._cost(attack), attack.name)
        if not len(eligible):
            log.info("%s: no image is right and accepted", task.name)
            return

        def piece(part: Labels) -> Arrays:
            images, labels = self._pixels(part), self.labels[part]
            started = time.perf_counter()
            seed = self._seed(task.name, part)
            found = attack.run(self.target, images, labels, task.budget, seed)
            shown = part < GALLERY
            attacked = within_range(found.images[shown], images[shown])
            arrays: Arrays = {"row": part, "image": attacked}
            arrays |= judged(self.target, task, images, labels, found)
            return arrays | {"seconds": np.array([time.perf_counter() - started])}

        twin = {"twin": self.twin} if attack.knowledge == "another network" else {}
        keywords = _keywords(attack.run)
        with self._stages(task.name, progress, passes=attack.passes, keywords=keywords, **twin) as stages:
            size = max(4, min(PIECE, PIECE_PASSES // max(1, attack.passes)))
            try:
                arrays = stages.run(attack.name, rows, piece, cost=self._cost(attack), size=size)
                arrays = arrays or self._spared(task)
            except (UsageError, DataError) as error:  # it cannot take this model, or these images
                if self.alone:
                    raise
                self._leave_out(attack, str(error))
                progress.advance(len(rows) * self._cost(attack), attack.name)
                return
            seconds, unconfirmed = float(arrays.pop("seconds").sum()), int(arrays.pop("unconfirmed").sum())
            lost = arrays.pop("lost")
            details = {
                "images": self.settings.count(attack),
                "skipped": len(eligible) - len(rows),
                "unconfirmed": unconfirmed,
                "command": self.command,
                **twin,
                **keywords,
            }
            result = self._result(task, arrays, lost, seconds, details)
            _save(self.out / result.file, arrays)
            (self.denied if task.denial else self.finished).append(Finished(result, arrays))

    def _leave_out(self, attack: Attack, reason: str) -> None:
        log.warning("%s is left out: %s", attack.name, reason)
        self.left_out[attack.name] = reason

    def _spared(self, task: Task) -> Arrays:
        """The arrays of an attack that no image is left to."""
        none = np.zeros(0, np.int64)
        images = self._pixels(none)
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
            )
            for score in self.scores
            if success.any()
        }

    # --- what is looked at once all attacks have run

    def _last_passes(self) -> int:
        """Passes of what the run ends with, less what is on the disk."""
        passes = 0 if self._kept_probes() else len(self._probe_key()["row"]) * masking.PASSES
        for norm in NORMS:
            if not self._kept_distance(norm):
                passes += self._radii_passes() * len(self.index)
            if self._ablates and not self._kept_remainders(norm):
                passes += audit.RANDOM_PASSES * len(self._random_fold())
        return passes

    def _radii_passes(self) -> int:
        return _NEAREST if self.settings.quick else _NEAREST + _INSIDE

    def _probe_budgets(self) -> dict[Norm, float]:
        return {norm: min(self.settings.budgets.get(norm) or BUDGETS[norm]) for norm in NORMS}

    def _probe_key(self) -> Arrays:
        """What the masking checks' own attacks hang on: the budget by norm, and the rows they are run on."""
        count = PROBED_QUICK if self.settings.quick else PROBED
        budgets = {f"budget-{norm}": np.array([value]) for norm, value in self._probe_budgets().items()}
        return budgets | {"row": np.flatnonzero(self.clean["right"])[:count]}

    def _kept_probes(self) -> Arrays:
        kept, key = self._kept(MASKING), self._probe_key()
        same = all(name in kept and np.array_equal(kept[name], value) for name, value in key.items())
        return kept if same else {}

    def _kept(self, name: str, *needed: str) -> Arrays:
        """The arrays of a file of the results folder; none where it is not there."""
        path = self.out / name
        return load_arrays(path, needed) if path.is_file() else {}

    def _mask(self, progress: Progress) -> None:
        key, budgets, probed = self._probe_key(), self._probe_budgets(), self._kept_probes()
        rows = key["row"]
        if not len(rows):
            return

        def piece(part: Labels) -> Arrays:
            return masking.probe(
                self.target.model, self._pixels(part), self.labels[part], budgets, seed=self.settings.seed
            )

        if not probed:
            with self._stages("masking", progress, budgets=sorted(budgets.items())) as stages:
                probed = stages.run("masking checks", rows, piece, cost=masking.PASSES) | key
                _save(self.out / MASKING, probed)
        self.checks = masking.checks(self.finished, probed, budgets)

    def _audit(self, progress: Progress) -> None:
        """Radii against every attack of the run, and against attacks started inside them."""
        guard = self.target.guards[self.calibration.score]
        rows = np.arange(len(self.index))
        nearest = {norm: self._nearest(norm) for norm in NORMS}
        random: dict[Norm, OmegaTable] = {}
        for norm in NORMS:
            nearest[norm] = np.minimum(nearest[norm], self._aimed(norm, progress))
            if self._ablates:
                random[norm] = self._random_omega(norm, progress)
        parts = [guard.measure(self._pixels(part)) for part in _split(rows)]
        measured = Measurement.concatenate(parts)
        self.radii = audit.radii(self.target, self.found, measured, nearest, random=random or None)

    def _nearest(self, norm: Norm) -> Values:
        """Smallest distance (N,) at which any attack made an image wrong; inf: none."""
        nearest = np.full(len(self.index), np.inf)
        for one in (*self.finished, *self.denied):
            reach = np.where(one.arrays["wrong"], one.arrays[norm], np.inf)
            np.minimum.at(nearest, one.arrays["row"], reach)
        return nearest

    def _aimed(self, norm: Norm, progress: Progress) -> Values:
        """Nearest of the attacks aimed at radii."""
        restarts = self._restarts
        guard = self.target.guards[self.calibration.score]

        def piece(part: Labels) -> Arrays:
            images = self._pixels(part)
            measured = guard.measure(images)
            seed = self._seed(f"radii {norm}", part)
            distance = audit.attacks_inside(
                self.target, self.found, images, measured, norm, restarts=restarts, seed=seed
            )
            return {"distance": distance}

        kept = self._kept_distance(norm)
        if not kept:
            with self._stages(f"radii {norm}", progress, restarts=restarts) as stages:
                rows, cost = np.arange(len(self.index)), self._radii_passes()
                kept = stages.run(f"radii {norm}", rows, piece, cost=cost)
                kept |= {"restarts": np.array(restarts)}
                _save(self.out / f"radii-{norm}.npz", kept)
        return np.asarray(kept["distance"], np.float64)

    def _kept_distance(self, norm: Norm) -> Arrays:
        kept = self._kept(f"radii-{norm}.npz", "distance", "restarts")
        return kept if kept and kept["restarts"] == self._restarts else {}

    @property
    def _restarts(self) -> int:
        """Of the attacks that start inside radii; with `quick` there are none."""
        return 0 if self.settings.quick else 2

    @property
    def _ablates(self) -> bool:
        """Whether omega is fitted to random perturbations too."""
        return self.same_data and not self.settings.quick

    def _random_fold(self) -> Labels:
        """Indices of the images that the ablation of omega is fitted to."""
        fold = data.folds(len(self.dataset), self.calibration.seed)["radii"]
        return np.random.default_rng([self.settings.seed, 3]).permutation(fold)[:RANDOM_OMEGA]

    def _kept_remainders(self, norm: Norm) -> Arrays:
        return self._kept(f"omega-random-{norm}.npz", "radius", "remainder")

    def _random_omega(self, norm: Norm, progress: Progress) -> OmegaTable:
        name = f"random omega {norm}"

        def piece(part: Labels) -> Arrays:
            images = data.to_floats(self.dataset.images[part])
            seed = self._seed(name, part)
            return audit.random_remainders(self.target.model, images, norm, seed=seed)

        kept = self._kept_remainders(norm)
        if not kept:
            with self._stages(name, progress) as stages:
                kept = stages.run(name, self._random_fold(), piece, cost=audit.RANDOM_PASSES)
                _save(self.out / f"omega-random-{norm}.npz", kept)
        return audit.random_omega(kept)

    # --- the record

    def _write(self, outstanding: Sequence[str] = ()) -> Results:
        results = self._results(outstanding)
        write_bytes(self.out / RESULTS, bundles.dump(results))
        return results

    def _results(self, outstanding: Sequence[str]) -> Results:
        settings, clean, found = self.settings, self.clean, self.found
        jacobian = summary(clean["jacobian"])
        if jacobian is None:
            raise BundleError(f"{found.path}: its Jacobian norms are not finite on {self.dataset.name}.")
        budgets = standing.headline_budgets(self.finished, settings.budgets)
        seconds = sum(one.result.seconds for one in (*self.finished, *self.denied))
        return Results(
            command=self.command,
            hardware=hardware(self.target.model, self.threads),
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
                "name": self.dataset.name,
                "digest": self.dataset.digest,
                "n": len(self.dataset),
                "fold": "report" if self.same_data else "all",
            },
            settings={
                "identity": self._identity(),
                "budgets": {norm: list(values) for norm, values in budgets.items()},
                "seed": settings.seed,
                "quick": settings.quick,
                "images": settings.images,
                "dear_images": settings.dear_images,
                "query_images": settings.query_images,
            },
            images=len(self.index),
            accuracy=share(clean["right"]),
            scores=self.scores,
            served=self.calibration.score,
            rejected={score: share(~clean[f"accepted_{score}"]) for score in self.scores},
            jacobian=jacobian,
            attacks=[one.result for one in self.finished],
            standing=standing.standings((*self.finished, *self.denied), clean, self.scores, budgets),
            over_rejection=[one.result for one in self.denied],
            outstanding=list(dict.fromkeys(outstanding)),
            left_out=[LeftOut(name=name, reason=reason) for name, reason in self.left_out.items()],
            checks=self.checks,
            radii=self.radii,
            provenance=provenance(self.arguments, seed=settings.seed),
        )

    def _announce(self, left: Sequence[Task], total: int) -> None:
        """Says what the run costs before it starts, from the speed of a few forward passes here."""
        if not total:
            log.info("%s: nothing is left to run", self.out)
            return
        images = self._pixels(np.arange(min(64, len(self.index))))
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


def _check(dataset: Dataset, found: Bundle) -> None:
    shape = found.manifest.input
    data.check_shape(dataset, (shape.channels, shape.height, shape.width))
    training = found.manifest.provenance.get("training") or {}
    trained_on = (training.get("data") or {}).get("digest") if isinstance(training, dict) else None
    if trained_on == dataset.digest:
        raise DataError(
            f"{dataset.name}: these are the images that {found.path} was trained on, on which every figure "
            "flatters. Give held-out images."
        )


def _labels(dataset: Dataset) -> Labels:
    if dataset.labels is None:
        raise DataError(
            f"{dataset.name}: has no labels; attacks lead away from the true classes. Give a folder with one "
            "sub-folder per class, or an .npz file with y_test."
        )
    return dataset.labels


def _images(dataset: Dataset, calibration: Calibration, settings: Settings, *, same: bool) -> Labels:
    """Indices of the images to evaluate, in the order they are attacked."""
    fold = np.arange(len(dataset))
    if same:
        fold = data.folds(len(dataset), calibration.seed)["report"]
    return np.random.default_rng([settings.seed, 2]).permutation(fold)[: settings.images]


def _split(rows: Labels) -> list[Labels]:
    return [rows[at : at + PIECE] for at in range(0, len(rows), PIECE)]


def _keywords(run: object) -> dict[str, Any]:
    """The plain settings that an attack's function is bound to."""
    if not isinstance(run, partial):
        return {}
    return {
        name: value for name, value in run.keywords.items() if isinstance(value, bool | int | float | str)
    }


def _save(path: Path, arrays: Arrays) -> None:
    with atomic_open(path) as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 30 else text[:27] + "..."


def hardware(model: object, threads: int) -> str:
    """What the run was computed on, in a few words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = threads or usable
    cuda = " with CUDA" if getattr(model, "provider", "cpu") == "cuda" else ""
    return f"{cores} {'thread' if cores == 1 else 'threads'} of {name}{cuda}"
