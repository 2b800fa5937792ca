"""Small ONNX classifiers for tests, without torch: a linear one with closed forms, a convolutional one."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.float32]


def linear(
    weight: Array, bias: Array | None = None, shape: tuple[int, int, int] = (1, 2, 2)
) -> onnx.ModelProto:
    """Logits z = W x + b of the flattened image; `weight` is (K, C * H * W)."""
    weight = np.asarray(weight, np.float32)
    offset = np.zeros(len(weight), np.float32) if bias is None else np.asarray(bias, np.float32)
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"], transB=1),
    ]
    return model(nodes, {"weight": weight, "bias": offset}, shape, len(weight))


def convolutional(
    *,
    seed: int = 0,
    classes: int = 10,
    shape: tuple[int, int, int] = (3, 8, 8),
    width: int = 8,
    scale: float = 6.0,
) -> onnx.ModelProto:
    """Three convolutions (the second of stride 2) with ReLU, a global average and a linear layer."""
    rng = np.random.default_rng(seed)
    sizes = [(width, shape[0], 3, 3), (2 * width, width, 3, 3), (2 * width, 2 * width, 3, 3)]
    weights = {
        f"w{i}": (rng.normal(size=s) * np.sqrt(2 / np.prod(s[1:]))).astype(np.float32)
        for i, s in enumerate(sizes)
    }
    weights |= {f"b{i}": (0.1 * rng.normal(size=s[0])).astype(np.float32) for i, s in enumerate(sizes)}
    weights["head"] = (scale * rng.normal(size=(classes, 2 * width)) / np.sqrt(width)).astype(np.float32)
    weights["head_bias"] = (0.1 * rng.normal(size=classes)).astype(np.float32)
    nodes, last = [], "images"
    for i, stride in enumerate((1, 2, 1)):
        nodes += [
            helper.make_node(
                "Conv",
                [last, f"w{i}", f"b{i}"],
                [f"c{i}"],
                pads=[1] * 4,
                strides=[stride] * 2,
                kernel_shape=[3, 3],
            ),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"]),
        ]
        last = f"r{i}"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head", "head_bias"], ["logits"], transB=1),
    ]
    return model(nodes, weights, shape, classes)


def model(
    nodes: list[onnx.NodeProto], weights: dict[str, Array], shape: tuple[int, int, int], classes: int
) -> onnx.ModelProto:
    """A checked model with input `images` (B, *shape) and output `logits` (B, classes)."""
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(built, full_check=True)
    return built


def images(count: int, shape: tuple[int, int, int] = (3, 8, 8), *, seed: int = 0) -> Array:
    """Random images (count, *shape) in [0, 1]."""
    return np.random.default_rng(seed).random((count, *shape), dtype=np.float32)
