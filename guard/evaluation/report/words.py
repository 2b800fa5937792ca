"""How numbers are written in a report: every share with its interval and n, every budget with its norm."""

import math

import numpy as np
from numpy.typing import NDArray

from guard.bundle import ScoreName, Share
from guard.evaluation.report.reading import Attacked
from guard.evaluation.results import (
    AttackResult,
    RadiusAudit,
    Standing,
    Summary,
    median_rank,
)

MISSING = "–"

KINDS = {
    "estimate": "fitted, no certificate; a stronger attack may succeed inside",
    "conformal": "broken at its rate by the attacks it was fitted to, on average; no certificate",
    "probabilistic": "certified with the stated probability",
    "sound": "certified: proven",
}
"""What each kind of radius may be called."""


_NO_EFFORT = {"command", "images", "norm", "score", "skipped", "twin", "unconfirmed"}


def percent(value: float) -> str:
    """A share with one decimal."""
    return f"{100 * value:.1f}%"


def share(found: Share | None) -> str:
    """A share with its interval and n."""
    if found is None:
        return MISSING
    level = "" if found.level == 0.95 else f", {found.level:.0%} interval"
    return f"{percent(found.value)} [{100 * found.lower:.1f}, {100 * found.upper:.1f}] (n = {found.n}{level})"


def error(found: Share | None) -> str:
    """The share of the others, in the same form."""
    if found is None:
        return MISSING
    turned = {"count": found.n - found.count, "value": 1 - found.value}
    return share(found.model_copy(update=turned | {"lower": 1 - found.upper, "upper": 1 - found.lower}))


def rejected(found: Share | None) -> str:
    """What a score rejects, where it is known; begins with a semicolon."""
    return "" if found is None else f"; rejected: {share(found)}"


def count(found: Share | None) -> str:
    """A count and of how many."""
    return MISSING if found is None else f"{found.count} of {found.n}"


def alone(found: Standing) -> str:
    """What stands without the detector, where it is known; begins with a comma."""
    return f", without the detector {share(found.alone)}" if found.alone else ""


def number(value: float) -> str:
    """A number with three significant digits."""
    if not math.isfinite(value):
        return "∞" if value > 0 else MISSING
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def median(found: Summary | None) -> str:
    """A median with its interval and n."""
    if found is None:
        return MISSING
    ends = f"{number(found.median_lower)}, {number(found.median_upper)}"
    return f"{number(found.median)} [{ends}] (n = {found.n})"


def mean(found: Summary | None) -> str:
    """A mean with its 95% interval and n."""
    if found is None:
        return MISSING
    return f"{number(found.mean)} ± {number(1.96 * found.standard_error)} (n = {found.n})"


def size(budget: float | None, norm: str | None) -> str:
    """A budget: linf ones in steps of 1/255 where they are whole."""
    if budget is None:
        return "nearest"
    steps = round(255 * budget)
    if norm == "linf" and steps and abs(255 * budget - steps) < 1e-6 * steps:
        return f"{steps}/255"
    return f"{budget:g}"


def at(budget: float | None, norm: str | None) -> str:
    """A budget with its norm."""
    return size(budget, norm) if norm is None else f"{norm} {size(budget, norm)}"


def attack(result: AttackResult) -> str:
    """An attack by its name and budget."""
    return attack_at(result.name, result.budget, result.norm)


def attack_at(name: str, budget: float | None, norm: str | None) -> str:
    """An attack's name and a budget."""
    return name if budget is None else f"{name} {size(budget, norm)}"


def success(result: AttackResult) -> str:
    """An attack's success, and how many images it was spared because cheaper attacks had broken them."""
    spared = result.settings.get("skipped")
    if result.success is None:
        return f"all {spared} broken before"
    return share(result.success) + (f"; {spared} broken before left out" if spared else "")


def effort(result: AttackResult) -> str:
    """What an attack was given: steps, starts and whatever else it was set to."""
    return ", ".join(
        f"{key.replace('_', ' ')} {value:.4g}" if type(value) is float else f"{key.replace('_', ' ')} {value}"
        for key, value in result.settings.items()
        if key not in _NO_EFFORT and not isinstance(value, bool)
    )


def named(found: Attacked) -> str:
    """`attack` of an attack with its arrays."""
    return attack(found.result)


def violations(audit: RadiusAudit) -> str:
    """How often a radius was broken, and what that bounds."""
    found = audit.violations
    return f"{found.count} of {found.n}, at most {found.upper:.2%} ({found.level:.0%})"


def radius(audit: RadiusAudit) -> str:
    """A radius by norm, method and kind; conformal and probabilistic ones with their alpha."""
    alpha = "" if audit.alpha is None else f", alpha = {audit.alpha:g}"
    return f"{audit.norm} {audit.method} ({audit.kind}{alpha})"


def detection(attack: AttackResult, score: ScoreName) -> str:
    """The share of an attack's successes that a score rejects, and the AUROC with its interval; none of an
    attack whose successes are those that the score accepts.
    """
    found = attack.detection.get(score)
    if found is None or attack.aware == score:
        return MISSING
    ends = f"{found.auroc_lower:.3f}, {found.auroc_upper:.3f}"
    return f"{share(found.rejected)}; {found.auroc:.3f} [{ends}]"


def tightness(audit: RadiusAudit) -> str:
    """Mean radius over mean distance with its 95% interval."""
    return f"{audit.tightness:.3f} ± {1.96 * audit.tightness_error:.3f}"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def middle(values: NDArray[np.float64]) -> str:
    """The median of distances, infinite ones included, with its 95% interval by order statistics, the same
    as `Summary` has. Fewer than six values have no such interval.
    """
    ordered = np.sort(values)
    n = len(ordered)
    if not n:
        return MISSING
    median = number(float(ordered[n // 2] + ordered[(n - 1) // 2]) / 2)
    if n < 6:
        return f"{median} (n = {n})"
    low = median_rank(n)
    ends = f"{number(float(ordered[low]))}, {number(float(ordered[n - 1 - low]))}"
    return f"{median} [{ends}] (n = {n})"
