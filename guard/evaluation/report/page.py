"""An evaluation as one HTML page: the verdict first, then figures, tables, a gallery, and how to read it.

The page needs no script and no network, and is well-formed XML.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from guard import plots
from guard.evaluation.report import figures, findings, gallery, tables, words
from guard.evaluation.report.reading import Evaluation
from guard.evaluation.results import Standing
from guard.norms import Norm

Rows = Iterable[Sequence[str]]

_FROM = '<p class="from"><a href="#commands">The commands behind these numbers</a></p>'


def page(
    evaluation: Evaluation,
    against: Evaluation | None = None,
    stability: Mapping[Norm, Mapping[str, Any]] | None = None,
) -> str:
    """The page as text.

    `against` is another model's evaluation, shown beside; `stability` holds by norm what `guard info
    --dataset D --json` says of the data, whose curve is drawn with the errors.
    """
    both = [evaluation] if against is None else [evaluation, against]
    name = escape(findings.name(evaluation))
    sections = [
        ("verdict", "Verdict", _verdict(both)),
        ("figures", "Figures", _figures(evaluation, against, stability or {})),
        ("attacks", "All attacks", _attacks(both)),
        ("detection", "Detection of attacks, second", _detection(both)),
        ("papers", "The papers' tables", _papers(both)),
        ("gallery", "Gallery", _gallery(evaluation)),
        ("methods", "Methods and definitions", _methods(evaluation)),
        ("commands", "Commands", _commands(both)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "\n".join(f'<section id="{key}"><h2>{title}</h2>{text}</section>' for key, title, text in sections)
    style = plots.STYLE + Path(__file__).with_name("page.css").read_text()
    results = evaluation.results
    data = escape(str(results.data.get("name", "held-out images")))
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>{name} under attack</title>
<style>{style}</style>
</head>
<body>
<header><h1>{name} under attack</h1>
<p class="muted">{results.images:,} images of {data} · {_counted(evaluation)} ·
{escape(results.hardware)} · {words.duration(results.seconds)}</p>
<nav>{links}</nav></header>
<main>
{body}
</main>
<footer>Brackets hold 95% intervals, n is the number of images behind a figure.</footer>
</body>
</html>
"""


def _counted(evaluation: Evaluation) -> str:
    """How many attacks there are, one in two norms counted twice, and how many controls."""
    names = {one.name: one.knowledge == "nothing" for one in evaluation.results.attacks}
    controls = sum(names.values())
    return f"{len(names) - controls} attacks" + (
        f", {controls} control{'s' * (controls > 1)}" if controls else ""
    )


def _commands(both: Sequence[Evaluation]) -> str:
    """The commands behind the numbers."""
    return "".join(
        f'<p class="from">{escape(findings.name(one))}: <code>{escape(command)}</code></p>'
        for one in both
        for command in findings.commands(one)
    )


def _table(caption: str, head: Sequence[str], rows: Rows, classes: Mapping[int, str] | None = None) -> str:
    """A table whose cells are escaped here; `classes` of rows by number."""
    columns = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = []
    for place, row in enumerate(rows):
        kind = (classes or {}).get(place, "")
        cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row)
        lines.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
    return (
        f'<h3>{escape(caption)}</h3><div class="scroll"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A cell's text, escaped; intervals and numbers of images are not broken across lines."""
    return re.sub(r"\[[^\]]*\]|\(n = \d+\)", lambda found: found[0].replace(" ", "\u00a0"), escape(text))


def _verdict(both: Sequence[Evaluation]) -> str:
    evaluation = both[0]
    results = evaluation.results
    sentences = [f"<p>{_cell(text)}</p>" for text in findings.headline(evaluation)]
    sentences += [f"<p>In {_cell(text)}</p>" for text in findings.price(evaluation)]
    failed = any(one.verdict == "failed" for one in results.checks)
    kind = ' class="warn"' if failed or not results.checks else ""
    sentences.append(f"<p{kind}>{_cell(findings.masking(evaluation))}</p>")
    for other in both[1:]:
        lacks = [*findings.unfinished(other.results), findings.unknowing(other.results, other.results.served)]
        said = (f"{findings.name(other)}: {lack}" for lack in lacks if lack)
        sentences += [f'<p class="warn">{_cell(text)}</p>' for text in said]
    parts = [f'<div class="verdict">{"".join(sentences)}</div>', _cards(both), _standing(both)]
    parts += [f"<p>{escape(sentence)}</p>" for sentence in findings.gaps(both)]
    if results.over_rejection:
        rows = [
            [
                words.attack(one),
                one.title,
                words.share(one.success),
                words.share(one.in_files),
                one.source,
            ]
            for one in results.over_rejection
        ]
        head = ("attack", "title", "clean images made rejected", "in files", "source")
        parts.append(_table("The other way round: clean images that an attack makes rejected", head, rows))
    parts.append(_checks(evaluation))
    parts.append(_radii(both))
    return "".join(parts)


def _cards(both: Sequence[Evaluation]) -> str:
    rows = []
    for evaluation in both:
        results = evaluation.results
        of = f"{findings.name(evaluation)}: " if len(both) > 1 else ""
        cards = [
            (
                f"{of}right and accepted under attack in {words.at(one.budget, one.norm)}",
                one.standing,
            )
            for one in findings.leading(evaluation)
        ]
        cards.append((f"{of}clean accuracy", results.accuracy))
        cards += [
            (f"{of}clean images rejected by {score}{', served' if score == results.served else ''}", found)
            for score, found in results.rejected.items()
        ]
        boxes = [
            f"<div><span>{escape(title)}</span><b>{words.percent(found.value)}</b>"
            f"<span>{_cell(words.share(found))}</span></div>"
            for title, found in cards
        ]
        norms = _cell(f"{words.mean(results.jacobian)}; median {words.median(results.jacobian)}")
        boxes.append(
            f"<div><span>{escape(of)}mean Jacobian norm, clean</span>"
            f"<b>{words.number(results.jacobian.mean)}</b><span>{norms}</span></div>"
        )
        rows.append(f'<div class="cards">{"".join(boxes)}</div>')
    return "".join(rows)


def _standing(both: Sequence[Evaluation]) -> str:
    """Robust accuracy with rejection, a row per score and budget; bars show the share."""
    served = both[0].results.served
    keyed = [
        {(one.score, one.norm, round(one.budget, 6)): one for one in evaluation.results.standing}
        for evaluation in both
    ]
    lines = []
    for key in sorted(keyed[0], key=lambda key: (key[0] != served, key)):
        one = keyed[0][key]
        cells = [f"<td>{escape(one.score)}</td><td>{escape(words.at(one.budget, one.norm))}</td>"]
        for known in keyed:
            found = known.get(key)
            if found is None:
                cells.append(f"<td>{words.MISSING}</td><td>{words.MISSING}</td>")
                continue
            cells.append(
                f'<td class="bar" style="--share: {100 * found.standing.value:.1f}%">'
                f"{_cell(words.share(found.standing))}</td><td>{_cell(words.share(found.clean))}</td>"
            )
        cells.append(f"<td>{escape(findings.worst(one))}</td>")
        kind = ' class="served"' if one.score == served else ""
        lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
    if not lines:
        return '<p class="warn">The run states no robust accuracy with rejection.</p>'
    names = [findings.name(evaluation) for evaluation in both]
    head = ["score", "budget"]
    for name in names:
        of = f"{name}: " if len(both) > 1 else ""
        head += [f"{of}under attack", f"{of}without"]
    columns = "".join(f"<th>{escape(text)}</th>" for text in [*head, "worst attack (images)"])
    unknown = [findings.unknowing(both[0].results, score) for score in both[0].results.scores]
    warning = "".join(f'<p class="warn">{escape(sentence)}</p>' for sentence in unknown if sentence)
    return (
        "<h3>Robust accuracy with rejection: right and accepted under all attacks of the run</h3>"
        f'<div class="scroll"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{warning}{_subsets(both)}{_fallen(both[0])}"
    )


def _subsets(both: Sequence[Evaluation]) -> str:
    """What stands of the first images, on which expensive attacks were run too."""
    head, rows = findings.subsets(both)
    if not rows:
        return ""
    note = (
        '<p class="muted">Above, expensive attacks count as failed where they were not run. Here all '
        "figures are of those that they were run on: how many they brought down of what the others "
        "had left standing, and what stands in all. The first images may be harder or easier than the "
        "rest, so that only figures of the same images compare.</p>"
    )
    return _table("The first images, on which expensive attacks were run too", head, rows) + note


def _fallen(evaluation: Evaluation) -> str:
    """How many images every attack brought down by itself, a table per score."""
    parts = []
    for score in evaluation.results.scores:
        stands = [one for one in evaluation.results.standing if one.score == score]
        names = {name for one in stands for name in one.fallen}
        total = {name: sum(one.fallen.get(name, 0) for one in stands) for name in names}
        rows = [
            [name, *(_brought_down(one, name) for one in stands)]
            for name in sorted(total, key=lambda name: (-total[name], name))
        ]
        if rows:
            head = ("attack", *(words.at(one.budget, one.norm) for one in stands))
            caption = f"Images that are right and accepted by {score}, brought down by each attack"
            parts.append(_table(caption, head, rows))
    note = (
        '<p class="muted">Whatever the budget it was run at, or none; with the number of images where it was '
        "not run on all. Expensive attacks that know the detector ran on what cheaper ones had left.</p>"
    )
    return "".join([*parts, note]) if parts else ""


def _brought_down(standing: Standing, name: str) -> str:
    fallen, meant = findings.brought_down(standing, name)
    return str(fallen) if meant == standing.clean.count else f"{fallen} of {meant}"


def _checks(evaluation: Evaluation) -> str:
    checks = evaluation.results.checks
    if not checks:
        return '<p class="warn">No check for gradient masking was run.</p>'
    lines = []
    for one in checks:
        chip = f'<span class="chip {one.verdict.replace(" ", "-")}">{one.verdict}</span>'
        lines.append(
            f"<tr><td>{escape(one.name)}</td><td>{chip}</td><td>{escape(one.expected)}</td>"
            f"<td>{escape(one.found)}</td></tr>"
        )
    columns = "".join(f"<th>{text}</th>" for text in ("check", "verdict", "expected", "found"))
    return (
        '<h3>Is a defence hiding its gradients?</h3><div class="scroll"><table>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="muted">{escape(findings.LUCK)}</p>'
    )


def _radii(both: Sequence[Evaluation]) -> str:
    rows: list[list[str]] = []
    classes: dict[int, str] = {}
    for evaluation in both:
        for one in evaluation.results.radii:
            if one.served:
                classes[len(rows)] = "served"
            rows.append(
                [
                    *([findings.name(evaluation)] if len(both) > 1 else []),
                    words.radius(one) + (", served" if one.served else ""),
                    words.violations(one),
                    words.number(one.mean_radius),
                    words.number(one.mean_distance),
                    words.tightness(one),
                    words.MISSING if one.found is None else str(one.found),
                ]
            )
    if not rows:
        return "<p>The run audited no radii.</p>"
    head = ["radius", "attacked inside", "mean radius", "mean smallest distance", "tightness", "n"]
    kinds = dict.fromkeys(one.kind for evaluation in both for one in evaluation.results.radii)
    meant = "; ".join(f"{kind}: {words.KINDS.get(kind, 'of a kind unknown here')}" for kind in kinds)
    head = ["model", *head] if len(both) > 1 else head
    table = _table("Radii under the union of all attacks", head, rows, classes)
    return f'{table}<p class="muted">{escape(findings.AUDIT)} What a radius is. {escape(meant)}.</p>'


def _figures(
    evaluation: Evaluation, against: Evaluation | None, stability: Mapping[Norm, Mapping[str, Any]]
) -> str:
    drawn = []
    for figure in figures.figures(evaluation, against, stability):
        legend = "".join(f'<li class="{series}">{escape(text)}</li>' for series, text in figure.legend)
        keys = f'<ul class="legend">{legend}</ul>' if legend else ""
        kind = ' class="wide"' if figure.wide else ""
        drawn.append(
            f"<figure{kind}><h3>{escape(figure.title)}</h3>{keys}{figure.svg}"
            f"<figcaption><p>{escape(figure.caption)}</p></figcaption></figure>"
        )
    note = (
        ""
        if stability
        else '<p class="muted">The data-stability curve is drawn with <code>--stability</code>.</p>'
    )
    return f'{_FROM}<div class="figures">{"".join(drawn)}</div>{note}'


def _attacks(both: Sequence[Evaluation]) -> str:
    head = [
        "attack",
        "title",
        "budget",
        "knows",
        "success",
        "in files",
        "distance of successes: median; mean",
    ]
    head += ["forward passes to success", "time", "settings", "source"]
    parts = []
    for evaluation in both:
        rows = [
            [
                one.name,
                one.title,
                f"{words.at(one.budget, one.norm)}{'' if one.unit == 'pixel values' else ', ' + one.unit}",
                one.knowledge + (f", evades {one.aware}" if one.aware else ""),
                words.success(one),
                words.share(one.in_files),
                f"{words.median(one.distance)}; {words.mean(one.distance)}"
                if one.distance
                else words.MISSING,
                words.number(one.passes),
                words.duration(one.seconds),
                words.effort(one) or words.MISSING,
                one.source,
            ]
            for one in evaluation.results.attacks
        ]
        parts.append(_FROM)
        parts.append(_table(f"Attacks on {findings.name(evaluation)}", head, rows))
    note = (
        "<p>Success is of the images that were right before; attacks that evade a score ran on those it "
        "accepts, and succeed where the image is wrong and accepted; expensive ones are spared the images "
        "that cheaper attacks broke, so theirs is of the harder rest. In files: of the successes, those that "
        "are one when rounded to 256 levels a value, which may take them a little beyond the budget. Forward "
        "passes are means: until an attack first succeeds (where it looks for the nearest image it then goes "
        "on), else all it takes, and always all where a library runs it; a gradient counts as two more, an "
        "answer over HTTP as the passes that the server makes for it. Time is what passed, pauses of the "
        "machine included. Settings are those that were run; a source may have others.</p>"
    )
    return note + "".join(parts)


def _detection(both: Sequence[Evaluation]) -> str:
    parts = [
        (
            "<p>The share of successful attacks that a score rejects, and how well it tells them from clean "
            "images (AUROC). Attacks that evade the score succeed only where it accepts, and are left out: "
            "these are figures of the careless attacker, not of the detector's worth, which the robust "
            "accuracy above states. Most attacks, PGD of a budget among them, stop at an image's first wrong "
            "class, where gradients are large; one that goes on into that class, as pgd-deep does, is "
            "rejected less.</p>"
        )
    ]
    for evaluation in both:
        scores = evaluation.results.scores
        rows = []
        for one, cells in findings.detected(evaluation):
            knows = f"evades {one.aware}" if one.aware else "no detector"
            rows.append([words.attack(one), knows, *cells])
        head = ("attack", "knows", *(f"{score}: rejected; AUROC" for score in scores))
        parts.append(_FROM)
        parts.append(_table(f"Detection, {findings.name(evaluation)}", head, rows))
        alarms = findings.false_alarms(evaluation)
        if alarms:
            caption = f"False alarms of {findings.name(evaluation)}: right images rejected under controls"
            parts.append(_table(caption, ("control", *(f"rejected by {score}" for score in scores)), alarms))
            parts.append(
                "<p>Noise and corruptions know nothing of the model: a detector that rejects what they leave "
                "right costs its users.</p>"
            )
    return "".join(parts)


def _papers(both: Sequence[Evaluation]) -> str:
    parts = [
        (
            "<p>Published figures as printed, ours below them in bold. Networks, training and attacks "
            f"differ; notes say what else does. {words.MISSING} is what was not run or not published.</p>"
        ),
        _FROM,
    ]
    for table in tables.tables(both):
        classes = {place: "ours" for place, row in enumerate(table.rows) if row.ours}
        rows = [[row.name, *row.cells] for row in table.rows]
        parts.append(_table(f"{table.name}: {table.title}", table.columns, rows, classes))
        parts += [f'<p class="muted">{escape(note)}</p>' for note in table.notes]
    return "".join(parts)


def _gallery(evaluation: Evaluation) -> str:
    parts = []
    for exhibit in gallery.exhibits(evaluation):
        result = exhibit.attack.result
        known = f", which evades {result.aware}" if result.aware else ""
        heading = f"{words.attack(result)}{known}: original, attacked, difference × {exhibit.gain:g}"
        twins = "".join(_twin(twin) for twin in exhibit.twins)
        parts.append(f'<h3>{escape(heading)}</h3><div class="twins">{twins}</div>')
    return "".join(parts) or "<p>No attack succeeded on the images that were kept.</p>"


def _twin(twin: gallery.Twin) -> str:
    pictures = "".join(
        f'<img src="{uri}" alt="{escape(what)}" />'
        for uri, what in (
            (twin.original, f"original: {twin.before}"),
            (twin.attacked, f"attacked: {twin.after}"),
            (twin.difference, "difference"),
        )
    )
    chips = "".join(f' <span class="chip failed">accepted by {escape(one)}</span>' for one in twin.accepted)
    chips += "".join(f' <span class="chip passed">rejected by {escape(one)}</span>' for one in twin.rejected)
    text = (
        f"{twin.before} → {twin.after}, l2 {words.number(twin.l2)}, linf {words.number(255 * twin.linf)}/255"
    )
    return f'<div class="twin"><div>{pictures}</div><p>{escape(text)}{chips}</p></div>'


def _methods(evaluation: Evaluation) -> str:
    results = evaluation.results
    definitions = [
        (
            "Robust accuracy with rejection",
            (
                "The share of all images that are accepted and right when clean, and for which no attack "
                "of the run found an accepted image of another class within the budget."
            ),
        ),
        (
            "Budgets and distances",
            (
                "Lengths of the perturbation in pixels of the model's input, which lie in [0, 1], as those "
                "of attacked images do. These are not rounded to 256 levels, which grants the attacker more "
                "than a file would: the table of attacks says how many successes remain one when rounded. "
                "Attacks over HTTP send files."
            ),
        ),
        (
            "Scores",
            (
                "What an image is rejected by, each calibrated to the same share of clean images. jacobian "
                "is the longest row of the Jacobian of the probabilities (LIPGEN 7.1), radius the margin's "
                "slope over the margin, combined both at one joint level."
            ),
        ),
        (
            "Attacks that know the detector",
            (
                "They follow the served decision and count as successful only where the image is wrong and "
                "accepted. Detection of attacks that do not is reported apart and says little."
            ),
        ),
        (
            "Intervals",
            (
                "Of shares: Clopper-Pearson, exact. Of medians: order statistics. Of means and their ratios: "
                "1.96 standard errors. Of AUROC, approximate: the wider of Newcombe's method 5 (2006) "
                "and DeLong's (1988) of images attacked and clean together."
            ),
        ),
        (
            "Kinds of radius",
            ". ".join(f"{kind}: {meaning}" for kind, meaning in words.KINDS.items())
            + ". Tightness is the mean radius over the mean smallest distance that any attack found.",
        ),
        (
            "Gradient masking",
            (
                "A defence can look strong because attacks cannot follow its gradients. The checks compare "
                "attacks whose order is known where they can."
            ),
        ),
    ]
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in definitions)
    facts = {
        "data": results.data,
        "bundle": {key: value for key, value in results.bundle.items() if key != "class_names"},
        "settings": results.settings,
        **results.provenance,
    }
    rows = [[key, _plain(value)] for key, value in facts.items()]
    return f"<dl>{terms}</dl>{_table('The run', ('what', 'value'), rows)}{_FROM}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(inner) for inner in value)
    return str(value)
