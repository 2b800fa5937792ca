"""The data-stability curve as one self-contained SVG picture."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 44, 56
_COLOURS = ("#1f4e79", "#b8541a")


def picture(title: str, axis: str, eps: Sequence[float], shares: Mapping[str, Sequence[float]]) -> str:
    """Draws `shares`, curves in [0, 1] by name, over ascending `eps`; `axis` says what eps is.

    At most two curves, at least two points; the text is SVG 1.1, readable in light and dark surroundings.
    """
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    span = eps[-1] - eps[0] or 1.0

    def x(value: float) -> float:
        return _LEFT + (right - _LEFT) * (value - eps[0]) / span

    def y(share: float) -> float:
        return bottom - (bottom - _TOP) * share

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        "<style>text { font: 12px sans-serif }</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="20">{escape(title)}</text>',
    ]
    for tick in range(6):
        share, value = tick / 5, eps[0] + span * tick / 5
        lines += [
            f'<line x1="{_LEFT}" y1="{y(share):.1f}" x2="{right}" y2="{y(share):.1f}" stroke="#dddddd"/>',
            f'<text x="{_LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>',
            f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:.3g}</text>',
        ]
    lines.append(
        f'<text x="{(_LEFT + right) / 2:.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(axis)}</text>'
    )
    for number, ((name, curve), colour) in enumerate(zip(shares.items(), _COLOURS, strict=False)):
        points = " ".join(f"{x(e):.1f},{y(s):.1f}" for e, s in zip(eps, curve, strict=True))
        lines += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{_LEFT + 8}" y="{_TOP + 14 + 18 * number}" fill="{colour}">{escape(name)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
