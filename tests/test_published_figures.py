"""README's figures are those of the committed results and of the shipped calibration, digit by digit."""

import re
from pathlib import Path

import pytest

from guard.bundle import CALIBRATION, Share, load
from guard.card import with_calibration
from guard.evaluation.results import AttackResult, Results

ROOT = Path(__file__).parent.parent
EVALUATIONS = ROOT / "benchmarks" / "results" / "evaluation"
BUDGETS = {
    ("l2", 0.25): "l2 0.25",
    ("l2", 0.5): "l2 0.5",
    ("l2", 1.0): "l2 1",
    ("linf", 2 / 255): "linf 2/255",
    ("linf", 8 / 255): "linf 8/255",
}


@pytest.fixture(scope="module")
def readme() -> str:
    """README's words, each line break a space."""
    return " ".join((ROOT / "README.md").read_text().split())


@pytest.fixture(scope="module")
def evaluations() -> list[Results]:
    """Of the shipped model and of its undefended twin."""
    names = ("cifar10.json", "undefended.json")
    return [Results.model_validate_json((EVALUATIONS / name).read_bytes()) for name in names]


def share(found: Share) -> str:
    return f"{100 * found.value:.1f}% ({100 * found.lower:.1f}-{100 * found.upper:.1f}%)"


def attack(results: Results, name: str, budget: float | None = None) -> AttackResult:
    (found,) = [one for one in results.attacks if one.name == name and one.budget == budget]
    return found


def row(label: str, cells: list[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def test_the_results_are_of_the_bundles_in_models(evaluations: list[Results]) -> None:
    shipped, twin = (one.settings["identity"] for one in evaluations)
    for name, identity in (("cifar10", shipped), ("cifar10-undefended", twin)):
        bundle = load(ROOT / "models" / name)
        assert identity["model"] == bundle.digest
        assert identity["calibration"] == bundle.manifest.files[CALIBRATION]
    assert shipped["data"] == twin["data"]


def test_the_table_of_robust_accuracy(readme: str, evaluations: list[Results]) -> None:
    assert row("clean accuracy", [share(one.accuracy) for one in evaluations]) in readme
    clean = [share(one.standing[0].clean) for one in evaluations]
    assert row("right and accepted without attack", clean) in readme
    for (norm, budget), words in BUDGETS.items():
        found = [
            share(at.standing)
            for one in evaluations
            for at in one.standing
            if at.score == one.served and at.norm == norm and at.budget == pytest.approx(budget)
        ]
        assert row(f"right and accepted under every attack, {words}", found) in readme


def test_what_stands_without_the_detector(readme: str, evaluations: list[Results]) -> None:
    for place, words in ((("l2", 0.25), "l2 0.25"), (("linf", 2 / 255), "linf 2/255")):
        found = [
            share(at.alone)
            for one in evaluations
            for at in one.standing
            if at.alone and at.norm == place[0] and at.budget == pytest.approx(place[1])
        ]
        assert row(f"the same without the detector, {words}", found) in readme


def test_how_many_clean_images_are_made_rejected(readme: str, evaluations: list[Results]) -> None:
    found = [one.success for shown in evaluations for one in shown.over_rejection if one.name == "denial-l2"]
    least = [one for one in found[:: len(found) // 2] if one]
    label = f"of these, made rejected by an attack, l2 0.25 (n = {' and '.join(str(one.n) for one in least)})"
    assert row(label, [share(one) for one in least]) in readme


def test_the_median_distances(readme: str) -> None:
    pattern = (
        r"^- In {}, median smallest distance found to another class (\S+) \[(\S+), (\S+)\] \(n = (\d+)\)"
    )
    cards = [(ROOT / "models" / name / "card.md").read_text() for name in ("cifar10", "cifar10-undefended")]
    for norm in ("l2", "linf"):
        found = [re.search(pattern.format(norm), card, re.MULTILINE) for card in cards]
        assert all(found)
        medians = [one.groups() for one in found if one]
        n = " and ".join(one[3] for one in medians)
        label = f"median smallest distance found, l2 (n = {n})" if norm == "l2" else "the same, linf"
        assert row(label, [f"{one[0]} ({one[1]}-{one[2]})" for one in medians]) in readme


def test_what_is_rejected_of_careless_attacks(readme: str, evaluations: list[Results]) -> None:
    attacks = (("fmn-l2", None), ("deepfool-l2", None), ("pgd-deep-l2", 0.5))
    fmn, deepfool, deep = (
        f"{100 * one.value:.0f}% {{}}({100 * one.lower:.1f}-{100 * one.upper:.1f}%, n = {one.n})"
        for one in (
            attack(evaluations[0], *which).detection[evaluations[0].served].rejected for which in attacks
        )
    )
    assert f"FMN's, at the boundary, are rejected in {fmn.format('of cases ')}" in readme
    assert f"DeepFool's, a bit past it, in {deepfool.format('')}" in readme
    assert f"PGD that goes on to the end of a budget of 0.5 in {deep.format('')}" in readme


def test_how_much_further_an_attacker_goes_who_knows_the_detector(readme: str) -> None:
    card = (ROOT / "models" / "cifar10" / "card.md").read_text()
    pattern = r"^- In l2, .* of the same images (\S+) \[(\S+), (\S+)\] \(n = (\d+)\) times as far\.$"
    found = re.search(pattern, card, re.MULTILINE)
    assert found
    ratio, lower, upper, n = found.groups()
    assert (
        f"lies {ratio} times as far in l2 as the nearest one found wrong (median, {lower}-{upper}, n = {n})"
        in readme
    )


def test_what_attacks_did_to_the_conformal_radii(readme: str, evaluations: list[Results]) -> None:
    calibration = load(ROOT / "models" / "cifar10").calibration
    assert calibration
    rates = {
        norm: " and ".join(f"{100 * one.violations.value:.1f}%" for one in radii.conformal if one.violations)
        for norm, radii in (("l2", calibration.l2), ("linf", calibration.linf))
    }
    assert f"{rates['l2']} in l2, {rates['linf']} in linf" in readme
    found = [one for one in evaluations[0].radii if one.kind == "conformal"]
    (n,) = {one.violations.n for one in found}
    all_ = {
        norm: " and ".join(
            f"{100 * one.violations.value:.1f}%"
            for one in sorted(found, key=lambda radius: radius.alpha or 0)
            if one.norm == norm
        )
        for norm in rates
    }
    assert f"n = {n}: {all_['l2']} in l2, {all_['linf']} in linf" in readme


@pytest.mark.parametrize("name", ["cifar10", "cifar10-undefended"])
def test_the_card_says_what_the_calibration_says(name: str) -> None:
    bundle = load(ROOT / "models" / name)
    assert bundle.calibration
    card = (bundle.path / "card.md").read_text()
    assert with_calibration(card, bundle.calibration) == card
