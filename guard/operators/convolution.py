"""Convolution and its transpose.

The gradient of y = Conv(x, w) with respect to x is the transposed convolution of the cotangent. At stride 1
it is an ordinary convolution with kernels flipped and channels swapped, which onnxruntime runs at full speed
in its blocked layout. At stride s it falls apart into s^2 small convolutions, one for each position of an
input pixel modulo s, whose results are interleaved. Where two such gradients meet, as they do where a
residual block halves its input, they are added before they are interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
from onnx import NodeProto

from guard.graph import Array, Graph, attributes
from guard.operators.broadcast import expand_to
from guard.operators.registry import data_rule

BLOCK = 16  # channels in one block of onnxruntime's layout, on the widest CPUs
SMALL_MAP = 64  # pixels up to which a window as large as the map costs nothing
STACKED_CHANNELS = 64  # up to here one convolution for all phases, zeros included, beats several thin ones


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

    @property
    def padding(self) -> tuple[int, ...]:
        """Pixels that the windows reach beyond the input on both sides together; negative where the last
        window stops short of the last pixel.
        """
        reach = zip(self.input, self.output, self.strides, self.span, strict=True)
        return tuple(s * (o - 1) + r + 1 - n for n, o, s, r in reach)


def window(
    given: dict[str, Any], kernel: Sequence[int], size: Sequence[int], output: Sequence[int]
) -> Window:
    """Reads the attributes of a node that takes spatial dimensions `size` to `output`."""
    rank = len(kernel)
    strides = tuple(given.get("strides") or [1] * rank)
    dilations = tuple(given.get("dilations") or [1] * rank)
    auto_pad = given.get("auto_pad", "NOTSET")
    pads = given.get("pads") if auto_pad == "NOTSET" else None
    begin = tuple(pads or [0] * 2 * rank)[:rank]
    geometry = Window(tuple(size), tuple(output), tuple(kernel), strides, dilations, begin)
    if auto_pad.startswith("SAME"):
        extra = 1 if auto_pad == "SAME_LOWER" else 0
        return replace(geometry, begin=tuple((max(p, 0) + extra) // 2 for p in geometry.padding))
    return geometry


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
        total = [p + e for p, e in zip(geometry.padding, extra, strict=True)]
        begin = tuple(max(t, 0) // 2 if auto_pad == "SAME_UPPER" else (max(t, 0) + 1) // 2 for t in total)
    end = [p - b for p, b in zip(geometry.padding, begin, strict=True)]
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


def keeps_blocks(graph: Graph, channels: int) -> bool:
    """Whether onnxruntime runs convolutions of so many channels on blocks of them. Only a convolution takes
    a tensor into that layout; ReLU masks and sums then stay in it. So where a gradient enters as anything
    else, a depthwise convolution is put in its place, or behind it.
    """
    return graph.provider == "cpu" and channels % BLOCK == 0


def spread_evenly(graph: Graph, cotangent: str, name: str) -> str:
    """The gradient of a mean over all pixels with respect to tensor `name` (B, C, ...)."""
    channels, *size = graph.static_shape(name, 1)
    pixels = prod(size)
    if len(size) == 2 and pixels <= SMALL_MAP and keeps_blocks(graph, channels):
        kernel = graph.constant(np.full((channels, 1, *size), 1 / pixels, graph.dtype(name)))
        reach = [n - 1 for n in size] * 2
        return graph.op("Conv", cotangent, kernel, group=channels, pads=reach)
    return expand_to(graph, (graph.tensor(cotangent) * (1 / pixels)).name, name)


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
    # where each channel is on its own, ConvTranspose is the faster
    in_phases = graph.provider == "cpu" and _square(geometry) and not 1 < group == group * weight.shape[1]
    if in_phases and all(k >= s for k, s in zip(geometry.kernel, geometry.strides, strict=True)):
        return _interleaved(graph, _phases(graph, cotangent, weight, geometry, group, key))
    behind = [p - b for p, b in zip(geometry.padding, geometry.begin, strict=True)]
    result: str = graph.op(
        "ConvTranspose",
        cotangent,
        graph.once(("kept", key), lambda: graph.constant(weight)),
        strides=geometry.strides,
        dilations=geometry.dilations,
        group=group,
        pads=[*geometry.begin, *(max(e, 0) for e in behind)],
        output_padding=[max(-e, 0) for e in behind],
    )
    if in_phases:  # of which some are empty: worth it only where other phases are added
        graph.phases[result] = _phases(graph, cotangent, weight, geometry, group, key)
    return result


def _square(geometry: Window) -> bool:
    return len(geometry.kernel) == 2 and len(set(geometry.strides)) == 1 and set(geometry.dilations) == {1}


@dataclass(frozen=True)
class Phases:
    """A tensor (B, C, *size) in parts: `parts[stride * r + c]` holds its pixels at rows r and columns c
    modulo `stride`, and possibly one row or column beyond its edge; None stands for zeros. C is `channels`.
    """

    parts: tuple[str | None, ...]
    stride: int
    size: tuple[int, ...]
    channels: int


def added(graph: Graph, first: str, second: str) -> str:
    """The sum of two gradients, added phase by phase where both come in phases."""
    a, b = (graph.phases.get(name) for name in (first, second))
    if a is None or b is None or (a.stride, a.size) != (b.stride, b.size):
        return graph.op("Add", first, second)
    pairs = list(zip(a.parts, b.parts, strict=True))
    if any(x is None and y is None for x, y in pairs):
        return graph.op("Add", first, second)
    parts = tuple(graph.op("Add", x, y) if x and y else x or y for x, y in pairs)
    return _interleaved(graph, Phases(parts, a.stride, a.size, a.channels))


def _phases(graph: Graph, cotangent: str, weight: Array, geometry: Window, group: int, key: str) -> Phases:
    """Input row s j + r meets only the kernel rows t = r + b (mod s): t = first + s u at output row
    j + q - u, with first = (r + b) mod s, q = (r + b) div s. Likewise for columns.
    """
    stride = geometry.strides[0]
    rows = [-(-n // stride) for n in geometry.input]
    kernels: list[Array] = []
    begins: list[list[int]] = []
    for offsets in product(range(stride), repeat=2):
        firsts = [(r + b) % stride for r, b in zip(offsets, geometry.begin, strict=True)]
        kernels.append(_swapped(weight[:, :, firsts[0] :: stride, firsts[1] :: stride], group))
        shifts = [(r + b) // stride for r, b in zip(offsets, geometry.begin, strict=True)]
        begins.append([count - 1 - q for count, q in zip(kernels[-1].shape[2:], shifts, strict=True)])
    stacked = group == 1 and weight.shape[1] * stride**2 <= STACKED_CHANNELS
    if stacked:
        kernels, begins = [_stacked(kernels, begins)], [[max(b) for b in zip(*begins, strict=True)]]

    def convolved(which: int) -> str | None:
        kernel, begin = kernels[which], begins[which]
        if not kernel.size:
            return None
        name = graph.once(("phase", key, geometry, group, which), lambda: graph.constant(kernel))
        end = [
            j - o + count - 1 - b
            for j, o, count, b in zip(rows, geometry.output, kernel.shape[2:], begin, strict=True)
        ]
        return _padded_conv(graph, cotangent, name, begin, end, group=group)

    parts = tuple(convolved(which) for which in range(len(kernels)))
    if stacked and parts[0]:
        sizes = graph.constant([weight.shape[1]] * stride**2)
        parts = graph.op("Split", parts[0], sizes, outputs=stride**2, axis=1)
    return Phases(parts, stride, geometry.input, weight.shape[1] * group)


def _interleaved(graph: Graph, phases: Phases) -> str:
    """The tensor whose phases these are, none of them None. Concatenating along new axes is four times as
    fast in onnxruntime as DepthToSpace.
    """
    stride, channels = phases.stride, phases.channels
    height, width = (-(-n // stride) * stride for n in phases.size)
    apart, row, whole = (
        graph.constant(s) for s in ([0, 0, 0, 0, 1], [0, 0, 0, 1, width], [0, 0, height, width])
    )
    columns = [graph.op("Reshape", part, apart) for part in phases.parts]
    rows = [
        graph.op("Reshape", graph.op("Concat", *columns[at : at + stride], axis=4), row)
        for at in range(0, stride**2, stride)
    ]
    result = graph.op("Reshape", graph.op("Concat", *rows, axis=3), whole)
    end = [have - n for have, n in zip((height, width), phases.size, strict=True)]
    result = _cropped(graph, result, [0, 0], end)
    if keeps_blocks(graph, channels):
        ones = graph.constant(np.ones((channels, 1, 1, 1), graph.dtype(result)))
        result = graph.op("Conv", result, ones, group=channels)
    graph.phases[result] = phases
    return result


def _stacked(parts: Sequence[Array], begins: Sequence[Sequence[int]]) -> Array:
    """The kernels of all phases as one, each padded with zeros to the window that covers them all."""
    front = [max(b) for b in zip(*begins, strict=True)]
    widths = [
        [(f - b, part.shape[2 + axis]) for axis, (f, b) in enumerate(zip(front, begin, strict=True))]
        for part, begin in zip(parts, begins, strict=True)
    ]
    size = [max(before + count for before, count in column) for column in zip(*widths, strict=True)]
    return np.concatenate(
        [
            np.pad(
                part,
                [
                    (0, 0),
                    (0, 0),
                    *((before, s - before - count) for (before, count), s in zip(width, size, strict=True)),
                ],
            )
            for part, width in zip(parts, widths, strict=True)
        ]
    )


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
