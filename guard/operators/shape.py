"""Operators that move elements without changing them."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from guard.graph import Graph, attributes
from guard.operators.broadcast import reshape_to, sum_to
from guard.operators.registry import data_rule


@data_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent in the shape of the input."""
    return reshape_to(graph, cotangent, node.input[0])


@data_rule("Transpose")
def transpose(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The inverse permutation."""
    order = attributes(node).get("perm") or list(range(graph.rank(node.input[0])))[::-1]
    return graph.op("Transpose", cotangent, perm=np.argsort(order).tolist())


@data_rule("Expand")
def expand(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent, summed over the repetitions."""
    return sum_to(graph, cotangent, node.output[0], node.input[0])
