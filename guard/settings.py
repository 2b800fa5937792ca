"""The environment variables an operator sets. No request and no flag of a client changes what they say."""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import guard
from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.images import Limits

_Number = TypeVar("_Number", int, float)

SHIPPED_BUNDLE = Path("models") / "cifar10"

VARIABLES = frozenset(
    f"GUARD_{name}"
    for name in (
        "DATA",
        "EXPOSE_SCORES",
        "MAX_BATCH",
        "MAX_BYTES",
        "MAX_PIXELS",
        "MAX_UPLOADS",
        "METRICS_DIR",
        "MIN_RADIUS_L2",
        "MIN_RADIUS_LINF",
        "MODEL",
        "TIMEOUT",
        "UPLOAD_SECONDS",
        "WORKERS",
    )
)
"""All that guard reads."""

_NEAR = 0.85
"""How like a variable another name has to be to be its misspelling; others, such as those that Kubernetes
makes of a service's name, are none of our business.
"""


def bundle_path(given: str | Path | None = None, environment: Mapping[str, str] = os.environ) -> Path:
    """The bundle to use: what was given, else `$GUARD_MODEL`, else the shipped `models/cifar10`.

    The shipped one is looked for in the working folder, then beside the package's source. The folder is not
    checked here.
    """
    named = given or environment.get("GUARD_MODEL")
    if named:
        return Path(named)
    beside_source = Path(guard.__file__).resolve().parent.parent / SHIPPED_BUNDLE
    return beside_source if beside_source.is_dir() and not SHIPPED_BUNDLE.is_dir() else SHIPPED_BUNDLE


@dataclass(frozen=True)
class Policy:
    """What an operator demands beyond the calibrated detector.

    `min_radius_l2`, `min_radius_linf`: accept only images whose radius is at least this (pixels, [0, 1]
    scale); None: off. `expose_scores`: whether answers carry the detector's score and all digits of
    margin and radii, which tell an attacker in which direction to go.
    """

    min_radius_l2: float | None = None
    min_radius_linf: float | None = None
    expose_scores: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Policy":
        """`GUARD_MIN_RADIUS_L2`, `GUARD_MIN_RADIUS_LINF`, `GUARD_EXPOSE_SCORES`.

        Raises `UsageError` for a value that means nothing and for a variable's name that is nearly one of
        ours: a misspelt policy must not be one switched off.
        """
        for name in sorted(environment):
            if name.startswith("GUARD_") and name not in VARIABLES:
                for meant in difflib.get_close_matches(name, VARIABLES, 1, _NEAR):
                    raise UsageError(f"{name} is no setting. Is {meant} meant?")
        return cls(
            min_radius_l2=_radius(environment, "GUARD_MIN_RADIUS_L2"),
            min_radius_linf=_radius(environment, "GUARD_MIN_RADIUS_LINF"),
            expose_scores=_switch(environment, "GUARD_EXPOSE_SCORES", default=True),
        )


def upload_limits(environment: Mapping[str, str] = os.environ) -> "Limits":
    """What an image may cost: `GUARD_MAX_BYTES`, `GUARD_MAX_PIXELS`. Raises what `positive` raises."""
    from guard.images import LIMITS, MOST_PIXELS, Limits

    pixels = positive(environment, "GUARD_MAX_PIXELS", LIMITS.pixels)
    if pixels > MOST_PIXELS:
        raise UsageError(
            f"GUARD_MAX_PIXELS is {pixels}: expected at most {MOST_PIXELS}, for Pillow decodes no more."
        )
    return Limits(bytes=positive(environment, "GUARD_MAX_BYTES", LIMITS.bytes), pixels=pixels)


def positive(environment: Mapping[str, str], variable: str, default: _Number) -> _Number:
    """A positive number, whole where the default is, which stands where the variable is not set or empty.

    Raises `UsageError` for anything else.
    """
    text = environment.get(variable, "").strip()
    if not text:
        return default
    try:
        value = type(default)(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        kind = "whole number" if type(default) is int else "number"
        raise UsageError(f"{variable} is {text!r}: expected a positive {kind}, such as {default}.")
    return value


def _radius(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{name} is {text!r}: expected a radius in pixels of the [0, 1] scale, such as 0.1.")
    return value or None


def _switch(environment: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = environment.get(name, "").strip().lower()
    if not text:
        return default
    if text in {"1", "true", "yes", "on"}:
        return True
    if text in {"0", "false", "no", "off"}:
        return False
    raise UsageError(f"{name} is {text!r}: expected 0 or 1.")
