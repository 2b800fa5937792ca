"""Regularizers as they are written: `tulip:eps=0.01,weight=0.1`, several side by side.

A hyperparameter is a number (0.1), a fraction (8/255), or a ramp `0.8..8@0.2..0.8`: 0.8 during the first
fifth of training, 8 during the last, straight in between.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import get_args

import torch
from torch import Tensor, nn

from guard.errors import UsageError
from guard.training import baselines, manifold, regularizers
from guard.training.passes import Passes, RegularizedLoss, relu_calls
from guard.training.schedules import Ramp

REGULARIZERS: dict[str, Callable[..., RegularizedLoss]] = {
    "none": regularizers.none,
    "tv-l2": regularizers.tv_l2,
    "tv-l1": regularizers.tv_l1,
    "lipschitz": regularizers.lipschitz,
    "tulip": regularizers.tulip,
    "gradient-penalty-l2": regularizers.gradient_penalty_l2,
    "gradient-penalty-l1": regularizers.gradient_penalty_l1,
    "tv-l2-exact": regularizers.tv_l2_exact,
    "tv-l1-exact": regularizers.tv_l1_exact,
    "lipschitz-exact": regularizers.lipschitz_exact,
    "tulip-exact": regularizers.tulip_exact,
    "gradient-penalty-l2-exact": regularizers.gradient_penalty_l2_exact,
    "gradient-penalty-l1-exact": regularizers.gradient_penalty_l1_exact,
    "stability": manifold.stability,
    "hamming": manifold.hamming,
    "dense-manifold": manifold.dense_manifold,
    "adversarial-l2": baselines.adversarial_l2,
    "adversarial-linf": baselines.adversarial_linf,
    "free-linf": baselines.free_linf,
    "gaussian": baselines.gaussian,
}

_READS_ACTIVATIONS = frozenset({"hamming"})

_FULL_PRECISION = frozenset({"lipschitz", "tulip"})  # their finite differences are, whatever the passes are

# These train on other points in place of the images, so that only one of them can be chosen.
_ELSEWHERE = frozenset(
    {"tv-l2", "tv-l1", "tulip", "adversarial-l2", "adversarial-linf", "free-linf", "gaussian"}
)


Value = float | int | str | Ramp


@dataclass(frozen=True)
class Regularizer:
    """A regularizer with its hyperparameters."""

    name: str
    settings: Mapping[str, Value]

    def __call__(self, passes: Passes) -> RegularizedLoss:
        """The regularizer's part of a batch's loss, at the passes' progress."""
        return REGULARIZERS[self.name](passes, **self.at(passes.progress))

    def at(self, progress: float) -> dict[str, float | int | str]:
        """The hyperparameters when the share `progress` of training is done."""
        return {
            key: value.at(progress) if isinstance(value, Ramp) else value
            for key, value in self.settings.items()
        }

    @property
    def ramps(self) -> dict[str, Ramp]:
        """The hyperparameters that change over training."""
        return {key: value for key, value in self.settings.items() if isinstance(value, Ramp)}

    @property
    def too_fine_for_bf16(self) -> bool:
        """Whether its finite differences would be mostly rounding where passes are bf16."""
        given = self.settings.get("h")
        steps = (given.first, given.last) if isinstance(given, Ramp) else (given,)
        fine = any(isinstance(h, float) and h < regularizers.HALF_PRECISION_STEP / 2 for h in steps)
        return fine and self.name not in _FULL_PRECISION

    @property
    def replays(self) -> int:
        """How many steps in a row use one batch."""
        default = signature(REGULARIZERS[self.name]).parameters.get("replays")
        return 1 if default is None else int(self.at(0).get("replays", default.default))

    @property
    def trains_elsewhere(self) -> bool:
        """Whether the network is trained on other points in place of the images."""
        return self.name in _ELSEWHERE and self.settings.get("form") != "penalty"


def parse(text: str) -> Regularizer:
    """The regularizer that `tulip:eps=0.01,weight=0.1` names, with its hyperparameters.

    Raises `UsageError` for an unknown name or hyperparameter, listing the known ones, and for a value that is
    missing, means nothing or would not be used.
    """
    name, _, settings = text.partition(":")
    if name not in REGULARIZERS:
        raise UsageError(f"unknown regularizer {name!r}: expected one of {', '.join(REGULARIZERS)}.")
    known = dict(list(signature(REGULARIZERS[name]).parameters.items())[1:])
    bound: dict[str, Value] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UsageError(f"regularizer {name} has no hyperparameter {key!r}: {takes}.")
        if key in bound:
            raise UsageError(f"regularizer {text!r} gives {key} twice.")
        bound[key] = _value(name, known[key], value)
    missing = [key for key, entry in known.items() if entry.default is Parameter.empty and key not in bound]
    if missing:
        example = ",".join([*filter(None, settings.split(",")), *(f"{key}=0.1" for key in missing)])
        raise UsageError(f"regularizer {name} needs {' and '.join(missing)}, as in {name}:{example}")
    if "form" in known and "h" in bound and bound.get("form") != "penalty":
        raise UsageError(
            f"regularizer {text!r}: h is the difference step of form=penalty: give both or neither."
        )
    return Regularizer(name, bound)


def parse_all(texts: Sequence[str]) -> list[Regularizer]:
    """Every text parsed; raises `UsageError` also, before any training, where two cannot be combined."""
    parsed = [parse(text) for text in texts]
    twice = next((text for text, one in zip(texts, parsed, strict=True) if parsed.count(one) > 1), None)
    if twice is not None:
        raise UsageError(f"regularizer {twice} is given twice: give it once, with twice the weight.")
    elsewhere = [
        text for text, regularizer in zip(texts, parsed, strict=True) if regularizer.trains_elsewhere
    ]
    if len(elsewhere) > 1:
        raise UsageError(
            f"{' and '.join(elsewhere)} each train on other points in place of the images: choose one."
        )
    return parsed


def check_precision(chosen: Sequence[Regularizer], precision: str) -> None:
    """Raises `UsageError` where a finite difference would be mostly the rounding of bf16."""
    for regularizer in chosen:
        if precision == "bf16" and regularizer.too_fine_for_bf16:
            raise UsageError(
                f"{regularizer.name}: under bf16 a difference over a step of {regularizer.settings['h']} is "
                "mostly rounding. Give --precision float32, leave h out (it is "
                f"{regularizers.HALF_PRECISION_STEP} then), or give {regularizers.HALF_PRECISION_STEP / 2} "
                "or more."
            )


def check_network(chosen: Sequence[Regularizer], model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raises `UsageError` where a regularizer asks for what the network, for images of `shape`, has not."""
    for regularizer in chosen:
        if regularizer.name in _READS_ACTIVATIONS and not relu_calls(model, shape):
            raise UsageError(
                f"{regularizer.name} compares what goes into ReLUs, and this network has none. Leave it out, "
                "or choose another --arch."
            )


def regularized_loss(chosen: Sequence[Regularizer], passes: Passes) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to minimize, and detached scalars for the log: `loss`, `data` and all regularizers' terms.

    The data term is the mean loss at the images, or the one that a regularizer trains on instead; penalties
    are added to it. At most one of `chosen` may train on other points.
    """
    passes.recording = any(regularizer.name in _READS_ACTIVATIONS for regularizer in chosen)
    passes.keeping_clean = not any(regularizer.trains_elsewhere for regularizer in chosen)
    parts = [regularizer(passes) for regularizer in chosen]
    elsewhere = [part.data for part in parts if part.data is not None]
    data = elsewhere[0] if elsewhere else passes.clean.losses.mean()
    loss = torch.stack([data, *(part.penalty for part in parts if part.penalty is not None)]).sum()
    terms: dict[str, Tensor] = {}
    for number, part in enumerate(parts, start=1):
        for name, value in part.terms.items():
            terms[f"{name}_{number}" if name in terms else name] = value
    return loss, {"loss": loss.detach(), "data": data.detach(), **terms}


def _value(name: str, parameter: Parameter, text: str) -> Value:
    choices = [choice for choice in get_args(parameter.annotation) if isinstance(choice, str)]
    if choices:
        if text not in choices:
            raise UsageError(f"regularizer {name}: {parameter.name} is {text!r}, not {' or '.join(choices)}.")
        return text
    if parameter.annotation is int:
        if not text.isdecimal() or int(text) == 0:
            raise UsageError(f"regularizer {name}: {parameter.name} is {text!r}, not a whole number above 0.")
        return int(text)
    if ".." in text:
        return _ramp(name, parameter, text)
    return _number(name, parameter, text)


def _ramp(name: str, parameter: Parameter, text: str) -> Ramp:
    values, _, shares = text.partition("@")
    first, _, last = values.partition("..")
    start, between, stop = (shares or "0..1").partition("..")
    try:
        ramp = Ramp(
            _number(name, parameter, first), _number(name, parameter, last), float(start), float(stop)
        )
    except ValueError:
        ramp = None
    if ramp is None or not between or not 0 <= ramp.start < ramp.stop <= 1:
        raise UsageError(
            f"regularizer {name}: {parameter.name} is {text!r}; a ramp is written FROM..TO@START..STOP, the "
            "last two shares of training from 0 to 1, as in 0.8..8@0.2..0.8."
        )
    return ramp


def _number(name: str, parameter: Parameter, text: str) -> float:
    upper, divided, lower = text.partition("/")
    try:
        number = float(upper) / float(lower) if divided else float(text)
    except (ValueError, ZeroDivisionError):
        number = float("nan")
    positive = parameter.name in ("h", "scale", "step")  # these divide, or lead nowhere
    if not 0 <= number < float("inf") or (positive and number == 0):
        kind = "above 0" if positive else "of 0 or more"
        raise UsageError(f"regularizer {name}: {parameter.name} is {text!r}, not a number {kind}.")
    return number
