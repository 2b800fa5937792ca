"""Elementwise operators, with broadcasting.

The derivative of an activation is computed once from the forward pass and shared by all rows; each row then
costs one multiplication. At kinks the derivative is the one torch takes: ReLU at 0 and Clip at its bounds: 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import NodeProto, helper

from guard.errors import ModelError
from guard.graph import Graph, Tensor, attributes, describe
from guard.operators.broadcast import sum_to
from guard.operators.registry import Cotangents, data_rule, only_first, rule

Derivative = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]

MASK_SLOPE = 3e38  # takes the smallest normal float32 above 1


def relu_mask(graph: Graph, output: str) -> str:
    """1 where the output of a ReLU is positive, else 0, as floats."""
    return graph.op("HardSigmoid", output, alpha=MASK_SLOPE, beta=0.0)


def derivative(*op_types: str, domain: str = "") -> Callable[[Derivative], Derivative]:
    """Registers y = f(x) by f'(x), written as a function of x, y and the attributes."""

    def register(function: Derivative) -> Derivative:
        @data_rule(*op_types, domain=domain)
        def apply(graph: Graph, node: NodeProto, cotangent: str) -> str:
            x, y = graph.tensor(node.input[0]), graph.tensor(node.output[0])
            slope = graph.once(("slope", y.name), lambda: function(x, y, attributes(node)).name)
            return graph.op("Mul", cotangent, slope)

        return function

    return register


@data_rule("Relu")
def relu(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent where the output is positive."""
    output = node.output[0]
    return graph.op("Mul", cotangent, graph.once(("slope", output), lambda: relu_mask(graph, output)))


@data_rule("Identity", "Dropout")
def identity(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent itself."""
    training = graph.optional_constant(node, 2) if node.op_type == "Dropout" else None
    if training is not None and bool(training):
        raise ModelError(f"{describe(node)} is in training mode; export the model in evaluation mode.")
    return cotangent


@data_rule("Cast")
def cast(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent, cast back."""
    kind = graph.dtype(node.input[0])
    return graph.op("Cast", cotangent, to=helper.np_dtype_to_tensor_dtype(kind))


@rule("Add", "Sum")
def add(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangent, for each term."""
    cotangent = only_first(node, cotangents)
    return [_summed(graph, node, x, cotangent) for x in node.input]


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
    return [
        _summed(graph, node, x, graph.op("Mul", cotangent, other)) if graph.needs(x) else None
        for x, other in ((a, b), (b, a))
    ]


@rule("Div")
def div(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """d(a/b) = da / b - (a/b) db / b"""
    a, b = node.input
    quotient = graph.op("Div", only_first(node, cotangents), b)
    result: Cotangents = [_summed(graph, node, a, quotient), None]
    if graph.needs(b):
        y = graph.tensor(node.output[0])
        result[1] = _summed(graph, node, b, (-(graph.tensor(quotient) * y)).name)
    return result


def _summed(graph: Graph, node: NodeProto, x: str, cotangent: str) -> str | None:
    """The cotangent of an operand that the node may have broadcast; None if not wanted."""
    return sum_to(graph, cotangent, node.output[0], x) if graph.needs(x) else None
