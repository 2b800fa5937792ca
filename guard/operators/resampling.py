"""Resizing.

Resize is linear and acts on each axis by itself, so one matrix per axis describes it, whatever its mode and
coordinate transformation. The matrix is read off by resizing unit vectors in onnxruntime; the gradient
multiplies by its transpose.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from guard.errors import ModelError
from guard.graph import Array, Graph, attributes, describe
from guard.operators.linear import along_axis
from guard.operators.registry import data_rule


@data_rule("Resize")
def resize(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The transposed matrices, axis by axis; for whole repetitions of pixels, sums over blocks."""
    given = attributes(node)
    if given.pop("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ModelError(f"{describe(node)} keeps the aspect ratio; only plain sizes are differentiated.")
    shape, output = graph.shape(node.input[0]), graph.shape(node.output[0])
    if shape == output:  # onnxruntime copies then, whatever the scales
        return cotangent
    rank = len(shape)
    axes = [int(axis) % rank for axis in given.pop("axes", range(rank))]
    matrices: dict[int, Array] = {}
    for position, axis in enumerate(axes):
        size, resized = shape[axis], output[axis]
        if size is not None and resized is not None:
            matrix = _matrix(graph, node, given, position, len(axes), size, resized)
            if not np.array_equal(matrix, np.eye(size)):
                matrices[axis] = matrix
        elif size != resized:
            raise ModelError(f"{describe(node)} resizes axis {axis}, which depends on the batch.")
    factors = [
        matrices[axis].shape[1] // matrices[axis].shape[0] if axis in matrices else 1 for axis in range(rank)
    ]
    repeats = all(
        np.array_equal(m, np.kron(np.eye(len(m)), np.ones((1, factors[axis]))))
        for axis, m in matrices.items()
    )
    if repeats and rank == 4 and set(matrices) <= {2, 3}:
        kernel = factors[2:]
        averaged = graph.op("AveragePool", cotangent, kernel_shape=kernel, strides=kernel)
        return (graph.tensor(averaged) * float(np.prod(kernel))).name
    for axis, matrix in matrices.items():
        cotangent = along_axis(graph, cotangent, axis, np.ascontiguousarray(matrix.T), rank)
    return cotangent


def _matrix(
    graph: Graph,
    node: NodeProto,
    given: dict[str, object],
    position: int,
    count: int,
    size: int,
    resized: int,
) -> Array:
    """What the node does to the unit vectors of one axis, (size, resized)."""
    region, scales = (graph.optional_constant(node, i) for i in (1, 2))
    if region is not None and region.size:
        ends = region.reshape(2, count)[:, position]
        region = np.asarray([0, 0, ends[0], 0, 1, 1, ends[1], 1], region.dtype)
    vectors = np.concatenate([np.eye(size, dtype=np.float32), np.zeros((1, size), np.float32)])
    inputs: list[Array | None] = [vectors.reshape(size + 1, 1, size, 1), region]
    # The last axis is doubled, and one of the two taken: where no size changes, onnxruntime copies.
    if scales is not None and scales.size:
        inputs.append(np.asarray([1, 1, scales[position], 2], np.float32))
    else:
        inputs += [None, np.asarray([size + 1, 1, resized, 2], np.int64)]
    responses = graph.evaluate("Resize", inputs, given).reshape(size + 1, resized, 2)[..., 0]
    # an extrapolated constant is what the zero vector becomes
    return responses[:-1] - responses[-1:]
