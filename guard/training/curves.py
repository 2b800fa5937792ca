"""The page of a run's curves: one self-contained HTML file of a few SVG panels, made from the run's files.

It needs no script and no network, is well-formed XML, and reloads itself while the run goes on.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from guard import plots
from guard.training import grammar

CURVES = "curves.html"

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

_RELOAD_SECONDS = 10


@dataclass(frozen=True)
class Curve:
    """`points` are (epochs done, value) by epoch; a value that is not finite interrupts the line.

    `latest` is what the legend states: the value now.
    """

    label: str
    points: plots.Points
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
<style>{plots.STYLE}{_STYLE}</style>
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
        f"<figure><figcaption><h2>{escape(panel.title)}{unit}</h2>"
        f'<ul class="legend">{legend}</ul></figcaption>'
        f"{_drawing(panel, epochs)}</figure>"
    )


def _text(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def _drawing(panel: Panel, epochs: int) -> str:
    values = [value for curve in panel.curves for _, value in curve.points if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0 / panel.scale)
    frame = plots.Frame(plots.counted(epochs, "epochs"), plots.linear(low, high, scale=panel.scale))
    marks = [plots.line(frame, curve.points, f"c{index}") for index, curve in enumerate(panel.curves)]
    return frame.svg(marks, f"{panel.title} over {epochs} epochs")


_STYLE = """
body { margin: 0; padding: 20px; background: var(--ground); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0; font-size: 20px; }
header p { margin: 2px 0 16px; color: var(--muted); overflow-wrap: anywhere; }
main { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
figure { margin: 0; padding: 12px 14px 8px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
h2 { margin: 0; font-size: 14px; }
small { color: var(--muted); font-weight: 400; font-size: 12px; }
"""
