"""The classifiers we train; all take images in [0, 1], so that every radius is in pixels.

A builder is called with the channels' means and deviations and the number of classes; where it has a keyword
`size`, it is told the images' height and width, and where it has `width`, that can be chosen.
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from guard.errors import UsageError
from guard.training.architectures.from_torchvision import Torchvision, names
from guard.training.architectures.layers import Normalize, PreLogitSigmoid, put_sigmoid_before_last_layer
from guard.training.architectures.plain import AllCNN, CarliniWagnerCNN, VerificationCNN
from guard.training.architectures.residual import CompactResNet, PreActResNet18, ResNet34

__all__ = [
    "ARCHITECTURES",
    "AllCNN",
    "CarliniWagnerCNN",
    "CompactResNet",
    "Normalize",
    "PreActResNet18",
    "PreLogitSigmoid",
    "ResNet34",
    "Torchvision",
    "VerificationCNN",
    "build",
    "builder",
    "check",
]

Builder = Callable[..., nn.Module]

ARCHITECTURES: dict[str, Builder] = {
    "compact-resnet": CompactResNet,
    "preactresnet18": PreActResNet18,
    "resnet34": ResNet34,
    "resnext34-2x32": partial(ResNet34, width=32, branches=2),
    "resnext34-4x32": partial(ResNet34, width=32, branches=4),
    "allcnn-c": AllCNN,
    "verification-cnn": VerificationCNN,
    "cw-cnn": CarliniWagnerCNN,
}

PREFIX = "torchvision:"

LARGEST = 2**31  # bytes of an ONNX file


def build(
    name: str,
    *,
    mean: Sequence[float],
    deviation: Sequence[float],
    num_classes: int,
    size: tuple[int, int],
    width: int | None = None,
    pre_logit_sigmoid: bool = False,
) -> nn.Module:
    """The architecture called `name`, its weights drawn from torch's global random state.

    `mean` and `deviation` have one entry per input channel, in units of [0, 1]; `size` is the images' height
    and width; `width` is the number of channels of the first stage, to which the others keep their ratio,
    None for the architecture's own; `pre_logit_sigmoid` puts a `PreLogitSigmoid` before the last layer.

    Raises `UsageError` where no architecture has that name, where it has no width to choose, where it does
    not take images of that size and number of channels, and where it is too large for an ONNX file.
    """
    check(name, width)
    make = builder(name)
    given: dict[str, Any] = {"size": size}
    if width is not None:
        given["width"] = width
    options = {key: value for key, value in given.items() if key in signature(make).parameters}
    try:
        model = make(mean, deviation, num_classes, **options)
        if pre_logit_sigmoid:
            put_sigmoid_before_last_layer(model, num_classes)
        _try_shapes(model, (2, len(mean), *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["an assertion failed"])[0].rstrip(".")
        raise UsageError(
            f"{name} does not take images of {size[0]} x {size[1]} pixels ({reason}). Bring them to another "
            "size, or choose another --arch."
        ) from error
    if sum(weight.nbytes for weight in model.state_dict().values()) >= LARGEST:
        raise UsageError(
            f"{name} has more than the 2 GiB of weights of an ONNX file. Choose a smaller --arch."
        )
    return model


def check(name: str, width: int | None = None) -> None:
    """Raises `UsageError` where no architecture is called `name`, and where it cannot have `width`."""
    parameters = signature(builder(name)).parameters
    if width is None:
        return
    if width < 1:
        raise UsageError(f"--width is {width}: expected 1 channel or more.")
    if "width" not in parameters:
        known = [other for other in ARCHITECTURES if "width" in signature(builder(other)).parameters]
        raise UsageError(f"--width is {width}: {name} has no width to choose. {', '.join(known)} have one.")


def builder(name: str) -> Builder:
    """What builds the architecture called `name`; raises `UsageError`, listing the known ones.

    `torchvision:resnet50` is torchvision's; so is `resnet50`, there being none of ours with that name.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    theirs = names()
    plain = name.removeprefix(PREFIX)
    if plain not in theirs:
        known = f"{', '.join(ARCHITECTURES)}, or of torchvision's {', '.join(theirs)}"
        raise UsageError(f"unknown architecture {name!r}: expected one of {known}.")
    return partial(Torchvision, name=plain)


@torch.no_grad()
def _try_shapes(model: nn.Module, shape: tuple[int, int, int, int]) -> None:
    """A pass that computes shapes only; raises what the layers raise for images of `shape` (B, C, H, W)."""
    training = model.training
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state = {name: tensor.to("meta") for name, tensor in tensors}
    functional_call(model.eval(), state, torch.empty(shape, device="meta"))
    model.train(training)
