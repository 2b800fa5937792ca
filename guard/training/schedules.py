"""How the learning rate runs over training: the share of its peak at each share of the way."""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def one_cycle(progress: float) -> float:
    """Straight down to 0."""
    return 1 - progress


def cosine(progress: float) -> float:
    """Half a cosine down to 0 (arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def step(progress: float) -> float:
    """A fifth, a twenty-fifth and a 125th from 30, 60 and 80% on (the wide residual networks' schedule)."""
    return float(0.2 ** sum(progress >= milestone for milestone in (0.3, 0.6, 0.8)))


def constant(progress: float) -> float:  # noqa: ARG001
    """No change."""
    return 1.0


SCHEDULES: dict[str, Schedule] = {
    "one-cycle": one_cycle,
    "cosine": cosine,
    "step": step,
    "constant": constant,
}


def share(schedule: str, progress: float, warmup: float) -> float:
    """The share of the peak rate when `progress` of training is done: straight up, then as scheduled.

    The rise takes the share `warmup` of training, below 1; the schedule runs over the rest.
    """
    if progress < warmup:
        return progress / warmup
    return SCHEDULES[schedule]((progress - warmup) / (1 - warmup))
