"""What an evaluation amounts to, in plain words: the same for the page and for the model's card."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from guard.bundle import ScoreName
from guard.evaluation.report import words
from guard.evaluation.report.reading import MANY_CLASSES, Evaluation, plain
from guard.evaluation.results import AttackResult, Results, Standing
from guard.evaluation.target import Values
from guard.norms import NORMS, Norm

TOP_5 = "top 5"
AUDIT = (
    "Attacked inside: by any attack of the run, at any budget; accepted images that are classified wrongly "
    "only by those aimed at radii. The violation rate that is served beside a "
    "radius is of the calibration's attacks alone, on images of the same fold."
)
LUCK = "One image, or one in a hundred, is put down to luck."
FAMILIES = {
    "FGSM": ("fgsm",),
    "I-FGSM": ("ifgsm", "iterated"),
    "gradient attack": ("gradient", "ascent"),
    "PGD": ("pgd",),
    "APGD": ("apgd",),
    "FAB": ("fab",),
    "CW": ("cw", "carliniwagner"),
    "LogBarrier": ("logbarrier",),
    "DeepFool": ("deepfool",),
    "DDN or FMN": ("ddn", "fmn"),
    "targeted FMN": ("fmntargeted",),
    "Boundary": ("boundary",),
    "HopSkipJump": ("hopskipjump",),
    "Square": ("square",),
    "AutoAttack": ("autoattackl",),
    TOP_5: ("top5",),
    "Wasserstein": ("wasserstein",),
    "spatial": ("spatial", "flow", "stadv"),
    "recolor": ("recolor",),
    "JPEG": ("jpeg",),
    "evasive CW": ("evasive",),
    "joint PGD": ("jointpgd",),
    "joint PGD, more starts": ("jointrestarts",),
    "joint APGD": ("jointapgd",),
    "high confidence": ("highconfidence",),
    "nearest accepted": ("nearestaccepted",),
    "over HTTP": ("http", "overhttp", "blackbox"),
    "transfer": ("transfer",),
    "noise": ("noise", "gaussian", "uniform"),
    "corruptions": ("corruption",),
    "denial": ("denial",),
}
"""The attacks there are, by how their names begin, without hyphens and the library's name."""

WITHIN_AUTOATTACK = {"APGD", "FAB", "Square"}
"""The families that the standard AutoAttack consists of."""


def name(evaluation: Evaluation) -> str:
    """The model's name."""
    return str(evaluation.results.bundle.get("name", "this model"))


def commands(evaluation: Evaluation) -> list[str]:
    """The command lines that ran the attacks, and at last the one that put them all together."""
    results = evaluation.results
    run = [str(one.settings.get("command", "")) for one in (*results.attacks, *results.over_rejection)]
    return [command for command in dict.fromkeys(run) if command not in ("", results.command)] + [
        results.command
    ]


def not_run(evaluation: Evaluation) -> list[str]:
    """The families of attacks of which the run had none."""
    results = evaluation.results
    run = {_family(one.name) for one in (*results.attacks, *results.over_rejection)}
    if "AutoAttack" in run:
        run |= WITHIN_AUTOATTACK
    wanted = [family for family in FAMILIES if family != TOP_5 or evaluation.classes >= MANY_CLASSES]
    return [family for family in wanted if family not in run]


def _family(attack: str) -> str | None:
    """The family of which the attack's name has the longest beginning."""
    name = plain(attack).removeprefix("foolbox")
    fits = [
        (len(begin), family) for family, all_ in FAMILIES.items() for begin in all_ if name.startswith(begin)
    ]
    return max(fits, default=(0, None))[1]


def gaps(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the runs lack, in sentences: families of attacks, images, attacks that could not be run, and of
    several evaluations the same images; then the model's name comes first.
    """
    if len(evaluations) == 1:
        return _gaps(evaluations[0])
    said = [f"{name(one)}: {sentence}" for one in evaluations for sentence in _gaps(one)]
    first, *others = evaluations
    return said + [
        f"{name(other)} was attacked on other images than {name(first)}: figures differ for that reason, too."
        for other in others
        if not first.same_images(other)
    ]


def _gaps(evaluation: Evaluation) -> list[str]:
    results = evaluation.results
    said = []
    if missing := not_run(evaluation):
        said.append(f"Attacks not run: {', '.join(missing)}. What they would find is unknown.")
    fewer: dict[int, dict[str, None]] = {}
    for one in (*results.attacks, *results.over_rejection):
        count = int(one.settings.get("images", results.images))
        if count < results.images:
            fewer.setdefault(count, {})[one.name] = None
    if fewer:
        parts = [f"on the first {count} {', '.join(fewer[count])}" for count in sorted(fewer, reverse=True)]
        said.append(
            f"Run on fewer images: {'; '.join(parts)}. Wherever all attacks are spoken of, these count as "
            "failed on the other images."
        )
    if refused := [f"{one.name} ({one.reason})" for one in results.left_out]:
        said.append(f"Asked for and left out: {'; '.join(refused)}")
    return said


def detected(evaluation: Evaluation) -> list[tuple[AttackResult, list[str]]]:
    """The attacks of whose successes a score that they do not evade says something, with a cell per score."""
    results = evaluation.results
    found = [(one, [words.detection(one, score) for score in results.scores]) for one in results.attacks]
    return [(one, cells) for one, cells in found if set(cells) != {words.MISSING}]


def false_alarms(evaluation: Evaluation) -> list[list[str]]:
    """A row per control and budget: its name and, by score, the share of still right images rejected."""
    results = evaluation.results
    return [
        [words.attack(one), *(words.share(one.false_alarms.get(score)) for score in results.scores)]
        for one in results.attacks
        if one.false_alarms
    ]


def headline(evaluation: Evaluation) -> list[str]:
    """What stands under all attacks by the served score, a sentence per norm, and what to make of it."""
    results = evaluation.results
    score = results.served
    said = unfinished(results)
    if results.standing:
        said.append(
            f"Robust accuracy with rejection is the share of images that are right and that {score} accepts "
            "when clean, and for which no attack of the run found an accepted image of another class within "
            "the budget."
        )
    for norm in NORMS:
        stands = [one for one in results.standing if one.score == score and one.norm == norm]
        if stands:
            parts = ". ".join(
                f"At {words.size(one.budget, norm)}: {words.share(one.standing)}{words.alone(one)}"
                for one in stands
            )
            said.append(f"Robust accuracy with rejection in {norm}. {parts}.")
            said += added(stands)
    if results.standing:
        clean = next((one.clean for one in results.standing if one.score == score), None)
        rejected = words.share(results.rejected.get(score))
        said.append(f"The same without attack: {words.share(clean)}. Clean images rejected: {rejected}.")
    if unknown := unknowing(results, score):
        said.append(unknown)
    return said


def unfinished(results: Results) -> list[str]:
    """What a run that was stopped still lacks, in a sentence, if it was."""
    if not results.outstanding:
        return []
    said = (
        f"The run is not finished: outstanding are {', '.join(results.outstanding)}. Attacks that are "
        "missing would leave less standing. The command that began them goes on from here."
    )
    return [said]


def added(stands: Sequence[Standing]) -> list[str]:
    """What expensive attacks, run on fewer images, brought down of those that others left: by subset."""
    found: dict[tuple[int, str], list[str]] = {}
    for one in stands:
        for some in one.subsets:
            if some.added:
                said = f"{words.count(some.added)} at {words.size(one.budget, one.norm)}"
                found.setdefault((some.images, ", ".join(some.attacks)), []).append(said)
    return [
        f"On the first {images} images {attacks} brought down, of those that others left, {', '.join(said)}."
        for (images, attacks), said in found.items()
    ]


def subsets(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """The heads of a table, and a row per score, budget and subset of images that expensive attacks were run
    on; of several evaluations the model's name comes first.
    """
    several = len(evaluations) > 1
    rows = [
        [
            *[name(evaluation)] * several,
            f"{one.score}, {words.at(one.budget, one.norm)}",
            f"first {some.images}",
            ", ".join(some.attacks),
            words.count(some.added),
            words.share(some.standing),
            words.share(some.clean),
            words.share(some.alone),
        ]
        for evaluation in evaluations
        for one in evaluation.results.standing
        for some in one.subsets
    ]
    heads = [
        "score, budget",
        "images",
        "attacks",
        "brought down of those that others left",
        "under attack",
    ]
    return [*["model"] * several, *heads, "without attack", "without the detector"], rows


def unknowing(results: Results, score: ScoreName) -> str:
    """At which budgets no attack of the run knows the score, in a sentence; empty where one does at all."""
    if not any(one.aware == score for one in results.attacks):
        where = ""
    else:
        missing = [
            words.at(one.budget, one.norm)
            for one in results.standing
            if one.score == score and not results.sought(one.norm, one.budget, aware=score, on_all=False)
        ]
        if not missing:
            return ""
        where = f" at {', '.join(missing)}"
    return f"No attack of the run knows {score}{where}: an attacker who does will leave less standing."


def leading(evaluation: Evaluation) -> list[Standing]:
    """What stands by the served score at the smallest budget of every norm."""
    first: dict[str, Standing] = {}
    for one in sorted(evaluation.results.standing, key=lambda standing: standing.budget):
        if one.score == evaluation.results.served:
            first.setdefault(one.norm, one)
    return [first[norm] for norm in sorted(first)]


def price(evaluation: Evaluation) -> list[str]:
    """What an attacker needs: the median distance to another class, and to one that is accepted, in norms in
    which an attack looked for it, and of the same images how many times as far the latter is.
    """
    said = []
    score = evaluation.results.served
    for norm in NORMS:
        parts = []
        if evaluation.results.sought(norm):
            nearest = evaluation.nearest(norm)[evaluation.right]
            parts.append(f"to another class {words.middle(nearest)}")
        if evaluation.results.sought(norm, aware=score):
            kept = evaluation.right & evaluation.accepted(score)
            accepted = evaluation.fallen(norm, score)[kept]
            parts.append(f"to another class that {score} accepts {words.middle(accepted)}")
            ratio = words.middle(dearer(evaluation, norm))
            parts.append(f"of the same images {ratio} times as far")
        if parts:
            said.append(f"{norm}, median smallest distance found {', '.join(parts)}.")
    return said


def dearer(evaluation: Evaluation, norm: Norm) -> Values:
    """How many times as far as the nearest other class the nearest one is that the served score accepts, as
    attacks found them, of the images (n,) that are right and accepted and of which the former was found;
    infinite where the latter was not.
    """
    score = evaluation.results.served
    near, accepted = evaluation.nearest(norm), evaluation.fallen(norm, score)
    rows = evaluation.right & evaluation.accepted(score) & np.isfinite(near) & (near > 0)
    return np.asarray(accepted[rows] / near[rows], np.float64)


def masking(evaluation: Evaluation) -> str:
    """The masking checks in one sentence."""
    checks = evaluation.results.checks
    if not checks:
        return "No check for gradient masking was run."
    if failed := [check.name for check in checks if check.verdict == "failed"]:
        return f"Signs of gradient masking: {'; '.join(failed)}. The figures may be too good."
    counts = Counter(check.verdict for check in checks)
    count, rest = counts["passed"], ""
    if counts["undecided"]:
        rest += f"; {counts['undecided']} undecided, as the attacks that tell break nothing there"
    if counts["not run"]:
        rest += f"; {counts['not run']} not run, for want of attacks to compare"
    return f"No sign of gradient masking in {count} check{'' if count == 1 else 's'}{rest}."


def worst(standing: Standing) -> str:
    """The attack that brought the largest share of its images down, and how many of how many."""
    if standing.worst is None:
        return words.MISSING
    fallen, meant = brought_down(standing, standing.worst)
    return f"{standing.worst} ({fallen} of {meant})"


def brought_down(standing: Standing, attack: str) -> tuple[int, int]:
    """How many images an attack brought down by itself, and of how many."""
    return standing.fallen.get(attack, 0), standing.meant.get(attack, standing.clean.count)
