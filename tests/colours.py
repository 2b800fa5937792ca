"""What tests of training share: images that a small network learns in a few steps."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from guard.data import Dataset
from guard.training import architectures
from guard.training.settings import Settings

TINY = Settings(
    architecture="tiny",
    regularizers=("tulip:eps=0.05,weight=0.01",),
    epochs=2,
    batch_size=8,
    learning_rate=0.1,
    padding=1,
    cutout=2,
    held_out=10,
)


def dataset(count: int = 70, seed: int = 0) -> Dataset:
    """Three classes of 8x8 images, told apart by which channel is bright."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 120, (count, 8, 8, 3))
    images[np.arange(count), :, :, labels] += 130
    return Dataset("colours", images.astype(np.uint8), labels, ("red", "green", "blue"), "digest")


class WithDropout(architectures.CompactResNet):
    """Dropout draws from torch's global random state, which a checkpoint must carry."""

    def __init__(self, mean: Sequence[float], deviation: Sequence[float], num_classes: int) -> None:
        super().__init__(mean, deviation, num_classes, width=2)
        self.features.append(nn.Dropout(0.2))


class Plain(nn.Module):
    """Two convolutions without BatchNorm."""

    def __init__(self, mean: Sequence[float], deviation: Sequence[float], num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            architectures.Normalize(mean, deviation),
            nn.Conv2d(len(mean), 6, 3, stride=2),
            nn.Softplus(),
            nn.Conv2d(6, 6, 3),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(6, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, 8, 8) -> (B, K)."""
        logits: Tensor = self.layers(images)
        return logits


def register() -> None:
    """Makes the networks known by name, in a process of their own."""
    architectures.ARCHITECTURES |= {"tiny": WithDropout, "plain": Plain}
