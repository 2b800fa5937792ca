"""Sizes and shapes of the networks we train."""

import pytest
import torch
from torch import Tensor, nn

from guard.errors import UsageError
from guard.training.architectures import CompactResNet, Normalize, PreActResNet18, build


@pytest.mark.parametrize(("name", "count"), [("compact-resnet", 1_941_546), ("preactresnet18", 11_172_170)])
def test_parameter_counts(name: str, count: int) -> None:
    model = build(name, mean=[0.5] * 3, deviation=[0.2] * 3, num_classes=10)
    assert sum(weight.numel() for weight in model.parameters()) == count


@pytest.mark.parametrize("builder", [CompactResNet, PreActResNet18])
@pytest.mark.parametrize(("channels", "side", "classes"), [(3, 32, 10), (1, 28, 10), (3, 17, 2)])
def test_logits_for_images_of_any_size(
    builder: type[CompactResNet | PreActResNet18], channels: int, side: int, classes: int
) -> None:
    model = builder([0.5] * channels, [0.2] * channels, classes, width=4)
    logits = model(torch.rand(2, channels, side, side))
    assert logits.shape == (2, classes)
    assert torch.isfinite(logits).all()


def test_normalization_is_inside() -> None:
    layer = Normalize([0.5, 0.25], [0.5, 0.25])
    image = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    assert layer(image).flatten().tolist() == [1.0, 1.0]
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"mean", "deviation"}  # a checkpoint carries it


def test_compact_resnet_multiply_adds() -> None:
    model = CompactResNet([0.5] * 3, [0.2] * 3, 10)
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d)
        total += layer.weight.numel() * output.shape[2] * output.shape[3]

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    model(torch.rand(1, 3, 32, 32))
    assert round(total / 1e6) == 72


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="'resnet': expected one of compact-resnet, preactresnet18"):
        build("resnet", mean=[0.5], deviation=[0.2], num_classes=10)
