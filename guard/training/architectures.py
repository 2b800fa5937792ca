"""The classifiers we train; all take images in [0, 1], so that every radius is in pixels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """`x + f(x)`, f being two 3x3 convolutions, each followed by BatchNorm and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, H, W) -> the same shape."""
        total: Tensor = features + self.body(features)
        return total


class CompactResNet(nn.Module):
    """A ResNet-9 in which strided convolutions halve the image, made to be trained on CPUs.

    A 3x3 stem of `width` channels; three stages of 2, 4 and 8 times the width, each a strided 3x3
    convolution and a residual block; the largest activation of each channel; a linear layer. At width 32,
    1.9 million parameters and 72 million multiply-adds for a 32x32 image.
    """

    def __init__(
        self, mean: Sequence[float], deviation: Sequence[float], num_classes: int, *, width: int = 32
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, deviation)
        layers: list[nn.Module] = [_convolution(len(mean), width)]
        for stage in range(3):
            outputs = width << (stage + 1)
            layers += [_convolution(width << stage, outputs, stride=2), Residual(outputs)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(8 * width, num_classes)
        # The largest of many activations starts out large: without the scale, the first steps at a high
        # learning rate saturate the softmax.
        self.scale = 0.125

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        features: Tensor = self.features(self.normalize(images))
        pooled = functional.max_pool2d(features, (features.shape[2], features.shape[3])).flatten(1)
        logits: Tensor = self.classifier(pooled * self.scale)
        return logits


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice, and a shortcut (figure 4e of arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 or inputs != outputs else None
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        activated = functional.relu(self.first_norm(features))
        shortcut = features if self.shortcut is None else self.shortcut(activated)
        total: Tensor = shortcut + self.second(functional.relu(self.second_norm(self.first(activated))))
        return total


class PreActResNet18(nn.Module):
    """PreActResNet-18 (arXiv 1603.05027) in its CIFAR form: 3x3 stem, no pooling, four stages of two blocks.

    At width 64, 11.2 million parameters.
    """

    def __init__(
        self, mean: Sequence[float], deviation: Sequence[float], num_classes: int, *, width: int = 64
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, deviation)
        layers: list[nn.Module] = [nn.Conv2d(len(mean), width, 3, 1, 1, bias=False)]
        inputs = width
        for stage in range(4):
            outputs = width << stage
            layers += [
                PreActivationBlock(inputs, outputs, 1 if stage == 0 else 2),
                PreActivationBlock(outputs, outputs, 1),
            ]
            inputs = outputs
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        features: Tensor = self.features(self.normalize(images))
        logits: Tensor = self.classifier(functional.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


Builder = Callable[[Sequence[float], Sequence[float], int], nn.Module]

ARCHITECTURES: dict[str, Builder] = {
    "compact-resnet": CompactResNet,
    "preactresnet18": PreActResNet18,
}


def build(name: str, *, mean: Sequence[float], deviation: Sequence[float], num_classes: int) -> nn.Module:
    """The architecture called `name`, its weights drawn from torch's global random state.

    `mean` and `deviation` have one entry per input channel, in units of [0, 1]. Raises `UsageError` where no
    architecture has that name.
    """
    return builder(name)(mean, deviation, num_classes)


def builder(name: str) -> Builder:
    """What builds the architecture called `name`; raises `UsageError`, listing the known ones."""
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UsageError(f"unknown architecture {name!r}: expected one of {known}.")
    return ARCHITECTURES[name]
