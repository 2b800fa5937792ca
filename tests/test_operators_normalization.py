import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import ModelError
from guard.graph import Provider
from tests.gradients import Array, Case, check, gradient_model, model_of, session


def vector(*shape: int, low: float = -1.0) -> Array:
    return np.random.default_rng(0).uniform(low, 2, shape).astype(np.float32)


def batch(channels: int) -> dict[int, Array]:
    """Scale, shift, mean and variance."""
    return {i: vector(channels, low=0.5) for i in (1, 2, 3, 4)}


CASES = [
    Case("LayerNormalization", [(4, 5)], {1: vector(5), 2: vector(5)}),
    Case("LayerNormalization", [(4, 5)], {1: vector(4, 5)}, {"axis": 1, "epsilon": 0.1}),
    Case("LayerNormalization", [(6,)], {1: vector(6), 2: vector(6)}, {"axis": 1}),
    Case("InstanceNormalization", [(3, 4, 5)], {1: vector(3), 2: vector(3)}),
    Case("InstanceNormalization", [(3, 6)], {1: vector(3), 2: vector(3)}, {"epsilon": 0.1}),
    Case("GroupNormalization", [(6, 3, 2)], {1: vector(6), 2: vector(6)}, {"num_groups": 3}, opset=21),
    Case("GroupNormalization", [(6, 5)], {1: vector(6), 2: vector(6)}, {"num_groups": 2}, opset=21),
    Case("LpNormalization", [(3, 4)]),
    Case("LpNormalization", [(3, 4)], attributes={"p": 1, "axis": 1}),
    Case("LRN", [(6, 3, 2)], attributes={"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 1.5}),
    Case("LRN", [(6, 3, 2)], attributes={"size": 5, "alpha": 0.5}),
    Case("MeanVarianceNormalization", [(3, 4, 5)], attributes={"axes": [2, 3]}),
]
SOFTMAX = [
    Case(op, [(3, 4)], attributes=given, opset=opset)
    for op in ("Softmax", "LogSoftmax")
    for given, opset in [
        ({}, 20),
        ({"axis": 1}, 20),
        ({"axis": -2}, 13),
        ({"axis": 2}, 11),
        ({"axis": 1}, 11),
    ]
]


@pytest.mark.parametrize("case", [*CASES, *SOFTMAX], ids=str)
def test_normalization(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 6), (3,), (2, 2, 2, 2)], ids=str)
def test_batch_normalization(shape: tuple[int, ...], provider: Provider) -> None:
    check(Case("BatchNormalization", [shape], batch(shape[0]), {"epsilon": 0.01}), provider=provider)


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_of_a_vector_of_zeros_is_finite(order: int) -> None:
    case = Case("LpNormalization", [(3,)], attributes={"p": order})
    feeds = {"x0": np.zeros((1, 3), np.float32), "cotangent": np.ones((1, 3), np.float32)}
    _, gradient = session(gradient_model(model_of(case))).run(None, feeds)
    np.testing.assert_array_equal(gradient, np.ones((1, 3)))


def test_root_mean_square() -> None:
    check(Case("RMSNormalization", [(4, 5)], {1: vector(5)}, opset=23))


def test_batch_normalization_in_training_mode_is_refused() -> None:
    case = Case("BatchNormalization", [(3, 4, 5)], batch(3), {"training_mode": 1}, outputs=3)
    with pytest.raises(ModelError, match="training mode"):
        gradient_model(model_of(case))


@settings(max_examples=10, deadline=None)
@given(
    op=st.sampled_from(["Softmax", "LogSoftmax"]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_softmax(op: str, shape: list[int], axis: int, seed: int) -> None:
    case = Case(op, [tuple(shape)], attributes={"axis": 1 + axis % len(shape)}, cancels=True)
    check(case, seed=seed)


def test_a_softmax_whose_gradient_cancels() -> None:
    check(Case("LogSoftmax", [(2,)], attributes={"axis": 1}, cancels=True), seed=48)


def test_softmax_of_far_apart_logits() -> None:
    check(Case("LogSoftmax", [(3,)], low=-200, high=200))
    check(Case("Softmax", [(3,)], low=-6, high=6))
