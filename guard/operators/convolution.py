"""Convolution and its transpose.

The gradient of y = Conv(x, w) with respect to x is the transposed convolution of the cotangent. At stride 1
it is an ordinary convolution with kernels flipped and channels swapped, which onnxruntime runs at full speed
in its blocked layout. At stride s it falls apart into s^2 small convolutions, one for each position of an
input pixel modulo s, whose results are interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from onnx import NodeProto

from guard.graph import Array, Graph, attributes
from guard.operators.registry import data_rule


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution or pooling, per spatial axis; `begin` is the padding before the first
    pixel. How far the padding behind the last one reaches follows from `output`.
    """

    input: tuple[int, ...]
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]

    @property
    def span(self) -> tuple[int, ...]:
        """Distance between the first and the last pixel of a window."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))


def window(
    given: dict[str, Any], kernel: Sequence[int], size: Sequence[int], output: Sequence[int]
) -> Window:
    """Reads the attributes of a node that takes spatial dimensions `size` to `output`."""
    rank = len(kernel)
    strides = tuple(given.get("strides") or [1] * rank)
    dilations = tuple(given.get("dilations") or [1] * rank)
    begin = tuple(given.get("pads") or [0] * 2 * rank)[:rank]
    auto_pad = given.get("auto_pad", "NOTSET")
    if auto_pad == "VALID":
        begin = (0,) * rank
    elif auto_pad.startswith("SAME"):
        reach = [
            (o - 1) * s + d * (k - 1) + 1 - n
            for n, o, k, s, d in zip(size, output, kernel, strides, dilations, strict=True)
        ]
        extra = 1 if auto_pad == "SAME_LOWER" else 0
        begin = tuple((max(total, 0) + extra) // 2 for total in reach)
    return Window(tuple(size), tuple(output), tuple(kernel), strides, dilations, begin)


@data_rule("Conv")
def conv(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The transposed convolution of the cotangent."""
    weight = graph.constant_of(node, 1)
    given = attributes(node)
    size, output = graph.static_shape(node.input[0], 2), graph.static_shape(node.output[0], 2)
    geometry = window(given, weight.shape[2:], size, output)
    return scatter_windows(graph, cotangent, weight, geometry, group=given.get("group", 1), key=node.input[1])


@data_rule("ConvTranspose")
def conv_transpose(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """Conv(dy, w): the kernel's layout (inputs, outputs / group, ...) already is the one Conv wants."""
    weight = graph.constant_of(node, 1)
    given = attributes(node)
    size, output = graph.static_shape(node.input[0], 2), graph.static_shape(node.output[0], 2)
    # the forward pass of a transposed convolution is the backward pass of this one
    geometry = window({**given, "auto_pad": "NOTSET"}, weight.shape[2:], output, size)
    auto_pad = given.get("auto_pad", "NOTSET")
    begin = geometry.begin
    if auto_pad.startswith("SAME") or "output_shape" in given:
        extra = given.get("output_padding") or [0] * len(size)
        total = [
            s * (n - 1) + e + r + 1 - o
            for s, n, e, r, o in zip(geometry.strides, size, extra, geometry.span, output, strict=True)
        ]
        begin = tuple(max(t, 0) // 2 if auto_pad == "SAME_UPPER" else (max(t, 0) + 1) // 2 for t in total)
    end = [
        s * (n - 1) + r + 1 - b - o
        for s, n, r, b, o in zip(geometry.strides, size, geometry.span, begin, output, strict=True)
    ]
    return _padded_conv(
        graph,
        cotangent,
        graph.constant(weight),
        begin,
        end,
        strides=geometry.strides,
        dilations=geometry.dilations,
        group=given.get("group", 1),
    )


def scatter_windows(
    graph: Graph, cotangent: str, weight: Array, geometry: Window, *, group: int, key: str
) -> str:
    """The transposed convolution that takes the cotangent of a convolution's output to its input.

    `weight` has shape (outputs, inputs / group, *kernel); `key` is its name among the shared constants.
    """
    if all(s == 1 for s in geometry.strides):
        begin = [r - b for r, b in zip(geometry.span, geometry.begin, strict=True)]
        end = [n - o + b for n, o, b in zip(geometry.input, geometry.output, geometry.begin, strict=True)]
        flipped = graph.once(("flipped", key, group), lambda: graph.constant(_swapped(weight, group)))
        return _padded_conv(graph, cotangent, flipped, begin, end, dilations=geometry.dilations, group=group)
    square = len(geometry.kernel) == 2 and len(set(geometry.strides)) == 1
    if graph.provider == "cpu" and square and set(geometry.dilations) == {1}:
        return _phases(graph, cotangent, weight, geometry, group, key)
    behind = [
        s * (o - 1) + r + 1 - b - n
        for s, o, r, b, n in zip(
            geometry.strides, geometry.output, geometry.span, geometry.begin, geometry.input, strict=True
        )
    ]
    return graph.op(
        "ConvTranspose",
        cotangent,
        graph.once(("kept", key), lambda: graph.constant(weight)),
        strides=geometry.strides,
        dilations=geometry.dilations,
        group=group,
        pads=[*geometry.begin, *(max(e, 0) for e in behind)],
        output_padding=[max(-e, 0) for e in behind],
    )


def _phases(graph: Graph, cotangent: str, weight: Array, geometry: Window, group: int, key: str) -> str:
    """Input row s j + r meets only the kernel rows t = r + b (mod s): t = first + s u at output row
    j + q - u, with first = (r + b) mod s, q = (r + b) div s. Likewise for columns.
    """
    stride = geometry.strides[0]
    rows = [-(-n // stride) for n in geometry.input]
    phases: list[tuple[tuple[int, ...], tuple[int, ...], Array]] = []
    for offsets in product(range(stride), repeat=2):
        firsts = [(r + b) % stride for r, b in zip(offsets, geometry.begin, strict=True)]
        part = weight[:, :, firsts[0] :: stride, firsts[1] :: stride]
        shifts = [(r + b) // stride for r, b in zip(offsets, geometry.begin, strict=True)]
        begin = tuple(count - 1 - q for count, q in zip(part.shape[2:], shifts, strict=True))
        end = tuple(j - o + q for j, o, q in zip(rows, geometry.output, shifts, strict=True))
        phases.append((begin, end, part))

    def convolved(begin: Sequence[int], end: Sequence[int], parts: Sequence[Array], which: int) -> str:
        swapped = np.concatenate([_swapped(part, group) for part in parts])
        kernel = graph.once(("phase", key, stride, geometry.begin, which), lambda: graph.constant(swapped))
        return _padded_conv(graph, cotangent, kernel, begin, end, group=group)

    channels = weight.shape[1] * group
    geometries = {(begin, end, part.shape[2:]) for begin, end, part in phases}
    if len(geometries) == 1 and group == 1:
        begin, end, _ = phases[0]
        stacked = convolved(begin, end, [part for _, _, part in phases], -1)
        result = graph.op("DepthToSpace", stacked, blocksize=stride, mode="DCR")
    else:
        pieces = [
            convolved(begin, end, [part], which) if part.size else None
            for which, (begin, end, part) in enumerate(phases)
        ]
        present = [piece for piece in pieces if piece]
        if len(present) == 1 and pieces[0]:
            result = _spread(graph, present[0], channels, rows, stride)
        else:
            blank = "" if len(present) == len(pieces) else (graph.tensor(present[0]) * 0.0).name
            stacked = graph.op("Concat", *(piece or blank for piece in pieces), axis=1)
            result = graph.op("DepthToSpace", stacked, blocksize=stride, mode="DCR")
    excess = [j * stride - n for j, n in zip(rows, geometry.input, strict=True)]
    return _cropped(graph, result, [0, 0], excess)


def _spread(graph: Graph, name: str, channels: int, rows: Sequence[int], stride: int) -> str:
    """Places each pixel in the first corner of a block of zeros."""
    apart = graph.op("Reshape", name, graph.constant([-1, channels, rows[0], 1, rows[1], 1]))
    padded = graph.op("Pad", apart, graph.constant([0] * 9 + [stride - 1, 0, stride - 1]))
    return graph.op("Reshape", padded, graph.constant([-1, channels, rows[0] * stride, rows[1] * stride]))


def _swapped(weight: Array, group: int) -> Array:
    """(outputs, inputs / group, *kernel) to (inputs, outputs / group, *kernel), the kernel flipped."""
    outputs, inputs, *kernel = weight.shape
    split = weight.reshape(group, outputs // group, inputs, *kernel).swapaxes(1, 2)
    joined = split.reshape(group * inputs, outputs // group, *kernel)
    return np.ascontiguousarray(np.flip(joined, tuple(range(2, joined.ndim))))


def _padded_conv(
    graph: Graph, x: str, weight: str, begin: Sequence[int], end: Sequence[int], **given: Any
) -> str:
    """Conv whose padding may be negative: pixels that no window of the forward pass read are cropped."""
    x = _cropped(graph, x, [max(-p, 0) for p in begin], [max(-p, 0) for p in end])
    pads = [max(p, 0) for p in (*begin, *end)]
    name: str = graph.op("Conv", x, weight, pads=pads, **given)
    return name


def _cropped(graph: Graph, x: str, begin: Sequence[int], end: Sequence[int]) -> str:
    if not any(begin) and not any(end):
        return x
    stops = [-e if e else np.iinfo(np.int64).max for e in end]
    axes = list(range(2, 2 + len(begin)))
    return graph.op("Slice", x, graph.constant(list(begin)), graph.constant(stops), graph.constant(axes))
