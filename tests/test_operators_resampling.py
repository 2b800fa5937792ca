import numpy as np
import pytest

from guard.errors import ModelError
from tests.gradients import Array, Case, check, gradient_model, model_of, session


def resize(size: tuple[int, int], scales: tuple[float, ...], **given: object) -> Case:
    """By scales over all axes."""
    return Case("Resize", [(2, *size)], {2: np.array([1, 1, *scales], np.float32)}, given)


def resize_to(size: tuple[int, int], target: tuple[int, int], **given: object) -> Case:
    """To a size; the batch axis is left out by naming the others."""
    sizes: Array = np.array(target, np.int64)
    return Case("Resize", [(2, *size)], {3: sizes}, {"axes": [2, 3], **given})


TRANSFORMATIONS = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
CASES = [
    resize((3, 4), (2, 2), mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    resize((3, 4), (3, 1), mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    resize((6, 4), (0.5, 1.5), mode="nearest"),
    *(resize_to((3, 4), (7, 6), mode="linear", coordinate_transformation_mode=t) for t in TRANSFORMATIONS),
    *(resize_to((6, 7), (4, 3), mode="linear", coordinate_transformation_mode=t) for t in TRANSFORMATIONS),
    *(
        resize_to((3, 4), (5, 9), mode="nearest", coordinate_transformation_mode=t)
        for t in TRANSFORMATIONS[:3]
    ),
    resize((4, 5), (2.0, 1.6), mode="cubic"),
    # one axis keeps its size and is interpolated all the same
    *(
        resize((8, 6), (1.15, 1.15), mode="linear", coordinate_transformation_mode=t)
        for t in ("half_pixel", "asymmetric", "pytorch_half_pixel")
    ),
    resize((14, 7), (1.1, 1.1), mode="nearest"),
    resize((8, 6), (1.15, 1.15), mode="cubic"),
    resize(
        (4, 5), (2.0, 1.6), mode="cubic", coordinate_transformation_mode="align_corners", cubic_coeff_a=-0.5
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resize(case: Case) -> None:
    check(case)


def test_a_resize_that_changes_no_size_copies() -> None:
    # as onnxruntime has it, whatever the scales; ONNX would interpolate
    model = gradient_model(model_of(resize((6, 6), (1.15, 1.15), mode="linear")))
    x, v = np.random.default_rng(0).random((2, 1, 2, 6, 6), np.float32)
    y, gradient = session(model).run(None, {"x0": x, "cotangent": v})
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(gradient, v)


def test_downsampling_with_antialias() -> None:
    check(resize_to((9, 8), (4, 5), mode="linear", antialias=1))


def test_keeping_the_aspect_ratio_is_refused() -> None:
    with pytest.raises(ModelError, match="aspect ratio"):
        gradient_model(
            model_of(resize_to((3, 4), (6, 9), mode="linear", keep_aspect_ratio_policy="not_larger"))
        )
