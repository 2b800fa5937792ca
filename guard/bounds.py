"""Upper bounds of a network's slope from its weights alone (LIP, section 3.5), to stand beside fitted ones.

Two are computed from the ONNX graph: the product of layer norms (Bartlett), and the norm of the product of
absolute weights. The latter takes the place of LIP's Lemma 3.3, the norm of the product of the weights
themselves, which is computed beside it as published and is no bound: f(x) = relu(x) - relu(x - 1) has weights
whose product is 0 and a slope of 1, for pulling |activation'| <= 1 out of a sum over paths needs every path
to count with its absolute value. What is computed, operator by operator: docs/decisions/0054.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil, inf, isfinite, prod, sqrt
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from guard.errors import GuardError, UnsupportedOperatorError
from guard.graph import SHAPE_READERS, Array, Graph, attributes, depending
from guard.norms import Norm
from guard.operators.convolution import Window, window
from guard.progress import Progress

MOST_INPUTS = 4096  # the linearized networks are evaluated at so many unit vectors at most
_BATCH = 64
_CHUNK = 1 << 22  # complex numbers held at a time while a convolution's norm is computed

# How fast an activation changes at most. Entry-wise ones only, as both bounds need.
_SLOPES = {
    "Clip": 1.0,
    "Elu": 1.0,
    "HardSigmoid": 0.2,
    "LeakyRelu": 1.0,
    "Relu": 1.0,
    "Sigmoid": 0.25,
    "Softplus": 1.0,
    "Softsign": 1.0,
    "Tanh": 1.0,
}
_MOVES = frozenset({"Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class Bound:
    """A number, or why there is none. `logits` is the largest ||grad z_i||, `margin` the largest
    ||grad (z_i - z_j)||, in the dual norm: l2 for perturbations in l2, l1 for linf. Pixels are in [0, 1].
    """

    logits: float | None
    margin: float | None
    reason: str = ""


@dataclass(frozen=True)
class WeightBounds:
    """Per norm of the perturbation: `layers`, the product of layer norms, and `paths`, the norm of the
    product of absolute weights, both sound up to rounding; `lemma`, the norm of the product of weights,
    which is no bound.
    """

    layers: dict[Norm, Bound]
    paths: dict[Norm, Bound]
    lemma: dict[Norm, Bound]


def weight_bounds(model: onnx.ModelProto) -> WeightBounds:
    """The bounds for a classifier with one input of images (B, C, H, W) and logits (B, K) as first output.

    An operator that has no rule is named in the `reason` of the bounds that it leaves out.

    Raises:
        ModelError: the model cannot be run.
    """
    graph = Graph(model)
    norms: tuple[Norm, ...] = ("l2", "linf")
    layers = {norm: _attempt(lambda norm=norm: _layers(graph, norm)) for norm in norms}  # type: ignore[misc]
    return WeightBounds(layers, _paths(graph, absolute=True), _paths(graph, absolute=False))


def convolution_norm(weight: Array, geometry: Window, group: int = 1) -> float:
    """An upper bound of the l2 norm of a zero-padded convolution, weight (outputs, inputs / group, *kernel).

    It is the exact norm of the convolution on a torus just large enough that no window reaches around it
    into another pixel. The zero-padded one is a part of that: pixels of the padding are held at 0 and some
    outputs are left out, neither of which lengthens anything. Strides sort the input's pixels by their
    position modulo the stride into channels of their own. On the torus the Fourier transform makes one
    matrix of each frequency, and the largest of their norms is the norm.
    """
    outputs = weight.shape[0] // group
    offsets = np.array(
        [
            [d * t for d, t in zip(geometry.dilations, tap, strict=True)]
            for tap in np.ndindex(weight.shape[2:])
        ]
    )
    steps = np.array(geometry.strides)
    shifts, phases = offsets // steps, offsets % steps
    size = []
    for axis, pixels in enumerate(geometry.input):
        stride, begin = geometry.strides[axis], geometry.begin[axis]
        end = stride * (geometry.output[axis] - 1) + geometry.span[axis] + 1 - begin - pixels
        size.append(ceil((pixels + max(begin, end, 0)) / stride) if shifts[:, axis].any() else 1)
    taps = weight.astype(np.float64).reshape(group, outputs, weight.shape[1], len(offsets))
    return max(_torus_norm(part, shifts, phases, size) for part in taps)


def _torus_norm(taps: Array, shifts: NDArray[Any], phases: NDArray[Any], size: list[int]) -> float:
    """The largest norm of sum_t taps[:, :, t] exp(i <frequency, shift_t>) over all frequencies of the torus,
    with the taps of each phase on input channels of their own.
    """
    outputs, inputs, _ = taps.shape
    kinds = [np.flatnonzero((phases == phase).all(1)) for phase in np.unique(phases, axis=0)]
    halves = [*size[:-1], size[-1] // 2 + 1]  # the others are their conjugates
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in halves), indexing="ij"), -1).reshape(-1, len(size))
    angles = 2 * np.pi * (grid / np.array(size)) @ shifts.T
    largest = 0.0
    per_frequency = outputs * inputs * len(kinds) + min(outputs, inputs * len(kinds)) ** 2
    step = max(1, _CHUNK // per_frequency)
    for start in range(0, len(angles), step):
        waves = np.exp(1j * angles[start : start + step])
        parts = [np.einsum("ft,oit->foi", waves[:, kind], taps[:, :, kind], optimize=True) for kind in kinds]
        matrix = np.concatenate(parts, -1)
        other = matrix.conj().swapaxes(1, 2)
        gram = matrix @ other if outputs <= matrix.shape[2] else other @ matrix
        largest = max(largest, float(np.linalg.eigvalsh(gram).max()))
    return sqrt(max(largest, 0.0))


def _attempt(compute: Callable[[], Bound]) -> Bound:
    try:
        return compute()
    except GuardError as error:
        return Bound(None, None, str(error))


class _NoRuleError(UnsupportedOperatorError):
    """Its text is the operator's name."""


def _walk(graph: Graph) -> Iterator[tuple[NodeProto, list[str]]]:
    """The nodes between images and logits, in order, each with those of its inputs that depend on images."""
    reached = depending(graph.nodes, graph.inputs, SHAPE_READERS)
    wanted = {graph.outputs[0]}
    for node in reversed(graph.nodes):
        if wanted.intersection(node.output):
            wanted.update(name for name in node.input if name)
    for node in graph.nodes:
        dynamic = [name for name in node.input if name in reached and not graph.is_constant(name)]
        if dynamic and wanted.intersection(node.output) and reached.intersection(node.output):
            yield node, dynamic


# --- the product of layer norms ---


def _layers(graph: Graph, norm: Norm) -> Bound:
    """Every tensor's slope as a function of the image, from those of what it is computed from."""
    slopes = dict.fromkeys(graph.inputs, 1.0)
    for node, dynamic in _walk(graph):
        slopes[node.output[0]] = _slope(graph, node, [slopes[name] for name in dynamic], norm)
    last, before = _head(graph)
    if last is None:
        slope = slopes[graph.outputs[0]]
        return _finite(slope, (sqrt(2) if norm == "l2" else 2.0) * slope)
    order, last = 2 if norm == "l2" else 1, last.astype(np.float64)
    apart = max(
        (float(np.linalg.norm(last[i + 1 :] - row, order, axis=1).max()) for i, row in enumerate(last[:-1])),
        default=0.0,
    )
    rows = float(np.linalg.norm(last, order, axis=1).max())
    return _finite(rows * slopes[before], apart * slopes[before])


def _head(graph: Graph) -> tuple[Array | None, str]:
    """The matrix (K, features) of a last linear layer and the tensor it is applied to, if there is one."""
    name = graph.outputs[0]
    while (node := graph.producer(name)) is not None:
        if node.op_type in ("Gemm", "MatMul"):
            matrix = _matrix(graph, node)
            return (matrix, node.input[0]) if graph.rank(node.input[0]) == 2 else (None, "")
        moves = [x for x in node.input if x and not graph.is_constant(x)]
        if node.op_type not in ("Add", "Identity") or len(moves) != 1:
            break
        name = moves[0]
    return None, ""


def _slope(graph: Graph, node: NodeProto, before: list[float], norm: Norm) -> float:
    if node.op_type in _SLOPES and len(before) == 1:
        return _activation_slope(node) * before[0]
    if node.op_type in _MOVES or _is_cast(node):
        _refuse_unless(node, node.op_type != "Dropout" or len(node.input) < 3)
        return before[0]
    if node.op_type in ("Add", "Sub", "Sum"):
        _refuse_unless(node, _keeps_shape(graph, node))
        return sum(before)
    if node.op_type == "Concat":
        _refuse_unless(node, len(before) == len(node.input))
        return sqrt(sum(slope**2 for slope in before)) if norm == "l2" else max(before)
    return _layer_norm(graph, node, norm) * before[0]


def _layer_norm(graph: Graph, node: NodeProto, norm: Norm) -> float:
    """The norm of one layer, or for l2 an upper bound of it."""
    if node.op_type in ("Gemm", "MatMul"):
        matrix = _matrix(graph, node).astype(np.float64)
        return float(np.linalg.norm(matrix, 2 if norm == "l2" else inf))
    if node.op_type == "Conv":
        weight = graph.constant_of(node, 1)
        if norm == "linf":
            return float(np.abs(weight).sum(tuple(range(1, weight.ndim)), dtype=np.float64).max())
        return convolution_norm(weight, _geometry(graph, node), attributes(node).get("group", 1))
    if node.op_type in ("Mul", "Div", "BatchNormalization"):
        return float(np.abs(_factor(graph, node)).max())
    if node.op_type == "Pad":
        _refuse_unless(node, _pads_with_zeros(graph, node))
        return 1.0
    if node.op_type == "MaxPool":
        return _overlap(_geometry(graph, node)) if norm == "l2" else 1.0
    if node.op_type == "AveragePool":
        _refuse_unless(node, _plain_average(node))
        geometry = _geometry(graph, node)
        return _overlap(geometry) / sqrt(prod(geometry.kernel)) if norm == "l2" else 1.0
    if node.op_type == "GlobalMaxPool":
        return 1.0
    if node.op_type in ("GlobalAveragePool", "ReduceMean"):
        return 1 / sqrt(_averaged(graph, node)) if norm == "l2" else 1.0
    raise _NoRuleError(node.op_type)


def _overlap(geometry: Window) -> float:
    """The root of how many windows a pixel can be in: squares of window entries are counted so often."""
    return sqrt(prod(ceil(k / s) for k, s in zip(geometry.kernel, geometry.strides, strict=True)))


# --- the product of weights, signed or absolute ---


@dataclass
class _Linear:
    """A network under construction that has the same weights, or their absolute values, and nothing else."""

    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)

    def constant(self, value: Array) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights[name] = np.ascontiguousarray(value)
        return name

    def add(self, op_type: str, inputs: list[str], node: NodeProto, **given: Any) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, [node.output[0]], **given))


def _paths(graph: Graph, *, absolute: bool) -> dict[Norm, Bound]:
    """The linearized network at unit vectors, and at the image of ones.

    With absolute weights its value at a unit vector bounds what any input can make of the derivative with
    respect to that pixel, and its value at ones the sum of those. Max pooling stays as it is: the derivative
    of a maximum is that of one of its arguments.
    """
    try:
        session = _linearized(graph, absolute=absolute)
        shape = graph.static_shape(graph.inputs[0], 1)
        bounds: dict[Norm, Bound] = {}
        if absolute:
            bounds["linf"] = _at_ones(graph, session, shape)
        if prod(shape) > MOST_INPUTS:
            reason = f"{prod(shape)} pixels, more than {MOST_INPUTS}"
            return {"l2": Bound(None, None, reason), "linf": bounds.get("linf", Bound(None, None, reason))}
        jacobian = _at_unit_vectors(session, shape)
        if not np.isfinite(jacobian).all():
            return {"l2": _finite(inf, inf), "linf": bounds.get("linf", _finite(inf, inf))}
        if absolute:
            # || |a| + |b| ||: what the difference of two rows can come to, given their entries' bounds
            gram = jacobian @ jacobian.T
            lengths = np.diag(gram)
            sums = lengths[:, np.newaxis] + lengths + 2 * gram
            np.fill_diagonal(sums, 0)
            bounds["l2"] = _finite(float(np.sqrt(lengths.max())), float(np.sqrt(sums.max())))
            return bounds
        for norm, order in (("l2", 2), ("linf", 1)):
            apart = [np.linalg.norm(jacobian[i + 1 :] - row, order, axis=1) for i, row in enumerate(jacobian)]
            bounds["l2" if norm == "l2" else "linf"] = _finite(
                float(np.linalg.norm(jacobian, order, axis=1).max()),
                max((float(part.max()) for part in apart if part.size), default=0.0),
            )
    except GuardError as error:
        reason = str(error)
        return {"l2": Bound(None, None, reason), "linf": Bound(None, None, reason)}
    return bounds


def _at_ones(graph: Graph, session: onnxruntime.InferenceSession, shape: tuple[int, ...]) -> Bound:
    logits, features = session.run(None, {graph.inputs[0]: np.ones((1, *shape), np.float32)})
    if not (np.isfinite(logits).all() and np.isfinite(features).all()):
        return _finite(inf, inf)
    last, _ = _head(graph)
    rows = np.sort(logits[0].astype(np.float64))
    if last is None:
        return _finite(float(rows[-1]), float(rows[-2:].sum()))
    weighted = last.astype(np.float64) * features[0]
    apart = [np.abs(weighted[i + 1 :] - row).sum(1).max() for i, row in enumerate(weighted[:-1])]
    return _finite(float(rows[-1]), float(max(apart, default=0.0)))


def _at_unit_vectors(session: onnxruntime.InferenceSession, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """(K, pixels): the network's values at all unit vectors; biases are left out."""
    count = prod(shape)
    name = session.get_inputs()[0].name
    rows = []
    with Progress(count, "linearized network") as progress:
        for start in range(0, count, _BATCH):
            part = np.arange(start, min(start + _BATCH, count))
            units = np.zeros((len(part), count), np.float32)
            units[np.arange(len(part)), part] = 1
            rows.append(session.run(None, {name: units.reshape(-1, *shape)})[0])
            progress.advance(len(part))
    return np.concatenate(rows).T.astype(np.float64)


def _linearized(graph: Graph, *, absolute: bool) -> onnxruntime.InferenceSession:
    """Outputs: the logits, and what the last linear layer is applied to."""
    linear = _Linear()
    for node, dynamic in _walk(graph):
        _linearize(graph, node, dynamic, linear, absolute=absolute)
    logits = graph.outputs[0]
    features = _head(graph)[1] or logits
    if features == logits:
        linear.nodes.append(helper.make_node("Identity", [logits], ["features"]))
        features = "features"
    model = helper.make_model(
        helper.make_graph(
            linear.nodes,
            "linearized",
            [
                helper.make_tensor_value_info(
                    graph.inputs[0], TensorProto.FLOAT, ["batch", *graph.static_shape(graph.inputs[0], 1)]
                )
            ],
            [onnx.ValueInfoProto(name=name) for name in (logits, features)],
            [numpy_helper.from_array(value, name) for name, value in linear.weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", graph.opset)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _linearize(graph: Graph, node: NodeProto, dynamic: list[str], linear: _Linear, *, absolute: bool) -> None:
    def weight(value: Array) -> str:
        return linear.constant(np.abs(value) if absolute else value)

    given = attributes(node)
    if node.op_type in _SLOPES and len(dynamic) == 1:
        # the lemma leaves activations out, whatever their slope
        slope = np.float32(_activation_slope(node) if absolute else 1)
        linear.add("Mul", [dynamic[0], linear.constant(np.asarray(slope))], node)
    elif node.op_type in ("Gemm", "MatMul"):
        matrix = weight(_matrix(graph, node).T)
        linear.add("MatMul", [dynamic[0], matrix], node)
    elif node.op_type == "Conv":
        linear.add("Conv", [dynamic[0], weight(graph.constant_of(node, 1))], node, **given)
    elif node.op_type in ("Mul", "Div", "BatchNormalization"):
        linear.add("Mul", [dynamic[0], weight(_factor(graph, node))], node)
    elif node.op_type in ("Add", "Sub", "Sum"):
        _refuse_unless(node, _keeps_shape(graph, node))
        _add_terms(node, dynamic, linear, absolute=absolute)
    elif node.op_type in ("MaxPool", "GlobalMaxPool"):
        _refuse_unless(node, absolute)  # LIP: not captured by the lemma
        linear.add(node.op_type, dynamic, node, **given)
    elif node.op_type == "Pad":
        _refuse_unless(node, _pads_with_zeros(graph, node))
        others = [linear.constant(value) for value in _constants(graph, node)]
        linear.add("Pad", [dynamic[0], others[0]], node)
    elif node.op_type == "AveragePool":
        _refuse_unless(node, _plain_average(node))
        linear.add(node.op_type, dynamic, node, **given)
    elif node.op_type == "Reshape":
        # its target may be computed from the batch size
        _refuse_unless(node, graph.shape(node.output[0])[:1] == (None,))
        target = np.array([-1, *graph.static_shape(node.output[0], 1)])
        linear.add("Reshape", [dynamic[0], linear.constant(target)], node)
    elif node.op_type == "Dropout":
        _refuse_unless(node, len(node.input) < 3)
        linear.add("Identity", dynamic, node)
    elif (
        node.op_type in _MOVES
        or node.op_type in ("Concat", "GlobalAveragePool", "ReduceMean")
        or _is_cast(node)
    ):
        others = [linear.constant(value) for value in _constants(graph, node)]
        _refuse_unless(node, node.op_type != "Concat" or not others)
        linear.add(node.op_type, [*dynamic, *others], node, **given)
    else:
        raise _NoRuleError(node.op_type)


def _add_terms(node: NodeProto, dynamic: list[str], linear: _Linear, *, absolute: bool) -> None:
    """A sum without its constants, or a difference, which for absolute weights is a sum."""
    if len(dynamic) > 1:
        linear.add("Add" if absolute and node.op_type == "Sub" else node.op_type, dynamic, node)
    else:
        negative = node.op_type == "Sub" and node.input[0] != dynamic[0] and not absolute
        linear.add("Neg" if negative else "Identity", dynamic, node)


# --- reading a node ---


def _matrix(graph: Graph, node: NodeProto) -> Array:
    """The matrix (outputs, inputs) that a Gemm or MatMul applies to the rows of its first input."""
    given = attributes(node)
    _refuse_unless(node, not graph.is_constant(node.input[0]) and not given.get("transA"))
    matrix = graph.value(node.input[1])
    _refuse_unless(node, matrix is not None)
    if matrix is None or matrix.ndim != 2:
        raise _NoRuleError(node.op_type)
    if node.op_type == "MatMul":
        return matrix.T
    if len(node.input) > 2 and node.input[2]:
        _refuse_unless(node, graph.is_constant(node.input[2]))
    return (matrix if given.get("transB") else matrix.T) * np.float32(given.get("alpha", 1.0))


def _factor(graph: Graph, node: NodeProto) -> Array:
    """What an entry-wise product multiplies its one argument by, ready to be broadcast."""
    if node.op_type == "BatchNormalization":
        _refuse_unless(node, not attributes(node).get("training_mode"))
        scale, _, _, variance = (graph.constant_of(node, position) for position in range(1, 5))
        factor = scale / np.sqrt(variance + np.float32(attributes(node).get("epsilon", 1e-5)))
        return factor.reshape(-1, *[1] * (graph.rank(node.input[0]) - 2))
    constants = _constants(graph, node)
    _refuse_unless(node, len(constants) == 1 and _keeps_shape(graph, node))
    _refuse_unless(node, node.op_type == "Mul" or not graph.is_constant(node.input[0]))
    return constants[0] if node.op_type == "Mul" else 1 / constants[0]


def _activation_slope(node: NodeProto) -> float:
    alpha = attributes(node).get("alpha")
    if alpha is None or node.op_type == "Softplus":
        return _SLOPES[node.op_type]
    return abs(float(alpha)) if node.op_type == "HardSigmoid" else max(1.0, abs(float(alpha)))


def _keeps_shape(graph: Graph, node: NodeProto) -> bool:
    """Whether no input that depends on the images is broadcast: that would lengthen it."""
    shapes = [graph.shape(name) for name in node.input if not graph.is_constant(name)]
    return all(shape == graph.shape(node.output[0]) for shape in shapes)


def _constants(graph: Graph, node: NodeProto) -> list[Array]:
    values = [graph.value(name) for name in node.input if name]
    return [value for value in values if value is not None]


def _geometry(graph: Graph, node: NodeProto) -> Window:
    given = attributes(node)
    size, output = graph.static_shape(node.input[0], 2), graph.static_shape(node.output[0], 2)
    kernel = graph.constant_of(node, 1).shape[2:] if node.op_type == "Conv" else given["kernel_shape"]
    geometry = window(given, kernel, size, output)
    _refuse_unless(node, node.op_type == "Conv" or set(geometry.dilations) == {1})
    return geometry


def _plain_average(node: NodeProto) -> bool:
    """Whether every window's mean is over as many pixels as the kernel has."""
    given = attributes(node)
    padded = any(given.get("pads") or ()) or given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return not given.get("ceil_mode") and (not padded or bool(given.get("count_include_pad")))


def _averaged(graph: Graph, node: NodeProto) -> int:
    """How many entries of an image one mean is over."""
    _refuse_unless(node, graph.shape(node.output[0])[:1] == graph.shape(node.input[0])[:1])
    shapes = [graph.static_shape(name, 1) for name in (node.input[0], node.output[0])]
    return prod(shapes[0]) // prod(shapes[1])


def _pads_with_zeros(graph: Graph, node: NodeProto) -> bool:
    mode = attributes(node).get("mode", "constant")
    pads = graph.value(node.input[1])
    return mode == "constant" and len(node.input) < 4 and pads is not None and bool((pads >= 0).all())


def _is_cast(node: NodeProto) -> bool:
    return node.op_type == "Cast" and attributes(node)["to"] == TensorProto.FLOAT


def _refuse_unless(node: NodeProto, holds: bool) -> None:
    if not holds:
        raise _NoRuleError(node.op_type)


def _finite(logits: float, margin: float) -> Bound:
    if isfinite(logits) and isfinite(margin):
        return Bound(logits, margin)
    return Bound(None, None, "larger than a number holds")
