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
    if graph.provider == "cpu" and _worth_phases(geometry, depthwise=1 < group == group * weight.shape[1]):
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


def _worth_phases(geometry: Window, *, depthwise: bool) -> bool:
    """Where onnxruntime's ConvTranspose, a matrix product and a serial scatter, is the slower lowering: not
    for 1x1 kernels, of which all phases but one are empty, and not where each channel is on its own.
    """
    if depthwise:
        return False
    square = len(geometry.kernel) == 2 and len(set(geometry.strides)) == 1 and set(geometry.dilations) == {1}
    return square and all(k >= s for k, s in zip(geometry.kernel, geometry.strides, strict=True))


def _phases(graph: Graph, cotangent: str, weight: Array, geometry: Window, group: int, key: str) -> str:
    """Input row s j + r meets only the kernel rows t = r + b (mod s): t = first + s u at output row
    j + q - u, with first = (r + b) mod s, q = (r + b) div s. Likewise for columns.
    """
    stride = geometry.strides[0]
    rows = [-(-n // stride) for n in geometry.input]
    parts: list[Array] = []
    begins: list[list[int]] = []
    for offsets in product(range(stride), repeat=2):
        firsts = [(r + b) % stride for r, b in zip(offsets, geometry.begin, strict=True)]
        parts.append(_swapped(weight[:, :, firsts[0] :: stride, firsts[1] :: stride], group))
        shifts = [(r + b) // stride for r, b in zip(offsets, geometry.begin, strict=True)]
        begins.append([count - 1 - q for count, q in zip(parts[-1].shape[2:], shifts, strict=True)])
    if group == 1 and weight.shape[1] * stride**2 <= STACKED_CHANNELS:
        parts, begins = [_stacked(parts, begins)], [[max(b) for b in zip(*begins, strict=True)]]

    def convolved(which: int) -> str:
        part, begin = parts[which], begins[which]
        kernel = graph.once(("phase", key, geometry, group, which), lambda: graph.constant(part))
        end = [
            j - o + count - 1 - b
            for j, o, count, b in zip(rows, geometry.output, part.shape[2:], begin, strict=True)
        ]
        return _padded_conv(graph, cotangent, kernel, begin, end, group=group)

    phases = [convolved(which) for which in range(len(parts))]
    stacked = graph.op("Concat", *phases, axis=1) if len(phases) > 1 else phases[0]
    result = graph.op("DepthToSpace", stacked, blocksize=stride, mode="DCR")
    return _cropped(
        graph, result, [0, 0], [j * stride - n for j, n in zip(rows, geometry.input, strict=True)]
    )


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
