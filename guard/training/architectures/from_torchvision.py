"""The classifiers of torchvision, untrained, behind our normalization."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from guard.errors import UsageError
from guard.training.architectures.layers import Normalize

# What a family must be told of the images' (height, width).
_SIZED: dict[str, Callable[[tuple[int, int]], dict[str, Any]]] = {
    "vit_": lambda size: {"image_size": size[0]},
    "maxvit_": lambda size: {"input_size": size},
}

# Their auxiliary classifiers would make tuples of the logits while training; their own normalization is off.
_INCEPTIONS = ("googlenet", "inception_v3")


def names() -> list[str]:
    """The image classifiers of torchvision, sorted."""
    from torchvision import models

    found: list[str] = models.list_models(module=models)
    return found


class Torchvision(nn.Module):
    """The torchvision classifier called `name` with random weights, for images of `size` (H, W).

    A grey image is read as a colour image with three equal channels. Raises `UsageError` for another number
    of channels.
    """

    def __init__(
        self,
        mean: Sequence[float],
        deviation: Sequence[float],
        num_classes: int,
        *,
        name: str,
        size: tuple[int, int],
    ) -> None:
        from torchvision import models

        super().__init__()
        if len(mean) not in (1, 3):
            raise UsageError(f"{name} takes images of 1 or 3 channels, these have {len(mean)}.")
        options: dict[str, Any] = {}
        for prefix, option in _SIZED.items():
            if name.startswith(prefix):
                options |= option(size)
        if name in _INCEPTIONS:
            options |= {"aux_logits": False, "transform_input": False, "init_weights": True}
        self.grey = len(mean) == 1
        self.normalize = Normalize(mean, deviation)
        self.network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
        self.attends = any(isinstance(layer, nn.MultiheadAttention) for layer in self.network.modules())

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [0, 1] -> logits (B, K)."""
        normalized = self.normalize(images)
        if self.grey:
            normalized = normalized.expand(-1, 3, -1, -1)
        # The faster kernels of attention cannot be differentiated twice, as some regularizers do.
        twice = self.attends and torch.is_grad_enabled()
        with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
            logits: Tensor = self.network(normalized)
        return logits
