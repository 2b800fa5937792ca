"""Regularizers: what makes a classifier's loss change slowly around its training images.

Each is a function `(passes, **hyperparameters) -> RegularizedLoss`; `passes` holds one batch and the passes
made over it, so that regularizers share them. L is the cross-entropy, g_i the gradient of L(x_i, y_i) by
x_i, and d_i a direction made from g_i, never differentiated itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, signature
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from guard.errors import UsageError


@dataclass(frozen=True)
class Output:
    """One pass: `logits` (B, K) and `losses` (B,), every image's cross-entropy, both float32 or wider."""

    logits: Tensor
    losses: Tensor


@dataclass(frozen=True)
class RegularizedLoss:
    """What one regularizer makes of a batch.

    `penalty`, a scalar with its weight, is added to the data term. `data`, where given, is the data term: the
    mean loss at other points, on which the network is trained instead of the images. `terms` are detached
    scalars for the log.
    """

    penalty: Tensor | None = None
    data: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)


Regularizer = Callable[["Passes"], RegularizedLoss]


class Passes:
    """One training batch, images (B, C, H, W) in [0, 1] and labels (B,), and the passes made over it.

    Passes normalize by the statistics of their own batch; only the first updates BatchNorm's running
    statistics. `generator` is the source of all that regularizers draw; `autocast` is the type that
    convolutions and products are computed in, None for the model's own. Losses are never narrower than
    float32.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.images = images
        self.labels = labels
        self.generator = generator
        self.autocast = autocast
        self._updated = False
        self._clean: Output | None = None
        self._gradient: Tensor | None = None

    def at(self, points: Tensor, labels: Tensor) -> Output:
        """A pass over `points` (N, C, H, W) with `labels` (N,)."""
        with (
            _statistics(self.model, update=not self._updated),
            torch.autocast(points.device.type, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            logits = self.model(points)
        self._updated = True
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return Output(logits, functional.cross_entropy(logits, labels, reduction="none"))

    def as_served(self, points: Tensor, labels: Tensor) -> Output:
        """A pass in inference mode and full precision, for points too few to be a batch of their own."""
        modes = {layer: layer.training for layer in self.model.modules()}
        self.model.eval()
        try:
            with torch.autocast(points.device.type, enabled=False):
                logits = self.model(points)
        finally:
            for layer, mode in modes.items():
                layer.training = mode
        return Output(logits, functional.cross_entropy(logits, labels, reduction="none"))

    @property
    def clean(self) -> Output:
        """The pass over the images themselves."""
        if self._clean is None:
            self._clean = self.at(self.images, self.labels)
        return self._clean

    @property
    def gradient(self) -> Tensor:
        """The rows g_i, (B, C, H, W), detached."""
        if self._gradient is None:
            points = self.images.detach().requires_grad_()
            self._clean = self.at(points, self.labels)
            (gradient,) = torch.autograd.grad(self._clean.losses.sum(), points, retain_graph=True)
            self._gradient = gradient.detach()
        return self._gradient

    def accuracy(self) -> Tensor | None:
        """The share of images that the clean pass labels rightly, where there was one."""
        if self._clean is None:
            return None
        return (self._clean.logits.detach().argmax(1) == self.labels).float().mean()


@contextmanager
def _statistics(model: nn.Module, *, update: bool) -> Iterator[None]:
    """Inside, BatchNorm layers in training mode update their running statistics or leave them alone."""
    layers = [
        layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    for layer in layers:
        layer.track_running_stats = update
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def image_norms(tensor: Tensor) -> Tensor:
    """l2 norm of every image: (B, ...) -> (B,)."""
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return norms


def unit_direction(gradient: Tensor) -> Tensor:
    """The direction g / ||g||_2 of every image, 0 where g is 0: (B, ...) -> (B, ...)."""
    norms = image_norms(gradient)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return gradient / norms.view(-1, *[1] * (gradient.dim() - 1))


def sign_direction(gradient: Tensor) -> Tensor:
    """The direction sign(g) / sqrt(N), along which L rises by ||g||_1 / sqrt(N): (B, ...) -> (B, ...)."""
    direction: Tensor = gradient.sign() / gradient[0].numel() ** 0.5
    return direction


def none(passes: Passes) -> RegularizedLoss:  # noqa: ARG001
    """Plain training."""
    return RegularizedLoss()


def tv_l2(
    passes: Passes, *, eps: float, form: Literal["step", "penalty"] = "step", h: float | None = None
) -> RegularizedLoss:
    """Total variation, eps * mean ||g||_2, by one step along d = g / ||g||_2.

    Form `step` trains on L(x + eps d), which is L(x) + eps ||g||_2 to first order (LIP 2.2); form `penalty`
    adds eps * mean (L(x + h d) - L(x)) / h (LIPGEN eq. 2.9).
    """
    direction = unit_direction(passes.gradient)
    terms = {"gradient_l2": image_norms(passes.gradient).mean()}
    if form == "step":
        return RegularizedLoss(data=_losses_along(passes, direction, eps).mean(), terms=terms)
    slopes = _slopes_along(passes, direction, _difference_step(passes, h))
    return RegularizedLoss(penalty=eps * slopes.mean(), terms=terms)


def lipschitz(passes: Passes, *, weight: float, h: float | None = None) -> RegularizedLoss:
    """The Lipschitz constant seen in the batch: weight * max_i ||g_i||_2 (LIPGEN eq. 2.6, LIP 3.1).

    Only the image with the largest gradient counts. Its norm is differentiated exactly, by double
    backpropagation through a pass over that image alone, in inference mode and full precision; with `h`, the
    finite difference (L(x + h d) - L(x)) / h takes its place.
    """
    slope = _steepest(passes, h)
    return RegularizedLoss(weight * slope, terms={"lipschitz": slope.detach()})


def tulip(passes: Passes, *, eps: float, weight: float, h: float | None = None) -> RegularizedLoss:
    """`tv-l2` with eps plus weight * `lipschitz`, for the price of `tv-l2` (LIP; LIPGEN 2.6 and 2.9)."""
    variation, constant = tv_l2(passes, eps=eps), lipschitz(passes, weight=weight, h=h)
    return RegularizedLoss(constant.penalty, variation.data, {**variation.terms, **constant.terms})


def gradient_penalty_l2(passes: Passes, *, weight: float, h: float | None = None) -> RegularizedLoss:
    """Squared gradient norm: weight * mean ((L(x + h d) - L(x)) / h)^2, d = g / ||g||_2 (SCALE Alg. 1)."""
    return _gradient_penalty(passes, unit_direction(passes.gradient), weight, h)


def gradient_penalty_l1(passes: Passes, *, weight: float, h: float | None = None) -> RegularizedLoss:
    """The same with d = sign(g) / sqrt(N): weight * mean ||g||_1^2 / N (SCALE 3.1)."""
    return _gradient_penalty(passes, sign_direction(passes.gradient), weight, h)


def _gradient_penalty(passes: Passes, direction: Tensor, weight: float, h: float | None) -> RegularizedLoss:
    penalty = _slopes_along(passes, direction, _difference_step(passes, h)).square().mean()
    return RegularizedLoss(weight * penalty, terms={"gradient_penalty": penalty.detach()})


def _losses_along(passes: Passes, direction: Tensor, step: float) -> Tensor:
    return passes.at(passes.images + step * direction, passes.labels).losses


def _slopes_along(passes: Passes, direction: Tensor, step: float) -> Tensor:
    return (_losses_along(passes, direction, step) - passes.clean.losses) / step


def _steepest(passes: Passes, h: float | None) -> Tensor:
    """The largest ||g_i||_2 of the batch, differentiable by the weights."""
    chosen = image_norms(passes.gradient).argmax().view(1)
    image, label = passes.images[chosen], passes.labels[chosen]
    if h is not None:
        ends = torch.cat([image, image + h * unit_direction(passes.gradient[chosen])])
        losses = passes.as_served(ends, label.repeat(2)).losses
        return (losses[1] - losses[0]) / h
    point = image.detach().requires_grad_()
    loss = passes.as_served(point, label).losses.sum()
    (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
    return image_norms(gradient).squeeze(0)


def _difference_step(passes: Passes, h: float | None) -> float:
    """The step of a finite difference: h where given, else what the precision of the passes allows."""
    if h is not None:
        return h
    return FULL_PRECISION_STEP if passes.autocast is None else HALF_PRECISION_STEP


FULL_PRECISION_STEP = 0.01
HALF_PRECISION_STEP = 0.1

REGULARIZERS: dict[str, Callable[..., RegularizedLoss]] = {
    "none": none,
    "tv-l2": tv_l2,
    "lipschitz": lipschitz,
    "tulip": tulip,
    "gradient-penalty-l2": gradient_penalty_l2,
    "gradient-penalty-l1": gradient_penalty_l1,
}


def parse(text: str) -> Regularizer:
    """The regularizer that `tulip:eps=0.01,weight=0.1` names, with its hyperparameters bound.

    Raises `UsageError` for an unknown name or hyperparameter, listing the known ones, and for a value that is
    missing or means nothing.
    """
    name, _, settings = text.partition(":")
    if name not in REGULARIZERS:
        raise UsageError(f"unknown regularizer {name!r}: expected one of {', '.join(REGULARIZERS)}.")
    function = REGULARIZERS[name]
    known = dict(list(signature(function).parameters.items())[1:])
    bound: dict[str, float | str] = {}
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
        example = ",".join(f"{key}=0.1" for key in missing)
        raise UsageError(f"regularizer {name} needs {' and '.join(missing)}, as in {name}:{example}")
    return partial(function, **bound)


def parse_all(texts: Sequence[str]) -> list[Regularizer]:
    """Every text parsed; raises `UsageError` also, before any training, where two cannot be combined."""
    parsed = [parse(text) for text in texts]
    elsewhere = [
        text
        for text, regularizer in zip(texts, parsed, strict=True)
        if isinstance(regularizer, partial)
        and regularizer.func in (tv_l2, tulip)
        and regularizer.keywords.get("form") != "penalty"
    ]
    if len(elsewhere) > 1:
        raise UsageError(
            f"{' and '.join(elsewhere)} both train on shifted images in place of the images; choose one of "
            "them."
        )
    return parsed


def _value(name: str, parameter: Parameter, text: str) -> float | str:
    choices = [choice for choice in get_args(parameter.annotation) if isinstance(choice, str)]
    if choices:
        if text not in choices:
            raise UsageError(f"regularizer {name}: {parameter.name} is {text!r}, not {' or '.join(choices)}.")
        return text
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    positive = parameter.name == "h"  # a step divides
    if not 0 <= number < float("inf") or (positive and number == 0):
        kind = "above 0" if positive else "of 0 or more"
        raise UsageError(f"regularizer {name}: {parameter.name} is {text!r}, not a number {kind}.")
    return number


def regularized_loss(regularizers: Sequence[Regularizer], passes: Passes) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to minimize, and detached scalars for the log: `loss`, `data` and all regularizers' terms.

    The data term is the mean loss at the images, or the one that a regularizer trains on instead; penalties
    are added to it. Raises `UsageError` where two regularizers want to train on different points.
    """
    parts = [regularizer(passes) for regularizer in regularizers]
    elsewhere = [part.data for part in parts if part.data is not None]
    if len(elsewhere) > 1:
        raise UsageError(
            "two of the regularizers train on shifted images in place of the images; choose one of them."
        )
    data = elsewhere[0] if elsewhere else passes.clean.losses.mean()
    loss = data + sum(part.penalty for part in parts if part.penalty is not None)
    terms = {name: value for part in parts for name, value in part.terms.items()}
    return loss, {"loss": loss.detach(), "data": data.detach(), **terms}
