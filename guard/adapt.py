"""Rewriting a classifier from elsewhere into the form that bundles hold.

That form: input `images` float32 (B, C, H, W) in [0, 1], any B; output `logits` (B, K). A classifier differs
from it in what it expects (normalization, range, layout, channel order, batch size, element type) and in
what it gives (probabilities). Each difference becomes a few nodes in front or behind, or a change of the
graph that keeps its results. `guard.wrap` decides by running the model and checks the outcome.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from guard.autodiff import Graph, check_differentiable
from guard.errors import ModelError, UsageError
from guard.free_batch import free_batch
from guard.guarded import IMAGES, LOGITS

Float32 = NDArray[np.float32]
Layout = Literal["nchw", "nhwc"]
Range = Literal["0-1", "0-255"]
Outputs = Literal["logits", "probabilities"]
Order = Literal["rgb", "bgr"]

SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)
"""Probabilities below this are raised to it before their logarithm is taken, which gives a logit of -87.3."""

_REARRANGING = frozenset({"Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze"})
_OTHER_FLOATS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})


@dataclass(frozen=True)
class Outside:
    """What a classifier leaves to the program around it.

    Its input is `(x * r - mean) / std` per channel, with r = 1 or 255 by `range`, for pixels x in [0, 1]:
    mean and std are in the units of `range` and in the model's own order of channels. `layout` and `order`
    say how it wants its axes and colours, `outputs` what it gives (None: found out), `output` which of
    several outputs to use, `size` the height and width of a model that leaves them open.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    range: Range = "0-1"
    layout: Layout = "nchw"
    order: Order = "rgb"
    outputs: Outputs | None = None
    output: str | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Form:
    """What a classifier says of itself: names of input and output, image shape (C, H, W), element type.

    `batch` is the fixed batch size; None where it is open.
    """

    input: str
    output: str
    shape: tuple[int, int, int]
    batch: int | None
    dtype: np.dtype[Any]
    half: bool


def form_of(model: onnx.ModelProto, outside: Outside) -> Form:
    """Reads off a classifier's form.

    Raises `ModelError` where it is none that images can be given to, `UsageError` where `outside`
    contradicts it or must say more.
    """
    value = _only_input(model)
    kind = value.type.tensor_type
    sides = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]
    if len(sides) != 4:
        raise ModelError(
            f"the input {value.name!r} has {len(sides)} axes: expected four (batch, channels, height, "
            "width), or (batch, height, width, channels) with --layout nhwc."
        )
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if kind.elem_type not in {TensorProto.FLOAT, TensorProto.UINT8, *_OTHER_FLOATS}:
        raise ModelError(
            f"the input {value.name!r} holds {dtype}: expected floating point or 8-bit integers."
        )
    if dtype == np.uint8:
        _check_integers(model, value.name, outside)
    return Form(
        input=value.name,
        output=_chosen_output(model, outside.output),
        shape=_image_shape(value.name, sides, outside),
        batch=sides[0],
        dtype=dtype,
        half=bool(_element_types(model) & _HALVES),
    )


def arranged(images: Float32, form: Form, outside: Outside) -> NDArray[Any]:
    """Images (B, C, H, W) in [0, 1] as the original model wants them: what `adapt` puts into the graph."""
    factor, offset = _affine(outside, form.shape[0])
    prepared = images * factor + offset
    if outside.order == "bgr":
        prepared = prepared[:, ::-1]
    if outside.layout == "nhwc":
        prepared = prepared.transpose(0, 2, 3, 1)
    if form.dtype == np.uint8:
        prepared = np.rint(prepared)
    return np.ascontiguousarray(prepared.astype(form.dtype))


def adapt(
    model: onnx.ModelProto, form: Form, outside: Outside, *, num_classes: int, probabilities: bool
) -> onnx.ModelProto:
    """The classifier from `images` to `logits` (B, num_classes), in float32, at opset 17 or above.

    `probabilities` says that the original gives them: a Softmax at its end is then removed; without one,
    logits are the logarithm of the probabilities, which are raised to `SMALLEST_PROBABILITY` first.

    Raises `ModelError` where the graph cannot be converted, run or rewritten, or branches on its images, and
    `UnsupportedOperatorError` for an operator without a differentiation rule.
    """
    channels, height, width = form.shape
    image = [channels, height, width] if outside.layout == "nchw" else [height, width, channels]
    single = in_float32(model)
    given = _only_input(single)
    kind = given.type.tensor_type.elem_type
    given.CopyFrom(helper.make_tensor_value_info(form.input, kind, [form.batch or "batch", *image]))
    plain = Graph(single).build([form.output])
    _check_straight(plain)
    check_differentiable(plain, form.input, form.output)
    (value,) = plain.graph.input
    if form.dtype == np.uint8:
        _lift_integers(plain, form.input)
    value.CopyFrom(helper.make_tensor_value_info(form.input, TensorProto.FLOAT, ["batch", *image]))
    if form.batch is not None:
        free_batch(plain, form.input, (form.batch, *image))
    softmax = _final_softmax(plain, form.output) if probabilities else None
    if softmax is not None:
        softmax.op_type = "Identity"
        del softmax.attribute[:]
    return _joined(plain, form, outside, num_classes, log=probabilities and softmax is None)


def _check_straight(model: onnx.ModelProto) -> None:
    """Control flow is refused; branches whose condition is constant have been taken before."""
    for node in model.graph.node:
        if node.op_type in {"Loop", "Scan", "If"}:
            raise ModelError(
                f"{node.op_type} (node {node.name!r}): control flow cannot be guarded. Export the model by "
                "tracing, without branches that depend on data."
            )


def _only_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    constants = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in constants]
    if len(values) != 1:
        names = ", ".join(value.name for value in values)
        raise ModelError(f"the model has {len(values)} inputs ({names}): expected exactly one, the images.")
    return values[0]


def _chosen_output(model: onnx.ModelProto, wanted: str | None) -> str:
    names = [str(value.name) for value in model.graph.output]
    if wanted is not None and wanted not in names:
        raise UsageError(f"--output {wanted}: the model has no such output, only {', '.join(names)}.")
    if wanted is None and len(names) > 1:
        raise UsageError(f"the model has {len(names)} outputs ({', '.join(names)}): choose one by --output.")
    return wanted or names[0]


def _image_shape(name: str, sides: Sequence[int | None], outside: Outside) -> tuple[int, int, int]:
    axes = (1, 2, 3) if outside.layout == "nchw" else (3, 1, 2)
    channels, *size = (sides[axis] for axis in axes)
    if channels not in (1, 3):
        other, there = ("nhwc", sides[3]) if outside.layout == "nchw" else ("nchw", sides[1])
        raise ModelError(
            f"the input {name!r} has {'an open number of' if channels is None else channels} channels (axis "
            f"{axes[0]} of {_shape_text(sides)}): expected 1 (grey) or 3 (colour)."
            + (f" The model looks like --layout {other}." if there in (1, 3) else "")
        )
    if outside.order == "bgr" and channels != 3:
        raise UsageError(f"--order bgr needs three channels; the model has {channels}.")
    settled = []
    for side, found, wanted in zip(("height", "width"), size, outside.size or (None, None), strict=True):
        if found is not None and wanted is not None and found != wanted:
            raise UsageError(f"--size asks for {side} {wanted}, but the model's input has {found}.")
        chosen = found if found is not None else wanted
        if chosen is None:
            raise UsageError(f"the model leaves the {side} of its input open: fix it by --size, such as 224.")
        if chosen < 1:
            raise UsageError(f"--size asks for {side} {chosen}: expected at least 1.")
        settled.append(chosen)
    return channels, settled[0], settled[1]


def _shape_text(sides: Sequence[int | None]) -> str:
    return "(" + ", ".join("?" if side is None else str(side) for side in sides) + ")"


def _check_integers(model: onnx.ModelProto, name: str, outside: Outside) -> None:
    """An integer input may become a float one where the model does nothing but cast it to float."""
    readers = [node for node in model.graph.node if name in node.input]
    if not readers or any(node.op_type != "Cast" for node in readers):
        raise ModelError(
            f"the input {name!r} holds 8-bit integers and is not cast to floats first: gradients end there. "
            "Export the model with a float input."
        )
    if outside.range != "0-255" or outside.mean or outside.std:
        raise UsageError("the model takes 8-bit integers: give --range 0-255, and no --mean or --std.")


def _lift_integers(model: onnx.ModelProto, name: str) -> None:
    for node in model.graph.node:
        if name in node.input:
            node.op_type = "Identity"
            del node.attribute[:]


def _affine(outside: Outside, channels: int) -> tuple[Float32, Float32]:
    """Per-channel factor and offset, each (C, 1, 1), that turn pixels in [0, 1] into what the model wants."""
    unit = 255.0 if outside.range == "0-255" else 1.0
    for option, given in (("mean", outside.mean), ("std", outside.std)):
        if len(given) not in (0, 1, channels):
            raise UsageError(
                f"--{option} has {len(given)} values: expected one, or one for each of {channels}."
            )
    mean = np.broadcast_to(np.array(outside.mean or (0.0,)), (channels,))
    std = np.broadcast_to(np.array(outside.std or (1.0,)), (channels,))
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise UsageError("--mean must be finite, --std finite and above zero.")
    if unit == 1 and (np.abs(mean) > 1).any():
        raise UsageError(
            f"--mean {mean.max():g} lies outside [0, 1], where --range 0-1 has its pixels: divide --mean and "
            "--std by 255, or give --range 0-255 if the model wants pixels from 0 to 255."
        )
    if unit == 255 and (np.abs(mean) <= 1).all() and (mean != 0).any():
        raise UsageError(
            f"--mean {mean.max():g} is almost nothing where --range 0-255 has its pixels: multiply --mean "
            "and --std by 255, or leave out --range if the model wants pixels from 0 to 1."
        )
    if outside.order == "bgr":
        mean, std = mean[::-1], std[::-1]
    factor, offset = (unit / std).astype(np.float32), (-mean / std).astype(np.float32)
    return factor.reshape(-1, 1, 1), offset.reshape(-1, 1, 1)


def _element_types(model: onnx.ModelProto) -> set[int]:
    """Element types that the model declares, stores or casts to."""
    found = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    found |= {tensor.data_type for tensor in model.graph.initializer}
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                found.add(attribute.i)
            if attribute.type == onnx.AttributeProto.TENSOR:
                found.add(attribute.t.data_type)
    return found


def in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes in float32 throughout."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if _element_types(copy) & _OTHER_FLOATS:
        for function in copy.functions:
            for node in function.node:
                _convert_attributes(node)
        _convert_graph(copy.graph)
    return copy


def _convert_graph(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _OTHER_FLOATS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        _convert_tensor(tensor)
    for node in graph.node:
        _convert_attributes(node)


def _convert_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in _OTHER_FLOATS:
            attribute.i = TensorProto.FLOAT
        if attribute.type == onnx.AttributeProto.TENSOR:
            _convert_tensor(attribute.t)
        for inner in (attribute.g, *attribute.graphs):
            _convert_graph(inner)


def _convert_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _OTHER_FLOATS:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _final_softmax(model: onnx.ModelProto, output: str) -> NodeProto | None:
    """The Softmax that makes the output, where only rearrangement follows it."""
    producers = {name: node for node in model.graph.node for name in node.output}
    readers = [name for node in model.graph.node for name in node.input]
    node = producers.get(output)
    while node is not None and _moves_only(node) and readers.count(node.input[0]) == 1:
        node = producers.get(node.input[0])
    return node if node is not None and node.op_type == "Softmax" else None


def _moves_only(node: NodeProto) -> bool:
    """Whether a node leaves float values as they are; 16-bit models often end in a Cast."""
    to_float = any(attribute.i == TensorProto.FLOAT for attribute in node.attribute if attribute.name == "to")
    return node.op_type in _REARRANGING or (node.op_type == "Cast" and to_float)


def _joined(
    model: onnx.ModelProto, form: Form, outside: Outside, num_classes: int, *, log: bool
) -> onnx.ModelProto:
    """The model between the nodes that go before and after it, from `images` to `logits`."""
    nodes: list[NodeProto] = []
    constants: list[TensorProto] = []

    def apply(operator: str, tensor: str, *values: NDArray[Any], **attributes: Any) -> str:
        stem = f"guard/{operator}_{len(nodes)}"
        names = [f"{stem}_{position}" for position in range(len(values))]
        constants.extend(numpy_helper.from_array(v, n) for v, n in zip(values, names, strict=True))
        nodes.append(helper.make_node(operator, [tensor, *names], [stem], **attributes))
        return stem

    factor, offset = _affine(outside, form.shape[0])
    current = IMAGES
    if (factor != 1).any():
        current = apply("Mul", current, factor)
    if (offset != 0).any():
        current = apply("Add", current, offset)
    if outside.order == "bgr":
        current = apply("Gather", current, np.array([2, 1, 0], np.int64), axis=1)
    if outside.layout == "nhwc":
        current = apply("Transpose", current, perm=[0, 2, 3, 1])
    # every name of the original, so that none meets those of guarded graphs or of an earlier wrapping
    _rename(model.graph, lambda name: current if name == form.input else f"model/{name}")
    nodes.extend(model.graph.node)
    current = apply("Flatten", f"model/{form.output}", axis=1)
    if log:
        smallest = np.array(SMALLEST_PROBABILITY, np.float32)
        current = apply("Log", apply("Clip", current, smallest))
    nodes[-1].output[0] = LOGITS
    graph = helper.make_graph(
        nodes,
        model.graph.name or "classifier",
        [helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, ["batch", *form.shape])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", num_classes])],
        [*model.graph.initializer, *constants],
    )
    return helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=model.ir_version, producer_name="guard"
    )


def _rename(graph: onnx.GraphProto, renamed: Callable[[str], str]) -> None:
    """Renames all tensors of a graph and its subgraphs; an empty name stands for one left out."""
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = renamed(value.name)
    for node in graph.node:
        node.input[:] = [renamed(name) if name else "" for name in node.input]
        node.output[:] = [renamed(name) if name else "" for name in node.output]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, renamed)
