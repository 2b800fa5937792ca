"""Small diagrams as SVG: axes with round ticks, lines, bands, histograms, dots; for light, dark and paper.

A `Frame` is two axes and a size. Marks (`line`, `band`, `bars`, ...) turn values into SVG within a frame,
under the class of their series: `c0` to `c7` are colours, `ink` and `pale` the text's own. `Frame.svg` puts
the axes behind them. A page takes the colours from `STYLE`; `standalone` makes a file of its own. No script,
no network; everything is well-formed XML, and texts are escaped here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Points = Sequence[tuple[float, float]]

SERIES = tuple(f"c{index}" for index in range(8))

_MOST_POINTS = 400  # of a line: more than a diagram has pixels across
_MOST_TICKS = 7
_CLOSEST = 0.12  # of an axis between two ticks, so that their texts do not meet
_DIGIT = 7  # how wide one is at most
_ASCENT = 4  # half a digit's height

_LIGHT = ("#3b52d9", "#c2571a", "#0b7a55", "#a1308f", "#7a5c00", "#0a7291", "#c21f3a", "#5b6470")
_DARK = ("#93a5ff", "#f0a36b", "#58d298", "#e58ad6", "#dcbc55", "#5cc8e6", "#ff8e8e", "#a9b2bf")


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in zip(SERIES, colours, strict=True))


STYLE = f"""
:root {{ color-scheme: light dark; --ground: #f4f5f8; --card: #fff; --ink: #161a22; --muted: #596273;
  --line: #e1e5ec; {_variables(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ground: #0d1015; --card: #161a21; --ink: #e9ecf2;
  --muted: #98a2b3; --line: #282e39; {_variables(_DARK)} }} }}
@media print {{ :root {{ color-scheme: light; --ground: #fff; --card: #fff; --ink: #000; --muted: #444;
  --line: #ddd; {_variables(_LIGHT)} }} }}
svg {{ display: block; width: 100%; height: auto; }}
text {{ font-size: 11px; fill: var(--muted); font-variant-numeric: tabular-nums; }}
text.x {{ text-anchor: middle; }}
text.y {{ text-anchor: end; }}
path {{ fill: none; }}
path.grid {{ stroke: var(--line); }}
path.tick {{ stroke: var(--muted); }}
path.rule {{ stroke: var(--ink); stroke-dasharray: 3 3; }}
svg g path {{ stroke: var(--series); stroke-width: 2; stroke-linejoin: round; }}
svg g path.bars {{ fill: var(--series); fill-opacity: 0.35; stroke-width: 1; }}
svg g path.band {{ fill: var(--series); fill-opacity: 0.16; stroke: none; }}
svg g path.whisker {{ stroke-width: 1.2; stroke-dasharray: none; }}
svg g circle {{ fill: var(--series); }}
svg g.dots circle {{ fill-opacity: 0.45; }}
svg g text {{ fill: var(--series); }}
{" ".join(f".{name} {{ --series: var(--{name}); }}" for name in SERIES)}
.ink {{ --series: var(--ink); }} .pale {{ --series: var(--muted); }}
svg g.c1 path, svg g.c4 path {{ stroke-dasharray: 6 3; }}
svg g.c2 path, svg g.c6 path {{ stroke-dasharray: 2 2.5; }}
svg g.c5 path {{ stroke-dasharray: 9 3 2 3; }}
svg g.pale path {{ stroke-dasharray: 1.5 3; }}
svg g path.bars, svg g path.band {{ stroke-dasharray: none; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 0 16px; margin: 2px 0 6px; padding: 0; list-style: none;
  font-size: 12px; color: var(--muted); }}
.legend b {{ color: var(--ink); font-variant-numeric: tabular-nums; }}
.legend li::before {{ content: ""; display: inline-block; width: 16px; margin-right: 6px;
  vertical-align: middle; border-top: 2px solid var(--series); }}
.legend .dot::before {{ width: 8px; height: 8px; border: 0; border-radius: 4px; background: var(--series); }}
.legend .c1::before, .legend .c4::before, .legend .c5::before {{ border-top-style: dashed; }}
.legend .c2::before, .legend .c6::before, .legend .pale::before {{ border-top-style: dotted; }}
"""


@dataclass(frozen=True)
class Axis:
    """From `low` to another value `high`; `ticks` are (value, text). Logarithmic ones need 0 < low < high."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    title: str = ""
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`. What a logarithm has not lies at `low`."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)


def linear(low: float, high: float, title: str = "", *, scale: float = 1.0) -> Axis:
    """An axis over the values, with round ends; `scale` multiplies what is written at it."""
    values = ticks(low * scale, high * scale)
    pairs = tuple((value / scale, text) for value, text in zip(values, labels(values), strict=True))
    return Axis(pairs[0][0], pairs[-1][0], pairs, title)


def shares(title: str = "") -> Axis:
    """An axis of shares in [0, 1], as percentages."""
    return Axis(0.0, 1.0, tuple((tick / 5, f"{20 * tick}%") for tick in range(6)), title)


def counted(count: int, title: str = "") -> Axis:
    """An axis from 0 to a whole number, ticks at whole ones, at most seven."""
    distance = next(
        factor * 10**power for power in range(10) for factor in (1, 2, 5) if factor * 10**power * 6 >= count
    )
    return Axis(0, count, tuple((tick, str(tick)) for tick in range(0, count + 1, distance)), title)


def logarithmic(low: float, high: float, title: str = "") -> Axis:
    """A logarithmic axis over positive values, its ends 1, 2 or 5 times a power of ten, with a few ticks."""
    grid = [(factor, power, factor * 10.0**power) for power in range(-12, 13) for factor in (1, 2, 5)]
    values = [value for _, _, value in grid]
    first = max([value for value in values if value <= low * (1 + 1e-9)], default=values[0])
    last = min([one for one in values if one >= high * (1 - 1e-9) and one > first], default=values[-1])
    for factors, every in (((1, 2, 5), 1), ((1, 5), 1), ((1,), 1), ((1,), 2), ((1,), 5)):
        shown = [one for f, p, one in grid if f in factors and p % every == 0 and first <= one <= last]
        closest = min((math.log(after / before) for before, after in pairwise(shown)), default=math.inf)
        if len(shown) <= _MOST_TICKS and closest >= _CLOSEST * math.log(last / first):
            break
    return Axis(first, last, tuple((value, f"{value:,.10g}") for value in shown), title, log=True)


@dataclass(frozen=True)
class Frame:
    """Two axes in a drawing of a width and a height, with room for their texts."""

    x: Axis
    y: Axis
    width: int = 380
    height: int = 230
    right: int = 20

    @property
    def left(self) -> int:
        """Room for the texts beside the upright axis."""
        return max(46, 10 + _DIGIT * max(len(text) for _, text in self.y.ticks))

    @property
    def top(self) -> int:
        """Room for the upright axis' title."""
        return 26 if self.y.title else 12

    @property
    def bottom(self) -> int:
        """Where the lower axis lies, from above."""
        return self.height - (38 if self.x.title else 24)

    def across(self, value: float) -> float:
        """From a value of the lower axis to the drawing's x."""
        return self.left + (self.width - self.left - self.right) * self.x.at(value)

    def up(self, value: float) -> float:
        """From a value of the upright axis to the drawing's y, which grows downwards."""
        return self.bottom - (self.bottom - self.top) * self.y.at(value)

    def svg(self, marks: Iterable[str], about: str) -> str:
        """The drawing: grid, ticks and titles, then the marks; `about` is what it is read out as."""
        box = f'viewBox="0 0 {self.width} {self.height}" xmlns="http://www.w3.org/2000/svg"'
        return "".join(
            [f'<svg {box} role="img" aria-label="{escape(about)}">', *self._axes(), *marks, "</svg>"]
        )

    def _axes(self) -> Iterable[str]:
        end = self.width - self.right
        for value, text in self.y.ticks:
            y = self.up(value)
            yield f'<path class="grid" d="M{self.left} {y:.1f}H{end}" />'
            yield f'<text class="y" x="{self.left - 6}" y="{y + _ASCENT:.1f}">{escape(text)}</text>'
        for value, text in self.x.ticks:
            x = self.across(value)
            yield f'<path class="tick" d="M{x:.1f} {self.bottom}v4" />'
            yield f'<text class="x" x="{x:.1f}" y="{self.bottom + 17}">{escape(text)}</text>'
        if self.x.title:
            middle = (self.left + end) / 2
            yield f'<text class="x" x="{middle}" y="{self.height - 4}">{escape(self.x.title)}</text>'
        if self.y.title:
            yield f'<text x="2" y="12">{escape(self.y.title)}</text>'


def line(frame: Frame, points: Points, series: str, *, dots: bool = False) -> str:
    """The runs of finite points as lines, and dots for those that stand alone (or, with `dots`, for all)."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in thinned(points):
        if math.isfinite(y):
            runs[-1].append((frame.across(x), frame.up(y)))
        elif runs[-1]:
            runs.append([])
    drawn = []
    for run in filter(None, runs):
        if len(run) > 1:
            drawn.append(f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in run)}" />')
        if len(run) == 1 or dots:
            drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" />' for x, y in run]
    return f'<g class="{series}">{"".join(drawn)}</g>'


def stairs(points: Points) -> Points:
    """The points of a function that jumps to each value where it stands, and holds it until the next."""
    held = []
    for (x, y), (following, _) in pairwise(points):
        held += [(x, y), (following, y)]
    return [*held, *points[-1:]]


def band(frame: Frame, lower: Points, upper: Points, series: str) -> str:
    """The ground between two lines."""
    corners = [*upper, *reversed(lower)]
    path = "L".join(f"{frame.across(x):.1f} {frame.up(y):.1f}" for x, y in corners)
    return f'<g class="{series}"><path class="band" d="M{path}Z" /></g>'


def whiskers(frame: Frame, intervals: Iterable[tuple[float, float, float]], series: str) -> str:
    """Upright intervals (x, lower, upper)."""
    drawn = "".join(
        f'<path class="whisker" d="M{frame.across(x):.1f} {frame.up(low):.1f}V{frame.up(high):.1f}" />'
        for x, low, high in intervals
    )
    return f'<g class="{series}">{drawn}</g>'


def bars(frame: Frame, edges: Sequence[float], heights: Sequence[float], series: str) -> str:
    """A histogram: heights (n,) between edges (n + 1,)."""
    ground = frame.up(frame.y.low)
    steps = [f"M{frame.across(edges[0]):.1f} {ground:.1f}"]
    for height, end in zip(heights, edges[1:], strict=True):
        steps.append(f"V{frame.up(height):.1f}H{frame.across(end):.1f}")
    return f'<g class="{series}"><path class="bars" d="{"".join(steps)}V{ground:.1f}Z" /></g>'


def dots(frame: Frame, points: Points, series: str, *, size: float = 2.5) -> str:
    """Small dots, so pale that many on one place show."""
    drawn = "".join(
        f'<circle cx="{frame.across(x):.1f}" cy="{frame.up(y):.1f}" r="{size:g}" />' for x, y in points
    )
    return f'<g class="dots {series}">{drawn}</g>'


def rule(frame: Frame, value: float, text: str) -> str:
    """An upright line at a value of the lower axis, with a text beside it."""
    x = frame.across(value)
    place, anchor = (x + 4, "start") if x < (frame.left + frame.width) / 2 else (x - 4, "end")
    return (
        f'<path class="rule" d="M{x:.1f} {frame.top}V{frame.bottom}" />'
        f'<text x="{place:.1f}" y="{frame.top + 9}" style="text-anchor: {anchor}">{escape(text)}</text>'
    )


def standalone(frame: Frame, marks: Iterable[str], title: str, names: Sequence[tuple[str, str]]) -> str:
    """A drawing as a file of its own, with its title and the names of its series above it: (class, text)."""
    above = 30 + 18 * len(names)
    legend = "".join(
        f'<g class="{series}"><text x="{frame.left}" y="{38 + 18 * row - above}">{escape(name)}</text></g>'
        for row, (series, name) in enumerate(names)
    )
    box = f"0 {-above} {frame.width} {frame.height + above}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">\n'
        f"<style>{STYLE}text {{ font-family: sans-serif; }} rect {{ fill: var(--card); }}</style>\n"
        f'<rect y="{-above}" width="100%" height="100%" />'
        f'<text x="{frame.left}" y="{18 - above}">{escape(title)}</text>\n'
        f"{legend}\n{''.join([*frame._axes(), *marks])}\n</svg>\n"
    )


def thinned(points: Points) -> Points:
    """At most 400 points: of every stretch its lowest and highest, so that no peak is lost.

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


def labels(values: Sequence[float]) -> list[str]:
    """Ticks as text, all with as many digits as their distance needs."""
    power = math.floor(math.log10(values[1] - values[0]) + 1e-9)
    largest = max(map(abs, values))
    if 1e-3 <= largest < 1e7:
        return [f"{value + 0.0:.{max(0, -power)}f}" for value in values]
    digits = max(0, math.floor(math.log10(largest) + 1e-9) - power)
    return [f"{value:.{digits}e}" for value in values]
