"""onnx's reference evaluator in float64, with the operators corrected where it is wrong or imprecise."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx
import scipy.special
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional

Array = NDArray[Any]


class Erf(OpRun):
    """The error function in float64: the reference evaluator's own rounds to float32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (scipy.special.erf(x),)


class Gelu(OpRun):
    """Gelu in float64, for the same reason."""

    op_domain = ""

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        if approximate == "tanh":
            return (x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),)
        return (x / 2 * (1 + scipy.special.erf(x / np.sqrt(2))),)


class ConvTranspose(OpRun):
    """The transposed convolution by torch: the reference evaluator's own fails with groups."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        rank = x.ndim - 2
        strides, extra = strides or [1] * rank, output_padding or [0] * rank
        image, kernel = (torch.from_numpy(np.array(a)) for a in (x, weight))
        transposed: Callable[..., torch.Tensor] = getattr(functional, f"conv_transpose{rank}d")
        full = transposed(image, kernel, stride=strides, dilation=dilations or 1, groups=group).numpy()
        full = np.pad(full, [(0, 0), (0, 0), *((0, e) for e in extra)])
        target = output_shape or [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
        if pads is None:
            pads = [0] * 2 * rank
            if output_shape is not None or auto_pad.startswith("SAME"):
                total = [n - t for n, t in zip(full.shape[2:], target, strict=True)]
                low, high = [t // 2 for t in total], [t - t // 2 for t in total]
                pads = [*low, *high] if auto_pad == "SAME_UPPER" else [*high, *low]
        crop = [slice(b, n - e) for b, e, n in zip(pads[:rank], pads[rank:], full.shape[2:], strict=True)]
        return (full[:, :, *crop] + (0 if bias is None else bias.reshape(-1, *[1] * rank)),)


class MaxPool(OpRun):
    """MaxPool by definition: the reference evaluator's own returns wrong indices at stride 1."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] = (),
        pads: Sequence[int] | None = None,
        storage_order: int = 0,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array, ...]:
        rank = len(kernel_shape)
        strides, dilations = strides or [1] * rank, dilations or [1] * rank
        reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel_shape, strict=True)]
        pads = list(pads or [0] * 2 * rank)
        sizes = list(x.shape[2:])
        if auto_pad == "SAME_UPPER":
            total = [
                max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, strides, reach, strict=True)
            ]
            pads = [*(t // 2 for t in total), *(t - t // 2 for t in total)]
        outputs = []
        for n, s, r, before, after in zip(sizes, strides, reach, pads[:rank], pads[rank:], strict=True):
            count = (n + before + after - r) / s
            count = int(np.ceil(count) if ceil_mode else np.floor(count)) + 1
            outputs.append(count - (ceil_mode and (count - 1) * s >= n + before))
        margins = [
            (0, 0),
            (0, 0),
            *((b, e + s + r) for b, e, s, r in zip(pads[:rank], pads[rank:], strides, reach, strict=True)),
        ]
        values = np.pad(x, margins, constant_values=-np.inf)
        numbers = np.pad(np.arange(x.size).reshape(x.shape), margins, constant_values=-1)
        best, where = np.full((*x.shape[:2], *outputs), -np.inf), np.zeros((*x.shape[:2], *outputs), np.int64)
        for taps in product(*(range(k) for k in kernel_shape)):
            window = tuple(
                slice(t * d, t * d + s * (o - 1) + 1, s)
                for t, d, s, o in zip(taps, dilations, strides, outputs, strict=True)
            )
            better = values[:, :, *window] > best
            best = np.where(better, values[:, :, *window], best)
            where = np.where(better, numbers[:, :, *window], where)
        return (best, where)[: len(self.onnx_node.output)]


class GlobalMaxPool(OpRun):
    """The maximum over the spatial axes of any rank: the reference evaluator knows images only."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


class GlobalLpPool(OpRun):
    """The p-norm over the spatial axes, which the reference evaluator lacks."""

    op_domain = ""

    def _run(self, x: Array, p: int = 2) -> tuple[Array]:
        return ((np.abs(x) ** p).sum(axis=tuple(range(2, x.ndim)), keepdims=True) ** (1 / p),)


class GroupNormalization(OpRun):
    """Group normalization in float64 by torch: the reference evaluator's own rounds to float32."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        epsilon: float = 1e-5,
        num_groups: int = 1,
        stash_type: int = 1,
    ) -> tuple[Array]:
        image, weight, shift = (torch.from_numpy(np.array(a)) for a in (x, scale, bias))
        return (functional.group_norm(image, num_groups, weight, shift, epsilon).numpy(),)


class LpNormalization(OpRun):
    """Division by the p-norm: the reference evaluator's own forgets the absolute value."""

    op_domain = ""

    def _run(self, x: Array, axis: int = -1, p: int = 2) -> tuple[Array]:
        return (x / np.linalg.norm(x, ord=p, axis=axis, keepdims=True),)


class Pad(OpRun):
    """Padding by negative amounts too, which crop: the reference evaluator's own refuses them."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        pads: Array,
        value: Array | None = None,
        axes: Array | None = None,
        mode: str = "constant",
    ) -> tuple[Array]:
        for axis, before, after in zip(
            range(x.ndim) if axes is None else axes, *np.split(pads, 2), strict=True
        ):
            margins = [(0, 0)] * x.ndim
            margins[axis] = (max(before, 0), max(after, 0))
            options: dict[str, Any] = {"mode": mode}
            if mode == "constant":
                options["constant_values"] = 0 if value is None else value.item()
            x = np.pad(x, margins, **options)
            kept = range(x.shape[axis])[max(-before, 0) : x.shape[axis] - max(-after, 0)]
            x = x.take(np.array(kept, np.int64), axis)
        return (x,)


class LRN(OpRun):
    """Local response normalization by torch: the reference evaluator's window is off by one."""

    op_domain = ""

    def _run(
        self, x: Array, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int = 1
    ) -> tuple[Array]:
        return (
            functional.local_response_norm(torch.from_numpy(np.array(x)), size, alpha, beta, bias).numpy(),
        )


CORRECTED = [
    ConvTranspose,
    Erf,
    Gelu,
    GlobalLpPool,
    GlobalMaxPool,
    GroupNormalization,
    LRN,
    LpNormalization,
    MaxPool,
    Pad,
]


def reference(model: onnx.ModelProto) -> Callable[[dict[str, Array]], list[Array]]:
    """The model as a function from inputs to outputs, computed in float64 by onnx's reference evaluator."""
    evaluator = ReferenceEvaluator(double(model), new_ops=CORRECTED)
    return lambda feeds: [np.asarray(output) for output in evaluator.run(None, feeds)]


def double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    scales = {node.input[2] for node in copy.graph.node if node.op_type == "Resize" and len(node.input) > 2}
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scales:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in copy.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
                array = numpy_helper.to_array(attribute.t).astype(np.float64)
                attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return copy
