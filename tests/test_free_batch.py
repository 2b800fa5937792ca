from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from guard.free_batch import free_batch

Float32 = NDArray[np.float32]


class Builder:
    """Nodes and constants of a graph with the batch size written into them."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, NDArray[np.generic]] = {}

    def constant(self, values: NDArray[np.generic] | Sequence[int]) -> str:
        name = f"k{len(self.constants)}"
        array = np.asarray(values)
        self.constants[name] = array.astype(np.int64) if array.dtype.kind == "i" else array
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def reshape(self, tensor: str, *target: int) -> str:
        return self.op("Reshape", tensor, self.constant(target))

    def model(self, output: str, shape: Sequence[int]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "fixed",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def weights(*shape: int) -> Float32:
    return np.random.default_rng(len(shape) + sum(shape)).normal(size=shape).astype(np.float32)


def run(model: onnx.ModelProto, images: Float32) -> Float32:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Float32 = session.run(None, {"x": images})[0]
    return result


def check_freed(model: onnx.ModelProto, shape: Sequence[int]) -> None:
    """The freed model gives each of many images what the fixed one gave it."""
    size = shape[0]
    images = np.random.default_rng(0).normal(size=(3 * size, *shape[1:])).astype(np.float32)
    expected = np.concatenate(
        [run(model, images[start : start + size]) for start in range(0, len(images), size)]
    )
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    free_batch(freed, "x", shape)
    freed.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    for count in (1, 2, 3 * size):
        found = run(freed, images[:count])
        np.testing.assert_allclose(found, expected[:count], rtol=1e-5, atol=1e-5)


def attention(build: Builder, tokens: str, size: int, length: int, heads: int, width: int) -> str:
    """Self-attention over (L, N, E), as torch writes it: heads merged into the batch, sequences first."""
    each = width // heads
    queries = [
        build.op("MatMul", tokens, build.constant(weights(width, width) / np.float32(4))) for _ in range(3)
    ]
    split = [
        build.op("Transpose", build.reshape(part, length, size * heads, each), perm=[1, 0, 2])
        for part in queries
    ]
    keys = build.op("Transpose", split[1], perm=[0, 2, 1])
    mixed = build.op("MatMul", build.op("Softmax", build.op("MatMul", split[0], keys), axis=-1), split[2])
    back = build.op("Transpose", mixed, perm=[1, 0, 2])
    flat = build.reshape(back, length * size, width)
    projected = build.op("Gemm", flat, build.constant(weights(width, width) / np.float32(4)))
    return build.reshape(projected, length, size, width)


@pytest.mark.parametrize("size", [1, 2])
def test_attention_with_sequences_first(size: int) -> None:
    build = Builder()
    patches = build.reshape("x", size, 4, 6)  # (N, E, L)
    tokens = build.op("Transpose", patches, perm=[2, 0, 1])
    attended = attention(build, tokens, size, 6, 2, 4)
    last = build.op("Transpose", attended, perm=[1, 0, 2])
    check_freed(build.model(build.reshape(last, size, 24), (size, 4, 2, 3)), (size, 4, 2, 3))


@pytest.mark.parametrize("axis", [1, -2])
def test_a_class_token(axis: int) -> None:
    build = Builder()
    tokens = build.op("Transpose", build.reshape("x", 1, 4, 6), perm=[0, 2, 1])
    joined = build.op("Concat", build.constant(weights(1, 1, 4)), tokens, axis=axis)
    shifted = build.op("Add", joined, build.constant(weights(1, 7, 4)))
    first = build.op("Gather", shifted, build.constant(np.array(0)), axis=1)
    check_freed(build.model(first, (1, 4, 2, 3)), (1, 4, 2, 3))


@pytest.mark.parametrize("size", [1, 3])
def test_windows_merged_into_the_batch(size: int) -> None:
    build = Builder()
    rows = build.reshape("x", size, 2, 2, 2, 3, 4)  # (N, rows, height, columns, width, E) of 2 x 2 windows
    windows = build.op("Transpose", rows, perm=[0, 1, 3, 2, 4, 5])
    each = build.reshape(windows, size * 4, 6, 4)
    mixed = build.op("Softmax", build.op("MatMul", each, build.constant(weights(4, 4))), axis=1)
    apart = build.op("Transpose", build.reshape(mixed, size, 2, 2, 2, 3, 4), perm=[0, 1, 3, 2, 4, 5])
    check_freed(build.model(build.reshape(apart, size, 4 * 6, 4), (size, 4, 6, 4)), (size, 4, 6, 4))


@pytest.mark.parametrize("target", [[1, -1], [-1, 12], [0, 12], [1, 12], [1, 3, 4]])
def test_flattening(target: list[int]) -> None:
    build = Builder()
    check_freed(build.model(build.reshape(build.op("Relu", "x"), *target), (1, 3, 2, 2)), (1, 3, 2, 2))


def test_a_gather_that_only_reshapes() -> None:
    build = Builder()
    flat = build.reshape(build.op("GlobalAveragePool", "x"), -1)
    again = build.op("Gather", flat, build.constant(np.arange(3).reshape(1, 3, 1, 1)), axis=0)
    check_freed(build.model(build.op("Flatten", again), (1, 3, 2, 2)), (1, 3, 2, 2))


def test_group_normalization_written_out() -> None:
    build = Builder()
    grouped = build.reshape("x", 1, 2, -1)
    centred = build.op("Sub", grouped, build.op("ReduceMean", grouped, build.constant([2]), keepdims=1))
    check_freed(build.model(build.reshape(centred, 1, 4, 2, 3), (1, 4, 2, 3)), (1, 4, 2, 3))


def test_computed_targets_stay_as_they_are() -> None:
    build = Builder()
    batch = build.op("Gather", build.op("Shape", "x"), build.constant([0]), axis=0)
    target = build.op("Concat", batch, build.constant([-1]), axis=0)
    model = build.model(build.op("Reshape", "x", target), (1, 4, 2, 3))
    before = [node.SerializeToString() for node in model.graph.node]
    free_batch(model, "x", (1, 4, 2, 3))
    assert [node.SerializeToString() for node in model.graph.node] == before


def test_unknown_operators_between_do_not_stop_the_walk() -> None:
    build = Builder()
    build.nodes.append(helper.make_node("Gelu", ["x"], ["odd"], domain="com.microsoft"))
    model = build.model(build.reshape("odd", 1, 24), (1, 4, 2, 3))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    check_freed(model, (1, 4, 2, 3))
