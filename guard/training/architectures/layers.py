"""What several architectures share: normalization, convolutions, the pre-logit sigmoid."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guard.errors import UsageError


class Normalize(nn.Module):
    """`(images - mean) / deviation` per channel: (B, C, H, W) in [0, 1] -> (B, C, H, W)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer(
            "deviation", torch.tensor(list(deviation), dtype=torch.float32).view(1, -1, 1, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return (images - self.mean) / self.deviation


def convolution(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, padding: int | None = None
) -> nn.Sequential:
    """A convolution, BatchNorm and ReLU; padded by half the kernel where `padding` is not given."""
    around = kernel // 2 if padding is None else padding
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, around, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class PreLogitSigmoid(nn.Module):
    """`t tanh(x / t)` of the features x, each brought to mean 0 and variance 1 by BatchNorm (LIP A.1).

    BatchNorm has no parameters of its own; the scale t, 1 at first, is learned and shared by all features.
    The result lies within (-t, t), is odd in x, and has slope 1 at 0, so logits and their slopes are bounded
    by the last layer's weights. Features are (B, F) or, for a last layer that is a convolution, (B, F, H, W).
    """

    def __init__(self, features: int, *, maps: bool = False) -> None:
        super().__init__()
        self.norm: nn.Module = (nn.BatchNorm2d if maps else nn.BatchNorm1d)(features, affine=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) or (B, F, H, W) -> the same shape."""
        return self.scale * torch.tanh(self.norm(features) / self.scale)


def put_sigmoid_before_last_layer(model: nn.Module, num_classes: int) -> None:
    """Puts a `PreLogitSigmoid` between the features and the layer that makes the logits of them.

    That layer is the last linear layer or convolution among the modules. Raises `UsageError` where it does
    not have `num_classes` outputs.
    """
    layers = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    name, last = layers[-1] if layers else ("", None)
    if isinstance(last, nn.Linear) and last.out_features == num_classes:
        sigmoid = PreLogitSigmoid(last.in_features)
    elif isinstance(last, nn.Conv2d) and last.out_channels == num_classes:
        sigmoid = PreLogitSigmoid(last.in_channels, maps=True)
    else:
        raise UsageError(
            f"--pre-logit-sigmoid: the last layer found does not have {num_classes} outputs, one per class. "
            "Choose another --arch."
        )
    model.set_submodule(name, nn.Sequential(OrderedDict(sigmoid=sigmoid, linear=last)))
