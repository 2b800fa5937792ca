import numpy as np
import pytest

from guard.errors import ModelError
from tests.gradients import Array, Case, check, gradient_model, model_of, session

ANY = [
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceProd",
]
POSITIVE = ["ReduceLogSum", "ReduceLogSumExp"]


def axes(*values: int) -> Array:
    return np.array(values, np.int64)


CASES = [
    *(Case(op, [(3, 4, 2)], {1: axes(2, 3)}, {"keepdims": keep}) for op in ANY for keep in (0, 1)),
    *(Case(op, [(3, 4, 2)], {1: axes(-1)}, {"keepdims": 0}) for op in ANY),
    *(Case(op, [(3, 4)], {1: axes(1)}, {"keepdims": keep}, low=0.2) for op in POSITIVE for keep in (0, 1)),
    *(Case(op, [(3, 4)], attributes={"axes": [1, 2], "keepdims": 0}, opset=11) for op in ANY),
    *(Case(op, [(3, 4)], attributes={"axes": [-1]}, opset=17) for op in ANY if op != "ReduceSum"),
    *(Case(op, [(3, 4)], {1: axes()}, {"noop_with_empty_axes": 1}) for op in ANY),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduction(case: Case) -> None:
    check(case)


def gradient_of(op: str, x: Array) -> Array:
    served = session(gradient_model(model_of(Case(op, [x.shape], {1: axes(1)}, {"keepdims": 0}))))
    gradient: Array = served.run(None, {"x0": x[None], "cotangent": np.ones(1, np.float32)})[1][0]
    return gradient


@pytest.mark.parametrize(
    ("op", "values", "slopes"),
    [
        ("ReduceMax", [1, 3, 3], [0, 0.5, 0.5]),
        ("ReduceMin", [3, 1, 1], [0, 0.5, 0.5]),
        ("ReduceL2", [0, 0, 0], [0, 0, 0]),
        ("ReduceL1", [0, -1, 1], [0, -1, 1]),
        ("ReduceProd", [2, 0, 3], [0, 6, 0]),
        ("ReduceProd", [2, 0, 0], [0, 0, 0]),
    ],
)
def test_kinks(op: str, values: list[float], slopes: list[float]) -> None:
    np.testing.assert_array_equal(gradient_of(op, np.array(values, np.float32)), slopes)


@pytest.mark.parametrize("op", [*ANY, *POSITIVE])
@pytest.mark.parametrize("keep", [0, 1])
def test_reducing_over_the_batch_is_refused(op: str, keep: int) -> None:
    with pytest.raises(ModelError, match=rf"{op} .*reduces over the batch"):
        gradient_model(model_of(Case(op, [(3,)], {1: axes(0)}, {"keepdims": keep})))
