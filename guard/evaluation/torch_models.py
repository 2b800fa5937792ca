"""Networks in torch as classifiers, classifiers as networks in torch, and calls into torch's libraries."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.attacks import Floats, Labels, Loss
from guard.errors import ModelError
from guard.evaluation.target import Classifier


class TorchModel:
    """A network in torch as a `guard.evaluation.target.Classifier`: float32, in evaluation mode, on `device`.

    `shape` is (C, H, W) of its images, in [0, 1]. The network moves to the device, and its weights stop
    asking for gradients.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, int, int], device: str = "cpu") -> None:
        self.module = module.to(device).eval().requires_grad_(requires_grad=False)
        self.module.to(memory_format=torch.channels_last)
        self.device = device
        self.input_shape = shape
        self.num_classes = self.logits(np.zeros((1, *shape), np.float32)).shape[1]

    def tensor(self, images: Floats) -> Tensor:
        """Images on the device, in the layout its convolutions like."""
        return torch.from_numpy(images).to(self.device).contiguous(memory_format=torch.channels_last)

    def logits(self, images: Floats) -> Floats:
        """Logits (B, K) of images (B, C, H, W)."""
        with torch.no_grad():
            return _array(self.module(self.tensor(images)))

    def loss_gradient(self, images: Floats, labels: Labels, loss: Loss) -> tuple[Floats, Floats, Floats]:
        """Logits (B, K), losses (B,) and their gradients (B, C, H, W); the losses are `Detector`'s."""
        points = self.tensor(images).requires_grad_()
        truth = torch.from_numpy(labels).to(self.device)
        logits = self.module(points)
        if loss == "cross-entropy":
            losses = nn.functional.cross_entropy(logits, truth, reduction="none")
        else:
            scores = logits.softmax(1) if loss == "probability-margin" else logits
            others = scores.scatter(1, truth[:, None], -torch.inf).amax(1)
            losses = others - scores.gather(1, truth[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(losses.sum(), points)
        return _array(logits), _array(losses), _array(gradient)

    def vjp(self, images: Floats, cotangents: Floats) -> tuple[Floats, Floats]:
        """Logits (B, K) and the gradient (B, C, H, W) of Σ_k cotangents[k] z_k(x), per image; cotangents (B,
        K).
        """
        points = self.tensor(images).requires_grad_()
        rows = torch.from_numpy(cotangents).to(self.device)
        logits = self.module(points)
        return _array(logits), _array(torch.autograd.grad(logits, points, rows)[0])


class Counted(nn.Module):
    """What `as_module` makes. `forwards` and `backwards` count images, not batches, and `passes` is both in
    forward passes, a backward one taken for two; `device` is where its tensors lie.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.device = classifier.device if isinstance(classifier, TorchModel) else "cpu"
        self.forwards = 0
        self.backwards = 0
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        self.forwards += len(images)
        if isinstance(self.classifier, TorchModel):
            images = images.view_as(images)
            logits: Tensor = self.classifier.module(images.contiguous(memory_format=torch.channels_last))
            if images.requires_grad:
                # Libraries call view() on gradients, which channels_last refuses.
                images.register_hook(lambda gradient: gradient.contiguous())  # type: ignore[no-untyped-call]
                logits.register_hook(self._count)  # type: ignore[no-untyped-call]
            return logits
        outside: Tensor = _Logits.apply(images, self)
        return outside

    @property
    def passes(self) -> int:
        """Forward passes of one image that all of them took together."""
        return self.forwards + 2 * self.backwards

    def _count(self, cotangents: Tensor) -> None:
        self.backwards += len(cotangents)


def as_module(classifier: Classifier) -> Counted:
    """A classifier as a torch network, for libraries that attack those: its logits forwards, its
    vector-Jacobian products backwards.

    A `TorchModel` is its own network, second derivatives and all. Another classifier, such as a
    `guard.runtime.Detector`, computes in float32 outside torch, its tensors lie on the CPU, and its gradients
    cannot be differentiated again: that raises `ModelError`.
    """
    return Counted(classifier)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, module: Counted) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(images)
        if not len(images):
            return images.new_zeros(0, module.classifier.num_classes)
        return torch.from_numpy(module.classifier.logits(_array(images))).to(images.dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        gradient: Tensor = _Gradient.apply(images, cotangents[0], ctx.module)
        return gradient, None


class _Gradient(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it fails in so many words."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, cotangents: Tensor, module: Counted) -> Tensor:  # noqa: ARG004
        module._count(cotangents)
        if not len(images):
            return torch.zeros_like(images)
        gradient = module.classifier.vjp(_array(images), _array(cotangents))[1]
        return torch.from_numpy(gradient).to(images.dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None, None]:  # noqa: ARG004
        raise ModelError(
            "a classifier outside torch has no second derivatives: take differences of its gradients "
            "(guard.attacks.growth), or attack the network in torch (TorchModel)."
        )


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """For calls into other people's libraries: torch's generators start from `seed`, and afterwards they,
    the warning filters, the root logger's handlers and the trace function are what they were.

    Otherwise foolbox, which logs through `logging.info`, would set the root logger up where nobody has, and
    pyautoattack would seed torch's generators for everyone and end a debugger's or coverage's trace.
    """
    devices = list(range(torch.cuda.device_count()))
    root, silent, trace = logging.getLogger(), logging.NullHandler(), sys.gettrace()
    root.addHandler(silent)
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            torch.manual_seed(seed)
            yield
    finally:
        root.removeHandler(silent)
        sys.settrace(trace)


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().cpu().float().contiguous().numpy()
    return array
