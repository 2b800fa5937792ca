"""The page of a run's curves: one self-contained HTML file of a few SVG panels, made from the run's files.

It needs no script and no network, is well-formed XML, and reloads itself while the run goes on.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from guard.training import grammar

CURVES = "curves.html"

Points = Sequence[tuple[float, float]]

# What a logged term is called and measured in, where the name alone does not say it.
_UNITS = {
    "gradient_l2": "loss per unit of l2 distance",
    "gradient_l1": "loss per unit of linf distance",
    "lipschitz": "loss per unit of l2 distance",
    "gradient_penalty": "squared loss per unit of distance",
    "stability": "squared l2 distance of probabilities, summed over the batch",
    "dense_manifold": "squared l2 distance of probabilities, weighted and summed",
    "hamming": "softened Hamming distance of activation patterns",
}
_ACCURACIES = {"train_accuracy": "training batches", "held_out_accuracy": "held-out images"}
_LOSSES = {"loss": "loss", "data": "data term"}
_NO_CURVES = {"epoch", "seconds", "learning_rate", *_ACCURACIES, *_LOSSES}

_MOST_POINTS = 400  # of a curve: more than a panel has pixels across
_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 38
_DIGIT = 7  # how wide one is at most
_RELOAD_SECONDS = 10


@dataclass(frozen=True)
class Curve:
    """`points` are (epochs done, value) by epoch; a value that is not finite interrupts the line.

    `latest` is what the legend states: the value now.
    """

    label: str
    points: Points
    latest: float


@dataclass(frozen=True)
class Panel:
    """One diagram. `scale` multiplies what is written at the axis and in the legend: 100 for percent."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: float = 1.0


def page(name: str, config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The page of the run `name` from its `config.json` and the lines of its `metrics.jsonl`.

    Any metric that lines hold gets a curve; lines without it leave a gap.
    """
    settings, data = config["settings"], config["data"]
    epochs = int(settings["epochs"])
    lines = [line for line in metrics if "epoch" in line]
    tested = next((line for line in metrics if "test_accuracy" in line), {})
    done = int(lines[-1]["epoch"]) if lines else 0
    finished = done >= epochs
    facts = [
        f"{settings['architecture']} on {data['name']}",
        " ".join(settings["regularizers"]),
        f"{done} of {epochs} epochs",
    ]
    seconds = _number(lines[-1].get("seconds")) if lines else math.nan
    if math.isfinite(seconds):
        facts.append(_duration(seconds))
    if tested:
        facts.append(f"test accuracy {tested['test_accuracy']:.2%} of {tested['test_images']:,} images")
    reload = "" if finished else f'<meta http-equiv="refresh" content="{_RELOAD_SECONDS}" />'
    drawn = [_figure(panel, epochs) for panel in panels(settings, lines)]
    body = "\n".join(drawn) if drawn else "<p>The first epoch is under way.</p>"
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
{reload}
<title>{escape(name)}: {done} of {epochs} epochs</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(name)}</h1><p>{" · ".join(map(escape, facts))}</p></header>
<main>
{body}
</main>
</body>
</html>
"""


def panels(settings: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Loss, accuracy, every other logged term, the learning rate, and the hyperparameters that ramp."""
    if not lines:
        return []
    terms = dict.fromkeys(name for line in lines for name in line if name not in _NO_CURVES)
    found = [
        Panel("loss", "nats per image", _curves(_LOSSES, lines)),
        Panel("accuracy", "%", _curves(_ACCURACIES, lines), scale=100),
        *(Panel(_words(name), _UNITS.get(name, ""), _curves({name: _words(name)}, lines)) for name in terms),
        Panel("learning rate", "at the end of the epoch", _curves({"learning_rate": "learning rate"}, lines)),
        *_ramps(settings, int(lines[-1]["epoch"])),
    ]
    return [panel for panel in found if panel.curves]


def _curves(names: Mapping[str, str], lines: Sequence[Mapping[str, Any]]) -> tuple[Curve, ...]:
    return tuple(
        Curve(
            label,
            [(float(line["epoch"]), _number(line.get(name))) for line in lines],
            _number(lines[-1].get(name)),
        )
        for name, label in names.items()
        if any(name in line for line in lines)
    )


def _number(value: object) -> float:
    """A logged value; what floating point cannot lay an axis through counts as 0, or as not finite."""
    number = float(value) if isinstance(value, int | float) else math.nan
    if 1e-300 < abs(number) < 1e300:
        return number
    return 0.0 if abs(number) < 1 else math.nan


def _ramps(settings: Mapping[str, Any], done: int) -> Iterable[Panel]:
    """A panel over the whole of training for every ramp."""
    epochs = int(settings["epochs"])
    for text in settings["regularizers"]:
        for key, ramp in grammar.parse(text).ramps.items():
            shares = sorted({0.0, ramp.start, ramp.stop, 1.0})
            points = [(share * epochs, ramp.at(share)) for share in shares]
            curve = Curve(key, points, ramp.at(done / epochs))
            yield Panel(f"{text.partition(':')[0]}: {key}", "as scheduled", (curve,))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _figure(panel: Panel, epochs: int) -> str:
    """A panel as HTML: title and unit, legend with last values, and the drawing."""
    legend = "".join(
        f'<li class="c{index}">{escape(curve.label)} <b>{_text(curve.latest * panel.scale)}</b></li>'
        for index, curve in enumerate(panel.curves)
    )
    unit = f" <small>{escape(panel.unit)}</small>" if panel.unit else ""
    return (
        f"<figure><figcaption><h2>{escape(panel.title)}{unit}</h2><ul>{legend}</ul></figcaption>"
        f"{_drawing(panel, epochs)}</figure>"
    )


def _text(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def _drawing(panel: Panel, epochs: int) -> str:
    values = [value for curve in panel.curves for _, value in curve.points if math.isfinite(value)]
    heights = ticks(min(values) * panel.scale, max(values) * panel.scale) if values else [0.0, 1.0]
    low, high = heights[0] / panel.scale, heights[-1] / panel.scale
    texts = labels(heights)
    left = max(_LEFT, 10 + _DIGIT * max(map(len, texts)))

    def across(epoch: float) -> float:
        return left + (_WIDTH - left - _RIGHT) * epoch / epochs

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)

    about = f"{escape(panel.title)} over {epochs} epochs"
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" xmlns="http://www.w3.org/2000/svg"'
    parts = [f'<svg {box} role="img" aria-label="{about}">']
    for height, text in zip(heights, texts, strict=True):
        y = up(height / panel.scale)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{_WIDTH - _RIGHT}" />')
        parts.append(f'<text class="y" x="{left - 6}" y="{y + 4:.1f}">{text}</text>')
    for epoch in epoch_ticks(epochs):
        x = across(epoch)
        parts.append(f'<path class="tick" d="M{x:.1f} {_HEIGHT - _BOTTOM}v4" />')
        parts.append(f'<text class="x" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}">{epoch}</text>')
    parts.append(f'<text class="x" x="{(left + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 4}">epochs</text>')
    for index, curve in enumerate(panel.curves):
        parts.append(f'<g class="c{index}">{_line(curve.points, across, up)}</g>')
    return "".join([*parts, "</svg>"])


def _line(points: Points, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """The runs of finite points as lines, and dots for those that stand alone."""
    runs: list[list[tuple[float, float]]] = [[]]
    for epoch, value in thinned(points):
        if math.isfinite(value):
            runs[-1].append((across(epoch), up(value)))
        elif runs[-1]:
            runs.append([])
    drawn = []
    for run in filter(None, runs):
        corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in run)
        if len(run) == 1:
            drawn.append(f'<circle cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="3" />')
        else:
            drawn.append(f'<path d="M{corners}" />')
    return "".join(drawn)


def thinned(points: Points) -> Points:
    """At most `_MOST_POINTS` points: of every stretch its lowest and highest, so that no peak is lost.

    The last point stays. A stretch with a value that is not finite keeps that one instead of its lowest.
    """
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / (_MOST_POINTS - 1))
    kept = []
    for start in range(0, len(points) - 1, size):
        stretch = points[start : min(start + size, len(points) - 1)]
        # A broken value sorts lowest, so that the gap stays a gap.
        ranked = sorted(stretch, key=lambda point: point[1] if math.isfinite(point[1]) else -math.inf)
        kept += sorted({ranked[0][0]: ranked[0], ranked[-1][0]: ranked[-1]}.values(), key=lambda p: p[0])
    return [*kept, points[-1]]


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round values at one distance, 1, 2 or 5 times a power of ten, that span both ends."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: a little room around it
        room = abs(high) / 10 or 1.0
        low, high = low - room, high + room
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    steps = (factor * power for factor in (1, 2, 5) if factor * power >= (high - low) / 4)
    distance = next(steps, 10 * power)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [step * distance for step in range(first, last + 1)]


def labels(heights: Sequence[float]) -> list[str]:
    """Ticks as text, all with as many digits as their distance needs."""
    power = math.floor(math.log10(heights[1] - heights[0]) + 1e-9)
    largest = max(map(abs, heights))
    if 1e-3 <= largest < 1e7:
        return [f"{height + 0.0:.{max(0, -power)}f}" for height in heights]
    digits = max(0, math.floor(math.log10(largest) + 1e-9) - power)
    return [f"{height:.{digits}e}" for height in heights]


def epoch_ticks(epochs: int) -> list[int]:
    """0, whole epochs at a round distance, at most seven in all."""
    distance = next(
        factor * 10**power for power in range(10) for factor in (1, 2, 5) if factor * 10**power * 6 >= epochs
    )
    return list(range(0, epochs + 1, distance))


_STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f8; --card: #fff; --ink: #161a22; --muted: #596273;
  --line: #e1e5ec; --c0: #3b52d9; --c1: #c2571a; }
@media (prefers-color-scheme: dark) { :root { --ground: #0d1015; --card: #161a21; --ink: #e9ecf2;
  --muted: #98a2b3; --line: #282e39; --c0: #93a5ff; --c1: #f0a36b; } }
body { margin: 0; padding: 20px; background: var(--ground); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0; font-size: 20px; }
header p { margin: 2px 0 16px; color: var(--muted); overflow-wrap: anywhere; }
main { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
figure { margin: 0; padding: 12px 14px 8px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
h2 { margin: 0; font-size: 14px; }
small { color: var(--muted); font-weight: 400; font-size: 12px; }
ul { display: flex; flex-wrap: wrap; gap: 0 16px; margin: 2px 0 6px; padding: 0; list-style: none;
  font-size: 12px; color: var(--muted); }
li b { color: var(--ink); font-variant-numeric: tabular-nums; }
li::before { content: ""; display: inline-block; width: 14px; margin-right: 6px; vertical-align: middle;
  border-top: 2px solid var(--c0); }
li.c1::before { border-top: 2px dashed var(--c1); }
svg { display: block; width: 100%; height: auto; }
text { font-size: 11px; fill: var(--muted); font-variant-numeric: tabular-nums; }
text.x { text-anchor: middle; }
text.y { text-anchor: end; }
path { fill: none; }
.grid, .tick { stroke: var(--line); }
g { stroke-width: 2; stroke-linejoin: round; }
g.c0 { stroke: var(--c0); }
g.c1 { stroke: var(--c1); stroke-dasharray: 5 3; }
circle { stroke: none; }
g.c0 circle { fill: var(--c0); }
g.c1 circle { fill: var(--c1); }
"""
