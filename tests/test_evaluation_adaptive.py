"""Attacks that know the detector, on models where class, score and acceptance have closed forms."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from guard.attacks import GRADIENT, Floats, Labels, length
from guard.bundle import ScoreName
from guard.decision import Guard
from guard.evaluation import adaptive, ascent, denial, served, transfer
from guard.evaluation.adaptive import ATTACKS, JOINT
from guard.evaluation.ascent import Start
from guard.evaluation.attack import SCORES
from guard.evaluation.target import Target
from guard.norms import Norm
from guard.runtime import Measurement, score_of
from guard.settings import Policy
from tests import networks
from tests.guards import guard_of, target_of
from tests.test_evaluation_gradient import Counting

NORMS: tuple[Norm, Norm] = ("l2", "linf")
SHAPE = (1, 3, 4)
DUAL = {"l2": 2, "linf": 1}
SIZE = 8.0
"""Length of the difference of the two classes' weights."""
RADIUS = 0.1
"""The least radius, and the first-order radius that the scores ask for."""


def two_classes(score: ScoreName, policy: Policy | None = None) -> tuple[Guard, NDArray[np.float64], float]:
    """A guard of two linear classes, w = w_1 - w_0, and the least margin it accepts."""
    w = np.random.default_rng(3).normal(size=12)
    w *= SIZE / np.linalg.norm(w)
    model = networks.linear(np.stack([-w / 2, w / 2]).astype(np.float32), shape=SHAPE)
    depth = SIZE * RADIUS
    p = 1 / (1 + np.exp(-depth))
    jacobian, shallow = p * (1 - p) * SIZE, 1 / (0.5 * RADIUS)
    limits: dict[ScoreName, float] = {
        "jacobian": jacobian,
        "jacobian-full": jacobian,
        "radius": 1 / RADIUS,
        "margin-gradient": SIZE / (1 + np.cosh(depth)),
        "combined": 1.0,
    }
    tests = {"jacobian": jacobian, "radius": shallow} if score == "combined" else None
    return guard_of(model, score, limits[score], tests=tests, policy=policy), w, depth


def batch(w: NDArray[np.float64], count: int = 8) -> tuple[Floats, Labels, NDArray[np.float64]]:
    """Images well inside the box, their classes, and their margins."""
    images = (0.5 + 0.05 * np.random.default_rng(1).standard_normal((count, *SHAPE))).astype(np.float32)
    logit = images.reshape(count, -1).astype(np.float64) @ w
    # moved along w to margins between 1 and 2, of either class
    wanted = np.linspace(1, 2, count) * np.where(np.arange(count) % 2, 1, -1)
    images += ((wanted - logit)[:, None] * w / SIZE**2).reshape(images.shape).astype(np.float32)
    assert images.min() > 0.1
    assert images.max() < 0.9
    return images, (wanted > 0).astype(np.int64), np.abs(wanted)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("score", SCORES)
def test_joint_attack_succeeds_exactly_where_the_budget_reaches_deep_enough(
    score: ScoreName, norm: Norm
) -> None:
    guard, w, depth = two_classes(score)
    images, labels, margin = batch(w)
    exact = (margin + depth) / np.linalg.norm(w, ord=DUAL[norm])
    options: dict[str, Any] = {"score": score, "norm": norm, "steps": 6, "deep_steps": 6, "starts": JOINT[:2]}
    short = adaptive.joint(target_of(guard), images, labels, 0.98 * exact, **options)
    assert not short.success.any()
    assert np.isinf(short.distance).all()
    # of failures, the wrong image that comes nearest to being accepted
    assert (guard.detector.logits(short.images).argmax(axis=1) != labels).all()
    far = adaptive.joint(target_of(guard), images, labels, 1.02 * exact, **options)
    assert far.success.all()
    assert (far.distance <= 1.02 * exact * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("adapt", [False, True])
def test_a_least_radius_is_met_by_going_deeper(norm: Norm, adapt: bool) -> None:
    least = 0.05 if norm == "linf" else 0.2
    policy = Policy(min_radius_l2=least) if norm == "l2" else Policy(min_radius_linf=least)
    guard, w, _ = two_classes("jacobian", policy)
    images, labels, margin = batch(w)
    exact = margin / np.linalg.norm(w, ord=DUAL[norm]) + least
    options: dict[str, Any] = {"score": "jacobian", "norm": norm, "starts": JOINT[:2], "adaptive": adapt}
    assert not adaptive.joint(
        target_of(guard), images, labels, 0.98 * exact, steps=5, **options
    ).success.any()
    assert adaptive.joint(target_of(guard), images, labels, 1.02 * exact, steps=5, **options).success.all()


def test_following_the_detector_brings_more_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Unlike those of two linear classes, rows of this network's Jacobian do not shrink wherever margins grow.
    model, images = networks.convolutional(scale=20.0, classes=4), networks.images(120)
    loose = guard_of(model, "jacobian", 1.0, row_bound=1e6)
    scores = score_of(loose.measure(images), "jacobian")
    guard = guard_of(model, "jacobian", float(np.quantile(scores, 0.1)), row_bound=1e6)
    taken = images[[decision.accepted for decision in guard.classify(images)]]
    labels = guard.detector.logits(taken).argmax(axis=1)

    def past() -> int:
        options: dict[str, Any] = {"score": "jacobian", "norm": "linf", "steps": 10, "deep_steps": 10}
        found = [
            adaptive.joint(target_of(guard), taken, labels, eps, **options) for eps in (0.02, 0.03, 0.05)
        ]
        return sum(int(one.success.sum()) for one in found)

    following = past()
    monkeypatch.setattr(adaptive, "descent", lambda _m, points, _j, rows: np.zeros_like(points[rows]))
    assert following > past()


def test_a_wrong_image_on_the_boundary_is_kept_before_a_right_one() -> None:
    # Equal logits: class 0 is predicted, the margin is 0 and the inverse of the radius infinite.
    guard = guard_of(networks.linear(np.eye(2, 12, dtype=np.float32), shape=SHAPE), "radius", 1.0)
    images = np.zeros((2, *SHAPE), np.float32)
    images[1, 0, 0, 1] = 1.0
    labels = np.array([1, 1])
    judged = served.judge(target_of(guard), images, labels, "radius")
    assert judged.wrong.tolist() == [True, False]
    assert np.isinf(judged.excess[0])
    merit = ascent.merit(judged, judged.verdict.measurement.logits, np.array([0, 0]))
    assert merit[0] > merit[1]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("score", ["jacobian", "radius"])
def test_nearest_accepted_image_lies_at_the_known_distance(score: ScoreName, norm: Norm) -> None:
    guard, w, depth = two_classes(score)
    images, labels, margin = batch(w, 6)
    exact = (margin + depth) / np.linalg.norm(w, ord=DUAL[norm])
    found = adaptive.nearest_accepted(target_of(guard), images, labels, score=score, norm=norm, steps=30)
    assert found.success.all()
    assert (found.distance >= exact * (1 - 1e-4)).all()
    assert found.distance == pytest.approx(exact, rel=0.01)
    assert length(found.images - images, norm) == pytest.approx(found.distance)


@pytest.mark.parametrize("score", ["jacobian", "radius"])
def test_evasive_carlini_wagner_lands_near_the_optimum(score: ScoreName) -> None:
    guard, w, depth = two_classes(score)
    images, labels, margin = batch(w, 4)
    exact = (margin + depth) / SIZE
    found = adaptive.evasive_carlini_wagner(target_of(guard), images, labels, score=score, steps=50)
    assert found.success.all()
    assert (found.distance >= exact * (1 - 1e-3)).all()
    assert found.distance == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("score", SCORES)
def test_denial_makes_clean_images_rejected_without_another_class(score: ScoreName, norm: Norm) -> None:
    guard, w, depth = two_classes(score)
    images, labels, margin = batch(w)
    assert guard.classify(images)[0].accepted
    exact = (margin - depth) / np.linalg.norm(w, ord=DUAL[norm])
    options: dict[str, Any] = {"score": score, "norm": norm, "steps": 6}
    assert not denial.deny(target_of(guard), images, labels, 0.97 * exact, **options).success.any()
    found = denial.deny(target_of(guard), images, labels, 1.03 * exact, **options)
    assert found.success.all()
    assert not any(decision.accepted for decision in guard.classify(found.images))
    assert [decision.label for decision in guard.classify(found.images)] == labels.tolist()


def test_evasive_carlini_wagner_moves_black_and_white_pixels() -> None:
    guard, w, depth = two_classes("jacobian")
    images = np.round(np.random.default_rng(1).random((200, *SHAPE), dtype=np.float32))
    logit = images.reshape(200, -1).astype(np.float64) @ w
    images, logit = images[np.abs(logit) < 1][:6], logit[np.abs(logit) < 1][:6]
    labels = (logit > 0).astype(np.int64)
    found = adaptive.evasive_carlini_wagner(target_of(guard), images, labels, score="jacobian")
    assert found.success.all()
    assert (found.distance >= (np.abs(logit) + depth) / SIZE * 0.999).all()


def test_the_longest_row_is_lowered_whichever_it_is() -> None:
    # Classes 0 and 1 share their weights: the row of class 2 is the longest although it is the last.
    w = np.random.default_rng(0).normal(size=12)
    size = float(np.linalg.norm(w))
    weight = np.stack([0 * w, 0 * w, w]).astype(np.float32)
    bias = np.log([0.5, 0.3, 0.2]).astype(np.float32)
    guard = guard_of(networks.linear(weight, bias, shape=SHAPE), "jacobian", 0.12 * size, row_bound=1e6)
    # p_2 (1 - p_2) ||w|| = 0.16 ||w||, where the first row is p_0 p_2 ||w|| = 0.1 ||w||
    image = np.zeros((1, *SHAPE), np.float32)
    judged = served.judge(target_of(guard), image, np.array([1]), "jacobian")
    assert judged.excess == pytest.approx([np.log(0.16 / 0.12)], rel=1e-5)
    down = served.descent(guard.detector, image, judged, np.arange(1))
    # d log p_2 (1 - p_2) = (1 - 2 p_2) dz_2 along w
    assert down.reshape(-1) == pytest.approx(-0.6 * w, rel=0.01, abs=1e-3)


@pytest.mark.parametrize("score", SCORES)
def test_descent_is_minus_the_gradient_of_what_is_exceeded(score: ScoreName) -> None:
    weight = 4 * np.random.default_rng(5).normal(size=(4, 12)).astype(np.float32)
    tests = {"jacobian": 0.5, "radius": 1.0} if score == "combined" else None
    guard = guard_of(networks.linear(weight, shape=SHAPE), score, 1.0, tests=tests, row_bound=1e6)
    target = target_of(guard)
    images = networks.images(16, SHAPE)
    margin = guard.measure(images).margin
    # Beside the boundary a radius changes too fast; far from it, float32 has no digits left for 1 - p.
    images = images[(margin > 1) & (margin < 8)]
    labels = np.zeros(len(images), np.int64)
    assert len(images) > 4
    down = served.descent(
        guard.detector, images, served.judge(target, images, labels, score), np.arange(len(images))
    )
    along = np.asarray(np.random.default_rng(2).standard_normal(images.shape), np.float32)
    here, ahead, behind = (
        served.judge(target, images + np.float32(side * 2e-3) * along, labels, score).excess
        for side in (0, 1, -1)
    )
    slope = -(down.astype(np.float64) * along).sum(axis=(1, 2, 3))
    # A longest row is a maximum: where another takes over within the step, one side knows.
    fits = [
        np.isclose(slope, difference, rtol=0.05, atol=0.1)
        for difference in ((ahead - here) / 2e-3, (here - behind) / 2e-3, (ahead - behind) / 4e-3)
    ]
    assert np.any(fits, axis=0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_least_radius_is_followed_with_the_slope_that_is_served(norm: Norm) -> None:
    # Behind the third class at a typical slope lies most of what makes these radii small.
    weight = 4 * np.random.default_rng(5).normal(size=(4, 12)).astype(np.float32)
    model = networks.linear(weight, shape=SHAPE)
    policy = Policy(min_radius_l2=9.0) if norm == "l2" else Policy(min_radius_linf=9.0)
    radii = guard_of(model, "jacobian", 1e6).calibration.radii(norm).model_copy(update={"slope": 60.0})
    changes: dict[str, Any] = {norm: radii}
    guard = guard_of(model, "jacobian", 1e6, policy=policy, **changes)
    target = target_of(guard)
    images = networks.images(40, SHAPE)
    images = images[guard.measure(images).margin > 1][:8]
    labels = np.zeros(len(images), np.int64)
    judged = served.judge(target, images, labels, "jacobian")
    assert set(judged.worst) == {f"min-radius-{norm}"}
    down = served.descent(guard.detector, images, judged, np.arange(len(images)))
    along = np.asarray(np.random.default_rng(2).standard_normal(images.shape), np.float32)
    ahead, behind = (
        served.judge(target, images + np.float32(side * 2e-3) * along, labels, "jacobian").excess
        for side in (1, -1)
    )
    slope = -(down.astype(np.float64) * along).sum(axis=(1, 2, 3))
    assert slope == pytest.approx((ahead - behind) / 4e-3, rel=0.05, abs=0.05)


def test_only_the_less_likely_class_evades_a_planted_detector() -> None:
    # Along the first pixel: class 1 begins at 0.9, and the box ends before it is deep; class 2 begins at 0.6,
    # with room below. The first-order radius asked for is 0.15.
    weight, bias = np.zeros((3, 12), np.float32), np.zeros(3, np.float32)
    weight[1, 0], bias[1] = 10, -9
    weight[2, 0], bias[2] = -10, 6
    guard = guard_of(networks.linear(weight, bias, shape=SHAPE), "radius", 1 / 0.15)
    images = np.full((4, *SHAPE), 0.5, np.float32)
    images.reshape(4, -1)[:, 0] = 0.8
    labels = np.zeros(4, np.int64)
    options: dict[str, Any] = {"score": "radius", "norm": "l2", "steps": 6, "deep_steps": 6}
    stuck = adaptive.joint(
        target_of(guard), images, labels, 0.36, starts=(Start("cross-entropy"),), **options
    )
    assert not stuck.success.any()
    found = adaptive.joint(target_of(guard), images, labels, 0.36, **options)
    assert found.success.all()
    assert guard.detector.logits(found.images).argmax(axis=1).tolist() == [2] * 4


@pytest.fixture(scope="module")
def curved() -> tuple[Guard, Floats, Labels]:
    """A convolutional network behind the median of its clean scores, and images that it accepts."""
    model = networks.convolutional(scale=20.0, classes=4)
    images = networks.images(40)
    scores = guard_of(model, "jacobian", 1.0, row_bound=1e6).measure(images).jacobian
    guard = guard_of(model, "jacobian", float(np.median(scores)), row_bound=1e6)
    accepted = np.array([decision.accepted for decision in guard.classify(images)])
    return guard, images[accepted][:12], guard.detector.logits(images[accepted][:12]).argmax(axis=1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("adapt", [False, True])
def test_success_is_what_the_server_would_say(
    curved: tuple[Guard, Floats, Labels], norm: Norm, adapt: bool
) -> None:
    guard, images, labels = curved
    eps = 0.8 if norm == "l2" else 0.08
    options: dict[str, Any] = {"score": "jacobian", "norm": norm, "adaptive": adapt, "steps": 6}
    found = adaptive.joint(target_of(guard), images, labels, eps, **options)
    assert found.success.any()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert (length(found.images - images, norm) <= eps * (1 + 1e-5)).all()
    assert (np.isfinite(found.distance) == found.success).all()
    for image, label, success in zip(found.images, labels, found.success, strict=True):
        (decision,) = guard.classify(image[None])
        assert (decision.accepted and decision.label != label) == success
    again = adaptive.joint(target_of(guard), images, labels, eps, **options)
    assert (again.images == found.images).all()
    tiny = adaptive.joint(target_of(guard), images, labels, 1e-4, **options)
    assert not tiny.success.any()


def test_high_confidence_is_no_better_than_what_follows_it(curved: tuple[Guard, Floats, Labels]) -> None:
    guard, images, labels = curved
    options: dict[str, Any] = {"score": "jacobian", "norm": "l2"}
    deep = adaptive.joint(target_of(guard), images, labels, 0.6, steps=0, **options)
    found = adaptive.joint(target_of(guard), images, labels, 0.6, steps=6, **options)
    assert (found.success >= deep.success).all()


def test_transfer_from_a_twin() -> None:
    guard, w, depth = two_classes("jacobian")
    images, labels, margin = batch(w)
    far = (margin + depth) / SIZE * 1.02
    opposite = guard_of(
        networks.linear(np.stack([w / 2, -w / 2]).astype(np.float32), shape=SHAPE), "jacobian", 1.0
    )
    for score, reach in ((None, margin / SIZE * 1.02), ("jacobian", far)):
        options: dict[str, Any] = {"norm": "l2", "score": score, "steps": 6}
        same = transfer.transfer(guard.detector, target_of(guard), images, labels, reach, **options)
        assert same.success.all()
        other = transfer.transfer(opposite.detector, target_of(guard), images, labels, reach, **options)
        assert not other.success.any()
    names = {attack.name for attack in transfer.attacks(guard.detector, ["radius"])}
    assert names == {f"transfer-{norm}" for norm in NORMS} | {
        f"transfer-accepted-radius-{norm}" for norm in NORMS
    }


def test_every_score_and_norm_has_its_attacks() -> None:
    names = [attack.name for attack in (*ATTACKS, *denial.ATTACKS)]
    assert len(set(names)) == len(names)
    assert {"joint-pgd-l2", "joint-apgd-linf", "joint-pgd-radius-l2", "evasive-cw-l2"} <= set(names)
    for attack in (*ATTACKS, *denial.ATTACKS):
        assert attack.norm is not None
        assert attack.name.endswith(f"-{attack.norm}")
    for score in SCORES:
        assert {attack.norm for attack in ATTACKS if attack.aware == score} == set(NORMS)


@pytest.mark.parametrize("norm", NORMS)
def test_what_attacks_cost_is_never_above_what_is_registered(
    norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Deeper in a class than any image lies: all turn wrong, none is accepted, and no attack ends early.
    guard, w, _ = two_classes("radius")
    monkeypatch.setattr(guard, "calibration", guard.calibration.model_copy(update={"threshold": 1e-3}))
    counting = Counting(guard.detector)
    images, labels, _ = batch(w, 1)
    measure = guard.measure

    def measured(some: Floats) -> Measurement:
        counting.passes += served.JUDGED * len(some)
        return measure(some)

    monkeypatch.setattr(guard, "measure", measured)
    for attack in ATTACKS:
        if attack.aware == "radius" and attack.norm == norm:
            counting.passes = 0
            target = Target(counting, {"radius": guard})
            found = attack.run(target, images, labels, None if attack.budgets is None else 1.0, 0)
            assert not found.success.any()
            assert found.passes is not None
            assert found.passes[0] == counting.passes, attack.name
            # two classes spare it some starts
            assert 0.5 * attack.passes < counting.passes <= attack.passes, attack.name


def test_starts_that_two_classes_cannot_tell_apart_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Start] = []
    ascend = ascent.ascend

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(arguments[4])
        return ascend(*arguments, **options)

    for module in (adaptive, transfer):
        monkeypatch.setattr(module, "ascend", noted)
    guard, w, _ = two_classes("radius")
    images, labels, _ = batch(w, 2)
    options: dict[str, Any] = {"score": "radius", "norm": "l2", "steps": 1}
    adaptive.joint(target_of(guard), images, labels, 0.01, deep_steps=1, **options)
    assert made == [JOINT[0], Start("margin"), JOINT[2], JOINT[4]]
    made.clear()
    transfer.transfer(guard.detector, target_of(guard), images, labels, 0.01, **options)
    assert made == [Start("cross-entropy"), Start("margin"), Start("cross-entropy", random=True)]


def test_no_step_is_computed_that_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noting(name: str) -> None:
        original = getattr(adaptive, name)

        def noted(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(adaptive, name, noted)

    noting("judge")
    noting("_pull")
    guard, w, _ = two_classes("radius")
    images, labels, _ = batch(w, 2)
    kept = ascent.Kept(1 - images, np.ones(2, np.bool_), np.full(2, -9.0), np.zeros(2, np.int64))
    adaptive._shrink(target_of(guard), images, labels, kept, score="radius", norm="l2", steps=5)
    assert (calls.count("judge"), calls.count("_pull")) == (5, 4)
    calls.clear()
    found = adaptive.evasive_carlini_wagner(
        target_of(guard), images, labels, score="radius", steps=5, searches=1
    )
    assert not found.success.any()
    assert calls.count("judge") == 5
    assert found.passes is not None
    assert (found.passes <= 5 * served.JUDGED + 4 * adaptive.PULLED).all()


def test_steps_of_joint_apgd_are_halved_where_nothing_improves(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, w, _ = two_classes("radius")
    monkeypatch.setattr(guard, "calibration", guard.calibration.model_copy(update={"threshold": 1e-3}))
    rates: list[float] = []
    moved = ascent.moved

    def noted(*arguments: Any) -> Floats:
        rates.append(float(arguments[3][0]))
        return moved(*arguments)

    monkeypatch.setattr(adaptive, "moved", noted)
    images, labels, _ = batch(w, 1)
    options: dict[str, Any] = {"score": "radius", "norm": "l2", "starts": JOINT[:1], "deep_steps": 10}
    adaptive.joint(target_of(guard), images, labels, 0.8, adaptive=True, steps=20, **options)
    assert len(rates) == 20
    assert rates[:4] == [0.4] * 4
    assert rates[-1] <= 0.1
    assert set(np.diff(np.log2(rates)).round(6)) <= {0.0, -1.0}


def test_a_search_of_the_evasive_attack_starts_at_the_nearest_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard, w, _ = two_classes("radius")
    images, labels, _ = batch(w, 1)
    points: list[Floats] = []
    judge = served.judge

    def noted(*arguments: Any) -> Any:
        points.append(arguments[1])
        return judge(*arguments)

    monkeypatch.setattr(adaptive, "judge", noted)
    options: dict[str, Any] = {"score": "radius", "steps": 60}
    first = adaptive.evasive_carlini_wagner(target_of(guard), images, labels, searches=1, **options)
    assert first.success.all()
    points.clear()
    second = adaptive.evasive_carlini_wagner(target_of(guard), images, labels, searches=2, **options)
    assert points[0] == pytest.approx(images, abs=1e-6)
    assert points[60] == pytest.approx(first.images, abs=1e-6)
    assert (second.distance <= first.distance).all()


def test_the_cost_is_counted_per_image_until_it_succeeds() -> None:
    guard, w, _ = two_classes("radius")
    images, labels, _ = batch(w, 2)
    for attack in (*ATTACKS, *denial.ATTACKS):
        if attack.aware == "radius" and attack.norm == "l2":
            budget = None if attack.budgets is None else 0.5
            found = attack.run(target_of(guard), images, labels, budget, 0)
            assert found.passes is not None
            assert (found.passes >= served.JUDGED).all()
            assert (found.passes < 0.5 * attack.passes).all(), attack.name
    near, far = 0.02, 0.5
    first = adaptive.joint(
        target_of(guard), images, labels, np.array([near, far]), score="radius", norm="l2", deep_steps=6
    )
    assert first.success.tolist() == [False, True]
    assert first.passes is not None
    assert first.passes[1] == 6 * GRADIENT + served.JUDGED
    assert first.passes[0] > 10 * first.passes[1]
    twin = transfer.transfer(guard.detector, target_of(guard), images, labels, far, norm="l2", steps=6)
    assert twin.passes is not None
    assert twin.passes.tolist() == [6 * GRADIENT] * 2


def test_attacks_run_in_their_one_shape() -> None:
    guard, w, _ = two_classes("radius")
    images, labels, _ = batch(w, 2)
    for attack in (*ATTACKS, *denial.ATTACKS):
        if attack.aware == "radius" and attack.norm == "l2":
            budget = None if attack.budgets is None else 0.5
            found = attack.run(target_of(guard), images, labels, budget, 0)
            assert found.success.all(), attack.name
            assert found.images.dtype == np.float32
            nothing = attack.run(target_of(guard), images[:0], labels[:0], budget, 0)
            assert len(nothing.images) == 0
    with pytest.raises(ValueError, match="budget is None"):
        ATTACKS[0].run(target_of(guard), images, labels, None, 0)
