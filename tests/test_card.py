from typing import Any

from guard.bundle import Calibration
from guard.card import (
    HEADING,
    UNATTACKED,
    UNCALIBRATED,
    calibration_section,
    with_calibration,
    with_section,
    without_attacks,
)

SHARE = {"count": 9, "n": 100, "value": 0.09, "lower": 0.04, "upper": 0.16}
RADII: dict[str, Any] = {
    "lipschitz": 2.0,
    "omega": {"eps": [1.0], "values": [[0.1]]},
    "violations": SHARE | {"count": 1, "value": 0.01},
    "mean_radius": 0.25,
    "mean_distance": 0.5,
    "tightness": 0.5,
    "attack": {},
    "effort": {},
}


def record(**more: Any) -> Calibration:
    values: dict[str, Any] = {
        "model_sha256": "0" * 64,
        "graph_version": 1,
        "score": "jacobian",
        "fpr": 0.05,
        "threshold": 2.45,
        "n": 100,
        "seed": 0,
        "data": {"name": "cifar10", "n": 400, "digest": "abc"},
        "folds": {"threshold": 100, "report": 200},
        "predicted_fpr": {"lower": 0.02, "upper": 0.1, "level": 0.95, "m": 200},
        "realized_fpr": SHARE,
        "row_bound": 3.0,
        "agreement": [{"images": "clean", "n": 50, "agree": 50}],
        "histogram": {"edges": [0.0, 1.0], "counts": [1]},
        "l2": RADII,
        "linf": RADII | {"conformal": {"alpha": 0.01, "kappa": 0.7, "n": 500, "suite": ["minimum-norm"]}},
        "provenance": {"arguments": {"bundle": "models/a b", "val": "cifar10", "fpr": 0.05, "threads": None}},
    }
    return Calibration.model_validate(values | more)


def test_the_section_says_what_was_measured_and_how() -> None:
    card = with_calibration("", record(accuracy=SHARE | {"value": 0.91}))
    assert card.startswith(HEADING)
    for words in (
        "    guard calibrate 'models/a b' --fpr 0.05 --val cifar10\n",
        "| promised false positive rate | at most 5%, on average over calibration sets |",
        "| predicted on the report fold (95%) | 2.0% to 10.0% |",
        "| realized | 9.00% (9 of 100; 95% interval 4.00% to 16.00%) |",
        "| accuracy | 91.00%",
        "| same decision as the full Jacobian's, clean | 50 of 50 |",
        "| mean omega-bound radius (estimate) | 0.2500 | 0.2500 |",
        "| conformal radius at alpha 1% | none | 0.700 of the first-order radius |",
    ):
        assert words in card
    assert "with probability 95%" in with_calibration("", record(guarantee="pac", delta=0.05))
    strict = with_calibration("", record(guarantee="pac", delta=0.001, fpr=0.0125))
    assert "at most 1.25%, with probability 99.9% over" in strict
    assert "accuracy" not in with_calibration("", record())


def test_a_first_calibration_replaces_the_notice_that_there_is_none() -> None:
    card = with_calibration(f"# Name\n\n{UNCALIBRATED}", record())
    assert card == f"# Name\n\n{calibration_section(record())}"


def test_the_section_is_replaced_wherever_it_stands() -> None:
    once = with_calibration("# net\n\nWords.\n\n## Licence\n\nFree.\n", record())
    assert once.startswith("# net\n\nWords.\n\n## Licence\n\nFree.\n\n")
    assert with_calibration(once, record()) == once
    between = with_calibration(f"# net\n\n{HEADING}\n\nStale.\n\n## Licence\n", record())
    assert "Stale" not in between
    assert between.count(HEADING) == 1
    assert between.endswith("\n\n## Licence\n")


def test_other_sections_are_kept_and_replaced_alike() -> None:
    card = with_calibration("# Name\n", record())
    attacked = with_section(card, "## Attacks\n\nten\n")
    assert attacked == f"{card.rstrip()}\n\n## Attacks\n\nten\n"
    assert with_section(attacked, "## Attacks\n\ntwo\n") == attacked.replace("ten", "two")
    assert with_calibration(attacked, record()) == attacked


def test_only_a_card_that_tells_of_attacks_loses_them() -> None:
    assert without_attacks("# A\n\n## Use\n") == "# A\n\n## Use\n"
    changed = without_attacks("## Attacks\n\nNone.\n\n## Use\n")
    assert changed == f"{UNATTACKED}\n## Use\n"
    assert without_attacks(changed) == changed
