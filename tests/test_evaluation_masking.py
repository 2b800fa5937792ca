from typing import Any

import numpy as np
import pytest

from guard.attacks import Floats, Labels
from guard.evaluation import masking
from guard.evaluation.results import AttackResult, Check, Finished
from guard.runtime import Detector
from guard.shares import share
from tests import networks
from tests.guards import guard_of, target_of

BUDGETS: Any = {"l2": 0.2, "linf": 0.1}
SHAPE = (1, 2, 2)


def linear_graph() -> Any:
    """Margin of class 0: twice the mean of the image, less 1."""
    weight = np.array([[0.25] * 4, [-0.25] * 4], np.float32)
    return networks.linear(weight, np.array([-0.5, 0.5], np.float32))


def linear_model() -> Detector:
    return Detector(linear_graph(), provider="cpu", threads=1)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


class Masked:
    """The same decisions, whose gradient says nothing: always zero, or against the slope."""

    def __init__(self, factor: float) -> None:
        self.model, self.factor = linear_model(), np.float32(factor)

    def logits(self, images: Floats) -> Floats:
        return self.model.logits(images)

    def loss_gradient(self, images: Floats, labels: Labels, loss: Any) -> tuple[Floats, Floats, Floats]:
        logits, value, gradient = self.model.loss_gradient(images, labels, loss)
        return logits, value, self.factor * gradient


def images_at(*means: float) -> tuple[Floats, Labels]:
    images = np.stack([np.full(SHAPE, mean, np.float32) for mean in means])
    return images, (images.mean(axis=(1, 2, 3)) < 0.5).astype(np.int64)


def test_an_open_model_passes_every_check() -> None:
    images, labels = images_at(0.55, 0.58, 0.45, 0.8, 0.1, 0.95)
    probed = masking.probe(linear_model(), images, labels, BUDGETS)
    # Means move by at most 0.1 within either budget.
    expected = [True, True, True, False, False, False]
    for norm in ("l2", "linf"):
        for steps in masking.STEPS:
            assert probed[f"{norm}-{steps}"].tolist() == expected
        assert not probed[f"{norm}-random"].any()
    assert probed["unbounded"].all()
    checks = masking.checks([], probed, BUDGETS)
    verdicts = [check.verdict for check in checks]
    assert verdicts.count("passed") == 7
    assert verdicts.count("not run") == 4


def test_no_gradient_is_found_out() -> None:
    images, labels = images_at(*np.linspace(0.501, 0.54, 60))
    probed = masking.probe(Masked(0.0), images, labels, BUDGETS)
    checks = by_name(masking.checks([], probed, BUDGETS))
    unbounded = checks["an unbounded attack always succeeds"]
    assert unbounded.verdict == "failed"
    assert unbounded.found == f"{int(probed['unbounded'].sum())} of 60 images"
    random = checks["random search finds nothing that PGD does not, linf"]
    assert random.verdict == "failed"
    assert random.numbers["left by PGD"] == 60
    assert random.numbers["random alone"] >= 30


class RightAtStart(Masked):
    """The same decisions, whose gradient leads astray everywhere but at the images given."""

    def __init__(self, images: Floats) -> None:
        super().__init__(1.0)
        self.images = images

    def loss_gradient(self, images: Floats, labels: Labels, loss: Any) -> tuple[Floats, Floats, Floats]:
        logits, value, gradient = super().loss_gradient(images, labels, loss)
        shift = np.abs(images[:, np.newaxis] - self.images).max(axis=(2, 3, 4)).min(axis=1)
        return (
            logits,
            value,
            np.where(shift[:, np.newaxis, np.newaxis, np.newaxis] < 1e-6, gradient, -gradient),
        )


def test_a_gradient_that_is_right_at_the_image_alone_is_found_out() -> None:
    images, labels = images_at(*np.linspace(0.55, 0.59, 60))
    checks = by_name(
        masking.checks([], masking.probe(RightAtStart(images), images, labels, BUDGETS), BUDGETS)
    )
    for norm in ("l2", "linf"):
        assert checks[f"more steps are stronger, {norm}"].verdict == "failed"
        once = checks[f"many steps beat one, {norm}"]
        assert once.verdict == "failed"
        assert once.found.startswith("60 of 60 images")


def test_random_search_is_not_run_on_what_pgd_broke() -> None:
    images, labels = images_at(0.52)
    probed = masking.probe(linear_model(), images, labels, BUDGETS)
    assert not probed["l2-random"].any()


def probed(**counts: int) -> dict[str, Any]:
    n = 200
    names = [f"{norm}-{steps}" for norm in ("l2", "linf") for steps in masking.STEPS]
    arrays: dict[str, Any] = {name: np.arange(n) < counts.get(name.replace("-", "_"), 100) for name in names}
    arrays |= {f"{norm}-random": np.zeros(n, bool) for norm in ("l2", "linf")}
    return arrays | {"unbounded": np.ones(n, bool)}


@pytest.mark.parametrize(("lost", "verdict"), [(0, "passed"), (2, "passed"), (3, "failed")])
def test_more_steps_may_lose_one_in_a_hundred(lost: int, verdict: str) -> None:
    checks = by_name(masking.checks([], probed(l2_80=100 - lost), BUDGETS))
    assert checks["more steps are stronger, l2"].verdict == verdict
    assert checks["more steps are stronger, linf"].verdict == "passed"


def test_where_nothing_falls_attacks_are_not_compared() -> None:
    nothing = probed(**{f"l2_{steps}": 0 for steps in masking.STEPS})
    found = [finished("pgd-l2", "gradients", [], 0.2), finished("square-l2", "scores", [], 0.2)]
    checks = by_name(masking.checks(found, nothing, BUDGETS))
    assert {name for name, check in checks.items() if check.verdict == "undecided"} == {
        "more steps are stronger, l2",
        "many steps beat one, l2",
        "random search finds nothing that PGD does not, l2",
        "gradients beat search by queries, l2",
    }
    nothing["l2-random"][:3] = True
    checks = by_name(masking.checks([], nothing, BUDGETS))
    assert checks["random search finds nothing that PGD does not, l2"].verdict == "failed"


def test_one_step_better_than_many() -> None:
    checks = by_name(masking.checks([], probed(linf_20=90, linf_80=90, linf_5=90), BUDGETS))
    check = checks["many steps beat one, linf"]
    assert check.verdict == "failed"
    assert check.found == "10 of 200 images; one step breaks 100, 20 break 90"


def finished(name: str, knowledge: Any, wrong: list[int], reach: float, **changes: Any) -> Finished:
    rows = np.arange(100)
    flags = np.isin(rows, wrong)
    result: dict[str, Any] = {
        "name": name,
        "title": name,
        "norm": "l2",
        "unit": "",
        "budget": None,
        "knowledge": knowledge,
        "aware": None,
        "source": "",
        "n": 100,
        "success": share(flags),
        "distance": None,
        "passes": 1,
        "seconds": 1,
        "file": "",
    }
    arrays = {"row": rows, "wrong": flags, "l2": np.full(100, reach), "linf": np.full(100, reach)}
    return Finished(AttackResult(**(result | changes)), arrays)


def test_queries_better_than_gradients() -> None:
    white = finished("pgd-l2", "gradients", [0, 1, 2], 0.2)
    black = finished("square-l2", "scores", [2, 3, 4], 0.2)
    name = "gradients beat search by queries, l2"
    check = by_name(masking.checks([white, black], probed(), BUDGETS))[name]
    assert check.verdict == "failed"
    assert check.found == "2 of 100 images; search by queries breaks 3, gradients 3"
    transfer = finished("transfer-l2", "another network", [2, 3, 4], 0.2, budget=0.2)
    by = by_name(masking.checks([white, transfer], probed(), BUDGETS))
    assert by[name].verdict == "not run"
    assert by["gradients beat transfer, l2"].verdict == "failed"
    # Beyond the budget nothing counts, by whatever attack it was found.
    far = finished("square-l2", "scores", [2, 3, 4], 0.3)
    assert by_name(masking.checks([white, far], probed(), BUDGETS))[name].verdict == "undecided"
    some = finished("square-l2", "scores", [2], 0.2)
    assert by_name(masking.checks([white, some], probed(), BUDGETS))[name].verdict == "passed"
    # The whole AutoAttack searches by queries too: what it finds need not be found by gradients.
    whole = finished("autoattack-l2", "gradients", [0, 1, 2, 3, 4], 0.2, budget=0.2)
    assert by_name(masking.checks([white, whole, black], probed(), BUDGETS))[name].verdict == "failed"
    aware = finished("http-l2", "scores", [2, 3, 4], 0.2, aware="jacobian")
    assert by_name(masking.checks([white, aware], probed(), BUDGETS))[name].verdict == "not run"


@pytest.mark.parametrize("aim", [{"norm": "linf"}, {"budget": 0.5}])
def test_attacks_aimed_elsewhere_are_not_compared(aim: dict[str, Any]) -> None:
    white = finished("pgd-l2", "gradients", [0, 1, 2], 0.2)
    black = finished("square-l2", "scores", [2, 3, 4], 0.2)
    name = "gradients beat search by queries, l2"
    at_this_budget = finished("square-l2", "scores", [2, 3, 4], 0.2, budget=0.2)
    assert by_name(masking.checks([white, at_this_budget], probed(), BUDGETS))[name].verdict == "failed"
    for pair in (
        (finished("weak", "gradients", [0], 0.2, **aim), black),
        (white, finished("weak", "scores", [0], 0.2, **aim)),
    ):
        check = by_name(masking.checks(pair, probed(), BUDGETS))[name]
        assert check.verdict == "not run"
        assert check.found.startswith("no attacks of both kinds at this budget")


def test_passes_are_an_upper_bound() -> None:
    class Counting(Masked):
        passes = 0

        def logits(self, images: Floats) -> Floats:
            self.passes += len(images)
            return super().logits(images)

        def loss_gradient(self, images: Floats, labels: Labels, loss: Any) -> tuple[Floats, Floats, Floats]:
            self.passes += 3 * len(images)
            return super().loss_gradient(images, labels, loss)

    model = Counting(0.0)
    images, labels = images_at(0.9, 0.99)
    masking.probe(model, images, labels, BUDGETS)
    assert model.passes == masking.PASSES * 2


@pytest.mark.parametrize(("threshold", "verdict"), [(10.0, "passed"), (1e-9, "failed")])
def test_a_detector_that_lets_nothing_wrong_pass_looks_masked(threshold: float, verdict: str) -> None:
    guard = guard_of(linear_graph(), "jacobian", threshold)
    images, labels = images_at(0.55, 0.58, 0.45)
    probed = masking.probe_detector(target_of(guard), images, labels, "jacobian")
    check = masking.detector_checks([], probed, BUDGETS, "jacobian")[0]
    assert check.verdict == verdict
    assert check.found == f"{3 if verdict == 'passed' else 0} of 3 images"


def knowing(name: str, knowledge: Any, past: list[int], left: list[int], **changes: Any) -> Finished:
    """An attack on the rows `left` that brings `past` of them past the detector, having spared the others of
    100."""
    one = finished(name, knowledge, past, 0.2, aware="jacobian", **changes)
    arrays = {name: values[left] for name, values in one.arrays.items()}
    arrays |= {"success": arrays["wrong"], "accepted_jacobian": arrays["wrong"]}
    return Finished(one.result.model_copy(update={"settings": {"skipped": 100 - len(left)}}), arrays)


@pytest.mark.parametrize(("found", "verdict"), [([7], "passed"), ([6, 7], "failed")])
def test_more_starts_past_the_detector(found: list[int], verdict: str) -> None:
    none: dict[str, Any] = {"unbounded": np.ones(3, bool)}
    name = "more starts find no more past the detector, l2"
    assert by_name(masking.detector_checks([], none, BUDGETS, "jacobian"))[name].verdict == "not run"
    more = knowing("joint-restarts-l2", "gradients", found, [5, 6, 7], budget=0.2)
    check = by_name(masking.detector_checks([more], none, BUDGETS, "jacobian"))[name]
    assert check.verdict == verdict
    assert check.found == f"{len(found)} of 3 images; other attacks bring 0 past it"
    # What an attack finds that came later, or from another folder, is not more than there was.
    too = knowing("nearest-accepted-l2", "gradients", [7], [5, 6, 7])
    assert by_name(masking.detector_checks([more, too], none, BUDGETS, "jacobian"))[name].verdict == "passed"
    nothing = knowing("joint-restarts-l2", "gradients", [], [5, 6, 7], budget=0.2)
    assert by_name(masking.detector_checks([nothing], none, BUDGETS, "jacobian"))[name].verdict == "undecided"
    elsewhere = knowing("joint-restarts-l2", "gradients", found, [5, 6, 7], budget=0.5)
    assert by_name(masking.detector_checks([elsewhere], none, BUDGETS, "jacobian"))[name].verdict == "not run"


@pytest.mark.parametrize(("found", "verdict"), [([3, 7], "passed"), ([6, 7], "failed")])
def test_queries_past_the_detector(found: list[int], verdict: str) -> None:
    none: dict[str, Any] = {"unbounded": np.ones(3, bool)}
    name = "gradients beat search by queries past the detector, l2"
    white = knowing("joint-pgd-l2", "gradients", [1, 2, 3], list(range(100)), budget=0.2)
    assert by_name(masking.detector_checks([white], none, BUDGETS, "jacobian"))[name].verdict == "not run"
    black = knowing("http-scores-l2", "scores", found, [3, 5, 6, 7], budget=0.2)
    check = by_name(masking.detector_checks([white, black], none, BUDGETS, "jacobian"))[name]
    assert check.verdict == verdict
    assert check.numbers == {
        "search by queries alone": len(set(found) - {3}),
        "search by queries": 2,
        "n": 4,
        "budget": 0.2,
    }
    nothing = knowing("http-scores-l2", "scores", [], [3, 5, 6, 7], budget=0.2)
    checks = by_name(masking.detector_checks([white, nothing], none, BUDGETS, "jacobian"))
    assert checks[name].verdict == "undecided"
