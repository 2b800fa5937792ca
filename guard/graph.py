"""A builder around an ONNX model: appends nodes, and knows the shapes and constants of every tensor.

Shapes are read off, not guessed: the model runs once at two batch sizes in onnxruntime, and a dimension that
is equal in both is static. The same runs yield the value of every tensor that does not depend on the images
(Reshape targets, Slice bounds, Resize scales, transposed weights).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeVar, overload

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from guard.errors import ModelError

Provider = Literal["cpu", "cuda"]
Shape = tuple[int | None, ...]
Array = NDArray[Any]
T = TypeVar("T")

OPSET_FLOOR = 17
PROBE_BATCHES = (2, 5)  # B // 2, B % 2 and the like differ too
SHAPE_READERS = frozenset({"Shape", "Size"})
SMALL = 1024  # elements; larger constants are not copied into models that only serve inference or probing

# Operators that ONNX defines by simpler ones, and which are differentiated through that definition.
EXPANDED = frozenset(
    {
        "AffineGrid",
        "Attention",
        "CenterCropPad",
        "LinearAttention",
        "MeanVarianceNormalization",
        "RotaryEmbedding",
        "SwiGLU",
    }
)

_BOOLEAN = frozenset(
    {"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"}
)
_INTEGER = frozenset({"ArgMax", "ArgMin", "NonZero", "Shape", "Size"})


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values, strings decoded."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def describe(node: NodeProto) -> str:
    """How an error names a node."""
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
    return f"{domain}{node.op_type} (node {node.name!r}, output {node.output[0]!r})"


class Graph:
    """A model under construction: a copy of `model`, to which nodes and constants are appended.

    Local functions are inlined, and a model below opset 17 is converted to it.
    `provider` is where the result will run; rules choose their lowering by it.
    `needed` holds, during a reverse walk, the tensors whose gradient is wanted, and `phases` what gradients
    of strided convolutions were put together from (`guard.operators.convolution`).

    Raises:
        ModelError: a model that cannot be inlined, converted or run, or an input whose size is unknown
            beyond the batch axis.
    """

    def __init__(self, model: onnx.ModelProto, *, provider: Provider = "cpu") -> None:
        self.provider: Provider = provider
        self.needed: frozenset[str] = frozenset()
        self.phases: dict[str, Any] = {}
        model = _prepared(model)
        # weights are shared with the caller's model, not copied, and never written to
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._model = _frame(model)
        self._arrays: dict[str, Array] = {}
        self._nodes: list[NodeProto] = []
        self._take(model.graph.node)
        self._names = {name for node in self._nodes for name in (*node.input, *node.output)}
        self._names |= {*self._initializers, *self.inputs}
        self._node_names = {node.name for node in self._nodes}
        self._producers: dict[str, NodeProto] = {}
        self._counter = 0
        self._constants: dict[Hashable, str] = {}
        self._memo: dict[Hashable, Any] = {}
        self._shapes: dict[str, Shape] = {}
        self._per_image: set[str] = set()  # tensors whose first axis is that of the images
        self._types: dict[str, int] = {}
        if any(node.op_type == "If" for node in self._nodes):
            self._take_constant_branches()

    @property
    def nodes(self) -> Sequence[NodeProto]:
        """All nodes so far, each after those whose outputs it reads."""
        return self._nodes

    @property
    def inputs(self) -> list[str]:
        """The inputs that a caller feeds."""
        return [value.name for value in self._model.graph.input]

    @property
    def outputs(self) -> list[str]:
        """The outputs of the model that this graph began as."""
        return [value.name for value in self._model.graph.output]

    @property
    def opset(self) -> int:
        """The version of the ONNX operator set."""
        return int(next(o.version for o in self._model.opset_import if not o.domain))

    def input(self, name: str, shape: Sequence[int | str], dtype: type[np.generic] = np.float32) -> str:
        """Adds an input; a string in `shape` names a dimension that varies with the batch."""
        if name in self._names:
            raise ModelError(f"The model already has a tensor called {name!r}; choose another name.")
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._model.graph.input.append(helper.make_tensor_value_info(name, kind, list(shape)))
        self._names.add(name)
        return name

    @overload
    def op(
        self, op_type: str, *inputs: str | None, outputs: Literal[1] = 1, domain: str = "", **attributes: Any
    ) -> str: ...

    @overload
    def op(
        self, op_type: str, *inputs: str | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]: ...

    def op(
        self, op_type: str, *inputs: str | None, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str | tuple[str, ...]:
        """Appends a node and returns the name of its output, or a tuple of names if `outputs` > 1.

        None stands for an optional input left out; an attribute that is None is left out.
        """
        names = tuple(self._unique(op_type) for _ in range(outputs))
        given = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(
            op_type, [name or "" for name in inputs], list(names), name=names[0], domain=domain, **given
        )
        self._nodes.append(node)
        self._types.update(dict.fromkeys(names, self._type_of(node)))
        if op_type == "TopK":
            self._types[names[1]] = TensorProto.INT64
        if domain and all(o.domain != domain for o in self._model.opset_import):
            self._model.opset_import.append(helper.make_opsetid(domain, 1))
        return names[0] if outputs == 1 else names

    def producer(self, name: str) -> NodeProto | None:
        """The node that computes a tensor, or None for inputs and constants."""
        if name not in self._producers:
            self._producers = {output: node for node in self._nodes for output in node.output}
        return self._producers.get(name)

    def extra_output(self, node: NodeProto, position: int) -> str:
        """The name of an optional output of an existing node, which is switched on if need be."""
        while len(node.output) <= position:
            node.output.append("")
        if not node.output[position]:
            node.output[position] = self._unique(node.op_type)
        return str(node.output[position])

    def constant(self, array: Array | np.generic | Sequence[int] | int) -> str:
        """The name of an initializer with this value; equal arrays share one. Python integers are int64."""
        value = np.ascontiguousarray(array).reshape(np.shape(array))
        digest = hashlib.blake2b(value.reshape(-1).view(np.uint8).data).digest()
        key = (value.dtype.str, value.shape, digest)
        if key not in self._constants:
            name = self._constants[key] = self._unique("Constant")
            self._arrays[name] = value
        return self._constants[key]

    def scalar(self, value: float, like: str) -> str:
        """A rank-0 constant of the same type as tensor `like`."""
        return self.constant(np.asarray(value, self.dtype(like)))

    def zero(self, like: str) -> TensorProto:
        """The `value` attribute of a ConstantOfShape that makes zeros of the type of tensor `like`."""
        return numpy_helper.from_array(np.zeros(1, self.dtype(like)))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, called once per key: what several reverse walks share is built by the first of them."""
        if key not in self._memo:
            self._memo[key] = make()
        result: T = self._memo[key]
        return result

    def tensor(self, name: str) -> Tensor:
        """The tensor as an object that arithmetic can be written with."""
        return Tensor(self, name)

    def needs(self, name: str) -> bool:
        """Whether the current reverse walk wants the gradient of this tensor."""
        return name in self.needed

    def shape(self, name: str) -> Shape:
        """The shape of a tensor; None stands for a dimension that depends on the batch size."""
        if name in self._initializers:
            return tuple(self._initializers[name].dims)
        if name in self._arrays:
            return self._arrays[name].shape
        if name not in self._shapes:
            self._probe()
        return self._shapes[name]

    def declare(self, name: str, like: str) -> str:
        """States that a tensor has the shape of tensor `like`, to spare reading it off; returns `name`."""
        self._shapes.setdefault(name, self.shape(like))
        if like in self._per_image:
            self._per_image.add(name)
        return name

    def rank(self, name: str) -> int:
        """The number of axes of a tensor."""
        return len(self.shape(name))

    def static_shape(self, name: str, start: int = 0) -> tuple[int, ...]:
        """The dimensions from `start` on.

        Raises:
            ModelError: one of them depends on the batch size.
        """
        dims = self.shape(name)[start:]
        if any(d is None for d in dims):
            raise ModelError(
                f"Tensor {name!r} has shape {self.shape(name)} (None: depends on the batch); "
                "only the batch axis may vary here. Export the model with fixed image dimensions."
            )
        return tuple(d for d in dims if d is not None)

    def value(self, name: str) -> Array | None:
        """The value of a tensor that is the same for every image and batch size, else None."""
        if name not in self._arrays:
            if name in self._initializers:
                self._arrays[name] = numpy_helper.to_array(self._initializers[name])
            elif name and name not in self._shapes:
                self._probe()
        return self._arrays.get(name)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is the same for every image and batch size."""
        return name in self._initializers or self.value(name) is not None

    def constant_of(self, node: NodeProto, position: int) -> Array:
        """The value of a node's input that must be constant.

        Raises:
            ModelError: it is computed from the images or depends on the batch size.
        """
        value = self.optional_constant(node, position)
        if value is None:
            raise ModelError(f"Input {position} of {describe(node)} must be a constant, and is missing.")
        return value

    def optional_constant(self, node: NodeProto, position: int) -> Array | None:
        """As `constant_of`, or None where the node has no such input."""
        if position >= len(node.input) or not node.input[position]:
            return None
        value = self.value(node.input[position])
        if value is None:
            raise ModelError(
                f"Input {position} ({node.input[position]!r}) of {describe(node)} must be a constant, "
                "but is computed from the images or depends on the batch size; export the model with "
                "fixed image dimensions and without input-dependent parameters."
            )
        return value

    def evaluate(self, op_type: str, inputs: Sequence[Array | None], given: Mapping[str, Any]) -> Array:
        """The first output of one operator, run in onnxruntime on constants: what linear operators do to
        unit vectors is measured, not modelled.
        """
        names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
        node = helper.make_node(op_type, names, ["y"], **given)
        values = [numpy_helper.from_array(x, n) for x, n in zip(inputs, names, strict=True) if x is not None]
        graph = helper.make_graph([node], op_type, [], [onnx.ValueInfoProto(name="y")], values)
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=self._model.ir_version)
        (result,) = _session(model).run(None, {})
        return np.asarray(result)

    def dtype(self, name: str) -> np.dtype[Any]:
        """The element type of a tensor (float32 where an operator unknown to onnx hides it)."""
        if name in self._initializers:
            return helper.tensor_dtype_to_np_dtype(self._initializers[name].data_type)
        if name in self._arrays:
            return self._arrays[name].dtype
        if name not in self._types:
            known = {n: v.type.tensor_type.elem_type for n, v in self._inferred().items()}
            names = (output for node in self._nodes for output in node.output)
            self._types = {n: known.get(n) or TensorProto.FLOAT for n in (*self.inputs, *names)} | self._types
        return helper.tensor_dtype_to_np_dtype(self._types[name])

    def build(self, outputs: Mapping[str, str] | Sequence[str]) -> onnx.ModelProto:
        """The model that computes `outputs`: tensor names, or a mapping from new names to tensor names.

        Nodes and constants that no output reads are left out; all inputs stay.
        """
        renamed = dict(outputs) if isinstance(outputs, Mapping) else {name: name for name in outputs}
        identities = [
            helper.make_node("Identity", [tensor], [name])
            for name, tensor in renamed.items()
            if name != tensor
        ]
        clashes = [node.output[0] for node in identities if node.output[0] in self._names]
        if clashes:
            raise ModelError(f"The model already has tensors called {clashes}; choose other output names.")
        inferred = self._inferred()
        values = []
        for name, tensor in renamed.items():
            value = onnx.ValueInfoProto()
            value.CopyFrom(inferred.get(tensor, value))
            value.name = name
            if tensor in self._shapes and not value.type.tensor_type.HasField("shape"):
                for axis, dim in enumerate(self._shapes[tensor]):
                    size = {"dim_value": dim} if dim is not None else {"dim_param": "" if axis else "batch"}
                    value.type.tensor_type.shape.dim.add(**size)
            value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(self.dtype(tensor))
            values.append(value)
        nodes = [*self._reaching(list(renamed.values())), *identities]
        model, _ = self._assembled(nodes, values, large_as_inputs=False)
        model.graph.value_info.extend(self._known_shapes(nodes, exclude=renamed))
        return model

    def _take(self, nodes: Iterable[NodeProto]) -> None:
        """Appends copies of a model's nodes; Constant nodes become constants."""
        for node in nodes:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                self._initializers[node.output[0]] = _constant_tensor(node)
            else:
                self._nodes.append(NodeProto())
                self._nodes[-1].CopyFrom(node)
                if node.domain == "ai.onnx":  # the same as none, which is how opsets are listed here
                    self._nodes[-1].domain = ""

    def _take_constant_branches(self) -> None:
        """Replaces each If whose condition does not depend on the images by the branch that it takes."""
        conditions = {
            node.output[0]: self.value(node.input[0]) for node in self._nodes if node.op_type == "If"
        }
        nodes, self._nodes = self._nodes, []
        for node in nodes:
            condition = conditions.get(node.output[0])
            if condition is None:
                self._nodes.append(node)
                continue
            branch = self._renamed(attributes(node)["then_branch" if condition.item() else "else_branch"])
            self._initializers |= {tensor.name: tensor for tensor in branch.initializer}
            self._take(branch.node)
            for value, name in zip(branch.output, node.output, strict=True):
                self._take([helper.make_node("Identity", [value.name], [name])])
        self._names |= {name for node in self._nodes for name in (*node.input, *node.output)}
        self._node_names |= {node.name for node in self._nodes}
        if any(node.op_type == "If" and node.output[0] not in conditions for node in self._nodes):
            self._take_constant_branches()

    def _renamed(self, branch: onnx.GraphProto) -> onnx.GraphProto:
        """A branch whose own tensors and nodes have names of this graph: other branches may have the same."""
        renamed = onnx.GraphProto()
        renamed.CopyFrom(branch)
        defined = {name for node in branch.node for name in node.output if name}
        names = {
            name: self._unique("branch") for name in sorted(defined | {t.name for t in branch.initializer})
        }
        for tensor in renamed.initializer:
            tensor.name = names[tensor.name]
        for value in renamed.output:
            value.name = names.get(value.name, value.name)
        for node in renamed.node:
            node.name = self._unique("node")
            node.output[:] = [names.get(name, name) for name in node.output]
        _rename_reads(renamed, names)
        return renamed

    def _unique(self, stem: str) -> str:
        while True:
            name = f"guard/{stem}_{self._counter}"
            self._counter += 1
            if name not in self._names and name not in self._node_names:
                self._names.add(name)
                return name

    def _known_shapes(
        self, nodes: Iterable[NodeProto], exclude: Collection[str]
    ) -> list[onnx.ValueInfoProto]:
        """Shapes of intermediate tensors. What onnxruntime infers loses the batch axis at every Reshape, and
        it keeps its blocked layout through Mul and Add only where it can tell that shapes are equal.
        """
        symbols = {v.type.tensor_type.shape.dim[0].dim_param for v in self._model.graph.input if _rank(v)}
        batch = min(symbols - {""}, default="")
        if not batch:
            return []
        values = []
        for name in (name for node in nodes for name in node.output if name and name not in exclude):
            shape = self._shapes.get(name)
            if shape and shape[0] is None and name in self._per_image and None not in shape[1:]:
                kind = helper.np_dtype_to_tensor_dtype(self.dtype(name))
                values.append(helper.make_tensor_value_info(name, kind, [batch, *shape[1:]]))
        return values

    def _reaching(self, outputs: Iterable[str]) -> list[NodeProto]:
        """The nodes that `outputs` depend on, in order."""
        wanted, kept = set(outputs), []
        for node in reversed(self._nodes):
            if not wanted.isdisjoint(node.output):
                kept.append(node)
                wanted.update(reads(node))
        return kept[::-1]

    def _assembled(
        self, nodes: Sequence[NodeProto], outputs: Sequence[onnx.ValueInfoProto], *, large_as_inputs: bool
    ) -> tuple[onnx.ModelProto, dict[str, Array]]:
        """A model of these nodes with the constants they read. Large ones may become inputs instead, which
        spares copies; their values are the second result.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.output[:], model.graph.value_info[:]
        model.graph.node.extend(nodes)
        model.graph.output.extend(outputs)
        produced = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in reads(node)} | {value.name for value in outputs}
        fed: dict[str, Array] = {}
        for name in sorted(read - produced - set(self.inputs)):
            value = self.value(name) if large_as_inputs and prod(self.static_shape(name)) > SMALL else None
            if value is not None:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                model.graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
                fed[name] = value
            elif name in self._initializers:
                model.graph.initializer.append(self._initializers[name])
            else:
                model.graph.initializer.append(numpy_helper.from_array(self._arrays[name], name))
        return model, fed

    def _type_of(self, node: NodeProto) -> int:
        """The element type of an appended node's output."""
        given = attributes(node)
        if node.op_type in _BOOLEAN:
            return TensorProto.BOOL
        if node.op_type in _INTEGER:
            return TensorProto.INT64
        if node.op_type == "Cast":
            return int(given["to"])
        if node.op_type == "ConstantOfShape":
            return int(given["value"].data_type) if "value" in given else TensorProto.FLOAT
        source = node.input[{"Where": 1, "CastLike": 1, "OneHot": 2}.get(node.op_type, 0)]
        return helper.np_dtype_to_tensor_dtype(self.dtype(source))

    def _inferred(self) -> dict[str, onnx.ValueInfoProto]:
        """What onnx infers about types and shapes."""
        model, _ = self._assembled(self._nodes, [], large_as_inputs=True)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        return {value.name: value for value in (*inferred.input, *inferred.value_info)}

    def _probe(self) -> None:
        """Runs the graph at two batch sizes and records shapes and constants of all tensors not yet known."""
        dependent = depending(self._nodes, self.inputs, SHAPE_READERS)
        names = [n for node in self._nodes for n in node.output if n and n not in self._shapes]
        nodes = list(self._nodes)
        fetches: dict[str, str] = {}
        for name in (*(n for n in self.inputs if n not in self._shapes), *names):
            if name in dependent:
                fetches[name] = f"guard/probe/{name}"
                nodes.append(helper.make_node("Shape", [name], [fetches[name]]))
            else:
                fetches[name] = name
        values = [onnx.ValueInfoProto(name=fetch) for fetch in fetches.values()]
        model, weights = self._assembled(nodes, values, large_as_inputs=True)
        try:
            session = _session(model)
            results = [session.run(list(fetches.values()), self._example(b) | weights) for b in PROBE_BATCHES]
        except ModelError:
            raise
        except Exception as error:  # onnxruntime's own exceptions have no common base
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"onnxruntime cannot run the model at batch sizes {PROBE_BATCHES}: {reason} "
                "Export the model with a dynamic batch axis."
            ) from error
        for name, first, second in zip(fetches, *results, strict=True):
            if name in dependent:
                dims = [int(a) if a == b else None for a, b in zip(first, second, strict=True)]
                self._shapes[name] = tuple(dims)
                if (*first[:1], *second[:1]) == PROBE_BATCHES:
                    self._per_image.add(name)
                continue
            dims = [a if a == b else None for a, b in zip(first.shape, second.shape, strict=True)]
            self._shapes[name] = tuple(dims)
            if first.shape == second.shape and np.array_equal(first, second):
                self._arrays[name] = first

    def _example(self, batch: int) -> dict[str, Array]:
        """Inputs to run the model with; symbolic first dimensions (and their namesakes) become `batch`."""
        symbols = {v.type.tensor_type.shape.dim[0].dim_param for v in self._model.graph.input if _rank(v)}
        feeds = {}
        for value in self._model.graph.input:
            kind = value.type.tensor_type
            dims = []
            for axis, dim in enumerate(kind.shape.dim):
                if dim.HasField("dim_value"):
                    dims.append(dim.dim_value)
                elif axis == 0 or (dim.dim_param and dim.dim_param in symbols):
                    dims.append(batch)
                else:
                    raise ModelError(
                        f"Axis {axis} of input {value.name!r} has no fixed size; only the batch axis may "
                        "vary. Export the model with fixed image dimensions."
                    )
            feeds[value.name] = np.full(dims, 0.5).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        return feeds


@dataclass(frozen=True)
class Tensor:
    """A tensor of a graph with arithmetic: each operation appends a node. Numbers take the tensor's type."""

    graph: Graph
    name: str

    def __add__(self, other: Tensor | float) -> Tensor:
        return self._binary("Add", other)

    def __sub__(self, other: Tensor | float) -> Tensor:
        return self._binary("Sub", other)

    def __mul__(self, other: Tensor | float) -> Tensor:
        return self._binary("Mul", other)

    def __truediv__(self, other: Tensor | float) -> Tensor:
        return self._binary("Div", other)

    def __pow__(self, other: Tensor | float) -> Tensor:
        return self._binary("Pow", other)

    def __radd__(self, other: float) -> Tensor:
        return self._binary("Add", other, swap=True)

    def __rsub__(self, other: float) -> Tensor:
        return self._binary("Sub", other, swap=True)

    def __rmul__(self, other: float) -> Tensor:
        return self._binary("Mul", other, swap=True)

    def __rtruediv__(self, other: float) -> Tensor:
        return self._binary("Div", other, swap=True)

    def __neg__(self) -> Tensor:
        return self.apply("Neg")

    def __lt__(self, other: Tensor | float) -> Tensor:
        return self._binary("Less", other)

    def __gt__(self, other: Tensor | float) -> Tensor:
        return self._binary("Greater", other)

    def __le__(self, other: Tensor | float) -> Tensor:
        return self._binary("LessOrEqual", other)

    def __ge__(self, other: Tensor | float) -> Tensor:
        return self._binary("GreaterOrEqual", other)

    def __and__(self, other: Tensor) -> Tensor:
        return self._binary("And", other)

    def equals(self, other: Tensor | float) -> Tensor:
        """Elementwise equality."""
        return self._binary("Equal", other)

    def apply(self, op_type: str, *others: str | None, **attributes: Any) -> Tensor:
        """The operator with this tensor as first input."""
        return Tensor(self.graph, self.graph.op(op_type, self.name, *others, **attributes))

    def where(self, true: Tensor, false: Tensor) -> Tensor:
        """`true` where this Boolean tensor holds, else `false`."""
        return self.apply("Where", true.name, false.name)

    def like(self, other: str) -> Tensor:
        """Cast to the element type of another tensor (a Boolean becomes 0 or 1)."""
        return self.apply("Cast", to=helper.np_dtype_to_tensor_dtype(self.graph.dtype(other)))

    def sum(self, axes: Sequence[int]) -> Tensor:
        """The sum over `axes`, which stay with size 1."""
        if not axes:
            return self
        return self.apply("ReduceSum", self.graph.constant(list(axes)), keepdims=1)

    def mean(self, axes: Sequence[int], count: int) -> Tensor:
        """The mean over `axes`, which hold `count` elements; the axes stay with size 1."""
        return self.sum(axes) * (1 / count)

    def _binary(self, op_type: str, other: Tensor | float, *, swap: bool = False) -> Tensor:
        name = other.name if isinstance(other, Tensor) else self.graph.scalar(other, self.name)
        pair = (name, self.name) if swap else (self.name, name)
        return Tensor(self.graph, self.graph.op(op_type, *pair))


def depending(nodes: Iterable[NodeProto], sources: Iterable[str], cut: frozenset[str]) -> set[str]:
    """The tensors computed from `sources`, which are among them; operators in `cut` break the dependence."""
    reached = set(sources)
    for node in nodes:
        if node.op_type not in cut and not reached.isdisjoint(reads(node)):
            reached.update(name for name in node.output if name)
    return reached


def reads(node: NodeProto) -> set[str]:
    """The tensors that a node reads, those that its subgraphs capture among them."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            local = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            for inner in graph.node:
                names |= reads(inner) - local
                local.update(inner.output)
            names |= {value.name for value in graph.output} - local
    return names


def _rename_reads(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Lets the nodes of a graph, and of graphs inside it, read tensors by their new names."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                local = {value.name for value in inner.input} | {tensor.name for tensor in inner.initializer}
                local |= {name for one in inner.node for name in one.output}
                captured = {old: new for old, new in names.items() if old not in local}
                for value in inner.output:
                    value.name = captured.get(value.name, value.name)
                _rename_reads(inner, captured)


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session that keeps every node as it is, and that has no threads left spinning."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _frame(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of everything but nodes and initializers."""
    if model.graph.sparse_initializer:
        raise ModelError("The model has sparse weights; only dense ones are supported.")
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    opsets = [
        helper.make_opsetid("" if o.domain == "ai.onnx" else o.domain, o.version) for o in model.opset_import
    ]
    copy = helper.make_model(
        helper.make_graph([], model.graph.name or "graph", inputs, model.graph.output),
        ir_version=max(model.ir_version, helper.find_min_ir_version_for(opsets, ignore_unknown=True)),
        opset_imports=opsets,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
    )
    copy.metadata_props.extend(model.metadata_props)
    return copy


def _prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or where needed a copy, without local functions and at opset 17 or above."""
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions:
        raise ModelError("The model imports no ONNX operator set; it is not a model onnxruntime can run.")
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        expanded = {node.op_type for node in model.graph.node if not node.domain} & EXPANDED
        if expanded:
            model = onnx.inliner.inline_selected_functions(
                model, [("", name) for name in sorted(expanded)], inline_schema_functions=True
            )
        if versions[0] < OPSET_FLOOR:
            model = onnx.version_converter.convert_version(model, OPSET_FLOOR)
    except Exception as error:  # the converter raises bare RuntimeErrors
        raise ModelError(
            f"The model (opset {versions[0]}) cannot be converted to opset {OPSET_FLOOR}: {error} "
            f"Export it again at opset {OPSET_FLOOR} or above."
        ) from error
    return model


def _constant_tensor(node: NodeProto) -> TensorProto:
    """The value of a Constant node, whichever attribute holds it."""
    if len(node.attribute) != 1:  # as where MeanVarianceNormalization is expanded without its `axes`
        raise ModelError(
            f"{describe(node)} has {len(node.attribute)} values: expected one. Export the model with every "
            "attribute of its operators written out."
        )
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name in ("value", "sparse_value"):
        if not isinstance(value, TensorProto):
            raise ModelError(f"{describe(node)} is sparse; only dense constants are supported.")
        tensor = TensorProto()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        return tensor
    if "string" in attribute.name:
        return helper.make_tensor(
            node.output[0],
            TensorProto.STRING,
            [len(value)] if attribute.name == "value_strings" else [],
            value if attribute.name == "value_strings" else [value],
        )
    kind = np.float32 if "float" in attribute.name else np.int64
    return numpy_helper.from_array(np.asarray(value, kind), node.output[0])


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)
