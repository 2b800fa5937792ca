"""Sections of a bundle's `card.md`, above all calibration's: what was promised and measured, and how."""

import re
import shlex
from typing import Any

from guard.bundle import Calibration, RadiusCalibration, Share
from guard.data import FOLDS

HEADING = "## Calibration"
ATTACKS = "## Attacks"
UNCALIBRATED = f"""\
{HEADING}

Not done yet: `guard calibrate` sets the threshold, fits the radii and measures both. Until then the bundle
cannot be served.
"""
UNATTACKED = f"""\
{ATTACKS}

Not done with this calibration yet: `guard evaluate` attacks the bundle, `guard report --markdown` puts the
outcome here.
"""


def with_calibration(text: str, calibration: Calibration) -> str:
    """The card with its section on calibration replaced, or added at the end."""
    return with_section(text, calibration_section(calibration))


def without_attacks(text: str) -> str:
    """The card without what attacks did to another calibration, where it says so."""
    return with_section(text, UNATTACKED) if f"\n{ATTACKS}\n" in f"\n{text}" else text


def with_section(text: str, section: str) -> str:
    """The card with a section, its `## ` heading first, in place of one of that heading, or at the end."""
    heading = re.escape(section.split("\n", 1)[0])
    known = re.compile(rf"^{heading}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if known.search(text):
        return known.sub(lambda found: section + "\n" * (found.end() < len(text)), text)
    return f"{text.rstrip()}\n\n{section}" if text.strip() else section


def calibration_section(calibration: Calibration) -> str:
    """Detection and radii in Markdown, from the heading on."""
    realized, predicted = calibration.realized_fpr, calibration.predicted_fpr
    promise = (
        "on average over calibration sets"
        if calibration.delta is None
        else f"with probability {percent(1 - calibration.delta)} over calibration sets"
    )
    data = calibration.data
    lines = [
        HEADING,
        "",
        f"On {data['n']} images of `{data['name']}` (sha256 `{data['digest']}`), split into the folds "
        + ", ".join(f"{name} ({calibration.folds[name]})" for name in FOLDS if name in calibration.folds)
        + f" with seed {calibration.seed}. Figures come from the report fold, to which nothing "
        "was fitted; they are too kind where settings were chosen after looking at them.",
        "",
        f"    {_command(calibration.provenance.get('arguments', {}))}",
        "",
        "| detection | |",
        "|---|---|",
        f"| score | {calibration.score} |",
        f"| threshold | {calibration.threshold:.6g}, from {calibration.n} images |",
        f"| promised false positive rate | at most {percent(calibration.fpr)}, {promise} |",
        (
            f"| predicted on the report fold ({predicted.level:.0%}) "
            f"| {predicted.lower:.1%} to {predicted.upper:.1%} |"
        ),
        f"| realized | {_share(realized)} |",
    ]
    if calibration.accuracy is not None:
        lines.append(f"| accuracy | {_share(calibration.accuracy)} |")
    lines += [
        f"| same decision as the full Jacobian's, {entry.images} | {entry.agree} of {entry.n} |"
        for entry in calibration.agreement
    ]
    pairs = [("l2", calibration.l2), ("linf", calibration.linf)]
    rows: list[tuple[str, list[str]]] = [
        ("mean omega-bound radius (estimate)", [f"{radii.mean_radius:.4f}" for _, radii in pairs]),
        ("mean smallest attack distance", [f"{radii.mean_distance:.4f}" for _, radii in pairs]),
        ("tightness: the first over the second", [f"{radii.tightness:.2f}" for _, radii in pairs]),
        ("attacks succeed inside the radius", [_violations(radii) for _, radii in pairs]),
        *(
            (f"conformal radius at alpha {percent(alpha)}", [_conformal(radii, alpha) for _, radii in pairs])
            for alpha in sorted({scale.alpha for _, radii in pairs for scale in radii.conformal})
        ),
    ]
    lines += ["", "| radii, accepted images, pixels in [0, 1] | l2 | linf |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    if calibration.caveat is not None:
        lines += ["", calibration.caveat]
    return "\n".join(lines) + "\n"


def percent(promised: float) -> str:
    """A promised share with all its digits: rounded, it would promise something else."""
    return f"{100 * promised:.10g}%"


def _share(share: Share) -> str:
    return (
        f"{share.value:.2%} ({share.count} of {share.n}; 95% interval {share.lower:.2%} to {share.upper:.2%})"
    )


def _violations(radii: RadiusCalibration) -> str:
    share = radii.violations
    return f"{share.count} of {share.n} (at most {share.upper:.2%} with {share.level:.0%} confidence)"


def _conformal(radii: RadiusCalibration, alpha: float) -> str:
    scale = next((scale for scale in radii.conformal if scale.alpha == alpha), None)
    if scale is None:
        return "none"
    if scale.violations is None or scale.mean_radius is None:
        return f"{scale.kappa:.3f} of the first-order radius"
    share = scale.violations
    return (
        f"{scale.mean_radius:.4f} on average; attacked inside: {share.count} of {share.n} (at most "
        f"{share.upper:.2%})"
    )


def _command(arguments: dict[str, Any]) -> str:
    """The command line that `arguments` came from; defaults are written out."""
    words = ["guard", "calibrate"]
    if arguments.get("bundle"):
        words.append(str(arguments["bundle"]))
    for name, value in sorted(arguments.items()):
        if name not in ("bundle",) and value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)
