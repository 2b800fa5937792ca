"""The table of differentiation rules: one function per operator."""

from __future__ import annotations

from collections.abc import Callable

from onnx import NodeProto, TensorProto

from guard.errors import ModelError, UnsupportedOperatorError
from guard.graph import Graph, attributes, describe

Cotangents = list[str | None]
Rule = Callable[[Graph, NodeProto, Cotangents], Cotangents]
DataRule = Callable[[Graph, NodeProto, str], str]

RULES: dict[str, Rule] = {}

# Their outputs are integers, Booleans, or constant between jumps: no gradient passes.
# fmt: off
WITHOUT_GRADIENT = frozenset({
    "And", "ArgMax", "ArgMin", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Ceil",
    "ConstantOfShape", "Equal", "EyeLike", "Floor", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less",
    "LessOrEqual", "NonZero", "Not", "OneHot", "Or", "RandomNormalLike", "RandomUniformLike", "Range",
    "Round", "Shape", "Sign", "Size", "Xor",
})
# fmt: on
_FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}


def rule(*op_types: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Registers a rule: given the cotangents of a node's outputs (None: zero), append the nodes that compute
    those of its inputs (None: no gradient, or none needed). A cotangent has the shape of its tensor.
    """

    def register(function: Rule) -> Rule:
        RULES.update({_key(op_type, domain): function for op_type in op_types})
        return function

    return register


def data_rule(*op_types: str, domain: str = "") -> Callable[[DataRule], DataRule]:
    """Registers the rule of an operator y = f(x, parameters...): given the cotangent of its first output,
    append the nodes that compute that of its first input. Parameters computed from the images are refused.
    """

    def register(function: DataRule) -> DataRule:
        def apply(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
            for position, name in enumerate(node.input[1:], start=1):
                if graph.needs(name):
                    raise ModelError(
                        f"Input {position} ({name!r}) of {describe(node)} is computed from the images; "
                        "this operator is differentiated with respect to its first input only."
                    )
            return [function(graph, node, only_first(node, cotangents))]

        rule(*op_types, domain=domain)(apply)
        return function

    return register


def only_first(node: NodeProto, cotangents: Cotangents) -> str:
    """The cotangent of a node's first output, where the others must not reach the logits."""
    if cotangents[0] is None or any(c is not None for c in cotangents[1:]):
        raise ModelError(f"Only the first output of {describe(node)} may be used on the way to the logits.")
    return cotangents[0]


def rule_for(node: NodeProto) -> Rule:
    """The rule of a node's operator.

    Raises:
        UnsupportedOperatorError: there is none; the text names operator, node, and the supported operators.
    """
    try:
        return RULES[_key(node.op_type, node.domain)]
    except KeyError:
        raise UnsupportedOperatorError(
            f"Cannot differentiate {describe(node)}: there is no rule for this operator. "
            f"Supported: {', '.join(supported_operators())}."
        ) from None


def supported_operators() -> list[str]:
    """The operators that may stand between images and logits, sorted."""
    return sorted({*RULES, *WITHOUT_GRADIENT})


def passes_gradient(node: NodeProto) -> bool:
    """Whether the outputs of a node can have a gradient with respect to its inputs at all."""
    if node.domain not in ("", "ai.onnx"):
        return True
    if node.op_type == "Cast":
        return attributes(node)["to"] in _FLOATS
    return node.op_type not in WITHOUT_GRADIENT


def _key(op_type: str, domain: str) -> str:
    return op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"
