from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from guard.attacks import Floats, Found
from guard.bundle import ScoreName
from guard.data import to_floats
from guard.decision import Guard
from guard.evaluation.attack import Task
from guard.evaluation.judging import judged, within_range
from guard.evaluation.results import MEASURED
from guard.evaluation.target import Target
from guard.settings import Policy
from guard.stages import Arrays
from tests.guards import guard_of
from tests.serving import model, write_bundle
from tests.test_evaluation_run import attack, colours, straight

DATA = colours(5)
IMAGES = to_floats(DATA.images)
LABELS = np.zeros(5, np.int64)
Judge = Callable[..., Arrays]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    guard = Guard.from_bundle(write_bundle(tmp_path_factory.mktemp("judged") / "b"), "cpu", policy=Policy())
    return partial(judged, Target(guard.detector, {"jacobian": guard}))


def moved(by: float) -> Found:
    """All images that far towards green; those of the kinds NARROW and NEAR, twice, become wrong at 2."""
    found = straight(Target(None), IMAGES, LABELS, by, 0)  # type: ignore[arg-type]
    return Found(found.images, np.zeros(5, np.bool_), found.distance)


def test_wrong_images_are_judged_and_others_not(judge: Judge) -> None:
    arrays = judge(Task(attack(), 2.0), IMAGES, LABELS, moved(2.0))
    assert arrays["wrong"].tolist() == [True, True, True, False, True]
    assert not arrays["success"].any(), "the attack calls none of them one"
    assert np.isfinite(arrays["ratio_jacobian"]).tolist() == arrays["wrong"].tolist()
    assert np.isfinite(arrays["margin"]).tolist() == arrays["wrong"].tolist()


def test_of_a_control_every_image_is_judged(judge: Judge) -> None:
    task = Task(attack(knowledge="nothing"), 0.01)
    arrays = judge(task, IMAGES, LABELS, moved(0.01))
    assert not arrays["wrong"].any()
    assert arrays["accepted_jacobian"].tolist() == [False, True, True, True, True], "all but NARROW"
    assert np.isfinite(arrays["ratio_jacobian"]).all()


def test_what_is_lost_in_files(judge: Judge) -> None:
    level = np.sqrt(128) / 255
    # Red over green by 20, 60 and 80 levels: 30.3 levels each make the middle ones wrong by 0.6, which
    # rounding to 30 takes back.
    found = straight(Target(None), IMAGES, LABELS, 30.3 * level, 0)  # type: ignore[arg-type]
    arrays = judge(Task(attack(), 2.0), IMAGES, LABELS, found)
    assert arrays["success"].tolist() == [True, True, False, False, True]
    assert arrays["lost"].tolist() == [False, True, False, False, True]
    # Accepted again by rounding 7.4 levels to 7: the strip in which the detector rejects begins between.
    found = straight(Target(None), IMAGES, LABELS, 7.4 * level, 0)  # type: ignore[arg-type]
    arrays = judge(Task(attack(aware="jacobian"), 2.0, denial=True), IMAGES, LABELS, found)
    assert arrays["success"].tolist() == [True, True, False, False, True]
    assert arrays["lost"].tolist() == [False, True, False, False, True]


def test_a_report_gets_the_jacobian_whatever_the_score() -> None:
    plain = guard_of(model(), "jacobian", 3.0)
    other = guard_of(model(), "margin-gradient", 3.0)
    expected = plain.measure(IMAGES).jacobian
    assert not np.allclose(other.measure(IMAGES).jacobian, expected)
    everything = Found(IMAGES, np.ones(5, np.bool_), np.zeros(5))
    guards: list[dict[ScoreName, Guard]] = [
        {"margin-gradient": other, "jacobian": plain},
        {"margin-gradient": other},
    ]
    for some in guards:
        target = Target(plain.detector, some)
        arrays = judged(target, Task(attack(), None), IMAGES, LABELS + 1, everything)
        assert arrays["jacobian"] == pytest.approx(expected)


def test_lengths_count_but_for_an_attack_with_a_measure_of_its_own(judge: Judge) -> None:
    found = straight(Target(None), IMAGES, LABELS, 2.0, 0)  # type: ignore[arg-type]
    claimed = Found(found.images, found.success, np.full(5, 7.0))
    beaten = [True, True, True, False, True]
    for norm, distance in (("l2", 2.0), (None, 7.0)):
        arrays = judge(Task(attack(norm=norm), None), IMAGES, LABELS, claimed)
        assert arrays["distance"] == pytest.approx(np.where(beaten, distance, np.inf))
    assert not judge(Task(attack(), 1.9), IMAGES, LABELS, claimed)["success"].any(), "beyond its budget"


def test_no_image_at_all(judge: Judge) -> None:
    none = Found(IMAGES[:0], np.zeros(0, np.bool_), np.zeros(0))
    arrays = judge(Task(attack(), 2.0), IMAGES[:0], LABELS[:0], none)
    assert {"success", "lost", "wrong", "passes", "accepted_jacobian", *MEASURED} <= arrays.keys()
    assert {len(values) for values in arrays.values()} == {0}


def test_what_is_outside_the_range_or_no_number_is_brought_back() -> None:
    images = np.full((1, 1, 1, 3), 0.5, np.float32)
    attacked: Floats = np.array([[[[np.nan, -1.0, 2.0]]]], np.float32)
    assert within_range(attacked, images).tolist() == [[[[0.5, 0.0, 1.0]]]]
