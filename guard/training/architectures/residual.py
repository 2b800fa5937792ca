"""Residual networks: ours for CPUs, PreActResNet-18, and the 34 layers of LIP and SCALE."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from guard.training.architectures.layers import Normalize, convolution


class Residual(nn.Module):
    """`x + f(x)`, f being two 3x3 convolutions, each followed by BatchNorm and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(width, width), convolution(width, width))

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
        layers: list[nn.Module] = [convolution(len(mean), width)]
        for stage in range(3):
            outputs = width << (stage + 1)
            layers += [convolution(width << stage, outputs, stride=2), Residual(outputs)]
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


class BranchBlock(nn.Module):
    """`relu(x + mean of the branches)`, a branch being two 3x3 convolutions, each followed by BatchNorm.

    A branch reads all `width` channels and has `width` itself. With one branch it is the basic block of
    arXiv 1512.03385; with several, the block of LIP A: ResNeXt's groups, averaged.
    """

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        inner = width * branches
        self.width = width
        self.branches = branches
        self.first = convolution(width, inner)
        self.second = nn.Conv2d(inner, inner, 3, 1, 1, groups=branches, bias=False)
        self.second_norm = nn.BatchNorm2d(inner)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, H, W) -> the same shape."""
        change: Tensor = self.second_norm(self.second(self.first(features)))
        if self.branches > 1:
            change = torch.unflatten(change, 1, (self.branches, self.width)).mean(1)
        activated: Tensor = self.activation(features + change)
        return activated


class ResNet34(nn.Module):
    """ResNet-34, and with several branches ResNeXt-34, in the CIFAR form of LIP A and SCALE 3.

    A 3x3 stem; three stages of `blocks` blocks with `width`, 2 `width` and 4 `width` channels; before the
    second and the third, a 1x1 convolution and 2x2 average pooling; the mean over the image; a linear layer.
    With five blocks a stage that is 1 + 30 + 2 + 1 = 34 layers. At width 16, 0.5 million parameters; at width
    32 with 2 branches 3.9 million and with 4 branches 7.8 million.
    """

    def __init__(
        self,
        mean: Sequence[float],
        deviation: Sequence[float],
        num_classes: int,
        *,
        width: int = 16,
        branches: int = 1,
        blocks: int = 5,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, deviation)
        layers: list[nn.Module] = [convolution(len(mean), width)]
        for stage in range(3):
            outputs = width << stage
            if stage > 0:
                layers += [convolution(outputs // 2, outputs, kernel=1), nn.AvgPool2d(2)]
            layers += [BranchBlock(outputs, branches) for _ in range(blocks)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        features: Tensor = self.features(self.normalize(images))
        logits: Tensor = self.classifier(functional.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits
