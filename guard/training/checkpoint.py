"""Everything a run needs to go on exactly where it stopped, in one file that is never half-written."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guard.errors import TrainingError
from guard.files import atomic_path

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class ProcessState:
    """What each process has of its own: torch's global random states, and what regularizers keep."""

    random_state: Tensor
    cuda_random_state: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """The state before step `step` of epoch `epoch`, both counted from 0.

    `sums` adds up the epoch's metrics so far, `seconds` the time spent training; `processes` has one entry
    per process that trained, in the order of their numbers.
    """

    epoch: int
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    processes: list[ProcessState]
    sums: dict[str, float]
    seconds: float


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Writes `path` in one move: a kill or a full disk leaves the file before it whole.

    Raises `TrainingError` where it cannot be written.
    """
    content = vars(checkpoint) | {"processes": [vars(process) for process in checkpoint.processes]}
    try:
        with atomic_path(path) as partial:
            torch.save(content, partial)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        before = "The one before it is whole" if path.exists() else "There is none before it"
        raise TrainingError(
            f"{path}: cannot be written ({reason}). {before}: make room, then --resume."
        ) from error


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU.

    Raises `TrainingError` where there is none, or the file is not a checkpoint of this version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if "processes" not in content:  # from before there could be several
            own = ProcessState.__dataclass_fields__.keys() & content.keys()
            content["processes"] = [{name: content.pop(name) for name in own}]
        processes = [ProcessState(**process) for process in content.pop("processes")]
        return Checkpoint(**content, processes=processes)
    except FileNotFoundError as error:
        raise TrainingError(
            f"{path}: no such checkpoint. Give the folder of a run of guard train."
        ) from error
    except (
        OSError,
        RuntimeError,
        TypeError,
        KeyError,
        AttributeError,
        EOFError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise TrainingError(
            f"{path}: is damaged, or a checkpoint of another version. Train anew into another folder."
        ) from error
