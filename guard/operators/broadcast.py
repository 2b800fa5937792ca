"""What rules share about shapes: undoing broadcasts, expanding, reshaping, reading axes."""

from __future__ import annotations

from onnx import NodeProto

from guard.errors import ModelError
from guard.graph import Graph, Shape, attributes


def sum_to(graph: Graph, cotangent: str, broadcast: Shape | str, target: Shape | str) -> str:
    """Sums a cotangent of shape `broadcast` over the axes along which `target` was repeated."""
    large = graph.shape(broadcast) if isinstance(broadcast, str) else broadcast
    small = graph.shape(target) if isinstance(target, str) else target
    lead = len(large) - len(small)
    axes = [i for i, d in enumerate(large) if i < lead or (small[i - lead] == 1 and d != 1)]
    if not axes:
        return cotangent
    result = graph.op("ReduceSum", cotangent, graph.constant(axes), keepdims=1)
    return reshape_to(graph, result, target) if lead else result


def reshape_to(graph: Graph, cotangent: str, target: Shape | str) -> str:
    """Reshapes to the shape of a tensor, or to a shape in which at most one dimension varies."""
    shape = graph.shape(target) if isinstance(target, str) else target
    if shape.count(None) <= 1 and 0 not in shape:
        return graph.op("Reshape", cotangent, graph.constant([-1 if d is None else d for d in shape]))
    if not isinstance(target, str):
        raise ModelError(f"Cannot reshape to {target}: more than one dimension depends on the batch.")
    return graph.op("Reshape", cotangent, graph.op("Shape", target), allowzero=1)


def expand_to(graph: Graph, cotangent: str, target: str) -> str:
    """Repeats a cotangent, of equal rank with ones for the repeated axes, to the shape of a tensor."""
    shape = graph.shape(target)
    if None not in shape[1:]:
        # 1 leaves the batch axis as it is
        return graph.op("Expand", cotangent, graph.constant([1 if d is None else d for d in shape]))
    return graph.op("Expand", cotangent, graph.op("Shape", target))


def axis_of(node: NodeProto, rank: int, default: int) -> int:
    """The `axis` attribute, counted from the front."""
    return int(attributes(node).get("axis", default)) % max(rank, 1)


def axes_of(graph: Graph, node: NodeProto, rank: int) -> list[int] | None:
    """The axes of a Reduce, Squeeze or Unsqueeze, from the attribute (older opsets) or the second input,
    counted from the front; None if not given.
    """
    axes = attributes(node).get("axes")
    if axes is None:
        values = graph.optional_constant(node, 1)
        axes = None if values is None else values.reshape(-1).tolist()
    return None if axes is None else sorted(int(axis) % rank for axis in axes)


def zeros_like(graph: Graph, name: str) -> str:
    """Zeros in the shape and type of a tensor, made once."""
    return graph.once(
        ("zeros", name), lambda: graph.op("ConstantOfShape", graph.op("Shape", name), value=graph.zero(name))
    )
