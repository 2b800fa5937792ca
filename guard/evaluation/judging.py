"""Attacked images judged anew by the decisions that would be served, whatever the attack says of them."""

import numpy as np

from guard.attacks import Floats, Found, Labels, length
from guard.bundle import ScoreName
from guard.evaluation.attack import Task
from guard.evaluation.results import MEASURED, ROUNDING
from guard.evaluation.target import Target
from guard.runtime import Detector, Measurement
from guard.stages import Arrays


def judged(target: Target, task: Task, images: Floats, labels: Labels, found: Found) -> Arrays:
    """What the served decisions say of n attacked images: the arrays of `results.ARRAYS`, but `row`, `image`.

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
    success = found.success.astype(np.bool_)
    if attack.aware is not None:
        success = success & (accepted[attack.aware] != task.denial)
    if not task.denial:
        success = success & wrong
    if attack.norm is not None and task.budget is not None:
        success = success & (arrays[attack.norm] <= task.budget * (1 + ROUNDING) + ROUNDING)
    distance = found.distance if attack.norm is None else arrays[attack.norm]
    return (
        arrays
        | {
            "success": success,
            "unconfirmed": found.success & ~success,
            "wrong": wrong,
            "distance": np.where(success, distance, np.inf),
            "passes": np.full(n, attack.passes) if found.passes is None else found.passes,
        }
        | {f"accepted_{score}": values for score, values in accepted.items()}
        | {f"ratio_{score}": values for score, values in ratio.items()}
    )


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
