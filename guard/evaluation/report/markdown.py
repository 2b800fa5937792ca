"""An evaluation as a section of a model's card."""

from collections.abc import Iterable, Sequence

from guard.card import ATTACKS
from guard.evaluation.report import findings, words
from guard.evaluation.report.reading import Evaluation


def section(evaluation: Evaluation, against: Evaluation | None = None) -> str:
    """The section, its heading first; `against` adds a column of another model's figures."""
    both = [evaluation] if against is None else [evaluation, against]
    results = evaluation.results
    names = [findings.name(one) for one in both]
    lines = [ATTACKS, ""]
    for one, name in zip(both, names, strict=True):
        on, hardware = _escape(str(one.results.data.get("name", "?"))), _escape(one.results.hardware)
        lines += [
            (
                f"{_escape(name)}: {one.results.images} images of {on}, {hardware}, "
                f"{words.duration(one.results.seconds)}. 95% intervals in brackets."
            ),
            "",
            *(f"    {' '.join(command.split())}" for command in findings.commands(one)),
            "",
        ]
    lines += [f"- {_escape(sentence)}" for sentence in _verdict(evaluation)]
    lines += ["", *_table(["", *names], _summary(both))]
    lines += [
        "",
        "Right and accepted under every attack of the run, those that know the detector included:",
        "",
        *_table(["score, budget", *names, "without attack", "worst attack (images)"], _standing(both)),
    ]
    head, rows = findings.subsets(both)
    if rows:
        lines += ["", "Expensive attacks, on the first images; above, they count as failed on the others:"]
        lines += ["", *_table(head, rows)]
    if results.checks:
        rows = [[one.name, one.verdict, one.expected, one.found] for one in results.checks]
        lines += ["", *_table(["gradient masking", "verdict", "expected", "found"], rows)]
        lines += ["", findings.LUCK]
    if results.radii:
        rows = [
            [
                words.radius(one) + (", served" if one.served else ""),
                words.number(one.mean_radius),
                words.number(one.mean_distance),
                words.tightness(one),
                words.MISSING if one.found is None else str(one.found),
                words.violations(one),
            ]
            for one in results.radii
        ]
        head = [
            "radius (kind)",
            "mean",
            "mean smallest distance",
            "tightness",
            "n of means",
            "attacked inside",
        ]
        lines += ["", *_table(head, rows), "", findings.AUDIT]
    lines += [
        "",
        *_table(["attack", "knows", "success", "median distance of successes"], _attacks(evaluation)),
    ]
    lines += [
        "",
        (
            "Detection of attacks that succeed and do not evade the score (those that do succeed only where "
            "it accepts); it comes second to the figures above, which count them all. Most attacks, PGD of a "
            "budget among them, stop at an image's first wrong class, where gradients are large; one that "
            "goes on, as pgd-deep does, is rejected less:"
        ),
        "",
        *_table(
            ["attack", *(f"rejected by {score}; AUROC" for score in results.scores)], _detection(evaluation)
        ),
    ]
    alarms = findings.false_alarms(evaluation)
    if alarms:
        head = ["control", *(f"rejected by {score}" for score in results.scores)]
        lines += ["", "False alarms: images that controls leave right, and that are rejected:"]
        lines += ["", *_table(head, alarms)]
    if results.over_rejection:
        rows = [[words.attack(one), words.share(one.success)] for one in results.over_rejection]
        head = ["attack that makes clean images rejected", "success"]
        lines += ["", *_table(head, rows)]
    for sentence in findings.gaps(both):
        lines += ["", _escape(sentence)]
    return "\n".join(lines) + "\n"


def _verdict(evaluation: Evaluation) -> Iterable[str]:
    yield from findings.headline(evaluation)
    yield from (f"In {sentence}" for sentence in findings.price(evaluation))
    yield findings.masking(evaluation)


def _summary(both: Sequence[Evaluation]) -> Iterable[list[str]]:
    yield ["clean accuracy", *(words.share(one.results.accuracy) for one in both)]
    for score in both[0].results.scores:
        cells = [words.share(one.results.rejected.get(score)) for one in both]
        yield [f"clean images rejected by {score}", *cells]
    yield ["mean Jacobian norm", *(words.mean(one.results.jacobian) for one in both)]


def _standing(both: Sequence[Evaluation]) -> Iterable[list[str]]:
    others = [
        {(one.score, one.norm, round(one.budget, 6)): one for one in evaluation.results.standing}
        for evaluation in both[1:]
    ]
    for one in both[0].results.standing:
        twins = [known.get((one.score, one.norm, round(one.budget, 6))) for known in others]
        yield [
            f"{one.score}, {words.at(one.budget, one.norm)}",
            words.share(one.standing),
            *(words.share(None if twin is None else twin.standing) for twin in twins),
            words.share(one.clean),
            findings.worst(one),
        ]


def _attacks(evaluation: Evaluation) -> Iterable[list[str]]:
    for one in evaluation.results.attacks:
        knows = one.knowledge + (f", evades {one.aware}" if one.aware else "")
        yield [words.attack(one), knows, words.success(one), words.median(one.distance)]


def _detection(evaluation: Evaluation) -> Iterable[list[str]]:
    for one, cells in findings.detected(evaluation):
        yield [words.attack(one) + (f" (knows {one.aware})" if one.aware else ""), *cells]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_escape, head))} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(map(_escape, row))} |" for row in rows]


def _escape(text: str) -> str:
    """Text that stays text: no table, tag or line of Markdown starts in it."""
    flat = " ".join(text.split())
    for sign, code in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        flat = flat.replace(sign, code)
    return flat
