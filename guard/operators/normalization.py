"""Normalizations, in evaluation mode."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from guard.errors import ModelError
from guard.graph import Graph, attributes, describe
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


def scale_channels(graph: Graph, x: str, factor: np.ndarray, rank: int) -> str:
    """Multiplies axis 1 of a tensor by a vector."""
    if graph.provider == "cpu" and rank == 4:
        # a depthwise convolution stays in onnxruntime's blocked layout, a broadcast Mul does not
        return graph.op("Conv", x, graph.constant(factor.reshape(-1, 1, 1, 1)), group=len(factor))
    return graph.op("Mul", x, graph.constant(factor.reshape(-1, *[1] * (rank - 2))))
