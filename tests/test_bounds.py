"""Bounds against closed forms, and against the Jacobians of small networks as dense matrices."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper

from guard import bounds
from guard.bounds import Bound, WeightBounds, convolution_norm, weight_bounds
from guard.norms import Norm
from guard.operators.convolution import Window
from tests import networks

Array = NDArray[np.float32]
rng = np.random.default_rng


def run(model: onnx.ModelProto, images: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])


def dense(model: onnx.ModelProto, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """The matrix (K, pixels) of an affine network."""
    units = np.eye(int(np.prod(shape)), dtype=np.float32).reshape(-1, *shape)
    return np.asarray((run(model, units) - run(model, np.zeros_like(units[:1]))).T, np.float64)


def values(bound: Bound) -> tuple[float, float]:
    assert bound.logits is not None, bound.reason
    assert bound.margin is not None
    return bound.logits, bound.margin


def slopes(jacobian: NDArray[np.float64], order: int) -> tuple[float, float]:
    """The largest dual norm of a row, and of a difference of rows."""
    apart = (jacobian[:, np.newaxis] - jacobian).reshape(-1, jacobian.shape[1])
    return tuple(float(np.linalg.norm(x, order, axis=1).max()) for x in (jacobian, apart))  # type: ignore[return-value]


def network(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, NDArray[Any]],
    shape: tuple[int, int, int],
    classes: int,
) -> onnx.ModelProto:
    return networks.model(list(nodes), dict(weights), shape, classes)


def two_layers(
    first: NDArray[Any], second: NDArray[Any], bias: NDArray[Any], activation: str = "Relu"
) -> onnx.ModelProto:
    """second activation(first x + bias), for images of `first.shape[1]` pixels in a row."""
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Gemm", ["flat", "first", "bias"], ["hidden"], transB=1),
        helper.make_node(activation, ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "second"], ["logits"], transB=1),
    ]
    weights = {"first": first, "second": second, "bias": bias}
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    return network(nodes, weights, (1, 1, first.shape[1]), len(second))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_linear_model_is_its_own_bound(norm: Norm) -> None:
    weight = np.array([[3, 4, 0], [0, -1, 2], [1, 1, 1]], np.float32)
    found = weight_bounds(networks.linear(weight, shape=(1, 1, 3)))
    exact = slopes(weight.astype(float), 2 if norm == "l2" else 1)
    assert values(found.layers[norm]) == pytest.approx(exact)
    assert values(found.lemma[norm]) == pytest.approx(exact, rel=1e-6)
    assert values(found.paths[norm])[0] == pytest.approx(exact[0], rel=1e-6)
    assert values(found.paths[norm])[1] >= exact[1] * (1 - 1e-6)


def test_the_published_lemma_is_no_bound() -> None:
    # relu(x) - relu(x - 1) has slope 1 between 0 and 1; the product of its weights is 0
    model = two_layers(np.array([[1], [1]]), np.array([[1, -1], [0, 0]]), np.array([0, -1]))
    steep = run(model, np.array([[[[0.75]]], [[[0.25]]]], np.float32))[:, 0]
    assert (steep[0] - steep[1]) / 0.5 == 1.0
    found = weight_bounds(model)
    for norm in ("l2", "linf"):
        assert values(found.lemma[norm])[0] == 0
        assert values(found.paths[norm]) == (2, 2)
        assert values(found.layers[norm])[0] == pytest.approx(2)


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "Sigmoid", "LeakyRelu", "Elu", "Softplus"])
def test_layers_and_paths_in_closed_form(activation: str) -> None:
    first, second = rng(0).normal(size=(5, 4)), rng(1).normal(size=(3, 5))
    found = weight_bounds(two_layers(first, second, np.zeros(5), activation))
    slope = 0.25 if activation == "Sigmoid" else 1
    assert values(found.layers["l2"]) == pytest.approx(
        tuple(slope * np.linalg.norm(first, 2) * length for length in slopes(second, 2)), rel=1e-5
    )
    assert values(found.layers["linf"]) == pytest.approx(
        tuple(slope * np.linalg.norm(first, np.inf) * length for length in slopes(second, 1)), rel=1e-5
    )
    absolute = slope * np.abs(second) @ np.abs(first)
    margins = [np.linalg.norm(absolute[i] + absolute[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert values(found.paths["l2"]) == pytest.approx(
        (np.linalg.norm(absolute, axis=1).max(), max(margins)), rel=1e-5
    )
    apart = [
        slope * np.abs(second[i] - second[j]) @ np.abs(first).sum(1) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert values(found.paths["linf"]) == pytest.approx((absolute.sum(1).max(), max(apart)), rel=1e-5)
    for norm, order in (("l2", 2), ("linf", 1)):
        assert values(found.lemma[norm]) == pytest.approx(slopes(second @ first, order), rel=1e-5)  # type: ignore[index]


GEOMETRIES = [
    # size, kernel, stride, dilation, pads (begin, end) per axis
    ((6, 6), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    ((7, 6), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)),
    ((8, 8), (3, 3), (2, 2), (1, 1), (0, 0, 0, 0)),
    ((8, 5), (5, 2), (3, 1), (1, 1), (2, 0, 2, 1)),
    ((9, 9), (3, 3), (1, 1), (2, 2), (2, 2, 2, 2)),
    ((7, 7), (3, 3), (2, 3), (2, 1), (2, 0, 1, 1)),
    ((5, 5), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((5, 5), (1, 1), (2, 2), (1, 1), (1, 1, 1, 1)),
    ((4, 4), (2, 2), (4, 4), (1, 1), (0, 0, 0, 0)),
    ((3, 3), (5, 5), (1, 1), (1, 1), (2, 2, 2, 2)),
    ((2, 2), (3, 3), (1, 1), (1, 1), (2, 2, 2, 2)),
]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("size", "kernel", "strides", "dilations", "pads"), GEOMETRIES)
def test_a_convolution_is_no_longer_than_its_bound(
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, int, int, int],
    group: int,
) -> None:
    weight = rng(3).normal(size=(4, 2 // group, *kernel)).astype(np.float32)
    nodes = [
        helper.make_node(
            "Conv",
            ["images", "weight"],
            ["map"],
            strides=strides,
            dilations=dilations,
            pads=pads,
            group=group,
        ),
        helper.make_node("Flatten", ["map"], ["logits"]),
    ]
    output = [
        (n + pads[a] + pads[a + 2] - dilations[a] * (kernel[a] - 1) - 1) // strides[a] + 1
        for a, n in enumerate(size)
    ]
    model = network(nodes, {"weight": weight}, (2, *size), 4 * output[0] * output[1])
    exact = float(np.linalg.norm(dense(model, (2, *size)), 2))
    bound = convolution_norm(weight, Window(size, tuple(output), kernel, strides, dilations, pads[:2]), group)
    assert exact * (1 - 1e-5) <= bound <= 2 * exact
    if kernel == (1, 1) or strides == kernel:
        assert bound == pytest.approx(exact, rel=1e-5)
    linf = values(weight_bounds(model).layers["linf"])[0]
    assert linf >= np.abs(dense(model, (2, *size))).sum(1).max() * (1 - 1e-5)


def test_a_convolution_on_a_torus_is_its_fourier_transform() -> None:
    # one channel, one direction: 1 + 2 cos(t) has its largest value, 3, at frequency 0
    ones = np.ones((1, 1, 1, 3), np.float32)
    geometry = Window((1, 50), (1, 50), (1, 3), (1, 1), (1, 1), (0, 1))
    assert convolution_norm(ones, geometry) == pytest.approx(3)
    alternating = ones * np.array([1, -1, 1], np.float32)
    assert convolution_norm(alternating, Window((1, 51), (1, 51), (1, 3), (1, 1), (1, 1), (0, 1))) == (
        pytest.approx(3)
    )


def test_chunks_of_frequencies_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = rng(0).normal(size=(3, 2, 3, 3))
    geometry = Window((8, 8), (4, 4), (3, 3), (2, 2), (1, 1), (1, 1))
    whole = convolution_norm(weight, geometry)
    monkeypatch.setattr(bounds, "_CHUNK", 1)
    assert convolution_norm(weight, geometry) == pytest.approx(whole, rel=1e-12)


def residual() -> onnx.ModelProto:
    """Normalization, batch norm, a residual sum, a difference, padding, poolings, concatenation."""
    random = rng(5)
    weights: dict[str, NDArray[Any]] = {
        "mean": random.random((1, 3, 1, 1), np.float32),
        "deviation": np.array([0.2, 0.3, 0.25], np.float32).reshape(1, 3, 1, 1),
        "stem": random.normal(size=(4, 3, 3, 3)).astype(np.float32) / 4,
        "body": random.normal(size=(4, 4, 3, 3)).astype(np.float32) / 4,
        "scale": random.normal(size=4).astype(np.float32),
        "shift": random.normal(size=4).astype(np.float32),
        "average": random.normal(size=4).astype(np.float32),
        "variance": random.random(4, np.float32) + np.float32(0.5),
        "head": random.normal(size=(5, 8)).astype(np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Sub", ["images", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "deviation"], ["normal"]),
        helper.make_node("Pad", ["normal", "pads"], ["padded"]),
        helper.make_node("Conv", ["padded", "stem"], ["stemmed"]),
        helper.make_node("Relu", ["stemmed"], ["trunk"]),
        helper.make_node("Conv", ["trunk", "body"], ["branch"], pads=[1] * 4),
        helper.make_node(
            "BatchNormalization", ["branch", "scale", "shift", "average", "variance"], ["normed"]
        ),
        helper.make_node("Sub", ["trunk", "normed"], ["summed"]),
        helper.make_node("Clip", ["summed"], ["clipped"]),
        helper.make_node(
            "MaxPool", ["clipped"], ["largest"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
        ),
        helper.make_node("AveragePool", ["clipped"], ["means"], kernel_shape=[3, 3], strides=[1, 1]),
        helper.make_node("GlobalMaxPool", ["largest"], ["top"]),
        helper.make_node("ReduceMean", ["means", "axes"], ["centre"], keepdims=1),
        helper.make_node("Concat", ["top", "centre"], ["both"], axis=1),
        helper.make_node("Flatten", ["both"], ["features"]),
        helper.make_node("Gemm", ["features", "head"], ["logits"], transB=1),
    ]
    return network(nodes, weights, (3, 6, 6), 5)


def steepest(model: onnx.ModelProto, shape: tuple[int, int, int], norm: str) -> tuple[float, float]:
    """The largest slopes found between near points, which bounds may not be below."""
    images = rng(7).random((20, *shape), np.float32) * 3 - 1
    units = np.eye(int(np.prod(shape)), dtype=np.float32).reshape(-1, *shape)
    h = np.float32(1e-2)
    found = [0.0, 0.0]
    for image in images:
        jacobian = ((run(model, image + h * units) - run(model, image - h * units)) / (2 * h)).T.astype(float)
        for at, slope in enumerate(slopes(jacobian, 2 if norm == "l2" else 1)):
            found[at] = max(found[at], slope)
    return found[0], found[1]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("which", ["residual", "convolutional"])
def test_no_slope_exceeds_the_bounds(which: str, norm: Norm) -> None:
    model, shape = (residual(), (3, 6, 6)) if which == "residual" else (networks.convolutional(), (3, 8, 8))
    found, steep = weight_bounds(model), steepest(model, shape, norm)
    for bound in (found.layers[norm], found.paths[norm]):
        assert values(bound)[0] >= steep[0] > 0
        assert values(bound)[1] >= steep[1] > 0


def test_the_lemma_is_left_out_where_the_network_has_max_pooling() -> None:
    found = weight_bounds(residual())
    assert found.lemma == dict.fromkeys(("l2", "linf"), Bound(None, None, "MaxPool"))


def test_the_lemma_leaves_the_linear_operators_as_they_are() -> None:
    model = networks.convolutional()
    linear = onnx.ModelProto()
    linear.CopyFrom(model)
    for node in linear.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Identity"
    jacobian = dense(linear, (3, 8, 8))
    found = weight_bounds(model)
    assert values(found.lemma["l2"]) == pytest.approx(slopes(jacobian, 2), rel=1e-4)
    assert values(found.lemma["linf"]) == pytest.approx(slopes(jacobian, 1), rel=1e-4)


def nothing(found: WeightBounds) -> set[str]:
    kinds = (found.layers, found.paths, found.lemma)
    assert all(bound.logits is None and bound.margin is None for kind in kinds for bound in kind.values())
    return {bound.reason for kind in kinds for bound in kind.values()}


def test_an_unknown_operator_is_named() -> None:
    nodes = [
        helper.make_node("Softmax", ["images"], ["soft"], axis=1),
        helper.make_node("Flatten", ["soft"], ["logits"]),
    ]
    assert nothing(weight_bounds(network(nodes, {}, (1, 2, 2), 4))) == {"Softmax"}


def test_a_product_of_two_activations_has_no_bound() -> None:
    nodes = [
        helper.make_node("Mul", ["images", "images"], ["squared"]),
        helper.make_node("Flatten", ["squared"], ["logits"]),
    ]
    assert nothing(weight_bounds(network(nodes, {}, (1, 2, 2), 4))) == {"Mul"}


def test_a_sum_that_repeats_its_argument_has_no_bound() -> None:
    # one pixel read four times is twice as long: the constant must not decide the shape
    nodes = [
        helper.make_node("Add", ["images", "grid"], ["spread"]),
        helper.make_node("Flatten", ["spread"], ["logits"]),
    ]
    model = network(nodes, {"grid": np.zeros((1, 1, 2, 2), np.float32)}, (1, 1, 1), 4)
    assert nothing(weight_bounds(model)) == {"Add"}


def test_images_of_many_pixels_get_what_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weight_bounds(networks.convolutional())
    monkeypatch.setattr(bounds, "MOST_INPUTS", 100)
    found = weight_bounds(networks.convolutional())
    assert found.layers == whole.layers
    assert found.paths["linf"] == whole.paths["linf"]
    assert found.paths["l2"] == Bound(None, None, "192 pixels, more than 100")
    assert found.lemma["linf"].reason == "192 pixels, more than 100"


def test_what_overflows_is_said() -> None:
    large = np.full((2, 2), 1e30, np.float32)
    found = weight_bounds(two_layers(large, large, np.zeros(2)))
    assert found.paths["l2"].reason == "larger than a number holds"
    assert values(found.layers["l2"])[0] == pytest.approx(np.sqrt(2) * 1e30 * 2e30, rel=1e-5)


def test_a_reshape_by_the_batch_size_is_followed() -> None:
    weight = rng(0).normal(size=(3, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Shape", ["images"], ["size"], start=0, end=1),
        helper.make_node("Concat", ["size", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["images", "target"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], transB=1),
    ]
    found = weight_bounds(network(nodes, {"weight": weight, "rest": np.array([-1])}, (1, 2, 2), 3))
    assert found == weight_bounds(networks.linear(weight))
