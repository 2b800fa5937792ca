"""The papers' figures from a results folder, as SVG: what was not run leaves its curve out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guard import plots
from guard.evaluation.report import words
from guard.evaluation.report.reading import Attacked, Evaluation, Flags, Values
from guard.evaluation.report.tables import SOURCES, deep_of, source_of
from guard.evaluation.results import farthest
from guard.norms import NORMS, Norm
from guard.plots import Frame, Points

_FLOOR = 1e-4
_BINS = 28
_FEWEST = 10


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, a legend of (series, text), and what it shows and of how many images; a wide
    one has the page's width.
    """

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...]
    caption: str
    wide: bool = False


def figures(
    evaluation: Evaluation, against: Evaluation | None, stability: Mapping[Norm, Mapping[str, Any]]
) -> list[Figure]:
    """All figures for which there is something to draw."""
    drawn: list[Figure | None] = []
    for norm in NORMS:
        white = [one for one in _of(evaluation, norm) if one.result.knowledge == "gradients"]
        others = [one for one in _of(evaluation, norm) if one.result.knowledge != "gradients"]
        for title, attacks in (("attacks with gradients", white), ("attacks without gradients", others)):
            drawn.append(_errors(evaluation, norm, title, attacks, stability.get(norm)))
        drawn.append(_robustness(evaluation, against, norm))
    drawn.append(_passes(evaluation))
    drawn += _histograms(evaluation)
    drawn += [_tightness(evaluation, norm) for norm in NORMS]
    return [figure for figure in drawn if figure is not None]


def _of(evaluation: Evaluation, norm: Norm) -> list[Attacked]:
    """Attacks on the classifier alone, whose errors are those of the classifier."""
    return [one for one in evaluation.attacks if one.result.norm == norm and one.result.aware is None]


def _errors(
    evaluation: Evaluation,
    norm: Norm,
    title: str,
    attacks: Sequence[Attacked],
    stability: Mapping[str, Any] | None,
) -> Figure | None:
    """LIP Fig. 1: the share of images lost within a distance; points with intervals for fixed budgets."""
    if not attacks:
        return None
    by_name: dict[str, list[Attacked]] = {}
    for attack in attacks:
        by_name.setdefault(attack.result.name, []).append(attack)
    union = evaluation.nearest(norm)
    reached = [one.lengths(norm)[one.success] for one in attacks] + [union[np.isfinite(union) & (union > 0)]]
    budgets = [one.result.budget for one in attacks if one.result.budget is not None]
    by_name = dict(sorted(by_name.items(), key=lambda pair: -_lost_at(pair[1], budgets)))
    positive = np.concatenate([*reached, budgets])
    if not (positive > 0).any():
        return None
    low = max(_FLOOR, float(np.quantile(positive[positive > 0], 0.01)))
    # Beyond the largest budget, where nothing looked for the nearest image, only other norms' attacks lie.
    high = (
        max(budgets)
        if budgets and not evaluation.results.sought(norm, on_all=False)
        else float(np.quantile(positive, 0.995))
    )
    if stability is not None:
        high = max(high, _reach(stability))
    across = plots.logarithmic(low, max(high, 2 * low), f"distance, {norm}")
    frame = Frame(across, plots.shares("images lost"), height=260)
    marks: list[str] = []
    legend: list[tuple[str, str]] = []
    for series, (name, found) in zip(plots.SERIES, by_name.items(), strict=False):
        sizes = sorted({one.n_considered for one in found})
        legend.append((series, f"{name} (n = {', '.join(map(str, sizes))})"))
        points = []
        for one in found:
            if one.result.budget is None:
                marks.append(_lost(frame, one, series))
            else:
                points.append((one.result.budget, one.standing()))
        points.sort(key=lambda pair: pair[0])
        places = [(eps, 1 - standing.value) for eps, standing in points]
        marks.append(plots.line(frame, places, series, dots=True))
        marks.append(
            plots.whiskers(frame, [(eps, 1 - one.upper, 1 - one.lower) for eps, one in points], series)
        )
    legend.append(("ink", f"all attacks of the run (n = {len(union)})"))
    marks.append(plots.line(frame, _cumulative(union, across), "ink"))
    left = [name for name in by_name if name not in list(by_name)[: len(plots.SERIES)]]
    caption = (
        "Images classified wrongly before any attack count as lost at every distance. Curves are attacks "
        "that look for the nearest image, points those of a fixed budget, with 95% intervals."
    )
    if any(one.n_considered < len(union) for one in attacks):
        caption += (
            " Those run on the first images only are of these alone, which may be harder or easier than the "
            "rest: such a point may lie above the curve of all."
        )
    if left:
        caption += f" Not drawn, as they break fewer: {', '.join(left)}."
    if stability is not None:
        eps, halfway = stability["stability"]["eps"], stability["stability"]["halfway"]
        marks.append(
            plots.line(
                frame, [(e, s) for e, s in zip(eps, halfway, strict=True) if 0 < e <= across.high], "pale"
            )
        )
        legend.append(("pale", f"data stability of {stability['dataset']} (n = {stability['n']})"))
        caption += (
            " Data stability: the share of images that a perturbation so long takes half-way to an image of "
            "another class, where no classifier can be right about both."
        )
    return Figure(f"Error against {norm} distance: {title}", frame.svg(marks, title), tuple(legend), caption)


def _lost_at(found: Sequence[Attacked], budgets: Sequence[float]) -> float:
    """How much an attack of several budgets, or of none, breaks in all: its shares of lost images at the
    budgets of the run, summed.
    """
    within = [farthest(budget) for budget in sorted(set(budgets))]
    lost = np.array([one.errors_within(within) for one in found])
    return float(lost.max(axis=0).sum()) if within else float(sum(one.success.mean() for one in found))


def _reach(stability: Mapping[str, Any]) -> float:
    """Where half of the images are half-way to another class: as far as an axis need go."""
    curve = stability["stability"]
    far = [e for e, s in zip(curve["eps"], curve["halfway"], strict=True) if s >= 0.5 and e > 0]
    return float(min(far, default=max(curve["eps"])))


def _lost(frame: Frame, attack: Attacked, series: str) -> str:
    found = np.sort(attack.distance()[attack.success])
    eps = np.unique(np.concatenate([[frame.x.low], found[found >= frame.x.low], [frame.x.high]]))
    eps = eps[eps <= frame.x.high * (1 + 1e-9)]
    curve = list(zip(eps.tolist(), attack.errors_within(eps), strict=True))
    return plots.line(frame, plots.stairs(curve), series)


def _cumulative(distances: Values, across: plots.Axis, *, left: bool = False) -> Points:
    """The share of distances at most eps (or, with `left`, beyond it), as stairs over an axis."""
    ordered = np.sort(distances)
    inside = ordered[(ordered > across.low) & (ordered < across.high)]
    eps = np.unique(np.concatenate([[across.low], inside, [across.high]]))
    within = np.searchsorted(ordered, eps, "right") / len(ordered)
    curve = 1 - within if left else within
    return plots.stairs(list(zip(eps.tolist(), curve.tolist(), strict=True)))


def _robustness(evaluation: Evaluation, against: Evaluation | None, norm: Norm) -> Figure | None:
    """What stands at each distance under all attacks, with and without rejection."""
    standings = [one for one in evaluation.results.standing if one.norm == norm]
    budgets = [one.budget for one in standings]
    if not budgets or not evaluation.attacked_in(norm):
        return None
    across = plots.linear(0.0, 1.2 * max(budgets), f"distance, {norm}")
    if norm == "linf":
        top = 1.2 * max(budgets)
        steps = plots.ticks(0.0, 255 * top)
        across = plots.Axis(
            0.0, steps[-1] / 255, tuple((step / 255, f"{step:g}/255") for step in steps), across.title
        )
    frame = Frame(across, plots.shares("images that stand"), height=260)
    marks = [plots.line(frame, _cumulative(evaluation.nearest(norm), across, left=True), "ink")]
    legend = [("ink", "right, without rejection")]
    for series, score in zip(plots.SERIES, evaluation.results.scores, strict=False):
        marks.append(
            plots.line(frame, _cumulative(evaluation.fallen(norm, score), across, left=True), series)
        )
        legend.append((series, f"right and accepted, {score}"))
        stands = [(one.budget, one.standing) for one in standings if one.score == score]
        marks.append(plots.dots(frame, [(eps, stand.value) for eps, stand in stands], series, size=3))
        marks.append(plots.whiskers(frame, [(eps, one.lower, one.upper) for eps, one in stands], series))
    if against is not None:
        marks.append(plots.line(frame, _cumulative(against.nearest(norm), across, left=True), "pale"))
        other, score = against.results.bundle.get("name", "the other"), against.results.served
        legend.append(("pale", f"{other}, without rejection"))
        marks.append(plots.line(frame, _cumulative(against.fallen(norm, score), across, left=True), "c7"))
        legend.append(("c7", f"{other}, right and accepted, {score}"))
    n = evaluation.results.images
    caption = (
        f"Of n = {n} images, under all attacks of the run, each as far as it went; a fixed budget shows "
        "where it was spent, so between budgets the curve is too high. Dots: the figures of the verdict, "
        "with their 95% intervals."
    )
    if any(one.subsets for one in standings):
        caption += " Expensive attacks ran on the first images only; the verdict says what stands of those."
    return Figure(f"Robust accuracy in {norm}", frame.svg(marks, f"robust {norm}"), tuple(legend), caption)


def _passes(evaluation: Evaluation) -> Figure | None:
    """Median time of a successful attack in forward passes (LIP Table 3's calls). Controls are no attacks,
    and a handful of images has no median worth its name.
    """
    rows = []
    for attack in evaluation.last_of_each():
        spent = np.asarray(attack.arrays["passes"], np.float64)[attack.success]
        if len(spent) >= _FEWEST and np.median(spent) > 0 and attack.result.knowledge != "nothing":
            low, middle, high = np.quantile(spent, (0.25, 0.5, 0.75))
            rows.append((words.named(attack), float(low), float(middle), float(high), len(spent)))
    if not rows:
        return None
    rows.sort(key=lambda row: row[2])
    lowest, highest = min(max(1.0, row[1]) for row in rows), max(row[3] for row in rows)
    across = plots.logarithmic(lowest, max(highest, 2 * lowest), "forward passes per image to first success")
    upright = plots.Axis(len(rows) - 0.5, -0.5, tuple((place, row[0]) for place, row in enumerate(rows)))
    frame = Frame(across, upright, width=1150, height=56 + 17 * len(rows))
    marks = []
    for place, (_, low, middle, high, _) in enumerate(rows):
        marks.append(plots.line(frame, [(max(low, 1.0), place), (high, place)], "c0"))
        marks.append(plots.dots(frame, [(middle, place)], "c0", size=4))
    sizes = [row[4] for row in rows]
    caption = (
        "Median and middle half over the images that an attack broke "
        f"(n = {min(sizes)} to {max(sizes)}), of several budgets the largest: what it took until it "
        "first succeeded, after which those that look for the nearest image go on; all it took where a "
        f"library runs it. A gradient counts as two more passes. Left out: controls, fewer than {_FEWEST} "
        "images."
    )
    return Figure("What a first success costs", frame.svg(marks, "forward passes"), (), caption, wide=True)


def _histograms(evaluation: Evaluation) -> Iterable[Figure]:
    """LIPGEN Fig. 4: the Jacobian norm of clean and of attacked images, on one axis; and that of an attack
    which goes on into the wrong class, as LIPGEN's do not.
    """
    clean = np.asarray(evaluation.clean["jacobian"], np.float64)
    rejected = words.rejected(evaluation.results.rejected.get("jacobian"))
    sets = [("clean", "c7", clean, f"n = {len(clean)}{rejected}")]
    found = [(f"; LIPGEN's figure has {kind}", source_of(evaluation, kind)) for kind in SOURCES]
    found.append(("; goes on to the end of its budget", deep_of(evaluation)))
    for series, (about, attack) in zip(plots.SERIES, found, strict=False):
        if attack is None:
            continue
        norms = np.asarray(attack.arrays["jacobian"], np.float64)[attack.success]
        text = f"n = {len(norms)}"
        if attack.result.aware is not None:
            text += f" that it brought past {attack.result.aware}"
        elif judged := attack.result.detection.get("jacobian"):
            text += words.rejected(judged.rejected)
        sets.append((words.named(attack), series, norms, text + about))
    values = np.concatenate([one for _, _, one, _ in sets])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return
    threshold = evaluation.threshold()
    low, high = float(np.quantile(values, 0.005)), float(values.max())
    across = plots.logarithmic(max(low, high * 1e-4), high * 1.01, "Jacobian norm")
    edges = _edges(across, threshold)
    for kind, series, norms, text in sets:
        finite = np.clip(norms[np.isfinite(norms)], across.low, across.high)
        if not len(finite):
            continue
        heights = np.histogram(finite, edges)[0] / len(finite)
        frame = Frame(across, plots.linear(0.0, float(heights.max()), "% of images", scale=100), height=164)
        marks = [plots.bars(frame, edges.tolist(), heights.tolist(), series)]
        if threshold is not None and across.low < threshold < across.high:
            marks.append(plots.rule(frame, threshold, f"t = {threshold:.3g}"))
        caption = f"Images: {text}. What lies right of t is rejected by the score jacobian."
        if (norms < across.low).any():
            caption += " The first bar holds all smaller ones, too."
        yield Figure(
            f"Jacobian norm: {kind}",
            frame.svg(marks, f"histogram of the Jacobian norm, {kind}"),
            (),
            caption,
        )


def _edges(across: plots.Axis, threshold: float | None) -> Values:
    """Edges of bins, one of them at the threshold: no bar holds rejected and accepted ones."""
    if threshold is None or not across.low < threshold < across.high:
        return np.geomspace(across.low, across.high, _BINS + 1)
    below = min(max(1, round(_BINS * across.at(threshold))), _BINS - 1)
    left = np.geomspace(across.low, threshold, below + 1)
    return np.concatenate([left, np.geomspace(threshold, across.high, _BINS - below + 1)[1:]])


def _tightness(evaluation: Evaluation, norm: Norm) -> Figure | None:
    """Radius against the smallest distance found, on accepted images, as the audit of radii counts them."""
    if norm not in evaluation.aimed and not evaluation.results.sought(norm):
        return None
    distance = np.where(evaluation.right, evaluation.nearest(norm), np.inf)
    distance = np.minimum(distance, evaluation.aimed.get(norm, np.inf))
    radius = evaluation.radius(norm)
    shown: Flags = (
        evaluation.accepted(evaluation.results.served) & np.isfinite(distance) & np.isfinite(radius)
    )
    if not shown.any():
        return None
    inside = shown & (distance < radius)
    ends = float(np.quantile(np.concatenate([distance[shown], radius[shown]]), 0.995)) * 1.02
    frame = Frame(
        plots.linear(0, ends, f"smallest distance found, {norm}"), plots.linear(0, ends, "radius as served")
    )
    limit = frame.x.high

    def points(flags: Flags) -> Points:
        clipped = np.minimum(distance[flags], limit), np.minimum(radius[flags], limit)
        return list(zip(*(values.tolist() for values in clipped), strict=True))

    marks = [
        plots.line(frame, [(0, 0), (limit, limit)], "pale"),
        plots.dots(frame, points(shown & ~inside), "c0"),
        plots.dots(frame, points(inside), "c6", size=3),
    ]
    legend = (("c0 dot", "held"), ("c6 dot", "attacked inside"), ("pale", "radius = distance"))
    served = next((one for one in evaluation.results.radii if one.served and one.norm == norm), None)
    found = f"n = {int(shown.sum())} accepted images, {int(inside.sum())} attacked inside."
    if served is not None:
        found = f"Radius: {words.radius(served)}. {found}"
    if (distance[shown] > limit).any() or (radius[shown] > limit).any():
        found += " Dots at the edge lie beyond it."
    return Figure(f"Radius against {norm} distance", frame.svg(marks, f"tightness {norm}"), legend, found)
