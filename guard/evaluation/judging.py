"""Attacked images judged anew by the decisions that would be served, whatever the attack says of them."""

import numpy as np

from guard.attacks import Floats, Found, Labels, length
from guard.bundle import ScoreName
from guard.evaluation.attack import Task
from guard.evaluation.over_http import floats, rounded
from guard.evaluation.results import MEASURED, reaches
from guard.evaluation.target import Flags, Target
from guard.runtime import Detector, Measurement
from guard.stages import Arrays


def judged(target: Target, task: Task, images: Floats, labels: Labels, found: Found) -> Arrays:
    """What the served decisions say of n attacked images: the arrays of `results.ARRAYS`, but `row`, `image`;
    `unconfirmed` (n,), successes that are none, and `lost` (n,), successes that a file does not hold
    (`lost_in_files`).

    The attack's word is not taken for anything: a success counts where the image is wrong (for a denial:
    rejected), within the budget and, for attacks that know a score, accepted by its guard. Its distance is
    taken only where the attack has a measure of its own. Of a control every image is judged, since a right
    one that is rejected counts too; of other attacks those that are wrong, or that they call a success.
    """
    attack, n = task.attack, len(images)
    attacked = within_range(found.images, images)
    moved = attacked - images
    arrays: Arrays = {"l2": length(moved, "l2"), "linf": length(moved, "linf")}
    suspects = np.arange(n)
    if n and attack.knowledge != "nothing":
        suspects = np.flatnonzero(found.success | (target.model.logits(attacked).argmax(axis=1) != labels))
    wrong = np.zeros(n, np.bool_)
    accepted = {score: np.zeros(n, np.bool_) for score in target.guards}
    ratio = {score: np.full(n, np.nan) for score in target.guards}
    measured: Arrays = {}
    if len(suspects):
        for score in target.guards:
            verdict = target.verdict(attacked[suspects], score)
            wrong[suspects] = verdict.labels != labels[suspects]
            accepted[score][suspects] = verdict.accepted
            ratio[score][suspects] = verdict.ratio
            measured = measured or measured_at(target, attacked[suspects], score, verdict.measurement)
    shapes = {"logits": (target.model.num_classes,)}
    arrays |= {name: np.full((n, *shapes.get(name, ())), np.nan, np.float32) for name in MEASURED}
    for name, values in measured.items():
        arrays[name][suspects] = values
    success = found.success.astype(np.bool_) & counts(task, wrong, accepted[aware_of(target, task)])
    if attack.norm is not None and task.budget is not None:
        success = success & reaches(arrays[attack.norm], task.budget)
    lost = np.zeros(n, np.bool_)
    if success.any():
        lost[success] = lost_in_files(target, task, attacked[success], labels[success])
    distance = found.distance if attack.norm is None else arrays[attack.norm]
    return (
        arrays
        | {
            "success": success,
            "unconfirmed": found.success & ~success,
            "lost": lost,
            "wrong": wrong,
            "distance": np.where(success, distance, np.inf),
            "passes": np.full(n, attack.passes) if found.passes is None else found.passes,
        }
        | {f"accepted_{score}": values for score, values in accepted.items()}
        | {f"ratio_{score}": values for score, values in ratio.items()}
    )


def lost_in_files(target: Target, task: Task, attacked: Floats, labels: Labels) -> Flags:
    """Which successes (n,), n >= 1, are none once every value is rounded to 8 bits, as in an image file.

    The served decision is asked again; the budget, which rounding may exceed, is not.
    """
    verdict = target.verdict(floats(rounded(attacked)), aware_of(target, task))
    return ~counts(task, verdict.labels != labels, verdict.accepted)


def aware_of(target: Target, task: Task) -> ScoreName:
    """The score that the attack knows, else the first, whose guard says as well which class an image has."""
    return next(iter(target.guards)) if task.attack.aware is None else task.attack.aware


def counts(task: Task, wrong: Flags, accepted: Flags) -> Flags:
    """Which images (n,) are what the attack is after: wrong ones, for a denial rejected ones; for an attack
    that knows a score, `accepted` (n,) by its guard.
    """
    sought = np.ones_like(wrong) if task.denial else wrong
    return sought if task.attack.aware is None else sought & (accepted != task.denial)


def within_range(attacked: Floats, images: Floats) -> Floats:
    """Attacked images (B, C, H, W) in [0, 1]; what is no number is as it was in the images attacked."""
    return np.where(np.isnan(attacked), images, np.clip(attacked, 0, 1)).astype(np.float32)


def measured_at(target: Target, images: Floats, score: ScoreName, measurement: Measurement) -> Arrays:
    """The fields kept for a report, from the Jacobian's guard where there is one."""
    if "jacobian" in target.guards and score != "jacobian":
        measurement = target.guards["jacobian"].measure(images)
    elif score not in ("jacobian", "combined", "jacobian-full") and isinstance(target.model, Detector):
        measurement = target.model.measure(images)
    return {name: getattr(measurement, name) for name in MEASURED}
