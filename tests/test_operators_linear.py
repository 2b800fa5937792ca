import numpy as np
import pytest

from guard.errors import ModelError
from tests.gradients import Array, Case, check, gradient_model, model_of


def matrix(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


GEMM = [
    Case("Gemm", [(4,)], {1: matrix(4, 3), 2: matrix(3)}),
    Case("Gemm", [(4,)], {1: matrix(3, 4), 2: matrix(3)}, {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [(4,)], {1: matrix(4, 3)}),
    Case("Gemm", [(4,), (3,)], {1: matrix(4, 3)}, {"beta": 2.0}),
]
MATMUL = [
    Case("MatMul", [(4,)], {1: matrix(4, 3)}),
    Case("MatMul", [(5, 4)], {1: matrix(4, 3)}),
    Case("MatMul", [(2, 5, 4)], {1: matrix(4, 3)}),
    Case("MatMul", [(2, 5, 4)], {1: matrix(2, 4, 3)}),
    Case("MatMul", [(1, 5, 4)], {1: matrix(2, 4, 3)}),
    Case("MatMul", [(5, 4)], {1: matrix(4)}),
    Case("MatMul", [(4, 3)], {0: matrix(5, 4)}),
    Case("MatMul", [(4, 3)], {0: matrix(4)}),
    Case("MatMul", [(2, 4, 3)], {0: matrix(2, 5, 4)}),
    Case("MatMul", [(5, 4), (4, 3)]),
    Case("MatMul", [(2, 5, 4), (2, 4, 3)]),
    Case("MatMul", [(2, 5, 4), (1, 4, 3)]),
]
EINSUM = [
    Case("Einsum", [(4,)], {1: matrix(4, 3)}, {"equation": "bi,ij->bj"}),
    Case("Einsum", [(2, 5, 4), (2, 3, 4)], attributes={"equation": "bhid,bhjd->bhij"}),
    Case("Einsum", [(2, 5)], attributes={"equation": "bij->bji"}),
    Case("Einsum", [(2, 5)], attributes={"equation": "bij->bi"}),
    Case("Einsum", [(2, 5), (5,)], attributes={"equation": "bij,bk->bk"}),
    Case("Einsum", [(4, 1)], {1: matrix(4, 5)}, {"equation": "bck,ck->bc"}),
    Case("Einsum", [(4, 1), (4, 5)], attributes={"equation": "bck,bck->bc"}),
    Case("Einsum", [(4, 1), (4, 5)], attributes={"equation": "bck,bck->bck"}),
]


@pytest.mark.parametrize("case", [*GEMM, *MATMUL, *EINSUM], ids=str)
def test_product(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("equation", ["...i,ij->...j", "bi,ij", "bii->bi"])
def test_einsum_says_what_it_cannot_do(equation: str) -> None:
    shapes = [(3, 3)] if "," not in equation else [(3,)]
    constants = {1: matrix(3, 3)} if "," in equation else {}
    with pytest.raises(ModelError, match="equation"):
        gradient_model(model_of(Case("Einsum", shapes, constants, {"equation": equation})))
