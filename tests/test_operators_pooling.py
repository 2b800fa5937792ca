import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from guard.errors import ModelError
from tests.gradients import Case, check, gradient_model, model_of, relative_error, session


def pool(op: str, size: tuple[int, ...], kernel: tuple[int, ...], **given: object) -> Case:
    """Pooling over three channels."""
    return Case(op, [(3, *size)], attributes={"kernel_shape": list(kernel), **given})


MAX = [
    pool("MaxPool", (6, 6), (2, 2), strides=[2, 2]),
    pool("MaxPool", (7, 7), (3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),
    pool("MaxPool", (7, 8), (3, 3), strides=[2, 2], ceil_mode=1),
    pool("MaxPool", (5, 5), (3, 3), pads=[1, 1, 1, 1]),
    pool("MaxPool", (9, 9), (3, 3), dilations=[2, 2]),
    pool("MaxPool", (6, 7), (3, 2), strides=[2, 1], pads=[0, 1, 2, 0]),
    pool("MaxPool", (7, 7), (3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    pool("MaxPool", (6, 7), (3, 3), strides=[2, 2], storage_order=1),
    pool("MaxPool", (9,), (3,), strides=[2]),
    pool("MaxPool", (4, 4, 4), (2, 2, 2), strides=[2, 2, 2]),
]
AVERAGE = [
    pool("AveragePool", (6, 6), (2, 2), strides=[2, 2]),
    pool("AveragePool", (7, 7), (2, 2), strides=[2, 2]),
    pool("AveragePool", (6, 9), (2, 3), strides=[2, 3]),
    pool("AveragePool", (5, 5), (3, 3), pads=[1, 1, 1, 1]),
    pool("AveragePool", (5, 5), (3, 3), pads=[1, 1, 1, 1], count_include_pad=1),
    pool("AveragePool", (5, 6), (3, 2), pads=[1, 0, 0, 1], count_include_pad=1),
    pool("AveragePool", (7, 7), (3, 3), strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    pool("AveragePool", (7, 7), (3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),
    pool("AveragePool", (6, 6), (3, 3), strides=[2, 2], ceil_mode=1),
    pool("AveragePool", (8, 8), (3, 3), dilations=[2, 2]),
    pool("AveragePool", (6, 7), (3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    pool("AveragePool", (6, 7), (3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    pool("AveragePool", (7,), (3,), strides=[2]),
    pool("AveragePool", (4, 4, 5), (2, 2, 3), strides=[2, 2, 1]),
]
GLOBAL = [
    *(
        Case(op, [(3, *size)])
        for op in ("GlobalAveragePool", "GlobalMaxPool")
        for size in [(4, 5), (7,), (2, 3, 2)]
    ),
    Case("GlobalLpPool", [(3, 4, 5)]),
    Case("GlobalLpPool", [(3, 4, 5)], attributes={"p": 3}, low=0.1),
]


@pytest.mark.parametrize("case", [*MAX, *AVERAGE, *GLOBAL], ids=str)
def test_pool(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        pool("AveragePool", (9, 9), (1, 1), strides=[3, 3], auto_pad="SAME_UPPER"),
        pool("AveragePool", (7,), (5,), strides=[3], dilations=[2], auto_pad="SAME_LOWER"),
    ],
    ids=str,
)
def test_windows_that_onnxruntime_places_otherwise_are_refused(case: Case) -> None:
    with pytest.raises(ModelError, match="only explicit pads are differentiated"):
        gradient_model(model_of(case))


@settings(max_examples=25, deadline=None)
@given(
    op=st.sampled_from(["MaxPool", "AveragePool"]),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    include=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_pool(
    op: str,
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    include: bool,
    seed: int,
) -> None:
    for i in range(2):
        assume(size[i] + pads[i] + pads[i + 2] >= kernel[i])
        assume(max(pads[i], pads[i + 2]) < kernel[i])
    given = {"count_include_pad": int(include)} if op == "AveragePool" else {}
    check(pool(op, size, kernel, strides=list(strides), pads=list(pads), **given), seed=seed)


def test_max_pool_routes_ties_to_the_first_pixel_as_torch_does() -> None:
    case = pool("MaxPool", (6, 7), (3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    served = session(gradient_model(model_of(case)))
    x = np.random.default_rng(0).integers(0, 3, (4, 3, 6, 7)).astype(np.float32)
    image = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.max_pool2d(image, 3, 2, 1)
    v = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    torch.autograd.backward(y, torch.tensor(v))
    _, gradient = served.run(None, {"x0": x, "cotangent": v})
    assert image.grad is not None
    assert relative_error(gradient, image.grad.numpy()) < 1e-6


@pytest.mark.parametrize("op", ["GlobalMaxPool"])
def test_ties_share_evenly(op: str) -> None:
    served = session(gradient_model(model_of(Case(op, [(1, 2, 2)]))))
    x = np.array([1, 3, 3, 2], np.float32).reshape(1, 1, 2, 2)
    _, gradient = served.run(None, {"x0": x, "cotangent": np.ones((1, 1, 1, 1), np.float32)})
    np.testing.assert_array_equal(gradient.reshape(-1), [0, 0.5, 0.5, 0])


@pytest.mark.parametrize("order", [2, 3])
def test_the_norm_of_a_dead_channel_has_gradient_zero(order: int) -> None:
    case = Case("GlobalLpPool", [(2, 1, 2)], attributes={"p": order})
    served = session(gradient_model(model_of(case)))
    x = np.array([0, 0, 3, 0], np.float32).reshape(1, 2, 1, 2)
    _, gradient = served.run(None, {"x0": x, "cotangent": np.ones((1, 2, 1, 1), np.float32)})
    np.testing.assert_allclose(gradient.reshape(-1), [0, 0, 1, 0], atol=1e-6)
