"""Matrix products and their generalizations."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto

from guard.errors import ModelError
from guard.graph import Array, Graph, attributes, describe
from guard.operators.broadcast import reshape_to, sum_to
from guard.operators.registry import Cotangents, only_first, rule


@rule("Gemm")
def gemm(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """For Y = alpha A' B' + beta C, where A', B' may be transposed."""
    cotangent = only_first(node, cotangents)
    given = attributes(node)
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)
    trans_a, trans_b = given.get("transA", 0), given.get("transB", 0)
    a, b, *rest = node.input
    result: Cotangents = [None] * len(node.input)
    if graph.needs(a):
        if trans_a:
            result[0] = graph.op("Gemm", b, cotangent, transA=trans_b, transB=1, alpha=alpha)
        else:
            result[0] = graph.op("Gemm", cotangent, b, transB=1 - trans_b, alpha=alpha)
    if graph.needs(b):
        if trans_b:
            result[1] = graph.op("Gemm", cotangent, a, transA=1, transB=trans_a, alpha=alpha)
        else:
            result[1] = graph.op("Gemm", a, cotangent, transA=1 - trans_a, alpha=alpha)
    if rest and graph.needs(rest[0]):
        scaled = cotangent if beta == 1 else (graph.tensor(cotangent) * beta).name
        result[2] = sum_to(graph, scaled, node.output[0], rest[0])
    return result


@rule("MatMul")
def matmul(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """Cotangents dY B^T and A^T dY, summed over broadcast axes; a vector counts as a row or column."""
    cotangent = only_first(node, cotangents)
    a, b = node.input
    shape_a, shape_b = graph.shape(a), graph.shape(b)
    matrix_a = shape_a if len(shape_a) > 1 else (1, *shape_a)
    matrix_b = shape_b if len(shape_b) > 1 else (*shape_b, 1)
    lead = len(graph.shape(node.output[0])) - min(len(shape_a), 2) - min(len(shape_b), 2) + 2
    batch = graph.shape(node.output[0])[:lead]
    if len(shape_b) == 1:
        cotangent = graph.op("Unsqueeze", cotangent, graph.constant([-1]))
    if len(shape_a) == 1:
        cotangent = graph.op("Unsqueeze", cotangent, graph.constant([-2]))
    result: Cotangents = [None, None]
    if graph.needs(a) and len(shape_a) > 1 and len(shape_b) == 2 and graph.is_constant(b):
        # Gemm transposes a weight in place, where MatMul would need a copy of it
        rows = reshape_to(graph, cotangent, (None, shape_b[1])) if len(shape_a) > 2 else cotangent
        product = graph.op("Gemm", rows, b, transB=1)
        result[0] = reshape_to(graph, product, a) if len(shape_a) > 2 else product
    elif graph.needs(a):
        product = graph.op("MatMul", cotangent, transposed(graph, b, column=True))
        summed = sum_to(graph, product, (*batch, *matrix_a[-2:]), matrix_a)
        result[0] = summed if len(shape_a) > 1 else reshape_to(graph, summed, a)
    if graph.needs(b):
        product = graph.op("MatMul", transposed(graph, a, column=False), cotangent)
        summed = sum_to(graph, product, (*batch, *matrix_b[-2:]), matrix_b)
        result[1] = summed if len(shape_b) > 1 else reshape_to(graph, summed, b)
    return result


def transposed(graph: Graph, name: str, *, column: bool) -> str:
    """Swaps the last two axes; a vector counts as a column or as a row."""
    rank = graph.rank(name)
    if rank == 1:
        return graph.op("Unsqueeze", name, graph.constant([0 if column else 1]))
    value = graph.value(name)
    if value is not None:
        return graph.once(("transposed", name), lambda: graph.constant(value.swapaxes(-1, -2)))
    order = [*range(rank - 2), rank - 1, rank - 2]
    return graph.once(("transposed", name), lambda: graph.op("Transpose", name, perm=order))


@rule("Einsum")
def einsum(graph: Graph, node: NodeProto, cotangents: Cotangents) -> Cotangents:
    """The cotangent of an operand is again an Einsum: of the cotangent and the other operands."""
    cotangent = only_first(node, cotangents)
    equation = attributes(node)["equation"].replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation or "." in equation or any(len(set(t)) != len(t) for t in (*terms, right)):
        raise ModelError(
            f"{describe(node)} has equation {equation!r}; only explicit equations ('ij,jk->ik') without "
            "ellipsis and repeated letters are differentiated."
        )
    result: Cotangents = [None] * len(terms)
    for position, (name, term) in enumerate(zip(node.input, terms, strict=True)):
        if not graph.needs(name):
            continue
        others = [(n, t) for i, (n, t) in enumerate(zip(node.input, terms, strict=True)) if i != position]
        available = {letter for t in (right, *(t for _, t in others)) for letter in t}
        inner = "".join(letter for letter in term if letter in available)
        back = ",".join((right, *(t for _, t in others))) + "->" + inner
        gradient = graph.op("Einsum", cotangent, *(n for n, _ in others), equation=back)
        # onnxruntime repeats axes of size 1 where another operand has more of the same letter
        own, seen = _sizes(graph, [(name, term)]), _sizes(graph, [(node.output[0], right), *others])
        large, small = (tuple(sizes[letter] for letter in inner) for sizes in (seen, own))
        gradient = sum_to(graph, gradient, large, small)
        missing = [i for i, letter in enumerate(term) if letter not in available]
        if missing:  # letters that the forward pass summed within this operand alone
            gradient = graph.op("Unsqueeze", gradient, graph.constant(missing))
        if missing or any(seen[letter] == 1 != own[letter] for letter in inner):
            gradient = graph.op("Expand", gradient, graph.op("Shape", name))
        result[position] = gradient
    return result


def _sizes(graph: Graph, operands: Iterable[tuple[str, str]]) -> dict[str, int | None]:
    """The size that each letter of an Einsum stands for in these tensors: 1 only where it is 1 in all."""
    sizes: dict[str, int | None] = {}
    for name, term in operands:
        for letter, size in zip(term, graph.shape(name), strict=True):
            if sizes.get(letter, 1) == 1:
                sizes[letter] = size
    return sizes


def along_axis(graph: Graph, x: str, axis: int, matrix: Array, rank: int) -> str:
    """Multiplies one axis of a tensor by a constant matrix (old size, new size)."""
    if axis == rank - 1:
        return graph.op("MatMul", x, graph.constant(matrix))
    if axis == rank - 2:
        return graph.op("MatMul", graph.constant(matrix.T), x)
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    product = graph.op("MatMul", graph.op("Transpose", x, perm=order), graph.constant(matrix))
    return graph.op("Transpose", product, perm=order)
