from dataclasses import replace
from typing import Any

import pytest

from guard.errors import UsageError
from guard.evaluation import suite
from guard.evaluation.attack import Attack
from guard.evaluation.suite import belongs, choose, common_name, known, with_budgets


def attack(name: str, **changes: Any) -> Attack:
    def run(*_: object) -> Any:
        raise NotImplementedError

    fields: dict[str, Any] = {"norm": "l2", "knowledge": "gradients", "passes": 10, "source": ""}
    return Attack(name, name, run, **(fields | changes))


ATTACKS = (
    attack("pgd-l2", budgets=(0.5, 1.0)),
    attack("pgd-linf", budgets=(2 / 255,), norm="linf"),
    attack("pgd-deep-l2", budgets=(0.5,)),
    attack("fmn-l2"),
    attack("joint-pgd-l2", budgets=(0.5,), aware="jacobian"),
    attack("joint-pgd-radius-l2", budgets=(0.5,), aware="radius"),
    attack("joint-pgd-jacobian-full-l2", budgets=(0.5,), aware="jacobian-full"),
    attack("transfer-l2", budgets=(0.5,), knowledge="another network"),
    attack("square-l2", budgets=(0.5,), knowledge="scores", passes=5000),
    attack("autoattack-l2", budgets=(0.5,), needs="a_package_that_nobody_has"),
    attack("recolor", norm=None, budgets=(0.06,)),
    attack("noise-l2", budgets=(0.5,), knowledge="nothing"),
)


def chosen(*words: str, scores: tuple[Any, ...] = ("jacobian",)) -> list[str]:
    return [attack.name for attack in choose(words, scores, ATTACKS)]


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("gradient", ["pgd-l2", "pgd-linf", "pgd-deep-l2"]),
        ("minimum-norm", ["fmn-l2"]),
        ("decision", ["square-l2"]),
        ("adaptive", ["joint-pgd-l2", "transfer-l2"]),
        ("unseen", ["recolor"]),
        ("controls", ["noise-l2"]),
        (
            "default",
            ["pgd-l2", "pgd-linf", "pgd-deep-l2", "fmn-l2", "joint-pgd-l2", "transfer-l2", "noise-l2"],
        ),
    ],
)
def test_groups(group: str, names: list[str]) -> None:
    assert chosen(group) == names


def test_every_attack_is_in_a_group_of_its_kind() -> None:
    kinds = [group for group in suite.GROUPS if group not in ("default", "all")]
    for one in suite.known():
        assert any(belongs(one, group) for group in kinds)


def test_names_leave_out_the_score() -> None:
    assert [common_name(one) for one in ATTACKS[4:7]] == ["joint-pgd-l2"] * 3
    assert chosen("joint-pgd-l2", scores=("radius",)) == ["joint-pgd-radius-l2"]
    assert chosen("joint-pgd-l2", "fmn-l2", scores=("jacobian", "radius")) == [
        "fmn-l2",
        "joint-pgd-l2",
        "joint-pgd-radius-l2",
    ]


def test_unknown_names_list_those_near() -> None:
    with pytest.raises(UsageError, match=r"'pdg-l2' is no attack. Near it: .*pgd-l2.* --attacks list"):
        chosen("pdg-l2")
    with pytest.raises(UsageError, match="A bundle stands before: guard evaluate models/mine --attacks"):
        chosen("pgd-l2", "models/mine")
    with pytest.raises(UsageError, match=r"joint-pgd-radius-l2 knows the score radius: add it to --scores"):
        chosen("joint-pgd-radius-l2")
    with pytest.raises(UsageError, match="transfer-linf is made on another network: name that with --twin"):
        chosen("transfer-linf")


def test_missing_packages_are_left_out_of_groups_and_refused_by_name() -> None:
    found = choose(["all"], ["jacobian"], ATTACKS)
    assert [one.name for one in found if not one.installed] == ["autoattack-l2"]
    with pytest.raises(UsageError, match="autoattack-l2 needs a_package_that_nobody_has, which is not"):
        chosen("autoattack-l2")
    with pytest.raises(UsageError, match="no attack of autoattack can be run"):
        chosen("autoattack")


def test_budgets_replace_those_of_the_same_norm() -> None:
    budgets: Any = {"l2": (0.1,)}
    assert with_budgets(ATTACKS[0], budgets).budgets == (0.1,)
    assert with_budgets(ATTACKS[1], budgets).budgets == (2 / 255,)
    assert with_budgets(ATTACKS[3], budgets).budgets is None
    assert with_budgets(replace(ATTACKS[0], norm=None), budgets).budgets == (0.5, 1.0)


def test_names_of_all_attacks_differ_and_cheap_ones_come_first() -> None:
    found = [*known(), *suite.over_rejection()]
    names = [one.name for one in found]
    assert len(set(names)) == len(names)
    assert not set(names) & set(suite.GROUPS)
    passes = [one.passes for one in known()]
    assert passes == sorted(passes)
    for one in found:
        assert one.name == one.name.lower()
        assert one.norm is None or one.name.endswith(f"-{one.norm}")
        assert one.passes >= 1


def test_the_quick_suite_is_there() -> None:
    names = {common_name(one) for one in suite.quick(("jacobian",), known())}
    assert {"pgd-l2", "pgd-linf", "pgd-deep-l2", "joint-pgd-l2"} <= names
    assert "pgd-deep-linf" not in names
    if any(one.name == "cw-l2" for one in known()):
        assert "cw-quick-l2" in names
