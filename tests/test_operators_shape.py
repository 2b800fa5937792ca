import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import ModelError
from tests.gradients import Array, Case, check, gradient_model, model_of


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


LAST = np.iinfo(np.int64).max
RESHAPED = [
    Case("Reshape", [(3, 4)], {1: ints(-1, 12)}),
    Case("Reshape", [(3, 4)], {1: ints(0, 2, 6)}),
    Case("Reshape", [(4, 3)], {1: ints(-1, 3)}),  # folds the batch into another axis
    Case("Flatten", [(3, 4)]),
    Case("Flatten", [(3, 4)], attributes={"axis": 2}),
    Case("Squeeze", [(1, 4, 1)], {1: ints(1, 3)}),
    Case("Squeeze", [(1, 4, 1)], attributes={"axes": [1, 3]}, opset=11),
    Case("Unsqueeze", [(3,)], {1: ints(1, -1)}),
    Case("Unsqueeze", [(3,)], attributes={"axes": [1, 3]}, opset=11),
    Case("Transpose", [(3, 4, 2)], attributes={"perm": [0, 3, 1, 2]}),
    Case("Transpose", [(3, 4)]),
    Case("Expand", [(3, 1)], {1: ints(1, 3, 4)}),
    Case("Expand", [(3,)], {1: ints(2, 1, 1)}),
    Case("Tile", [(3, 2)], {1: ints(1, 2, 3)}),
    Case("Tile", [(3, 2)], {1: ints(1, 1, 1)}),
    Case("DepthToSpace", [(8, 2, 3)], attributes={"blocksize": 2}),
    Case("DepthToSpace", [(8, 2, 3)], attributes={"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [(2, 4, 6)], attributes={"blocksize": 2}),
    Case("Trilu", [(3, 4)], {1: np.array(1, np.int64)}),
    Case("Trilu", [(3, 4)], attributes={"upper": 0}),
    *(
        Case("CumSum", [(5,)], {1: np.array(1, np.int64)}, {"reverse": reverse, "exclusive": exclusive})
        for reverse in (0, 1)
        for exclusive in (0, 1)
    ),
]
JOINED = [
    Case("Concat", [(3, 4), (2, 4), (1, 4)], attributes={"axis": 1}),
    Case("Concat", [(3, 4), (3, 2)], attributes={"axis": -1}),
    Case("Concat", [(3,)], attributes={"axis": 1}),
    Case("Split", [(6, 2)], {1: ints(1, 2, 3)}, {"axis": 1}, outputs=3, used=1),
    Case("Split", [(6, 2)], attributes={"axis": 1, "num_outputs": 3}, outputs=3, used=2),
    Case("Split", [(5, 2)], attributes={"axis": 1, "num_outputs": 2}, outputs=2),
    Case("Split", [(6, 2)], attributes={"axis": 1, "split": [4, 2]}, outputs=2, opset=11),
    Case("Split", [(6, 2)], attributes={"axis": 1}, outputs=2, opset=11),
]
PICKED = [
    Case("Slice", [(6, 5)], {1: ints(1), 2: ints(4), 3: ints(1)}),
    Case("Slice", [(6, 5)], {1: ints(0, 1), 2: ints(-1, LAST), 3: ints(1, -1)}),
    Case("Slice", [(6, 5)], {1: ints(0, 1), 2: ints(LAST, 5), 3: ints(0, 1), 4: ints(1, 2)}),
    Case("Slice", [(6, 5)], {1: ints(-1), 2: ints(-LAST), 3: ints(1), 4: ints(-1)}),
    Case("Slice", [(6, 5)], {1: ints(4), 2: ints(0), 3: ints(1), 4: ints(-2)}),
    Case("Slice", [(6, 5)], attributes={"starts": [1], "ends": [3], "axes": [2]}, opset=9),
    Case("Gather", [(4, 3)], {1: ints(2)[0]}, {"axis": 1}),
    Case("Gather", [(4, 3)], {1: ints(0)[0]}, {"axis": 2}),
    Case("Gather", [(4, 3)], {1: ints(3, 1, -4)}, {"axis": 1}),
    Case("Gather", [(4, 3)], {1: ints(3, 1, 3, 3)}, {"axis": 1}),
    Case("Gather", [(4, 3)], {1: ints(0, 1, 1, 2).reshape(2, 2)}, {"axis": 2}),
    Case("Gather", [(4, 3)], {1: ints(3, 2, 1, 0)}, {"axis": 1}),
    Case("Pad", [(3, 4)], {1: ints(0, 1, 2, 0, 0, 1)}),
    Case("Pad", [(3, 4)], {1: ints(0, 1, 2, 0, 0, 1), 2: np.array(7, np.float32)}),
    Case("Pad", [(3, 4)], {1: ints(1, 2), 3: ints(2)}, opset=18),
    Case("Pad", [(3, 4)], attributes={"pads": [0, 1, 2, 0, 0, 1]}, opset=10),
    *(
        Case("Pad", [(3, 4)], {1: ints(0, 1, 2, 0, 0, 3)}, {"mode": mode}, opset=19)
        for mode in ("reflect", "edge")
    ),
    Case("Pad", [(3, 4)], {1: ints(0, 1, 2, 0, 2, 3)}, {"mode": "wrap"}, opset=19),
    Case("TopK", [(6,)], {1: ints(3)}, {"axis": 1}, outputs=2),
    Case("TopK", [(6,)], {1: ints(3)}, {"largest": 0}, outputs=2),
]


@pytest.mark.parametrize("case", [*RESHAPED, *JOINED, *PICKED], ids=str)
def test_shape(case: Case) -> None:
    check(case)


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(1, 7),
    start=st.integers(-9, 9),
    stop=st.integers(-9, 9),
    step=st.sampled_from([-3, -2, -1, 1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_any_slice(size: int, start: int, stop: int, step: int, seed: int) -> None:
    if step < 0:  # where the start lies before the tensor, the reference evaluator takes nothing
        start = max(start, -size)
    check(Case("Slice", [(2, size)], {1: ints(start), 2: ints(stop), 3: ints(2), 4: ints(step)}), seed=seed)


def test_padding_may_crop() -> None:
    check(Case("Pad", [(3, 4)], {1: ints(0, -1, 2, 0, 0, -2)}))
    check(Case("Pad", [(5, 4)], {1: ints(0, -1, 0, 0, -1, 0)}, {"mode": "reflect"}))


@settings(max_examples=10, deadline=None)
@given(indices=st.lists(st.integers(-4, 3), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_gather(indices: list[int], seed: int) -> None:
    check(Case("Gather", [(4, 2)], {1: ints(*indices)}, {"axis": 1}), seed=seed)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("Slice", [(3,)], {1: ints(0), 2: ints(1), 3: ints(0)}), "axis 0, which depends on the batch"),
        (Case("Pad", [(3,)], {1: ints(1, 0, 0, 0)}), "axis 0, which depends on the batch"),
        (
            Case(
                "ScatterND",
                [(3,)],
                {1: ints(0).reshape(1, 1), 2: np.ones((1, 3), np.float32)},
                {"reduction": "mul"},
                opset=18,
            ),
            "reduction 'mul'",
        ),
    ],
    ids=str,
)
def test_what_mixes_images_is_refused(case: Case, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        gradient_model(model_of(case))
