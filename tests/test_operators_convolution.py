from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from guard.graph import Provider
from tests.gradients import Array, Case, check

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
