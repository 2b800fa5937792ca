"""Pooling over the spatial axes."""

from __future__ import annotations

from functools import reduce
from math import prod

import numpy as np
from onnx import NodeProto

from guard.errors import ModelError
from guard.graph import Array, Graph, Tensor, attributes, describe
from guard.operators.broadcast import reshape_to
from guard.operators.convolution import Window, spread_evenly, window
from guard.operators.linear import along_axis
from guard.operators.registry import data_rule


@data_rule("GlobalAveragePool")
def global_average_pool(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The mean's cotangent, spread evenly."""
    return spread_evenly(graph, cotangent, node.input[0])


@data_rule("GlobalMaxPool")
def global_max_pool(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Pixels that tie for the maximum share the cotangent evenly."""
    x, y = graph.tensor(node.input[0]), graph.tensor(node.output[0])

    def share() -> str:
        ties = x.equals(y).like(x.name)
        return (ties / ties.sum(range(2, graph.rank(x.name)))).name

    return graph.op("Mul", cotangent, graph.once(("share", y.name), share))


@data_rule("GlobalLpPool")
def global_lp_pool(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """With y = ||x||_p: sign(x) |x / y|^(p-1), and 0 where y is 0."""
    x, y = graph.tensor(node.input[0]), graph.tensor(node.output[0])
    order = attributes(node).get("p", 2)

    def slope() -> str:
        one = Tensor(graph, graph.scalar(1.0, y.name))
        ratio = x / y.equals(0.0).where(one, y)
        return (ratio if order == 2 else x.apply("Sign") * ratio.apply("Abs") ** (order - 1.0)).name

    return graph.op("Mul", cotangent, graph.once(("slope", y.name), slope))


@data_rule("MaxPool")
def max_pool(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Each cotangent goes to the first pixel of its window with the maximum; overlapping windows add."""
    x = node.input[0]

    def argmax() -> str:
        # positions in the flattened input, batch and channels included, unless counted by columns
        given = attributes(node)
        by_columns = given.pop("storage_order", 0)
        found = graph.op("MaxPool", x, outputs=2, **given)[1] if by_columns else graph.extra_output(node, 1)
        return graph.op("Reshape", found, graph.constant([-1]))

    indices = graph.once(("argmax", node.output[0]), argmax)

    def zeros() -> str:
        flat = graph.op("Reshape", x, graph.constant([-1]))
        return graph.op("ConstantOfShape", graph.op("Shape", flat), value=graph.zero(x))

    updates = graph.op("Reshape", cotangent, graph.constant([-1]))
    blank = graph.once(("flat zeros", x), zeros)
    scattered = graph.op("ScatterElements", blank, indices, updates, axis=0, reduction="add")
    return reshape_to(graph, scattered, x)


@data_rule("AveragePool")
def average_pool(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Each pixel receives the cotangents of the windows it lies in, each over the size of that window."""
    given = attributes(node)
    size, output = graph.static_shape(node.input[0], 2), graph.static_shape(node.output[0], 2)
    geometry = window(given, given["kernel_shape"], size, output)
    if given.get("auto_pad", "NOTSET").startswith("SAME") and (
        any(d != 1 for d in geometry.dilations) or any(p < 0 for p in geometry.padding)
    ):
        raise ModelError(
            f"{describe(node)} has auto_pad with dilations, or strides above its kernel; only explicit pads "
            "are differentiated there."
        )
    members = [_membership(geometry, axis) for axis in range(len(size))]
    inside = reduce(np.multiply.outer, [m.sum(axis=1) for m in members])
    # the average of ones is (pixels inside) / divisor, whatever the node counts as padding
    ones = graph.evaluate("AveragePool", [np.ones((1, 1, *size), np.float32)], given)[0, 0]
    divisors = np.round(inside / ones)
    kind = graph.dtype(node.input[0])
    uniform = bool(np.all(divisors == divisors.flat[0]))
    whole = all(n == k * o for n, k, o in zip(size, geometry.kernel, output, strict=True))
    if (
        uniform
        and whole
        and geometry.kernel == geometry.strides
        and not any(geometry.begin)
        and len(size) == 2
    ):
        scaled = (graph.tensor(cotangent) * float(1 / divisors.flat[0])).name
        factors = np.asarray([1, 1, *geometry.kernel], np.float32)
        return graph.op(
            "Resize",
            scaled,
            None,
            graph.constant(factors),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    share = 1 / (divisors.flat[0] if uniform else divisors)
    result = graph.op("Mul", cotangent, graph.constant(np.asarray(share, kind)))
    if all(s == 1 for s in geometry.strides) and all(d == 1 for d in geometry.dilations):
        # the same windows, mirrored: a sum over them is an average times the size of the kernel
        begin = [k - 1 - b for k, b in zip(geometry.kernel, geometry.begin, strict=True)]
        end = [n - o + b for n, o, b in zip(size, output, geometry.begin, strict=True)]
        if all(0 <= p < k for p, k in zip((*begin, *end), geometry.kernel * 2, strict=True)):
            averaged = graph.op(
                "AveragePool",
                result,
                kernel_shape=geometry.kernel,
                pads=[*begin, *end],
                count_include_pad=1,
            )
            return (graph.tensor(averaged) * float(prod(geometry.kernel))).name
    for axis, matrix in enumerate(members, start=2):
        result = along_axis(graph, result, axis, matrix.astype(kind), len(size) + 2)
    return result


def _membership(geometry: Window, axis: int) -> Array:
    """Which pixels (columns) lie in which windows (rows) along one axis, as numbers 0 and 1."""
    first = np.arange(geometry.output[axis]) * geometry.strides[axis] - geometry.begin[axis]
    taps = np.arange(geometry.kernel[axis]) * geometry.dilations[axis]
    pixels = first[:, None, None] + taps[:, None]
    matrix: Array = (pixels == np.arange(geometry.input[axis])).sum(axis=1)
    return matrix
