"""The data-stability curve as one self-contained SVG picture."""

from collections.abc import Mapping, Sequence

from guard import plots


def picture(title: str, axis: str, eps: Sequence[float], shares: Mapping[str, Sequence[float]]) -> str:
    """Draws `shares`, curves in [0, 1] by name, over ascending `eps`; `axis` says what eps is.

    At most eight curves, at least two points; the text is SVG 1.1 with colours for light and dark.
    """
    end = eps[-1] if eps[-1] > eps[0] else eps[0] + 1.0
    values = [eps[0] + (end - eps[0]) * tick / 5 for tick in range(6)]
    across = plots.Axis(eps[0], end, tuple((value, f"{value:.3g}") for value in values), axis)
    frame = plots.Frame(across, plots.shares(), width=640, height=340)
    named = list(zip(plots.SERIES, shares.items(), strict=False))
    marks = [plots.line(frame, list(zip(eps, curve, strict=True)), series) for series, (_, curve) in named]
    return plots.standalone(frame, marks, title, [(series, name) for series, (name, _) in named])
