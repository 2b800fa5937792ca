"""Shares of images with their exact intervals."""

import numpy as np
from numpy.typing import NDArray

from guard import statistics
from guard.bundle import Share


def share(flags: NDArray[np.bool_]) -> Share:
    """The share of True among flags (n,), n >= 1, with its 95% Clopper-Pearson interval."""
    return share_of(int(flags.sum()), len(flags))


def share_of(count: int, n: int) -> Share:
    """A count among n >= 1 with its 95% Clopper-Pearson interval."""
    interval = statistics.clopper_pearson(count, n)
    return Share(count=count, n=n, value=count / n, lower=interval.lower, upper=interval.upper)


def share_at_most(flags: NDArray[np.bool_]) -> Share:
    """The share of True among flags (n,), n >= 1, with a one-sided 95% Clopper-Pearson bound (`upper`)."""
    count, n = int(flags.sum()), len(flags)
    return Share(count=count, n=n, value=count / n, upper=statistics.clopper_pearson_upper(count, n))
