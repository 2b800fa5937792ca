"""Reductions over axes."""

from __future__ import annotations

from math import prod

from onnx import NodeProto

from guard.graph import Graph, attributes
from guard.operators.broadcast import axes_of, expand_to, reshape_to
from guard.operators.registry import data_rule


def reduced_axes(graph: Graph, node: NodeProto) -> list[int]:
    """The axes a node reduces over; none named means all, or with `noop_with_empty_axes` none."""
    rank = graph.rank(node.input[0])
    axes = axes_of(graph, node, rank)
    if not axes:
        axes = [] if attributes(node).get("noop_with_empty_axes", 0) else list(range(rank))
    return axes


def kept(graph: Graph, node: NodeProto, name: str) -> str:
    """A tensor shaped like the node's output, with the reduced axes back as ones."""
    if attributes(node).get("keepdims", 1):
        return name
    axes = reduced_axes(graph, node)
    return reshape_to(
        graph, name, tuple(1 if i in axes else d for i, d in enumerate(graph.shape(node.input[0])))
    )


@data_rule("ReduceSum")
def reduce_sum(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent, repeated along the reduced axes."""
    return expand_to(graph, kept(graph, node, cotangent), node.input[0])


@data_rule("ReduceMean")
def reduce_mean(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent over the number of elements, repeated along the reduced axes."""
    shape = graph.shape(node.input[0])
    axes = reduced_axes(graph, node)
    count = prod(graph.static_shape(node.input[0])[i] if shape[i] is None else shape[i] or 0 for i in axes)
    scaled = graph.tensor(cotangent) * (1 / count)
    return expand_to(graph, kept(graph, node, scaled.name), node.input[0])


@data_rule("ReduceMax", "ReduceMin")
def reduce_extremum(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Elements that tie for the extremum share the cotangent evenly."""
    x, y = graph.tensor(node.input[0]), graph.tensor(kept(graph, node, node.output[0]))

    def share() -> str:
        ties = x.equals(y).like(x.name)
        return (ties / ties.sum(reduced_axes(graph, node))).name

    return graph.op("Mul", kept(graph, node, cotangent), graph.once(("share", node.output[0]), share))
