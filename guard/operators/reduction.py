"""Reductions over axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from onnx import NodeProto

from guard.errors import ModelError
from guard.graph import Graph, Tensor, attributes, describe
from guard.operators.broadcast import axes_of, expand_to, reshape_to
from guard.operators.convolution import spread_evenly
from guard.operators.registry import data_rule


@dataclass(frozen=True)
class Reduction:
    """A node y = f(x), reduced over `axes`, which y keeps with size 1."""

    x: Tensor
    y: Tensor
    axes: list[int]


Slope = Callable[[Reduction], Tensor]


def reduced_axes(graph: Graph, node: NodeProto) -> list[int]:
    """The axes a node reduces over; none named means all, or with `noop_with_empty_axes` none.

    Raises `ModelError` where one of them depends on the batch.
    """
    shape = graph.shape(node.input[0])
    axes = axes_of(graph, node, len(shape))
    if not axes:
        axes = [] if attributes(node).get("noop_with_empty_axes", 0) else list(range(len(shape)))
    if any(shape[axis] is None for axis in axes):
        raise ModelError(f"{describe(node)} reduces over the batch; images must not influence each other.")
    return axes


def kept(graph: Graph, node: NodeProto, name: str) -> str:
    """A tensor shaped like the node's output, with the reduced axes back as ones."""
    axes = reduced_axes(graph, node)
    if attributes(node).get("keepdims", 1):
        return name
    shape = graph.shape(node.input[0])
    return reshape_to(graph, name, tuple(1 if i in axes else d for i, d in enumerate(shape)))


@data_rule("ReduceSum")
def reduce_sum(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent, repeated along the reduced axes."""
    return expand_to(graph, kept(graph, node, cotangent), node.input[0])


@data_rule("ReduceMean")
def reduce_mean(graph: Graph, node: NodeProto, cotangent: str) -> str:
    """The cotangent over the number of elements, repeated along the reduced axes."""
    shape, axes = graph.shape(node.input[0]), reduced_axes(graph, node)
    if axes and axes == list(range(2, len(shape))):
        return spread_evenly(graph, kept(graph, node, cotangent), node.input[0])
    scaled = graph.tensor(cotangent) * (1 / prod(shape[axis] or 1 for axis in axes))
    return expand_to(graph, kept(graph, node, scaled.name), node.input[0])


def _reduction(op_type: str) -> Callable[[Slope], Slope]:
    """Registers y = f(x over axes) by dy/dx, in terms of x, y and the axes."""

    def register(function: Slope) -> Slope:
        @data_rule(op_type)
        def apply(graph: Graph, node: NodeProto, cotangent: str) -> str:
            def slope() -> str:
                x, y = graph.tensor(node.input[0]), graph.tensor(kept(graph, node, node.output[0]))
                return function(Reduction(x, y, reduced_axes(graph, node))).name

            factor = graph.once(("slope", node.output[0]), slope)
            return graph.op("Mul", kept(graph, node, cotangent), factor)

        return function

    return register


@_reduction("ReduceMax")
@_reduction("ReduceMin")
def reduce_extremum(at: Reduction) -> Tensor:
    """Elements that tie for the extremum share the cotangent evenly."""
    ties = at.x.equals(at.y).like(at.x.name)
    return ties / ties.sum(at.axes)


@_reduction("ReduceL1")
def reduce_l1(at: Reduction) -> Tensor:
    """The sign."""
    return at.x.apply("Sign")


@_reduction("ReduceL2")
def reduce_l2(at: Reduction) -> Tensor:
    """For the norm y: x / y, and 0 where y is 0."""
    return at.x / at.y.equals(0.0).where(Tensor(at.y.graph, at.y.graph.scalar(1.0, at.y.name)), at.y)


@_reduction("ReduceSumSquare")
def reduce_sum_square(at: Reduction) -> Tensor:
    """Twice x."""
    return at.x * 2.0


@_reduction("ReduceLogSum")
def reduce_log_sum(at: Reduction) -> Tensor:
    """One over the sum, in the shape of x."""
    return at.x * 0.0 + (-at.y).apply("Exp")


@_reduction("ReduceLogSumExp")
def reduce_log_sum_exp(at: Reduction) -> Tensor:
    """The softmax."""
    return (at.x - at.y).apply("Exp")


@_reduction("ReduceProd")
def reduce_prod(at: Reduction) -> Tensor:
    """The product of the other elements, right where some are zero."""
    one = Tensor(at.x.graph, at.x.graph.scalar(1.0, at.x.name))
    zero = at.x.equals(0.0)
    nonzero = zero.where(one, at.x)
    zeros = zero.like(at.x.name).sum(at.axes)
    graph = at.x.graph
    if not at.axes:
        product = nonzero
    elif graph.opset < 18:
        product = nonzero.apply("ReduceProd", axes=at.axes)
    else:
        product = nonzero.apply("ReduceProd", graph.constant(at.axes))
    others = product / nonzero * zeros.equals(0.0).like(at.x.name)
    return zero.where(product * zeros.equals(1.0).like(at.x.name), others)
