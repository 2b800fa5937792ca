"""Input gradients of torchvision's classifiers at their full image size: error against torch, cost over a
forward pass.

    python benchmarks/differentiation.py --out benchmarks/results/differentiation.json
    python benchmarks/differentiation.py --networks resnet50 vit_b_16 --threads 1

Networks have random weights and batch statistics of random images; torch's default exporter; batch size 1.
The error of an image is that of the gradient of a random combination of logits, relative in the Euclidean
norm, against torch in float64. Where a ReLU's input lies within rounding of 0, two libraries may switch it
differently and the gradient jumps; channels are therefore initialized to be mostly on or mostly off, and the
least of several images' errors is given beside their median.
Costs are medians over repeats of interleaved runs, as ratios to the bare model's forward pass.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torchvision
from torch import nn

from guard.autodiff import Graph, pullback
from guard.runtime import session_of

NETWORKS = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "vgg16_bn",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "squeezenet1_1",
    "googlenet",
    "inception_v3",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
    "maxvit_t",
]
SIZE = 224
CLASSES = 1000


def network(name: str) -> nn.Module:
    """A classifier in evaluation mode whose signals neither vanish nor explode."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    depthwise = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in net.modules())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.3, 0.5)
            # an off channel would starve a depthwise convolution
            sign = torch.sign(torch.randn(module.num_features))
            module.bias.data.copy_(torch.ones_like(sign) if depthwise else sign)
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    for attribute, value in {"aux1": None, "aux2": None, "AuxLogits": None, "aux_logits": False}.items():
        if hasattr(net, attribute):
            setattr(net, attribute, value)
    with torch.no_grad():
        net.train()(torch.rand(4, 3, SIZE, SIZE))
    return net.eval().requires_grad_(requires_grad=False)


def exported(net: nn.Module) -> onnx.ModelProto:
    """The network by torch's default exporter, with a dynamic batch axis."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            net,
            (torch.rand(5, 3, SIZE, SIZE),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
        return onnx.load(path)


def gradients(model: onnx.ModelProto, rows: int) -> onnx.ModelProto:
    """Logits and the gradients of `rows` combinations of them."""
    graph = Graph(model)
    cotangents = [graph.input(f"cotangents{i}", ["batch", CLASSES]) for i in range(rows)]
    names = {f"gradient{i}": pullback(graph, "logits", c, "images") for i, c in enumerate(cotangents)}
    return graph.build({"logits": "logits", **names})


def measure(name: str, images: int, repeats: int, threads: int) -> dict[str, Any]:
    """One row of the table."""
    net = network(name)
    model = exported(net)
    start = time.perf_counter()
    one = gradients(model, 1)
    build = time.perf_counter() - start
    timed = [session_of(m, threads=threads) for m in (model, one, gradients(model, 2))]
    double = copy.deepcopy(net).double()
    random = np.random.default_rng(0)
    errors = []
    seconds: list[list[float]] = [[], [], []]
    for repeat in range(max(images, repeats)):
        x = random.random((1, 3, SIZE, SIZE), np.float32)
        v = random.standard_normal((1, CLASSES), np.float32)
        feeds = {"images": x, "cotangents0": v, "cotangents1": v[:, ::-1].copy()}
        for rows, session in enumerate(timed):
            given = {key: feeds[key] for key in list(feeds)[: 1 + rows]}
            begin = time.perf_counter()
            outputs = session.run(None, given)
            seconds[rows].append(time.perf_counter() - begin)
            if rows == 1 and repeat < images:
                exact = torch.tensor(x, dtype=torch.float64, requires_grad=True)
                (gradient,) = torch.autograd.grad(double(exact), exact, torch.tensor(v).double())
                difference = np.linalg.norm(outputs[1] - gradient.numpy())
                errors.append(float(difference / gradient.norm()))
    ratios = [
        statistics.median(b / a for a, b in zip(seconds[0][1:], seconds[rows][1:], strict=True))
        for rows in (1, 2)
    ]
    return {
        "network": name,
        "nodes": len(model.graph.node),
        "build_seconds": round(build, 2),
        "forward_milliseconds": round(1e3 * statistics.median(seconds[0][1:]), 1),
        "one_row_ratio": round(ratios[0], 2),
        "two_rows_ratio": round(ratios[1], 2),
        "least_error": float(f"{min(errors):.1e}"),
        "median_error": float(f"{statistics.median(errors):.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    table = []
    for name in given.networks:
        table.append(measure(name, given.images, given.repeats, given.threads))
        print("  ".join(f"{key} {value}" for key, value in table[-1].items()), flush=True)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python benchmarks/differentiation.py " + " ".join(sys.argv[1:]),
            "hardware": f"{given.threads} threads, {platform.machine()}, {platform.processor()}",
            "versions": {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
            "images": given.images,
            "repeats": given.repeats,
            "rows": table,
        }
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
