"""Operators that move elements without changing them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from guard.errors import ModelError
from guard.graph import Array, Graph, attributes, describe
from guard.operators.broadcast import axis_of, reshape_to, sum_to, zeros_like
from guard.operators.linear import along_axis
from guard.operators.registry import Cotangents, data_rule, only_first, rule


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


@data_rule("Tile")
def tile(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent, summed over the repetitions, each of which becomes an axis of its own."""
    repeats = graph.constant_of(node, 1).tolist()
    shape = graph.shape(node.input[0])
    apart = tuple(d for pair in zip(repeats, shape, strict=True) for d in pair)
    axes = [2 * i for i, r in enumerate(repeats) if r != 1]
    if not axes:
        return cotangent
    split = reshape_to(graph, cotangent, apart)
    return reshape_to(graph, graph.op("ReduceSum", split, graph.constant(axes)), node.input[0])


@rule("Concat")
def concat(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangent, cut where the inputs met."""
    cotangent = only_first(node, cotangents)
    rank = graph.rank(node.output[0])
    axis = axis_of(node, rank, 0)
    if len(node.input) == 1:
        return [cotangent]
    dims = [graph.shape(name)[axis] for name in node.input]
    sizes = [d for d in dims if d is not None]
    if len(sizes) < len(dims):
        raise ModelError(f"{describe(node)} joins tensors along axis {axis}, which depends on the batch.")
    wanted = [graph.needs(name) for name in node.input]
    if sum(wanted) > 1:
        pieces = graph.op("Split", cotangent, graph.constant(sizes), outputs=len(sizes), axis=axis)
        return [piece if want else None for piece, want in zip(pieces, wanted, strict=True)]
    starts = np.cumsum([0, *sizes])
    return [
        sliced(graph, cotangent, axis, int(start), int(start) + size) if want else None
        for start, size, want in zip(starts, sizes, wanted, strict=False)
    ]


@rule("Split")
def split(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangents joined, zeros for outputs that are not used."""
    axis = axis_of(node, graph.rank(node.input[0]), 0)
    pieces = [
        zeros_like(graph, name) if cotangent is None else cotangent
        for name, cotangent in zip(node.output, cotangents, strict=True)
    ]
    return [graph.op("Concat", *pieces, axis=axis)]


@data_rule("Slice")
def slice_(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Zeros, with the cotangent where the slice was."""
    shape = graph.shape(node.input[0])
    given = attributes(node)
    starts, stops, axes, steps = (
        given[name] if name in given else _listed(graph.optional_constant(node, position))
        for position, name in enumerate(("starts", "ends", "axes", "steps"), start=1)
    )
    for i, (start, stop) in enumerate(zip(starts or [], stops or [], strict=True)):
        axis = (axes[i] if axes else i) % len(shape)
        step = steps[i] if steps else 1
        size = shape[axis]
        if size is None:
            if (start, step) == (0, 1) and stop >= np.iinfo(np.int32).max:
                continue
            raise ModelError(f"{describe(node)} cuts axis {axis}, which depends on the batch.")
        source = _taken(int(start), int(stop), int(step), size)
        cotangent = put_back(graph, cotangent, axis, source, size, len(shape))
    return cotangent


def _taken(start: int, stop: int, step: int, size: int) -> Array:
    """The indices that a Slice takes; unlike Python's, a start beyond the tensor is clamped into it."""
    start, stop = (bound + size if bound < 0 else bound for bound in (start, stop))
    if step > 0:
        return np.arange(min(max(start, 0), size), min(max(stop, 0), size), step)
    return np.arange(min(max(start, 0), size - 1), min(max(stop, -1), size - 1), step)


@data_rule("Gather")
def gather(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Zeros, with each cotangent added where it was gathered."""
    shape = graph.shape(node.input[0])
    axis = axis_of(node, len(shape), 0)
    indices = graph.value(node.input[1])
    if indices is None:
        return _scattered(graph, node, cotangent, axis)
    size = graph.static_shape(node.input[0], axis)[0] if shape[axis] is None else shape[axis] or 0
    flat = cotangent
    if indices.ndim != 1:
        flat = reshape_to(graph, cotangent, (*shape[:axis], indices.size, *shape[axis + 1 :]))
    return put_back(graph, flat, axis, indices.reshape(-1) % size, size, len(shape))


def _scattered(graph: Graph, node: NodeProto, cotangent: str, axis: int) -> str:
    """The rule of Gather where the indices vary, as in tensors flattened together with the batch."""
    x, indices = node.input
    width = graph.rank(indices)
    order = [*range(axis, axis + width), *range(axis), *range(axis + width, graph.rank(node.output[0]))]
    front = [axis, *range(axis), *range(axis + 1, graph.rank(x))]
    if axis:
        cotangent = graph.op("Transpose", cotangent, perm=order)
    zeros = graph.op("Transpose", zeros_like(graph, x), perm=front) if axis else zeros_like(graph, x)
    result = _added(graph, zeros, 1, indices, cotangent, width)
    return graph.op("Transpose", result, perm=np.argsort(front).tolist()) if axis else result


def _added(graph: Graph, zeros: str, lead: int, positions: str, cotangent: str, width: int) -> str:
    """`zeros` with rows of the cotangent added at positions, which number the rows that its `lead` first axes
    make; the rows of the cotangent are numbered by its `width` first.

    ScatterND would do, but onnxruntime adds in several threads at once there, and loses some.
    """
    updates = graph.op("Flatten", cotangent, axis=width)
    rows = graph.op("Reshape", positions, graph.constant([-1, 1]))
    rows = graph.op("Expand", rows, graph.op("Shape", updates))
    flat = graph.op("Flatten", zeros, axis=lead)
    result = graph.op("ScatterElements", flat, rows, updates, axis=0, reduction="add")
    return graph.op("Reshape", result, graph.op("Shape", zeros))


@rule("GatherElements")
def gather_elements(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """Zeros, with each cotangent added where it was gathered."""
    cotangent = only_first(node, cotangents)
    x, indices = node.input
    axis = attributes(node).get("axis", 0)
    zeros = zeros_like(graph, x)
    return [graph.op("ScatterElements", zeros, indices, cotangent, axis=axis, reduction="add"), None]


@rule("GatherND")
def gather_nd(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """Zeros, with each cotangent added where it was gathered."""
    cotangent = only_first(node, cotangents)
    x, indices = node.input
    if attributes(node).get("batch_dims", 0):
        raise ModelError(f"{describe(node)} has batch_dims; only 0 is differentiated.")
    depth = graph.shape(indices)[-1]
    inner = [size for size in graph.shape(x)[1:depth] if size is not None]
    if depth is None or len(inner) < depth - 1:
        raise ModelError(f"{describe(node)} gathers along axes whose sizes depend on the batch.")
    sizes = graph.op("Slice", graph.op("Shape", x), graph.constant([0]), graph.constant([depth]))
    strides = [math.prod(inner[axis:]) for axis in range(depth)]
    places = graph.op("Mul", graph.op("Mod", indices, sizes), graph.constant(strides))
    places = graph.op("ReduceSum", places, graph.constant([-1]), keepdims=0)
    return [_added(graph, zeros_like(graph, x), depth, places, cotangent, graph.rank(indices) - 1), None]


@rule("ScatterND")
def scatter_nd(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """Zeros where elements were replaced; their cotangents go to the updates."""
    cotangent = only_first(node, cotangents)
    data, indices, updates = node.input
    reduction = attributes(node).get("reduction", "none")
    if reduction not in ("none", "add"):
        raise ModelError(
            f"{describe(node)} has reduction {reduction!r}; only 'none' and 'add' are differentiated."
        )
    kept: str | None = cotangent
    if reduction == "none" and graph.needs(data):
        kept = graph.op("ScatterND", cotangent, indices, zeros_like(graph, updates))
    return [kept, None, graph.op("GatherND", cotangent, indices) if graph.needs(updates) else None]


@rule("ScatterElements")
def scatter_elements(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """Zeros where elements were replaced; their cotangents go to the updates."""
    cotangent = only_first(node, cotangents)
    data, indices, updates = node.input
    given = attributes(node)
    axis, reduction = given.get("axis", 0), given.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise ModelError(
            f"{describe(node)} has reduction {reduction!r}; only 'none' and 'add' are differentiated."
        )
    kept: str | None = cotangent
    if reduction == "none" and graph.needs(data):
        kept = graph.op("ScatterElements", cotangent, indices, zeros_like(graph, updates), axis=axis)
    gathered = graph.op("GatherElements", cotangent, indices, axis=axis) if graph.needs(updates) else None
    return [kept, None, gathered]


@rule("TopK")
def top_k(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """Zeros, with each cotangent where its value came from."""
    cotangent = only_first(node, cotangents)
    x = node.input[0]
    axis = attributes(node).get("axis", -1)
    indices = graph.extra_output(node, 1)
    return [graph.op("ScatterElements", zeros_like(graph, x), indices, cotangent, axis=axis), None]


@data_rule("Pad")
def pad(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent of the core, plus what the padding copied from it (reflect, edge, wrap)."""
    shape = graph.shape(node.input[0])
    given = attributes(node)
    mode = given.get("mode", "constant")
    pads = graph.constant_of(node, 1).tolist()
    axes = [int(axis) % len(shape) for axis in _listed(graph.optional_constant(node, 3)) or range(len(shape))]
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        size = shape[axis]
        if before == after == 0:
            continue
        if size is None:
            raise ModelError(f"{describe(node)} pads axis {axis}, which depends on the batch.")
        if mode != "constant":
            source = np.pad(np.arange(size), (max(before, 0), max(after, 0)), mode=mode)
            source = source[max(-before, 0) : len(source) - max(-after, 0)]
            cotangent = put_back(graph, cotangent, axis, source, size, len(shape))
            continue
        if before > 0 or after > 0:
            length = before + size + after
            cotangent = sliced(graph, cotangent, axis, max(before, 0), length - max(after, 0))
        if before < 0 or after < 0:
            core = np.arange(size)[max(-before, 0) : size - max(-after, 0)]
            cotangent = put_back(graph, cotangent, axis, core, size, len(shape))
    return cotangent


@data_rule("DepthToSpace")
def depth_to_space(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """SpaceToDepth; in the CRD order by hand."""
    given = attributes(node)
    block = given["blocksize"]
    if given.get("mode", "DCR") == "DCR":
        return graph.op("SpaceToDepth", cotangent, blocksize=block)
    batch, channels, height, width = graph.shape(node.input[0])
    deep = (channels or 0) // block**2
    apart = reshape_to(graph, cotangent, (batch, deep, height, block, width, block))
    return reshape_to(graph, graph.op("Transpose", apart, perm=[0, 1, 3, 5, 2, 4]), node.input[0])


@data_rule("SpaceToDepth")
def space_to_depth(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """DepthToSpace."""
    return graph.op("DepthToSpace", cotangent, blocksize=attributes(node)["blocksize"], mode="DCR")


@data_rule("Trilu")
def trilu(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The same triangle of the cotangent."""
    return graph.op("Trilu", cotangent, *node.input[1:], upper=attributes(node).get("upper", 1))


@data_rule("CumSum")
def cumulative_sum(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cumulative sum from the other end."""
    given = attributes(node)
    reverse, exclusive = 1 - given.get("reverse", 0), given.get("exclusive", 0)
    return graph.op("CumSum", cotangent, node.input[1], reverse=reverse, exclusive=exclusive)


def sliced(graph: Graph, x: str, axis: int, start: int, stop: int) -> str:
    """Part of a tensor along one axis."""
    return graph.op("Slice", x, graph.constant([start]), graph.constant([stop]), graph.constant([axis]))


def put_back(graph: Graph, cotangent: str, axis: int, source: Array, size: int, rank: int) -> str:
    """The cotangent of x, given that of x.take(source, axis), where x has `size` elements along `axis`."""
    count = len(source)
    if count == size and np.array_equal(source, np.arange(size)):
        return cotangent
    if count and np.array_equal(source, np.arange(source[0], source[0] + count)):
        before, after = int(source[0]), size - count - int(source[0])
        return _padded(graph, cotangent, axis, before, after, rank)
    if len(set(source.tolist())) == count:
        # element `count`, one behind the end, is zero
        inverse = np.full(size, count)
        inverse[source] = np.arange(count)
        extended = _padded(graph, cotangent, axis, 0, 1, rank) if count < size else cotangent
        return graph.op("Gather", extended, graph.constant(inverse), axis=axis)
    repetition = (source[:, None] == np.arange(size)).astype(graph.dtype(cotangent))
    return along_axis(graph, cotangent, axis, repetition, rank)


def _padded(graph: Graph, x: str, axis: int, before: int, after: int, rank: int) -> str:
    pads = [0] * 2 * rank
    pads[axis], pads[rank + axis] = before, after
    return graph.op("Pad", x, graph.constant(pads))


def _listed(values: Array | None) -> Sequence[int] | None:
    return None if values is None else values.reshape(-1).tolist()
