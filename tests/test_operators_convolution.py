from collections import Counter
from itertools import product

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from guard.graph import Provider
from tests.gradients import Array, Case, check, gradient_model, relative_error, session

Pads = tuple[int, int, int, int]


def kernel(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def conv(
    channels: tuple[int, int],
    size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    *,
    op: str = "Conv",
    **given: object,
) -> Case:
    """A convolution from `channels[0]` to `channels[1]` channels."""
    group = int(str(given.get("group", 1)))
    inputs, outputs = channels
    shape = (outputs, inputs // group) if op == "Conv" else (inputs, outputs // group)
    bias = kernel(outputs)
    return Case(op, [(inputs, *size)], {1: kernel(*shape, *kernel_size), 2: bias}, given)


PLAIN = [
    conv((3, 4), (6, 5), (3, 3), pads=[1, 1, 1, 1]),
    conv((3, 4), (6, 5), (1, 1)),
    conv((3, 4), (6, 5), (2, 3)),
    conv((4, 6), (6, 6), (3, 3), group=2, pads=[1, 1, 1, 1]),
    conv((4, 4), (6, 6), (3, 3), group=4, pads=[1, 1, 1, 1]),
    conv((2, 3), (7, 7), (3, 3), dilations=[2, 2], pads=[2, 2, 2, 2]),
    conv((2, 3), (7, 7), (3, 3), pads=[0, 2, 1, 0]),
    conv((2, 3), (4, 4), (1, 1), pads=[2, 1, 1, 0]),  # pads reach beyond the kernel
    conv((2, 3), (5, 6), (3, 3), auto_pad="SAME_UPPER"),
    conv((2, 3), (5, 6), (2, 2), auto_pad="SAME_LOWER"),
    conv((2, 3), (5, 6), (2, 2), auto_pad="VALID"),
    conv((2, 3), (9,), (3,), pads=[1, 1]),
    conv((2, 3), (4, 4, 4), (2, 2, 2)),
]
STRIDED = [
    conv((20, 3), (7, 8), (3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),  # too many channels to stack the phases
    conv((9, 3), (9, 8), (5, 4), strides=[3, 3], pads=[2, 1, 0, 1]),
    conv((3, 4), (8, 8), (3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),
    conv((3, 4), (7, 9), (3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),
    conv((3, 4), (8, 8), (1, 1), strides=[2, 2]),
    conv((3, 4), (7, 7), (1, 1), strides=[2, 2]),
    conv((3, 4), (7, 7), (1, 1), strides=[2, 2], pads=[1, 1, 1, 1]),
    conv((3, 4), (12, 12), (7, 7), strides=[2, 2], pads=[3, 3, 3, 3]),
    conv((3, 4), (8, 8), (4, 4), strides=[4, 4]),
    conv((3, 4), (9, 10), (4, 4), strides=[4, 4]),
    conv((3, 4), (11, 11), (2, 2), strides=[3, 3]),
    conv((3, 4), (10, 10), (5, 5), strides=[3, 3], pads=[2, 0, 1, 2]),
    conv((4, 4), (8, 8), (3, 3), strides=[2, 2], pads=[1, 1, 1, 1], group=4),
    conv((4, 6), (8, 8), (3, 3), strides=[2, 2], pads=[1, 1, 1, 1], group=2),
    conv((2, 2), (9, 9), (3, 3), strides=[2, 2], dilations=[2, 2], pads=[2, 2, 2, 2]),
    conv((2, 2), (9, 8), (3, 3), strides=[2, 1], pads=[1, 1, 1, 1]),
    conv((2, 2), (7, 6), (3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    conv((2, 2), (6, 8), (3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    conv((2, 2), (9,), (3,), strides=[2]),
    conv((1, 2), (5, 5, 6), (3, 2, 2), strides=[2, 2, 2]),
]
TRANSPOSED = [
    conv((3, 4), (5, 4), (3, 3), op="ConvTranspose"),
    conv(
        (3, 4), (5, 4), (3, 3), op="ConvTranspose", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]
    ),
    conv((4, 6), (5, 4), (2, 2), op="ConvTranspose", strides=[2, 2], group=2),
    conv((2, 2), (4, 4), (3, 3), op="ConvTranspose", dilations=[2, 2], pads=[1, 1, 1, 1]),
    conv((2, 2), (4, 4), (3, 3), op="ConvTranspose", strides=[2, 2], auto_pad="SAME_UPPER"),
    conv((2, 2), (4, 4), (3, 3), op="ConvTranspose", strides=[2, 2], auto_pad="SAME_LOWER"),
    conv((2, 2), (4, 4), (3, 3), op="ConvTranspose", strides=[2, 2], output_shape=[8, 8]),
    conv((2, 2), (5,), (3,), op="ConvTranspose", strides=[2]),
]


@pytest.mark.parametrize(("case", "provider"), list(product([*PLAIN, *STRIDED], ["cpu", "cuda"])), ids=str)
def test_conv(case: Case, provider: Provider) -> None:
    check(case, provider=provider)


@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_conv_transpose(case: Case) -> None:
    check(case)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    group=st.sampled_from([1, 2]),
    provider=st.sampled_from(["cpu", "cuda"]),
    seed=st.integers(0, 99),
)
def test_any_conv(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: int,
    dilation: int,
    pads: Pads,
    group: int,
    provider: Provider,
    seed: int,
) -> None:
    reach = [dilation * (k - 1) + 1 for k in kernel_size]
    assume(all(n + pads[i] + pads[i + 2] >= r for i, (n, r) in enumerate(zip(size, reach, strict=True))))
    case = conv(
        (2, 4),
        size,
        kernel_size,
        strides=[stride] * 2,
        dilations=[dilation] * 2,
        pads=list(pads),
        group=group,
    )
    check(case, seed=seed, provider=provider)


def strided_convs(kernel_sizes: tuple[int, ...], size: tuple[int, int], stride: int) -> onnx.ModelProto:
    """The sum of several convolutions of one input, as where a residual block halves its input."""
    weights = [
        numpy_helper.from_array(kernel(5, 20, k, k) + np.float32(i), f"w{i}")
        for i, k in enumerate(kernel_sizes)
    ]
    nodes = [
        helper.make_node("Conv", ["x", f"w{i}"], [f"y{i}"], strides=[stride] * 2, pads=[k // 2] * 4)
        for i, k in enumerate(kernel_sizes)
    ]
    nodes.append(helper.make_node("Sum", [node.output[0] for node in nodes], ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 20, *size])
    y = onnx.ValueInfoProto(name="y")
    y.type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph(nodes, "block", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)], ids=str)
@pytest.mark.parametrize(
    ("kernel_sizes", "stride", "operators"),
    [
        ((3, 1), 2, {"Conv": 2 + 4 + 1, "Add": 1}),
        ((1, 3), 2, {"Conv": 2 + 4 + 1, "Add": 1}),
        ((3, 3), 2, {"Conv": 2 + 4 + 4, "Add": 4}),
        ((3, 1, 5), 2, {"Conv": 3 + 4 + 1 + 4, "Add": 1 + 4}),
        ((1, 1), 2, {"Conv": 2, "ConvTranspose": 2, "Add": 1}),  # nothing but zeros in between
        ((3, 1), 3, {"Conv": 2 + 9 + 1, "Add": 1}),
    ],
    ids=str,
)
def test_strided_convs_of_one_input_are_added_in_phases(
    kernel_sizes: tuple[int, ...], stride: int, operators: dict[str, int], size: tuple[int, int]
) -> None:
    model = strided_convs(kernel_sizes, size, stride)
    found = gradient_model(model)
    counted = Counter(node.op_type for node in found.graph.node)
    assert {op: counted[op] for op in ("Conv", "ConvTranspose", "Add") if counted[op]} == operators
    random = np.random.default_rng(1)
    x = random.standard_normal((2, 20, *size)).astype(np.float32)
    v = random.standard_normal((2, 5, *(-(-n // stride) for n in size))).astype(np.float32)
    expected = session(gradient_model(model, provider="cuda")).run(["g0"], {"x": x, "cotangent": v})[0]
    actual = session(found).run(["g0"], {"x": x, "cotangent": v})[0]
    assert relative_error(actual, expected) < 1e-6
