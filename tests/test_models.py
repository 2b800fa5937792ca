"""Whole classifiers with random weights: input gradients in onnxruntime against torch's autograd.

A ReLU whose input lies within rounding of 0 may switch differently in two libraries, and the gradient jumps.
That is not an error of either, so the networks are initialized to have few such inputs, and an image on which
it happens is replaced by a fresh one. A wrong rule would spoil every image.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchvision import models, ops
from torchvision.models import convnext, efficientnet, mobilenetv3, regnet

from guard.autodiff import Graph, check_differentiable, pullback
from tests.gradients import Array, session

CLASSES = 10
TOLERANCE = 1e-4
ATTEMPTS = 4

Make = Callable[[], nn.Module]


def vgg16_bn() -> nn.Module:
    """VGG-16 with its 100 million parameters of fully connected layers cut down."""
    net: nn.Module = models.vgg16_bn(num_classes=CLASSES)
    net.avgpool = nn.Identity()
    net.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, CLASSES))
    return net


def shallow_mobilenet_v3() -> nn.Module:
    """The first kinds of block: with and without squeeze-and-excitation, with ReLU and HardSwish."""
    settings = [
        mobilenetv3.InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1),
        mobilenetv3.InvertedResidualConfig(16, 5, 64, 24, True, "HS", 2, 1, 1),
        mobilenetv3.InvertedResidualConfig(24, 5, 96, 24, False, "HS", 1, 1, 1),
    ]
    net: nn.Module = models.MobileNetV3(settings, 64, CLASSES)
    return net


def shallow_efficientnet() -> nn.Module:
    """Two blocks with SiLU and squeeze-and-excitation."""
    settings = [
        efficientnet.MBConvConfig(1, 3, 1, 32, 16, 1),
        efficientnet.MBConvConfig(6, 5, 2, 16, 24, 2),
    ]
    net: nn.Module = models.EfficientNet(settings, 0.0, num_classes=CLASSES, last_channel=64)
    return net


def shallow_regnet() -> nn.Module:
    """RegNet-Y with two stages."""
    parameters = regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25)
    net: nn.Module = models.RegNet(parameters, CLASSES)
    return net


WHOLE: dict[str, tuple[Make, int]] = {
    "resnet18": (lambda: models.resnet18(num_classes=CLASSES), 64),
    "resnet50": (lambda: models.resnet50(num_classes=CLASSES), 64),
    "resnext50": (lambda: models.resnext50_32x4d(num_classes=CLASSES), 64),
    "densenet121": (lambda: models.densenet121(num_classes=CLASSES), 64),
    "vgg16_bn": (vgg16_bn, 32),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=CLASSES), 64),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=CLASSES), 64),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=CLASSES), 64),
    "convnext_tiny": (lambda: models.convnext_tiny(num_classes=CLASSES), 64),
    "squeezenet1_1": (lambda: models.squeezenet1_1(num_classes=CLASSES), 64),
    "googlenet": (lambda: models.googlenet(num_classes=CLASSES, aux_logits=False, init_weights=False), 64),
    "regnet_y_400mf": (lambda: models.regnet_y_400mf(num_classes=CLASSES), 64),
}
SHALLOW: dict[str, tuple[Make, int]] = {
    "resnet": (lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], CLASSES), 64),
    "bottleneck": (lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], CLASSES), 64),
    "resnext": (
        lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], CLASSES, groups=32, width_per_group=4),
        64,
    ),
    "densenet": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=CLASSES), 64),
    "vgg": (
        lambda: nn.Sequential(*models.vgg11_bn().features[:8], nn.Flatten(), nn.Linear(8192, CLASSES)),
        32,
    ),
    "mobilenet_v2": (
        lambda: models.MobileNetV2(CLASSES, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
        64,
    ),
    "mobilenet_v3": (shallow_mobilenet_v3, 64),
    "efficientnet": (shallow_efficientnet, 64),
    "convnext": (
        lambda: models.ConvNeXt(
            [convnext.CNBlockConfig(24, 48, 1), convnext.CNBlockConfig(48, None, 1)], num_classes=CLASSES
        ),
        64,
    ),
    "vit": (
        lambda: models.VisionTransformer(64, 16, 2, 4, 96, 192, num_classes=CLASSES),
        64,
    ),
    "swin": (
        lambda: models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=CLASSES),
        64,
    ),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=CLASSES), 64),
    "regnet": (shallow_regnet, 64),
}


def prepared(make: Make, size: int) -> nn.Module:
    """A network in evaluation mode whose signals neither vanish nor explode, with few ReLU inputs near 0."""
    torch.manual_seed(0)
    net = make()
    depthwise = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in net.modules())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.3, 0.5)
            # channels mostly on or mostly off; an off channel would starve a depthwise convolution
            sign = torch.sign(torch.randn(module.num_features))
            module.bias.data.copy_(torch.ones_like(sign) if depthwise else sign)
        if isinstance(module, ops.StochasticDepth | nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Linear) and not module.weight.any():  # heads that start at zero
            nn.init.normal_(module.weight, std=0.05)
    with torch.no_grad():
        net.train()(torch.rand(8, 3, size, size))
    return net.eval().requires_grad_(False)


def exported(net: nn.Module, size: int, path: Path, *, dynamo: bool) -> onnx.ModelProto:
    """The network by either of torch's exporters."""
    example = (torch.rand(5, 3, size, size),)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(
                net, example, path, dynamic_shapes=shapes, external_data=False, verbose=False, **names
            )
        else:
            axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
            torch.onnx.export(net, example, path, dynamo=False, dynamic_axes=axes, **names)
    return onnx.load(path)


def by_autograd(net: nn.Module, images: Array, cotangents: Array) -> tuple[Array, Array]:
    """Logits and gradients by torch."""
    x = torch.tensor(images, requires_grad=True)
    logits = net(x)
    (gradient,) = torch.autograd.grad(logits, x, torch.tensor(cotangents))
    return logits.detach().numpy(), gradient.numpy()


def errors(actual: Array, expected: Array) -> Array:
    """Per image, the relative error in the Euclidean norm."""
    axes = tuple(range(1, actual.ndim))
    result: Array = np.sqrt(((actual - expected) ** 2).sum(axes) / (expected**2).sum(axes))
    return result


def check(net: nn.Module, model: onnx.ModelProto, size: int) -> None:
    """Gradients of fresh images in onnxruntime are torch's, at batch sizes other than the exporter's."""
    check_differentiable(model, "images", "logits")
    graph = Graph(model)
    cotangent = graph.input("cotangents", ["batch", CLASSES])
    gradient = pullback(graph, "logits", cotangent, "images")
    served = session(graph.build({"logits ": "logits", "gradient": gradient}))
    double = copy.deepcopy(net).double()
    random = np.random.default_rng(1)
    for batch in (1, 3):
        best = np.full(batch, np.inf)
        for _ in range(ATTEMPTS):
            x = random.random((batch, 3, size, size), np.float32)
            v = random.standard_normal((batch, CLASSES), np.float32)
            logits, actual = served.run(None, {"images": x, "cotangents": v})
            expected_logits, expected = by_autograd(double, x.astype(np.float64), v.astype(np.float64))
            assert errors(logits, expected_logits).max() < TOLERANCE
            assert actual.shape == x.shape
            best = np.minimum(best, errors(actual, expected))
            if best.max() <= TOLERANCE:
                break
        assert best.max() <= TOLERANCE


@pytest.mark.parametrize("name", list(WHOLE))
def test_whole_models_of_the_torchscript_exporter(name: str, tmp_path: Path) -> None:
    make, size = WHOLE[name]
    net = prepared(make, size)
    check(net, exported(net, size, tmp_path / "model.onnx", dynamo=False), size)


@pytest.mark.parametrize("name", list(SHALLOW))
def test_families_of_the_default_exporter(name: str, tmp_path: Path) -> None:
    make, size = SHALLOW[name]
    net = prepared(make, size)
    check(net, exported(net, size, tmp_path / "model.onnx", dynamo=True), size)
