import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.gradients import Array, Case, check, gradient_model, model_of, session

SMOOTH = [
    "Asinh",
    "Atan",
    "Celu",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Gelu",
    "HardSwish",
    "Identity",
    "Mish",
    "Neg",
]
SMOOTH += ["Selu", "Sigmoid", "Sin", "Sinh", "Softplus", "Softsign", "Tanh"]
KINKED = ["Abs", "HardSigmoid", "LeakyRelu", "Relu", "Shrink", "ThresholdedRelu"]
RATIONAL = ["Log", "Reciprocal", "Sqrt", "Asin", "Acos", "Atanh", "Tan"]


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


UNARY = [
    *(Case(op, [(3, 4)]) for op in (*SMOOTH, *KINKED)),
    *(Case(op, [(3, 4)], low=0.1, high=0.9) for op in RATIONAL),
    Case("Acosh", [(3, 4)], low=1.2, high=3),
    Case("Celu", [(5,)], attributes={"alpha": 0.4}),
    Case("Elu", [(5,)], attributes={"alpha": 0.4}),
    Case("Selu", [(5,)], attributes={"alpha": 0.4, "gamma": 3.0}),
    Case("HardSigmoid", [(5,)], attributes={"alpha": 0.5, "beta": 0.3}),
    Case("LeakyRelu", [(5,)], attributes={"alpha": -0.3}),
    Case("ThresholdedRelu", [(5,)], attributes={"alpha": 0.5}),
    Case("Shrink", [(5,)], attributes={"lambd": 1.0, "bias": 1.0}),
    Case("Gelu", [(7,)], attributes={"approximate": "tanh"}),
    Case("Clip", [(9,)], {1: f32(-1.0).reshape(()), 2: f32(0.5).reshape(())}),
    Case("Clip", [(9,)], {1: f32(-1.0).reshape(())}),
    Case("Clip", [(9,)], {2: f32(0.5).reshape(())}),
    Case("Clip", [(9,)]),
    Case("Clip", [(9,)], attributes={"min": -1.0, "max": 0.5}, opset=9),
    Case("PRelu", [(3, 4, 4)], {1: f32(0.2, -0.5, 1.5).reshape(3, 1, 1)}),
    Case("PRelu", [(3,)], {1: f32(0.25)}),
    Case("Dropout", [(3, 4)]),
    Case("Dropout", [(3, 4)], attributes={"ratio": 0.3}, opset=10),
    Case("Cast", [(3,)], attributes={"to": 1}),
    Case("Pow", [(4,)], {1: f32(2.0).reshape(())}),
    Case("Pow", [(4,)], {1: f32(3.0).reshape(())}),
    Case("Pow", [(4,)], {1: np.array([3], np.int64)}),
    Case("Pow", [(4,)], {1: f32(0.5, -1.5, 2.0, 0.0)}, low=0.2),
    Case("Pow", [(4,)], {0: f32(1.5).reshape(())}),
    Case("Pow", [(4,), (4,)], low=0.3, high=1.7),
]
BINARY = [
    *(
        Case(op, [(3, 4), (3, 4)], low=0.5)
        for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")
    ),
    *(
        Case(op, [(3, 4), (1, 4)], low=0.5)
        for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")
    ),
    *(Case(op, [(2, 3)], {1: f32(1, 2, 3)}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *(Case(op, [(2, 3)], {0: f32(1, 2, 3)}, low=0.5) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *(
        Case(op, [(3,)], {0: np.ones((2, 2, 1, 1), np.float32) * 3}, low=0.5)
        for op in ("Add", "Sub", "Mul", "Div")
    ),
    *(Case(op, [(3,), (3,), (3,)]) for op in ("Sum", "Mean", "Max", "Min")),
    *(Case(op, [(3,)]) for op in ("Sum", "Mean", "Max", "Min")),
    Case("Where", [(2, 3), (2, 3)], {0: np.array([True, False, True])}),
    Case("Where", [(2, 3), (1, 3)], {0: np.array([[True], [False]])}),
    Case(
        "Where", [(2, 3)], {0: np.array([True, False, True]), 1: np.float32(2) * np.ones((2, 3), np.float32)}
    ),
    Case(
        "Where", [(2, 3)], {0: np.array([True, False, True]), 2: np.float32(2) * np.ones((1, 1), np.float32)}
    ),
]


@pytest.mark.parametrize("case", UNARY, ids=str)
def test_unary(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", BINARY, ids=str)
def test_binary(case: Case) -> None:
    check(case)


def gradient_at(case: Case, *inputs: Array) -> list[Array]:
    """The float32 gradients of sum(y) at inputs with a batch axis."""
    served = session(gradient_model(model_of(case)))
    feeds = {f"x{i}": x for i, x in enumerate(inputs)}
    shape = np.broadcast_shapes(*(x.shape for x in inputs))
    _, *gradients = served.run(None, {**feeds, "cotangent": np.ones(shape, np.float32)})
    return list(gradients)


@pytest.mark.parametrize(
    ("case", "points", "slopes"),
    [
        (Case("Relu", [(4,)]), f32(-0.0, 0.0, 1e-38, -1e-38), f32(0, 0, 1, 0)),
        (
            Case("Clip", [(4,)], {1: f32(0).reshape(()), 2: f32(6).reshape(())}),
            f32(0, 6, 3, 7),
            f32(0, 0, 1, 0),
        ),
        (Case("Abs", [(3,)]), f32(0, 2, -2), f32(0, 1, -1)),
        (Case("LeakyRelu", [(3,)], attributes={"alpha": 0.1}), f32(0, 2, -2), f32(0.1, 1, 0.1)),
        (Case("HardSigmoid", [(2,)]), f32(-2.5, 2.5), f32(0, 0)),
        (Case("Sigmoid", [(3,)]), f32(-200, 0, 200), f32(0, 0.25, 0)),
        (Case("Softplus", [(2,)]), f32(-200, 200), f32(0, 1)),
        (Case("Gelu", [(2,)]), f32(-50, 50), f32(0, 1)),
        (Case("Pow", [(1,)], {1: f32(2)}), f32(0), f32(0)),
        (Case("Pow", [(1,)], {1: f32(0)}), f32(0), f32(0)),
        (Case("Pow", [(3,)], {1: f32(0, 1, 2)}), f32(0, 0, 0), f32(0, 1, 0)),
    ],
    ids=str,
)
def test_slopes_at_kinks_and_far_out(case: Case, points: Array, slopes: Array) -> None:
    (gradient,) = gradient_at(case, points[None])
    np.testing.assert_allclose(gradient[0], slopes, atol=1e-7)


@pytest.mark.parametrize("op_type", ["Max", "Min"])
def test_ties_share_evenly(op_type: str) -> None:
    a, b = gradient_at(Case(op_type, [(2,), (2,)]), f32(1, 1)[None], f32(1, 2)[None])
    won = 0.0 if op_type == "Max" else 1.0
    np.testing.assert_array_equal(a[0], f32(0.5, won))
    np.testing.assert_array_equal(b[0], f32(0.5, 1 - won))


def test_nan_and_infinity_are_not_hidden() -> None:
    (gradient,) = gradient_at(Case("Relu", [(2,)]), f32(np.nan, 1)[None])
    assert np.isnan(gradient[0, 0])
    assert gradient[0, 1] == 1


@settings(max_examples=15, deadline=None)
@given(
    op_type=st.sampled_from(["Add", "Sub", "Mul", "Div"]),
    dims=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    ones=st.lists(st.booleans(), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_any_broadcast(op_type: str, dims: list[int], ones: list[bool], seed: int) -> None:
    narrow = tuple(1 if one else d for d, one in zip(dims, ones, strict=False))
    check(Case(op_type, [tuple(dims), narrow], low=0.5), seed=seed)


def test_silu_as_it_is_exported() -> None:
    nodes = [helper.make_node("Sigmoid", ["x0"], ["s"]), helper.make_node("Mul", ["x0", "s"], ["y0"])]
    swapped = [nodes[0], helper.make_node("Mul", ["s", "x0"], ["y0"])]
    x = np.linspace(-30, 30, 41, dtype=np.float32)[None]
    sigmoid = 1 / (1 + np.exp(-x.astype(np.float64)))
    for form in (nodes, swapped):
        model = model_of(Case("Relu", [(41,)]))
        del model.graph.node[:]
        model.graph.node.extend(form)
        built = gradient_model(model)
        assert [node.op_type for node in built.graph.node].count(
            "Mul"
        ) == 3  # forward, slope, and the row itself
        _, gradient = session(built).run(None, {"x0": x, "cotangent": np.ones_like(x)})
        np.testing.assert_allclose(gradient, sigmoid + x * sigmoid * (1 - sigmoid), rtol=1e-5, atol=1e-6)


def test_a_clip_to_infinity_is_a_clip_on_one_side() -> None:
    case = Case("Clip", [(3,)], {1: f32(0).reshape(()), 2: f32(np.inf).reshape(())})
    (gradient,) = gradient_at(case, f32(-1, 0, 1e-37)[None])
    np.testing.assert_array_equal(gradient[0], f32(0, 0, 1))
