"""Normalizations, in evaluation mode, and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from guard.errors import ModelError
from guard.graph import Graph, Tensor, attributes, describe
from guard.operators.broadcast import axis_of, reshape_to
from guard.operators.linear import along_axis
from guard.operators.registry import data_rule


@data_rule("BatchNormalization")
def batch_normalization(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """With fixed statistics, a scale per channel."""
    given = attributes(node)
    if given.get("training_mode", 0):
        raise ModelError(f"{describe(node)} is in training mode; export the model in evaluation mode.")
    scale, variance = graph.constant_of(node, 1), graph.constant_of(node, 4)
    factor = scale / np.sqrt(variance.astype(np.float64) + given.get("epsilon", 1e-5))
    return scale_channels(graph, cotangent, factor.astype(scale.dtype), graph.rank(node.input[0]))


def scale_channels(graph: Graph, x: str, factor: NDArray[Any], rank: int) -> str:
    """Multiplies axis 1 of a tensor by a vector."""
    if graph.provider == "cpu" and rank == 4:
        # a depthwise convolution stays in onnxruntime's blocked layout, a broadcast Mul does not
        return graph.op("Conv", x, graph.constant(factor.reshape(-1, 1, 1, 1)), group=len(factor))
    return graph.op("Mul", x, graph.constant(factor.reshape(-1, *[1] * (rank - 2))))


@data_rule("Softmax")
def softmax(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """With cotangent v: y (v - <y, v>)."""
    v, y = graph.tensor(cotangent), graph.tensor(node.output[0])
    axis = axis_of(node, graph.rank(y.name), -1)
    return (y * (v - (v * y).sum([axis]))).name


@data_rule("LogSoftmax")
def log_softmax(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """With cotangent v: v - softmax(x) sum(v)."""
    v, y = graph.tensor(cotangent), graph.tensor(node.output[0])
    axis = axis_of(node, graph.rank(y.name), -1)
    probabilities = graph.tensor(graph.once(("slope", y.name), lambda: y.apply("Exp").name))
    return (v - probabilities * v.sum([axis])).name


@data_rule("LayerNormalization")
def layer_normalization(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Normalized over the last axes."""
    x = node.input[0]
    rank = graph.rank(x)
    axes = list(range(axis_of(node, rank, -1), rank))
    scaled = graph.op("Mul", cotangent, node.input[1])

    def statistics() -> tuple[str, str]:
        mean, inverse = graph.extra_output(node, 1), graph.extra_output(node, 2)
        return ((graph.tensor(x) - graph.tensor(mean)) * graph.tensor(inverse)).name, inverse

    normalized, inverse = graph.once(("statistics", node.output[0]), statistics)
    return _centred(graph, scaled, normalized, inverse, axes, prod(graph.static_shape(x, axes[0])))


@data_rule("RMSNormalization")
def rms_normalization(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Normalized over the last axes, without centring."""
    x = graph.tensor(node.input[0])
    rank = graph.rank(x.name)
    axes = list(range(axis_of(node, rank, -1), rank))
    count = prod(graph.static_shape(x.name, axes[0]))
    epsilon = attributes(node).get("epsilon", 1e-5)

    def statistics() -> tuple[str, str]:
        inverse = 1.0 / ((x * x).mean(axes, count) + epsilon).apply("Sqrt")
        return (x * inverse).name, inverse.name

    normalized, inverse = map(graph.tensor, graph.once(("statistics", node.output[0]), statistics))
    scaled = graph.tensor(graph.op("Mul", cotangent, node.input[1]))
    return ((scaled - normalized * (scaled * normalized).mean(axes, count)) * inverse).name


@data_rule("InstanceNormalization")
def instance_normalization(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Normalized over the spatial axes of each channel."""
    x = node.input[0]
    rank = graph.rank(x)
    scale = _per_channel(graph, node.input[1], rank)
    axes = list(range(2, rank))
    epsilon = attributes(node).get("epsilon", 1e-5)
    normalized, inverse = _statistics(graph, node.output[0], x, axes, graph.static_shape(x, 2), epsilon)
    scaled = graph.op("Mul", cotangent, scale)
    return _centred(graph, scaled, normalized, inverse, axes, prod(graph.static_shape(x, 2)))


@data_rule("GroupNormalization")
def group_normalization(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Normalized over the channels of a group and all spatial axes."""
    x = node.input[0]
    batch = graph.shape(x)[0]
    channels, *space = graph.static_shape(x, 1)
    given = attributes(node)
    groups = given["num_groups"]
    grouped = (batch, groups, channels // groups * prod(space))
    scale = graph.constant_of(node, 1)
    if graph.opset < 21:  # one scale per group there
        scale = np.repeat(scale, channels // groups)
    scaled = graph.op("Mul", cotangent, graph.constant(scale.reshape(-1, *[1] * len(space))))
    flat = graph.once(("grouped", node.output[0]), lambda: reshape_to(graph, x, grouped))
    epsilon = given.get("epsilon", 1e-5)
    normalized, inverse = _statistics(graph, node.output[0], flat, [2], grouped[2:], epsilon)
    result = _centred(graph, reshape_to(graph, scaled, grouped), normalized, inverse, [2], grouped[2])
    return reshape_to(graph, result, x)


@data_rule("LpNormalization")
def lp_normalization(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """With y = x / n, n = ||x||: (v - y <v, y>) / n for p = 2, (v - sign(x) <v, y>) / n for p = 1; n = 1
    where x is 0, as onnxruntime has it.
    """
    x, y, v = (graph.tensor(name) for name in (node.input[0], node.output[0], cotangent))
    axis = axis_of(node, graph.rank(x.name), -1)
    order = attributes(node).get("p", 2)

    def norm() -> str:
        length = (x * x).sum([axis]).apply("Sqrt") if order == 2 else x.apply("Abs").sum([axis])
        return length.equals(0.0).where(Tensor(graph, graph.scalar(1.0, x.name)), length).name

    direction = y if order == 2 else x.apply("Sign")
    length = graph.tensor(graph.once(("norm", y.name), norm))
    return ((v - direction * (v * y).sum([axis])) / length).name


@data_rule("LRN")
def local_response_normalization(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """With y = x s^-beta, s = bias + alpha / size * (sum of x^2 over neighbouring channels):
    v s^-beta - 2 alpha beta / size * x * (the same sum, seen from the neighbours, of v y / s).
    """
    given = attributes(node)
    size, alpha, beta = int(given["size"]), float(given.get("alpha", 1e-4)), float(given.get("beta", 0.75))
    x, y, v = (graph.tensor(name) for name in (node.input[0], node.output[0], cotangent))
    rank = graph.rank(x.name)
    (channels, *_) = graph.static_shape(x.name, 1)
    index = np.arange(channels)
    offset = index[:, None] - index  # rows: neighbours, columns: the channel that is normalized
    near = ((offset >= -((size - 1) // 2)) & (offset <= size // 2)).astype(graph.dtype(x.name))

    def scale() -> str:
        sums = graph.tensor(along_axis(graph, (x * x).name, 1, near, rank))
        return (sums * (alpha / size) + float(given.get("bias", 1.0))).name

    s = graph.tensor(graph.once(("scale", y.name), scale))
    spread = graph.tensor(along_axis(graph, (v * y / s).name, 1, np.ascontiguousarray(near.T), rank))
    return (v * s**-beta - x * spread * (2 * alpha * beta / size)).name


def _statistics(
    graph: Graph, key: str, x: str, axes: Sequence[int], dims: Sequence[int], epsilon: float
) -> tuple[str, str]:
    """The tensor normalized over `axes`, of sizes `dims`, and its inverse standard deviation."""

    def make() -> tuple[str, str]:
        count = prod(dims)
        centred = graph.tensor(x) - graph.tensor(x).mean(axes, count)
        inverse = 1.0 / ((centred * centred).mean(axes, count) + epsilon).apply("Sqrt")
        return (centred * inverse).name, inverse.name

    return graph.once(("statistics", key), make)


def _centred(
    graph: Graph, cotangent: str, normalized: str, inverse: str, axes: Sequence[int], count: int
) -> str:
    """Normalization pulled back: with u = (x - mean) / deviation: (v - mean(v) - u mean(v u)) / deviation."""
    v, u = graph.tensor(cotangent), graph.tensor(normalized)
    return ((v - v.mean(axes, count) - u * (v * u).mean(axes, count)) * graph.tensor(inverse)).name


def _per_channel(graph: Graph, vector: str, rank: int) -> str:
    return reshape_to(graph, vector, (*graph.static_shape(vector), *[1] * (rank - 2)))
