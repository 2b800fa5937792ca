"""Freeing a batch size that an exporter fixed: the rewriting of everything in a graph that holds it.

The batch axis of the input alone is not enough. Exporters write the batch size N into Reshape targets, where
it may stand alone ([1, 768, 196]), multiply another axis ([12 N, 197, 64] for attention heads) or stand
second ([197, N, 768] where sequences come first); and constants such as a class token have N rows.

Where the batch lies in a tensor is found by inferring all shapes twice, for N and for 2 N images: the axis
that doubles holds it. In row-major order P values then lie before the batch's own step, and a Reshape keeps
P. So P says at which axis of the target the batch has to stand; where several would do, the one that holds
nothing else is taken. That last choice is a guess, so the result has to be run and compared (`guard.wrap`
does).
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.shape_inference import infer_node_outputs

from guard.graph import SHAPE_READERS, depending

_SMALL = 64  # elements: constants up to this size may be shapes, axes or bounds
_BATCH = "guard/batch"


def free_batch(model: onnx.ModelProto, source: str, shape: Sequence[int]) -> None:
    """Rewrites `model` in place so that its input `source`, of fixed shape (N, ...), takes any batch size.

    What it cannot place is left as it is; such a model fails, or mixes images, at other batch sizes.
    """
    _Walk(model, source, shape).run()


class _Walk:
    """One pass over the nodes: types of all tensors at N and at 2 N images, and rewriting on the way."""

    def __init__(self, model: onnx.ModelProto, source: str, shape: Sequence[int]) -> None:
        self.graph = model.graph
        self.source = source
        self.size = shape[0]
        self.opsets = {opset.domain: opset.version for opset in model.opset_import}
        self.opset_imports = list(model.opset_import)
        self.images = depending(self.graph.node, [source], SHAPE_READERS)
        self.varying = depending(self.graph.node, [source], frozenset())
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.types: dict[str, tuple[TypeProto, TypeProto]] = {
            name: (_type(tensor.data_type, tensor.dims),) * 2 for name, tensor in self.constants.items()
        }
        once, twice = (_type(TensorProto.FLOAT, [n, *shape[1:]]) for n in (self.size, 2 * self.size))
        self.types[source] = once, twice
        self.outer: dict[str, int] = {}
        self.nodes: list[NodeProto] = []
        self.repeats = False

    def run(self) -> None:
        for node in self.graph.node:
            if node.op_type == "Gather" and node.input[0] in self.images:
                self._gather(node)
            if (
                node.op_type == "Reshape"
                and node.input[0] in self.images
                and node.input[1] not in self.varying
            ):
                self._reshape(node)
            elif node.op_type == "Concat" and not self.images.isdisjoint(node.input):
                self._concat(node)
            self.nodes.append(node)
            self._infer(node)
        if self.repeats:
            first = helper.make_node("Shape", [self.source], [_BATCH], name=_BATCH, start=0, end=1)
            self.nodes.insert(0, first)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _reshape(self, node: NodeProto) -> None:
        target = self._inferred(node, 0).get(node.output[0])
        before = self._values_before_batch(node.input[0])
        sides = None if target is None else _sides(target)
        if sides is None or before is None or 0 in sides:
            self._free_first(node)
            return
        place = _place(sides, before, self.size)
        if place is not None:
            axis, self.outer[node.output[0]] = place
            node.input[1] = self._constant([-1 if i == axis else side for i, side in enumerate(sides)])

    def _free_first(self, node: NodeProto) -> None:
        """Without known shapes: a leading N most likely is the batch."""
        stored = self.constants.get(node.input[1])
        target = [] if stored is None else [int(side) for side in numpy_helper.to_array(stored)]
        if target and target[0] == self.size and -1 not in target[1:]:
            node.input[1] = self._constant([-1, *target[1:]])

    def _gather(self, node: NodeProto) -> None:
        """A Gather that takes every value of a flat tensor in order is a Reshape (torch's `as_strided`)."""
        taken = self.constants.get(node.input[1])
        types = self.types.get(node.input[0])
        flat = _sides(types[0]) if types else None
        if taken is None or flat is None or len(flat) != 1 or math.prod(taken.dims) != flat[0]:
            return
        if np.array_equal(numpy_helper.to_array(taken).ravel(), np.arange(flat[0])):
            node.op_type = "Reshape"
            del node.attribute[:]
            node.input[1] = self._constant(taken.dims)

    def _concat(self, node: NodeProto) -> None:
        """Gives each image its own copy of a constant that has one row for all, such as a class token."""
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        for position, name in enumerate(node.input):
            dims = list(self.constants[name].dims) if name in self.constants else []
            if self.size != 1 or len(dims) < 2 or dims[0] != 1 or axis in (0, -len(dims)):
                continue
            self.repeats = True
            repeated = f"guard/repeated_{len(self.nodes)}"
            ones = self._constant([1] * (len(dims) - 1))
            self.nodes += [
                helper.make_node("Concat", [_BATCH, ones], [f"{repeated}_shape"], axis=0),
                helper.make_node("Expand", [name, f"{repeated}_shape"], [repeated]),
            ]
            kind = self.constants[name].data_type
            self.types[repeated] = _type(kind, dims), _type(kind, [2, *dims[1:]])
            node.input[position] = repeated

    def _values_before_batch(self, name: str) -> int | None:
        """P: how many values of one image's tensor, in row-major order, come before the step of the batch."""
        axis = self._batch_axis(name)
        if axis is None:
            return None
        sides = _sides(self.types[name][0]) or []
        return math.prod(sides[:axis]) * self.outer.get(name, 1)

    def _batch_axis(self, name: str) -> int | None:
        once, twice = (_sides(kind) for kind in self.types.get(name, ()) or (None, None))
        if once is None or twice is None or len(once) != len(twice):
            return None
        changed = [axis for axis, pair in enumerate(zip(once, twice, strict=True)) if pair[0] != pair[1]]
        return changed[0] if len(changed) == 1 and twice[changed[0]] == 2 * once[changed[0]] else None

    def _infer(self, node: NodeProto) -> None:
        once, twice = self._inferred(node, 0), self._inferred(node, 1)
        for name in node.output:
            if name in once and name in twice:
                self.types[name] = once[name], twice[name]
                self._inherit_outer(node, name)

    def _inherit_outer(self, node: NodeProto, name: str) -> None:
        """An operator between two Reshapes leaves an axis as it was merged."""
        axis = self._batch_axis(name)
        if axis is None or name in self.outer:
            return
        side = (_sides(self.types[name][0]) or [])[axis]
        for before in node.input:
            where = self._batch_axis(before)
            sides = _sides(self.types[before][0]) if where is not None else None
            if before in self.outer and where is not None and sides is not None and sides[where] == side:
                self.outer[name] = self.outer[before]

    def _inferred(self, node: NodeProto, which: int) -> dict[str, TypeProto]:
        """Output types at N (`which` 0) or 2 N images (1); empty where they cannot be inferred."""
        names = [name for name in node.input if name]
        if any(name not in self.types for name in names):
            return {}
        data = {name: self.constants[name] for name in names if name in self.constants}
        small = {name: tensor for name, tensor in data.items() if math.prod(tensor.dims) <= _SMALL}
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets[node.domain], node.domain)
            kinds = {name: self.types[name][which] for name in names}
            return infer_node_outputs(schema, node, kinds, small, opset_imports=self.opset_imports)
        except (KeyError, RuntimeError, onnx.defs.SchemaError, onnx.shape_inference.InferenceError):
            return {}  # an operator that onnx does not know, or shapes that do not fit

    def _constant(self, values: Sequence[int]) -> str:
        name = f"guard/shape_{len(self.graph.initializer)}"
        tensor = numpy_helper.from_array(np.array(values, np.int64), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        self.types[name] = (_type(tensor.data_type, tensor.dims),) * 2
        return name


def _place(target: Sequence[int], before: int, size: int) -> tuple[int, int] | None:
    """The axis of a Reshape target that holds the batch, and the values before the batch within that axis.

    `before` values precede the batch's step, so the batch can stand in axis k where prod(target[:k]) divides
    `before` and the axis has room for the rest and for `size`. Preferred are axes that hold the batch alone,
    then those it leads (as it leads attention heads), the last one excepted, which usually holds features.
    """
    found = []
    for axis, side in enumerate(target):
        ahead = math.prod(target[:axis])
        if before % ahead == 0 and side % (before // ahead * size) == 0:
            outer = before // ahead
            alone, leads = side == size and outer == 1, outer == 1 and axis != len(target) - 1
            found.append((0 if alone else 1 if leads else 2, axis, outer))
    if not found:
        return None
    _, axis, outer = min(found)
    return axis, outer


def _type(kind: int, dims: Sequence[int]) -> TypeProto:
    return helper.make_tensor_type_proto(kind, list(dims))


def _sides(kind: TypeProto | None) -> list[int] | None:
    """The dimensions of a tensor type; None where one is unknown."""
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return [int(dim.dim_value) for dim in dims] if all(dim.HasField("dim_value") for dim in dims) else None
