"""One training batch and the passes made over it, which regularizers share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Output:
    """One pass: `logits` (B, K) and `losses` (B,), every image's cross-entropy, both float32 or wider.

    `activations` are the inputs of every ReLU in the order of the pass, where they were recorded.
    """

    logits: Tensor
    losses: Tensor
    activations: tuple[Tensor, ...] = ()


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


class Pair(NamedTuple):
    """Passes over x + rho and x - rho; `corners` (B, C, H, W) is rho."""

    plus: Output
    minus: Output
    corners: Tensor


class _RandomState(NamedTuple):
    cpu: Tensor
    cuda: Tensor | None


class Passes:
    """One training batch, images (B, C, H, W) in [0, 1] and labels (B,), and the passes made over it.

    Passes normalize by the statistics of their own batch; the first over the images or the points trained on
    updates BatchNorm's running statistics, no other. All draw the same dropout masks, so that two of them
    differ by their points alone. Losses are never narrower than float32.

    `generator` is the source of all that regularizers draw; `autocast` is the type that convolutions and
    products are computed in, None for the model's own. `compiled` is the model through `torch.compile`, used
    wherever neither second derivatives nor activations are asked for. `progress` is the share of training
    that is done. `state` carries what a regularizer keeps from step to step, `after_backward` what is to be
    called once the loss has been differentiated. Without `keeping_clean`, what the clean pass would need to
    be differentiated by the weights is freed once `gradient` is known. The batch may be one of `parts` equal
    ones whose gradients are averaged: a sum over the batch is multiplied by `parts`, so that the average is
    the sum over all. It is number `part` of those that one process computes one after another.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        autocast: torch.dtype | None = None,
        compiled: Callable[[Tensor], Tensor] | None = None,
        progress: float = 0.0,
        state: dict[str, Tensor] | None = None,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.model = model
        self.images = images
        self.labels = labels
        self.generator = generator
        self.autocast = autocast
        self.progress = progress
        self.state = {} if state is None else state
        self.part = part
        self.parts = parts
        self.recording = False
        self.keeping_clean = True
        self.after_backward: list[Callable[[], None]] = []
        self._compiled = model if compiled is None else compiled
        self._updated = False
        self._masks: _RandomState | None = None
        self._clean: Output | None = None
        self._gradient: Tensor | None = None
        self._exact_gradient: Tensor | None = None
        self._pairs: dict[float, Pair] = {}

    def at(self, points: Tensor, *, plain: bool = False, update: bool = True) -> Output:
        """A pass over `points` (B, C, H, W) with the batch's labels.

        `plain` passes go through the model as it was written. The first pass with `update` updates
        BatchNorm's running statistics.
        """
        with (
            _statistics(self.model, update=update and not self._updated),
            self._same_masks(),
            torch.autocast(points.device.type, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            logits = (self.model if plain else self._compiled)(points)
        self._updated |= update
        return _output(logits, self.labels)

    @contextmanager
    def _same_masks(self) -> Iterator[None]:
        """Inside, torch's random state is that of the batch's first pass, which alone moves it on."""
        cuda = self.images.device if self.images.device.type == "cuda" else None
        if self._masks is None:
            self._masks = _RandomState(
                torch.get_rng_state(), None if cuda is None else torch.cuda.get_rng_state(cuda)
            )
            yield
            return
        with torch.random.fork_rng(devices=[] if cuda is None else [cuda]):
            torch.set_rng_state(self._masks.cpu)
            if cuda is not None and self._masks.cuda is not None:
                torch.cuda.set_rng_state(self._masks.cuda, cuda)
            yield

    def over_few(self, points: Tensor, labels: Tensor) -> Output:
        """A pass in full precision over few points (b, C, H, W) of any labels (b,), for second derivatives.

        It normalizes by the statistics of these points, as all passes do, and leaves the running ones alone.
        """
        with (
            _statistics(self.model, update=False),
            self._same_masks(),
            torch.autocast(points.device.type, enabled=False),
        ):
            logits = self.model(points)
        return _output(logits, labels)

    @property
    def clean(self) -> Output:
        """The pass over the images themselves, made anew where the one kept cannot be differentiated."""
        if self._clean is None or not self._clean.losses.requires_grad:
            self._clean = self.at(self.images)
        return self._clean

    @property
    def gradient(self) -> Tensor:
        """The rows g_i, (B, C, H, W), detached."""
        if self._gradient is None and self.keeping_clean:
            points = self.images.detach().requires_grad_()
            self._clean = self.at(points)
            (self._gradient,) = torch.autograd.grad(self._clean.losses.sum(), points, retain_graph=True)
        elif self._gradient is None:
            self._clean, self._gradient = self._differentiated(self.images, update=True)
        return self._gradient

    @property
    def exact_gradient(self) -> Tensor:
        """The rows g_i, (B, C, H, W), differentiable by the weights (double backpropagation)."""
        if self._exact_gradient is None:
            points = self.images.detach().requires_grad_()
            self._clean = self.at(points, plain=True)
            (gradient,) = torch.autograd.grad(self._clean.losses.sum(), points, create_graph=True)
            self._exact_gradient = gradient
            self._gradient = gradient.detach()
        return self._exact_gradient

    def attack_gradient(self, points: Tensor) -> Tensor:
        """The gradient of every image's loss at `points` (B, C, H, W), detached, for a step of an attack.

        BatchNorm's running statistics stay as they are: they describe the points trained on.
        """
        return self._differentiated(points, update=False)[1]

    def _differentiated(self, points: Tensor, *, update: bool) -> tuple[Output, Tensor]:
        """A pass over `points` (B, C, H, W) and its gradient by them, both detached.

        The weights are frozen meanwhile: nothing is stored for their gradient, and a compiled backward pass,
        which otherwise computes all gradients, leaves theirs out.
        """
        points = points.detach().requires_grad_()
        with _frozen(self.model):
            output = self.at(points, update=update)
        (gradient,) = torch.autograd.grad(output.losses.sum(), points)
        return Output(output.logits.detach(), output.losses.detach()), gradient

    def pair(self, eps: float) -> Pair:
        """Passes over x + rho and x - rho, rho a random corner of the cube of half side `eps` per image.

        One pair per `eps` and batch; with `recording`, the inputs of all ReLUs are kept.
        """
        if eps not in self._pairs:
            signs = torch.randint(0, 2, self.images.shape, generator=self.generator, dtype=torch.int8)
            corners = eps * (2 * signs.to(self.images.device) - 1).to(self.images.dtype)
            plus, minus = self._recorded(self.images + corners), self._recorded(self.images - corners)
            self._pairs[eps] = Pair(plus, minus, corners)
        return self._pairs[eps]

    def _recorded(self, points: Tensor) -> Output:
        if not self.recording:
            return self.at(points, update=False)
        with _Recorder() as recorder:
            output = self.at(points, plain=True, update=False)
        return Output(output.logits, output.losses, tuple(recorder.activations))

    def accuracy(self) -> Tensor | None:
        """The share of images that the clean pass labels rightly, where there was one."""
        if self._clean is None:
            return None
        return (self._clean.logits.detach().argmax(1) == self.labels).float().mean()


def compiled(model: nn.Module, *, backend: str = "inductor") -> Callable[[Tensor], Tensor]:
    """The model through `torch.compile`, for passes that are differentiated more than once."""
    # Compiled backward passes otherwise reuse the memory of what the next one still needs.
    functorch_config.donated_buffer = False
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend=backend)
    return compiled


@torch.no_grad()
def relu_calls(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """How many ReLUs one pass over an image of `shape` (C, H, W) calls; the model is left as it was."""
    modes = {layer: layer.training for layer in model.modules()}
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    try:
        with _Recorder() as recorder:
            model.eval()(torch.zeros(1, *shape, device=device))
    finally:
        for layer, mode in modes.items():
            layer.training = mode
    return len(recorder.activations)


def _output(logits: Tensor, labels: Tensor) -> Output:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return Output(logits, functional.cross_entropy(logits, labels, reduction="none"))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad = False
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad = True


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


class _Recorder(TorchFunctionMode):
    """Keeps the input of every ReLU called inside, as a layer or as a function, in place or not."""

    def __init__(self) -> None:
        super().__init__()
        self.activations: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _RELUS or (func is functional.hardtanh and _lower_end(*args, **(kwargs or {})) == 0):
            given: Tensor = args[0] if args else (kwargs or {})["input"]
            self.activations.append(given.clone())  # a ReLU in place overwrites what it was given
        return func(*args, **(kwargs or {}))


_RELUS = frozenset(
    {
        torch.relu,
        torch.relu_,
        torch.Tensor.relu,
        torch.Tensor.relu_,
        functional.relu,
        functional.relu_,
        functional.relu6,
        functional.leaky_relu,
        functional.leaky_relu_,
        functional.prelu,
        functional.rrelu,
    }
)


def _lower_end(input: Tensor, min_val: float = -1.0, *_: Any, **__: Any) -> float:  # noqa: ARG001
    """Where a call of `hardtanh` starts: at 0 it is a ReLU up to its upper end, as ReLU6 is."""
    return min_val
