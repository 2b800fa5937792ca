"""Pooling over the spatial axes."""

from __future__ import annotations

from math import prod

from onnx import NodeProto

from guard.graph import Graph
from guard.operators.broadcast import expand_to, reshape_to
from guard.operators.registry import data_rule


@data_rule("GlobalAveragePool")
def global_average_pool(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The mean's cotangent, spread evenly."""
    count = prod(graph.static_shape(node.input[0], 2))
    return expand_to(graph, (graph.tensor(cotangent) * (1 / count)).name, node.input[0])


@data_rule("GlobalMaxPool")
def global_max_pool(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Pixels that tie for the maximum share the cotangent evenly."""
    x, y = graph.tensor(node.input[0]), graph.tensor(node.output[0])

    def share() -> str:
        ties = x.equals(y).like(x.name)
        return (ties / ties.sum(range(2, graph.rank(x.name)))).name

    return graph.op("Mul", cotangent, graph.once(("share", y.name), share))


@data_rule("MaxPool")
def max_pool(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Each cotangent goes to the first pixel of its window with the maximum; overlapping windows add."""
    x = node.input[0]
    # positions in the flattened input, batch and channels included
    indices = graph.once(
        ("argmax", node.output[0]),
        lambda: graph.op("Reshape", graph.extra_output(node, 1), graph.constant([-1])),
    )

    def zeros() -> str:
        flat = graph.op("Reshape", x, graph.constant([-1]))
        return graph.op("ConstantOfShape", graph.op("Shape", flat), value=graph.zero(x))

    updates = graph.op("Reshape", cotangent, graph.constant([-1]))
    blank = graph.once(("zeros", x), zeros)
    scattered = graph.op("ScatterElements", blank, indices, updates, axis=0, reduction="add")
    return reshape_to(graph, scattered, x)
