"""How the learning rate, and hyperparameters that ramp, run over training: functions of the share done.

A schedule knows no epochs: a run of any length goes through the same one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

from guard.errors import UsageError

Schedule = Callable[[float], float]

Knots = Sequence[tuple[float, float]]


def one_cycle(progress: float) -> float:
    """Straight down to 0."""
    return 1 - progress


def cosine(progress: float) -> float:
    """Half a cosine down to 0 (arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def step(progress: float) -> float:
    """A fifth, a twenty-fifth and a 125th from 30, 60 and 80% on (the wide residual networks', SCALE's)."""
    return float(0.2 ** sum(progress >= milestone for milestone in (0.3, 0.6, 0.8)))


def fifths(progress: float) -> float:
    """A fifth, a twenty-fifth and a 125th from 30, 60 and 90% on (LIP A, CIFAR-10)."""
    return float(0.2 ** sum(progress >= milestone for milestone in (0.3, 0.6, 0.9)))


def tenths(progress: float) -> float:
    """A tenth and a hundredth from 50 and 75% on (LIP A, CIFAR-100)."""
    return float(0.1 ** sum(progress >= milestone for milestone in (0.5, 0.75)))


def constant(progress: float) -> float:  # noqa: ARG001
    """No change."""
    return 1.0


def piecewise(knots: Knots, progress: float) -> float:
    """Straight between `knots`, (share of training, value) by rising share, and constant outside them.

    Where two knots have one share, the value jumps there, to that of the second.
    """
    before = [knot for knot in knots if knot[0] <= progress]
    after = [knot for knot in knots if knot[0] > progress]
    if not before or not after:
        return before[-1][1] if before else after[0][1]
    (left, low), (right, high) = before[-1], after[0]
    return low + (high - low) * (progress - left) / (right - left)


def three_slopes(progress: float) -> float:
    """Up from 0 over 40%, down to a twentieth over 40% more, and to 0 (HAMMING A, MANIFOLD B)."""
    return piecewise(((0.0, 0.0), (0.4, 1.0), (0.8, 0.05), (1.0, 0.0)), progress)


SCHEDULES: dict[str, Schedule] = {
    "one-cycle": one_cycle,
    "cosine": cosine,
    "step": step,
    "fifths": fifths,
    "tenths": tenths,
    "three-slopes": three_slopes,
    "constant": constant,
}


@cache
def named(schedule: str) -> Schedule:
    """The schedule of that name, or that of knots written `0:0,0.4:1,0.8:0.05,1:0` (share:value).

    Raises `UsageError` for an unknown name, and for knots that do not rise from 0 to 1 or have negative
    values.
    """
    if schedule in SCHEDULES:
        return SCHEDULES[schedule]
    if ":" not in schedule:
        known = ", ".join(SCHEDULES)
        raise UsageError(
            f"--schedule is {schedule}: expected one of {known}, or knots as in 0:0,0.4:1,0.8:0.05,1:0."
        )
    try:
        pairs = [knot.split(":") for knot in schedule.split(",")]
        knots = [(float(share), float(value)) for share, value in pairs]
    except ValueError:
        knots = []
    shares = [share for share, _ in knots]
    rising = all(left <= right for left, right in pairwise(shares)) and shares[:1] + shares[-1:] == [0, 1]
    if not rising or not all(0 <= value < math.inf for _, value in knots):
        raise UsageError(
            f"--schedule is {schedule}: expected knots share:value, shares rising from 0 to 1 and values of "
            "0 or more, as in 0:0,0.4:1,0.8:0.05,1:0."
        )
    return partial(piecewise, knots)


def share(schedule: str, progress: float, warmup: float) -> float:
    """The share of the peak rate when `progress` of training is done: straight up, then as scheduled.

    The rise takes the share `warmup` of training, below 1; the schedule runs over the rest. A schedule that
    starts at 0 rises by itself and runs over all of training.
    """
    scheduled = named(schedule)
    if scheduled(0.0) == 0:
        return scheduled(progress)
    if progress < warmup:
        return progress / warmup
    return scheduled((progress - warmup) / (1 - warmup))


@dataclass(frozen=True)
class Ramp:
    """A hyperparameter that goes from `first` to `last` straight between two shares of training."""

    first: float
    last: float
    start: float
    stop: float

    def at(self, progress: float) -> float:
        """The value when `progress` of training is done."""
        return piecewise(((self.start, self.first), (self.stop, self.last)), progress)
