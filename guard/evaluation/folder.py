"""A results folder: what an evaluation has finished, kept so that another can go on, or join it."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guard.bundle import ScoreName
from guard.errors import DataError, UsageError
from guard.evaluation.attack import Attack
from guard.evaluation.report import words
from guard.evaluation.results import (
    ARRAYS,
    RESULTS,
    SETTINGS,
    AttackResult,
    Finished,
    load,
    load_arrays,
)
from guard.files import atomic_open, write_text
from guard.guarded import GRAPH_VERSION
from guard.progress import Progress
from guard.stages import Arrays, Stages

log = logging.getLogger(__name__)


class Folder:
    """The folder `path` of an evaluation with the settings `identity`, which another must share for its
    attacks to be kept.

    `finished` are the attacks on accuracy, `denied` those that make clean images rejected, `left_out` the
    reasons by name of those that could not be run.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], scores: Sequence[ScoreName]) -> None:
        self.path, self.identity, self.scores = path, identity, scores
        self.finished: list[Finished] = []
        self.denied: list[Finished] = []
        self.left_out: dict[str, str] = {}
        self._begun: list[str] = []

    @property
    def all(self) -> list[Finished]:
        """Everything finished."""
        return [*self.finished, *self.denied]

    @property
    def unfinished(self) -> list[str]:
        """Attacks that another run finished at some budgets and was stopped before others, with these."""
        done = {words.attack(one.result) for one in self.all}
        return [left for left in self._begun if left not in done]

    def take_up(
        self, joined: Sequence[Path], twin: str | None, asked: Mapping[tuple[str, float | None], Attack]
    ) -> None:
        """Takes finished attacks from this folder and the joined ones; nothing is written before all are
        looked at.

        Raises `UsageError` where they are of something else, made on another twin than `twin`, or with other
        settings than those `asked` for by name and budget, and `DataError` where they cannot be read.
        """
        exists = (self.path / SETTINGS).is_file()
        if not exists and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UsageError(f"--out {self.path}: holds files but no evaluation. Choose a new folder.")
        folders = [(f"--out {self.path}", self.path)] * exists
        folders += [(f"--join {folder}", folder) for folder in joined]
        for where, folder in folders:
            self._check_settings(where, folder)
        copied = []
        for where, folder in folders:
            for one in self._take(folder):
                if attack := asked.get((one.result.name, one.result.budget)):
                    _compare(where, attack, one.result)
                made_on = one.result.settings.get("twin")
                twin = twin or made_on
                if made_on not in (None, twin):
                    raise UsageError(
                        f"{where}: holds attacks made on another twin: {_short(made_on)}, now "
                        f"{_short(twin)}. Choose another folder."
                    )
                copied += [one] * (folder is not self.path)
        if not exists:
            write_text(self.path / SETTINGS, json.dumps(self.identity, indent=1) + "\n")
        for one in copied:
            self.save(one.result.file, one.arrays)
        if self.all:
            log.info("%s: goes on after %d finished attacks", self.path, len(self.all))

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
        for name, value in self.identity.items():
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
        names = {one.result.name for one in self.all}
        self._begun += [left for left in results.outstanding if left.partition(" ")[0] in names]
        left_out = {one.name: one.reason for one in results.left_out} | self.left_out
        self.left_out = {name: reason for name, reason in left_out.items() if name not in names}
        return taken

    def leave_out(self, attack: Attack, reason: str) -> None:
        """Notes, with a warning, that an attack is not run."""
        log.warning("%s is left out: %s", attack.name, reason)
        self.left_out[attack.name] = reason

    def stages(self, name: str, progress: Progress, **more: object) -> Stages:
        """Pieces of one stage, which hang on the identity and on `more`."""
        key = {"graph": GRAPH_VERSION, "name": name, **self.identity, **more}
        return Stages(self.path, key, progress, doing="evaluating")

    def kept(self, name: str, *needed: str) -> Arrays:
        """The arrays of one of its files; none where it is not there."""
        path = self.path / name
        return load_arrays(path, needed) if path.is_file() else {}

    def save(self, name: str, arrays: Arrays) -> None:
        """Writes the arrays of one of its files, whole or not at all."""
        with atomic_open(self.path / name) as stream:
            np.savez(stream, allow_pickle=False, **arrays)


def _compare(where: str, attack: Attack, before: AttackResult) -> None:
    """Raises `UsageError` where a finished attack of this name has other settings."""
    for name, value in attack.keywords.items():
        if before.settings.get(name) != value:
            raise UsageError(
                f"{where}: holds {attack.name} with other {name}: {_short(before.settings.get(name))}, now "
                f"{_short(value)}. Choose another folder."
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 30 else text[:27] + "..."
