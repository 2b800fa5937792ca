"""Networks without shortcuts: AllCNN-C, and the small ones of the verification and MNIST experiments."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from guard.training.architectures.layers import Normalize, convolution


class AllCNN(nn.Module):
    """AllCNN-C (arXiv 1412.6806, table 1) with BatchNorm after every convolution and no dropout (LIP A).

    3x3 convolutions of `width` channels, twice, then with stride 2; the same with 2 `width`; one more
    unpadded, and a 1x1 convolution; the mean over the image; a linear layer. (The last two commute: it is the
    paper's 1x1 convolution to K channels, then averaged.) At width 96, 1.4 million parameters.
    """

    def __init__(
        self, mean: Sequence[float], deviation: Sequence[float], num_classes: int, *, width: int = 96
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, deviation)
        self.features = nn.Sequential(
            convolution(len(mean), width),
            convolution(width, width),
            convolution(width, width, stride=2),
            convolution(width, 2 * width),
            convolution(2 * width, 2 * width),
            convolution(2 * width, 2 * width, stride=2),
            convolution(2 * width, 2 * width, padding=0),
            convolution(2 * width, 2 * width, kernel=1),
        )
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        features: Tensor = self.features(self.normalize(images))
        logits: Tensor = self.classifier(functional.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


class VerificationCNN(nn.Module):
    """The CNN that HAMMING verifies: small, so that a solver can decide about every one of its ReLUs.

    4x4 convolutions of stride 2 with `width` and 2 `width` channels, a hidden layer of 128 units, a linear
    layer; ReLUs and no BatchNorm (HAMMING, experimental details; arXiv 1805.12514 has 100 units). For images
    of `size` (H, W) only.
    """

    def __init__(
        self,
        mean: Sequence[float],
        deviation: Sequence[float],
        num_classes: int,
        *,
        size: tuple[int, int],
        width: int = 16,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, deviation)
        self.features = nn.Sequential(
            nn.Conv2d(len(mean), width, 4, 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
        self.hidden = nn.Sequential(
            nn.Linear(_features(self.features, len(mean), size), hidden), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: Tensor = self.classifier(self.hidden(self.features(self.normalize(images))))
        return logits


class CarliniWagnerCNN(nn.Module):
    """The MNIST network of Carlini and Wagner (arXiv 1608.04644, table I), without its dropout.

    Unpadded 3x3 convolutions, two of `width` channels and two of 2 `width`, each pair followed by 2x2
    max pooling; two hidden layers of 200 units; a linear layer. For images of `size` (H, W) only.
    """

    def __init__(
        self,
        mean: Sequence[float],
        deviation: Sequence[float],
        num_classes: int,
        *,
        size: tuple[int, int],
        width: int = 32,
        hidden: int = 200,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, deviation)
        layers: list[nn.Module] = []
        for inputs, outputs in ((len(mean), width), (width, 2 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(outputs, outputs, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(
            nn.Linear(_features(self.features, len(mean), size), hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: Tensor = self.classifier(self.hidden(self.features(self.normalize(images))))
        return logits


@torch.no_grad()
def _features(layers: nn.Module, channels: int, size: tuple[int, int]) -> int:
    """How many numbers `layers` make of an image of `size` (H, W)."""
    output: Tensor = layers(torch.zeros(1, channels, *size))
    return output.shape[1]
