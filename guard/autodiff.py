"""Reverse-mode differentiation of ONNX graphs: gradients that run in plain onnxruntime.

For y = f(x) built from nodes, `pullback` takes a cotangent v of y (same shape) and appends nodes computing
v^T dy/dx. It visits the nodes between x and y once, last to first; each operator's rule (`guard.operators`)
turns the cotangents of a node's outputs into those of its inputs, and where a tensor is read several times
the contributions add. Images of a batch are independent in a classifier, so one walk yields every image's
gradient.

Several rows of a Jacobian are several calls on one graph: they share the forward pass and, through
`Graph.once`, all that the rules derive from it (ReLU masks, derivatives of activations).
"""

from __future__ import annotations

from collections import defaultdict

import onnx
from onnx import NodeProto

from guard.graph import Graph, reads
from guard.operators import passes_gradient, rule_for, supported_operators
from guard.operators.convolution import added

__all__ = ["Graph", "check_differentiable", "pullback", "supported_operators"]


def pullback(graph: Graph, output: str, cotangent: str, input: str) -> str:
    """Appends the gradient of sum(cotangent * output) with respect to `input`; returns its name.

    `cotangent` has the shape of `output`, the result that of `input`; it is zero where `output` does not
    depend on `input`. The derivative of ReLU at 0 is 0.

    Raises:
        UnsupportedOperatorError: an operator on the path has no rule.
        ModelError: a rule needs a constant or a static shape that the model does not have.
    """
    path, graph.needed = _path(graph, input, output)
    contributions: dict[str, list[str]] = defaultdict(list, {output: [cotangent]})
    for node in reversed(path):
        cotangents = [_total(graph, name, contributions.pop(name, [])) for name in node.output]
        if all(c is None for c in cotangents):
            continue
        for name, gradient in zip(node.input, rule_for(node)(graph, node, cotangents), strict=False):
            if gradient is not None and graph.needs(name):
                contributions[name].append(graph.declare(gradient, like=name))
    gradient = _total(graph, input, contributions.get(input, []))
    return graph.declare(gradient or graph.op("Mul", input, graph.scalar(0.0, input)), like=input)


def check_differentiable(model: onnx.ModelProto | Graph, input: str, output: str) -> None:
    """Checks that every operator between `input` and `output` has a rule.

    Raises:
        UnsupportedOperatorError: one has none; the text names it, the node, and the supported operators.
        ModelError: the model cannot be brought to a supported opset.
    """
    graph = model if isinstance(model, Graph) else Graph(model)
    path, _ = _path(graph, input, output)
    for node in path:
        rule_for(node)


def _path(graph: Graph, input: str, output: str) -> tuple[list[NodeProto], frozenset[str]]:
    """The nodes through which `output` depends differentiably on `input`, and the tensors between them."""
    nodes = [node for node in graph.nodes if passes_gradient(node)]
    reached = {input}
    for node in nodes:
        if not reached.isdisjoint(reads(node)):
            reached.update(name for name in node.output if name)
    wanted, path = {output} & reached, []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output) and not reached.isdisjoint(reads(node)):
            path.append(node)
            wanted.update(name for name in node.input if name in reached)
    return path[::-1], frozenset(wanted)


def _total(graph: Graph, name: str, contributions: list[str]) -> str | None:
    """The sum of what reaches a tensor."""
    total: str | None = None
    for contribution in contributions:
        total = contribution if total is None else graph.declare(added(graph, total, contribution), like=name)
    return total
