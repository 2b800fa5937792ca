"""Elementwise operators, with broadcasting.

The derivative of an activation is computed once from the forward pass and shared by all rows; each row then
costs one multiplication. At a kink the derivative is the one torch takes: that of ReLU at 0 and of ReLU6 at
its bounds is 0; operands that tie in Max or Min share the cotangent evenly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import pi, sqrt
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from guard.errors import ModelError
from guard.graph import Graph, Tensor, attributes, describe
from guard.operators.broadcast import sum_to, zeros_like
from guard.operators.registry import Cotangents, data_rule, only_first, rule

MASK_SLOPE = 3e38  # takes the smallest normal float32 above 1

SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875  # ONNX's defaults


def relu_mask(graph: Graph, output: str) -> str:
    """1 where the output of a ReLU is positive, else 0, as floats."""
    return graph.op("HardSigmoid", output, alpha=MASK_SLOPE, beta=0.0)


@data_rule("Relu")
def relu(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent where the output is positive."""
    output = node.output[0]
    return graph.op("Mul", cotangent, graph.once(("slope", output), lambda: relu_mask(graph, output)))


@dataclass(frozen=True)
class Activation:
    """A node y = f(x) with its attributes."""

    x: Tensor
    y: Tensor
    attributes: dict[str, Any]

    def number(self, name: str, default: float) -> float:
        """An attribute, or its default."""
        return float(self.attributes.get(name, default))

    def where(self, condition: Tensor, true: Tensor | float, false: Tensor | float) -> Tensor:
        """`true` where the condition holds, else `false`."""
        return condition.where(*(t if isinstance(t, Tensor) else self._scalar(t) for t in (true, false)))

    def indicator(self, condition: Tensor) -> Tensor:
        """1 where the condition holds, else 0."""
        return condition.like(self.x.name)

    def _scalar(self, value: float) -> Tensor:
        return Tensor(self.x.graph, self.x.graph.scalar(value, self.x.name))


Derivative = Callable[[Activation], Tensor]


def derivative(op_type: str, domain: str = "") -> Callable[[Derivative], Derivative]:
    """Registers an operator y = f(x) by f'(x), written in terms of x, y and the node's attributes."""

    def register(function: Derivative) -> Derivative:
        @data_rule(op_type, domain=domain)
        def apply(graph: Graph, node: NodeProto, cotangent: str) -> str:
            x, y = graph.tensor(node.input[0]), graph.tensor(node.output[0])
            slope = graph.once(("slope", y.name), lambda: function(Activation(x, y, attributes(node))).name)
            return graph.op("Mul", cotangent, slope)

        return function

    return register


_DERIVATIVES: dict[str, Derivative] = {
    "Abs": lambda at: at.x.apply("Sign"),
    "Acos": lambda at: -1.0 / (1.0 - at.x * at.x).apply("Sqrt"),
    "Acosh": lambda at: 1.0 / (at.x * at.x - 1.0).apply("Sqrt"),
    "Asin": lambda at: 1.0 / (1.0 - at.x * at.x).apply("Sqrt"),
    "Asinh": lambda at: 1.0 / (at.x * at.x + 1.0).apply("Sqrt"),
    "Atan": lambda at: 1.0 / (at.x * at.x + 1.0),
    "Atanh": lambda at: 1.0 / (1.0 - at.x * at.x),
    "Celu": lambda at: at.where(at.x > 0.0, 1.0, at.y * (1 / at.number("alpha", 1.0)) + 1.0),
    "Cos": lambda at: -at.x.apply("Sin"),
    "Cosh": lambda at: at.x.apply("Sinh"),
    "Elu": lambda at: at.where(at.x > 0.0, 1.0, at.y + at.number("alpha", 1.0)),
    "Erf": lambda at: (-(at.x * at.x)).apply("Exp") * (2 / sqrt(pi)),
    "Exp": lambda at: at.y,
    "HardSigmoid": lambda at: at.indicator((at.y > 0.0) & (at.y < 1.0)) * at.number("alpha", 0.2),
    "LeakyRelu": lambda at: at.where(at.x > 0.0, 1.0, at.number("alpha", 0.01)),
    "Log": lambda at: 1.0 / at.x,
    "Reciprocal": lambda at: -(at.y * at.y),
    "Shrink": lambda at: at.indicator(at.x.apply("Abs") > at.number("lambd", 0.5)),
    "Sigmoid": lambda at: at.y * (1.0 - at.y),
    "Sin": lambda at: at.x.apply("Cos"),
    "Sinh": lambda at: at.x.apply("Cosh"),
    "Softplus": lambda at: at.x.apply("Sigmoid"),
    "Softsign": lambda at: (1.0 + at.x.apply("Abs")) ** -2.0,
    "Sqrt": lambda at: 0.5 / at.y,
    "Tan": lambda at: at.y * at.y + 1.0,
    "Tanh": lambda at: 1.0 - at.y * at.y,
    "ThresholdedRelu": lambda at: at.indicator(at.x > at.number("alpha", 1.0)),
}
for _op_type, _function in _DERIVATIVES.items():
    derivative(_op_type)(_function)


@derivative("Selu")
def selu(at: Activation) -> Tensor:
    """Gamma above 0, y + gamma alpha below."""
    alpha, gamma = at.number("alpha", SELU_ALPHA), at.number("gamma", SELU_GAMMA)
    return at.where(at.x > 0.0, gamma, at.y + gamma * alpha)


@derivative("HardSwish")
def hard_swish(at: Activation) -> Tensor:
    """For x h, h = HardSigmoid(x; 1/6, 1/2): h + x / 6 where |x| < 3."""
    inside = at.indicator(at.x.apply("Abs") < 3.0)
    return at.x.apply("HardSigmoid", alpha=1 / 6, beta=0.5) + at.x * inside * (1 / 6)


@derivative("Mish")
def mish(at: Activation) -> Tensor:
    """For x t, t = tanh(softplus(x)): t + x (1 - t^2) sigmoid(x)."""
    t = at.x.apply("Softplus").apply("Tanh")
    return t + at.x * (1.0 - t * t) * at.x.apply("Sigmoid")


@derivative("Swish")
def swish(at: Activation) -> Tensor:
    """For x s, s = sigmoid(alpha x): s + alpha y (1 - s)."""
    return _swish(at, at.number("alpha", 1.0))


@derivative("QuickGelu", domain="com.microsoft")
def quick_gelu(at: Activation) -> Tensor:
    """A Swish with alpha = 1.702."""
    return _swish(at, at.number("alpha", 1.702))


def _swish(at: Activation, alpha: float) -> Tensor:
    s = (at.x * alpha).apply("Sigmoid")
    return s + at.y * (1.0 - s) * alpha


@derivative("Gelu")
@derivative("Gelu", domain="com.microsoft")
def gelu(at: Activation) -> Tensor:
    """Phi(x) + x phi(x); the tanh approximation by its own derivative."""
    x = at.x
    if at.attributes.get("approximate", "none") == "tanh":
        a, b = sqrt(2 / pi), sqrt(2 / pi) * 0.044715
        square = x * x
        t = (x * (square * b + a)).apply("Tanh")
        return (t + 1.0) * 0.5 + x * (1.0 - t * t) * (square * (3 * b) + a) * 0.5
    cumulative = (x * sqrt(0.5)).apply("Erf") * 0.5 + 0.5
    return cumulative + x * (x * x * -0.5).apply("Exp") * (1 / sqrt(2 * pi))


@data_rule("Clip")
def clip(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent strictly between the bounds."""
    y = graph.tensor(node.output[0])
    low, high = (_bound(graph, node, position) for position in (1, 2))

    def inside() -> str:
        # the product of the distances to the bounds is 0 at them and positive between
        distances = [y if value == 0 else y - graph.tensor(name) for name, value in low]
        distances += [graph.tensor(name) - y for name, _ in high]
        return relu_mask(graph, reduce(operator.mul, distances).name)

    if not low and not high:
        return cotangent
    return graph.op("Mul", cotangent, graph.once(("slope", y.name), inside))


def _bound(graph: Graph, node: NodeProto, position: int) -> list[tuple[str, float | None]]:
    """A bound of Clip: its name, and its value where that is constant; nothing if absent or infinite."""
    name = ([*node.input, "", ""])[position]
    value = graph.optional_constant(node, position) if name and graph.is_constant(name) else None
    if not name or (value is not None and np.isinf(value).all()):
        return []
    return [(name, None if value is None else float(value.reshape(())))]


@data_rule("PRelu")
def prelu(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent above 0, times the parameter below."""
    x, slope = (graph.tensor(name) for name in node.input)
    one = Tensor(graph, graph.scalar(1.0, x.name))
    factor = graph.once(("slope", node.output[0]), lambda: (x > 0.0).where(one, slope).name)
    return graph.op("Mul", cotangent, factor)


@data_rule("Identity", "Dropout")
def identity(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent itself: in evaluation mode Dropout does nothing."""
    training = graph.optional_constant(node, 2) if node.op_type == "Dropout" else None
    if training is not None and bool(training):
        raise ModelError(f"{describe(node)} is in training mode; export the model in evaluation mode.")
    return cotangent


@rule("Neg")
def neg(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The negative."""
    return [graph.op("Neg", only_first(node, cotangents))]


@rule("Cast", "CastLike")
def cast(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangent, cast back; none for integers and Booleans."""
    kind = graph.dtype(node.input[0])
    if kind.kind in "biu":
        return [None]
    return [graph.op("Cast", only_first(node, cotangents), to=helper.np_dtype_to_tensor_dtype(kind))]


@rule("Add", "Sum")
def add(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangent, for each term."""
    cotangent = only_first(node, cotangents)
    return [_summed(graph, node, x, cotangent) for x in node.input]


@rule("Mean")
def mean(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangent over the number of terms."""
    share = graph.tensor(only_first(node, cotangents)) * (1 / len(node.input))
    return [_summed(graph, node, x, share.name) for x in node.input]


@rule("Sub")
def sub(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangent and its negative."""
    a, b = node.input
    cotangent = only_first(node, cotangents)
    negated = graph.op("Neg", cotangent) if graph.needs(b) else cotangent
    return [_summed(graph, node, a, cotangent), _summed(graph, node, b, negated)]


@rule("Mul")
def mul(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangent times the other factor."""
    cotangent = only_first(node, cotangents)
    a, b = node.input
    for x, gate in ((a, b), (b, a)):
        if _is_sigmoid_of(graph, gate, x):
            gradient = graph.op("Mul", cotangent, _silu_slope(graph, gate, node.output[0]))
            return [gradient, None] if x == a else [None, gradient]
    return [
        _summed(graph, node, x, graph.op("Mul", cotangent, other)) if graph.needs(x) else None
        for x, other in ((a, b), (b, a))
    ]


def _is_sigmoid_of(graph: Graph, gate: str, x: str) -> bool:
    node = graph.producer(gate)
    return node is not None and node.op_type == "Sigmoid" and node.input[0] == x


def _silu_slope(graph: Graph, gate: str, output: str) -> str:
    """The derivative of y = x s, s = sigmoid(x), as SiLU is exported: s + y (1 - s), shared by all rows."""
    s, y = graph.tensor(gate), graph.tensor(output)
    return graph.once(("slope", output), lambda: (s + y * (1.0 - s)).name)


@rule("Div")
def div(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """With y = a / b: v / b and -v y / b."""
    a, b = node.input
    quotient = graph.op("Div", only_first(node, cotangents), b)
    result: Cotangents = [_summed(graph, node, a, quotient), None]
    if graph.needs(b):
        y = graph.tensor(node.output[0])
        result[1] = _summed(graph, node, b, (-(graph.tensor(quotient) * y)).name)
    return result


@rule("Pow")
def power(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """With y = a^b: v b a^(b-1) (0 where b is 0) and v y log a (0 where a is 0), as in torch."""
    cotangent = graph.tensor(only_first(node, cotangents))
    a, b, y = (graph.tensor(name) for name in (*node.input, node.output[0]))
    result: Cotangents = [None, None]
    if graph.needs(a.name):
        exponent = graph.value(b.name)

        def slope() -> str:
            if exponent is not None and exponent.size == 1:
                e = float(exponent.reshape(()))
                return zeros_like(graph, a.name) if e == 0 else (a * 2.0 if e == 2 else a ** (e - 1) * e).name
            like_a = b.like(a.name)
            zero = Tensor(graph, graph.scalar(0.0, a.name))
            return like_a.equals(0.0).where(zero, like_a * a ** (like_a - 1.0)).name

        factor = graph.tensor(graph.once(("slope", y.name), slope))
        result[0] = _summed(graph, node, a.name, (cotangent * factor).name)
    if graph.needs(b.name):

        def growth() -> str:
            zero = Tensor(graph, graph.scalar(0.0, a.name))
            return a.equals(0.0).where(zero, y * a.apply("Log")).name

        factor = graph.tensor(graph.once(("growth", y.name), growth))
        result[1] = _summed(graph, node, b.name, (cotangent * factor).name)
    return result


@rule("Max", "Min")
def extremum(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """Operands that tie for the extremum share the cotangent evenly."""
    if len(node.input) == 1:
        return list(cotangents)
    cotangent, y = only_first(node, cotangents), graph.tensor(node.output[0])

    def shares() -> list[str]:
        ties = [graph.tensor(x).equals(y).like(y.name) for x in node.input]
        total = reduce(lambda a, b: a + b, ties)
        return [(tie / total).name for tie in ties]

    each = graph.once(("shares", y.name), shares)
    return [
        _summed(graph, node, x, graph.op("Mul", cotangent, share)) if graph.needs(x) else None
        for x, share in zip(node.input, each, strict=True)
    ]


@rule("Where")
def where(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangent where the branch was taken."""
    cotangent = only_first(node, cotangents)
    condition, a, b = node.input
    zero = graph.scalar(0.0, cotangent)
    from_a = graph.op("Where", condition, cotangent, zero) if graph.needs(a) else zero
    from_b = graph.op("Where", condition, zero, cotangent) if graph.needs(b) else zero
    return [None, _summed(graph, node, a, from_a), _summed(graph, node, b, from_b)]


def _summed(graph: Graph, node: NodeProto, x: str, cotangent: str) -> str | None:
    """The cotangent of an operand that the node may have broadcast; None if not wanted."""
    return sum_to(graph, cotangent, node.output[0], x) if graph.needs(x) else None
