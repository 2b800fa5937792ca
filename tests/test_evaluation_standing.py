"""Headlines of attacks whose outcome is written down by hand."""

from typing import Any

import numpy as np
import pytest

from guard.evaluation.results import AttackResult, Finished
from guard.evaluation.standing import headline_budgets, standings
from guard.norms import Norm
from guard.shares import share

COUNT = 10
RIGHT = 8
"""Of the images the last two are wrong, and the third last is right but rejected."""


def clean() -> dict[str, Any]:
    right = np.arange(COUNT) < RIGHT
    return {"right": right, "accepted_jacobian": np.arange(COUNT) != RIGHT - 1}


def finished(
    name: str,
    reach: dict[int, float],
    *,
    budget: float | None = None,
    norm: Norm | None = "l2",
    images: int = COUNT,
    rejected: tuple[int, ...] = (),
    **changes: Any,
) -> Finished:
    """An attack on the right ones of the first `images`, with wrong images at `reach` in l2 by row."""
    rows = np.arange(min(images, RIGHT))
    wrong = np.isin(rows, list(reach))
    result = {
        "name": name,
        "title": name,
        "norm": norm,
        "unit": "",
        "budget": budget,
        "knowledge": "gradients",
        "aware": None,
        "source": "",
        "settings": {"images": images},
        "n": len(rows),
        "success": share(wrong),
        "distance": None,
        "passes": 1,
        "seconds": 1,
        "file": "",
    }
    lengths = np.array([reach.get(int(row), 0.0) for row in rows])
    arrays = {"row": rows, "wrong": wrong, "l2": lengths, "linf": lengths / 10}
    arrays["accepted_jacobian"] = wrong & ~np.isin(rows, rejected)
    return Finished(AttackResult(**(result | changes)), arrays)


def test_whatever_any_attack_found_counts_within_the_budget() -> None:
    attacks = [
        finished("near-l2", {0: 0.1, 1: 0.4, 2: 0.6}, rejected=(0,)),
        finished("far-l2", {1: 0.5, 3: 0.5, 7: 0.1}, budget=0.5),
        finished("joint-l2", {4: 0.5}, budget=0.5, aware="jacobian", images=6),
        finished("of-another-norm", {5: 0.2}, norm=None),
        finished("of-another-score", {6: 0.2}, budget=1.0, aware="radius"),
    ]
    (found,) = standings(attacks, clean(), ["jacobian"], {"l2": (0.5,)})
    # Image 0 is rejected wherever it is wrong, 2 falls beyond the budget, 7 was rejected without attack.
    assert found.alone is not None
    assert (found.alone.count, found.alone.n) == (1, COUNT), "only image 2, nothing being rejected"
    assert (found.clean.count, found.clean.n) == (7, COUNT)
    assert (found.standing.count, found.standing.n) == (2, COUNT)
    assert list(found.fallen.items()) == [
        ("far-l2", 2),
        ("joint-l2", 1),
        ("near-l2", 1),
        ("of-another-norm", 1),
        ("of-another-score", 1),
    ]
    assert found.worst == "far-l2"
    assert found.meant["near-l2"] == 7
    assert found.meant["joint-l2"] == 6
    # Of the first six the others left 0, 2 and 4, of which the joint one broke 4.
    (first,) = found.subsets
    assert (first.images, first.attacks) == (6, ["joint-l2"])
    assert (first.standing.count, first.standing.n) == (2, 6)
    assert (first.clean.count, first.clean.n) == (6, 6)
    assert (first.alone.count, first.alone.n) == (1, 6)
    assert first.added is not None
    assert (first.added.count, first.added.n) == (1, 3)
    (wide,) = standings(attacks, clean(), ["jacobian"], {"linf": (0.06,)})
    assert wide.standing.count == 1


def test_the_first_images_are_those_of_the_attacks_that_could_count() -> None:
    few = finished("few-l2", {}, budget=1.0, images=3)
    for other, images in (
        (finished("few-linf", {}, norm="linf", images=2), []),
        (finished("of-another-score", {}, aware="radius", images=2), []),
        (finished("nearest-l2", {}, images=4), [4]),
    ):
        below, at = standings([few, other], clean(), ["jacobian"], {"l2": (0.5, 1.0)})
        assert [one.images for one in below.subsets] == images
        assert [one.images for one in at.subsets] == [*images, 3]


def test_attacks_of_another_norm_on_the_same_first_images_count_there_too() -> None:
    few = finished("few-l2", {}, images=4)
    other = finished("few-linf", {1: 0.1, 3: 0.1}, norm="linf", images=4)
    (found,) = standings([few, other], clean(), ["jacobian"], {"l2": (0.5,)})
    assert (found.standing.count, found.clean.count) == (5, 7)
    assert found.meant == {"few-l2": 4, "few-linf": 4}
    (first,) = found.subsets
    assert first.attacks == ["few-l2"]
    assert (first.standing.count, first.alone.count) == (2, 2)
    assert first.added is not None
    assert (first.added.count, first.added.n) == (0, 2)


def test_an_attack_on_fewer_images_is_worst_by_its_share_of_them() -> None:
    many = finished("many-l2", {0: 0.1, 1: 0.1, 2: 0.1})
    few = finished("few-l2", {0: 0.1, 1: 0.1}, images=2)
    (found,) = standings([many, few], clean(), ["jacobian"], {"l2": (0.5,)})
    assert found.worst == "few-l2"
    assert (found.fallen["few-l2"], found.meant["few-l2"]) == (2, 2)
    (first,) = found.subsets
    assert first.added is None, "the attack on all images had left none of these"


@pytest.mark.parametrize(
    ("attacks", "expected"),
    [
        ([], []),
        ([finished("pgd", {}, budget=0.25)], [0.25]),
        ([finished("pgd", {}, budget=2.0), finished("pgd", {}, budget=0.3)], [0.3, 2.0]),
        ([finished("fmn", {})], [0.25, 0.5]),
        ([finished("fmn", {}), finished("pgd", {}, budget=1.0)], [0.25, 0.5, 1.0]),
        ([finished("pgd", {}, budget=0.25), finished("noise", {}, budget=0.5, knowledge="nothing")], [0.25]),
        ([finished("noise", {}, budget=0.5, knowledge="nothing")], []),
        ([finished("flow", {}, norm=None, budget=0.5)], []),
    ],
)
def test_only_budgets_that_were_tried_have_a_headline(attacks: list[Finished], expected: list[float]) -> None:
    asked: dict[Norm, tuple[float, ...]] = {"l2": (0.5, 0.25), "linf": (0.1,)}
    assert headline_budgets(attacks, asked) == {"l2": expected, "linf": []}
