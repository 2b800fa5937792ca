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
class Checkpoint:
    """The state before step `step` of epoch `epoch`, both counted from 0.

    `sums` adds up the epoch's metrics so far, `seconds` the time spent training; `random_state` and
    `cuda_random_state` are torch's global ones; `state` is what regularizers keep from step to step.
    """

    epoch: int
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    random_state: Tensor
    sums: dict[str, float]
    seconds: float
    cuda_random_state: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Writes `path` in one move: a kill or a full disk leaves the file before it whole.

    Raises `TrainingError` where it cannot be written.
    """
    try:
        with atomic_path(path) as partial:
            torch.save(dict(vars(checkpoint)), partial)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"{path}: cannot be written ({error}). The one before it is whole: make room, then --resume."
        ) from error


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU.

    Raises `TrainingError` where there is none, or the file is not a checkpoint of this version.
    """
    try:
        return Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise TrainingError(
            f"{path}: no such checkpoint. Give the folder of a run of guard train."
        ) from error
    except (OSError, RuntimeError, TypeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{path}: is damaged, or a checkpoint of another version. Train anew into another folder."
        ) from error
