"""Batches and networks of a few pixels, some with closed forms, for the tests of regularizers."""

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Logits W x of flattened images; for two classes everything has a closed form."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 16, 3),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def batch(count: int = 6, classes: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 4, 4, generator=generator, dtype=dtype)
    return images, torch.arange(count) % classes


def two_class_model() -> tuple[Linear, Tensor]:
    """The model, and the difference w_0 - w_1 of its rows."""
    weight = torch.randn(2, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Linear(weight)
    return model, weight[0] - weight[1]


def margins(images: Tensor, labels: Tensor, difference: Tensor) -> Tensor:
    """Logit of the label minus the other one's: L = log(1 + exp(-margin))."""
    return (images.flatten(1) @ difference) * (1 - 2 * labels)


def smooth_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def weight_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
