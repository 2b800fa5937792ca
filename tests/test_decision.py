import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard import bundle as bundles
from guard.bundle import Bundle, Calibration, InputShape, Manifest, Preprocessing, dump
from guard.decision import Decision, Guard, ratio, two_digits
from guard.errors import BundleError, DataError
from guard.files import sha256
from guard.guarded import GRAPH_VERSION
from guard.runtime import Detector
from guard.settings import Policy
from tests.networks import images, linear

WEIGHT = np.array([[4.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 0]], np.float32)
OMEGA = {"eps": [0.25, 0.5, 1.0], "edges": [], "values": [[0.0, 0.0, 0.0]], "reach": [1.0]}


def calibration_record(model_sha256: str, **changes: Any) -> dict[str, Any]:
    share = {"count": 1, "n": 100, "value": 0.01, "upper": 0.047, "lower": 0.0, "level": 0.95}
    radii = {
        "lipschitz": 5.0,
        "omega": OMEGA,
        "violations": share,
        "mean_radius": 0.2,
        "mean_distance": 0.4,
        "tightness": 0.5,
        "attack": {},
        "effort": {},
    }
    return {
        "model_sha256": model_sha256,
        "graph_version": GRAPH_VERSION,
        "score": "jacobian",
        "fpr": 0.05,
        "threshold": 0.5,
        "n": 100,
        "seed": 0,
        "data": {},
        "folds": {},
        "predicted_fpr": {"lower": 0.03, "upper": 0.07, "level": 0.95, "m": 100},
        "realized_fpr": share,
        "row_bound": 0.0,
        "histogram": {"edges": [0.0, 1.0], "counts": [100]},
        "l2": radii,
        "linf": radii,
    } | changes


def write_bundle(
    folder: Path, model: onnx.ModelProto, *, shape: tuple[int, int, int] = (1, 2, 2), **changes: Any
) -> Path:
    """A bundle with a calibration of our choice, so that decisions have closed forms."""
    folder.mkdir(parents=True)
    onnx.save(model, folder / bundles.MODEL)
    record = calibration_record(sha256(folder / bundles.MODEL), **changes)
    calibration = Calibration.model_validate(record)
    (folder / bundles.CALIBRATION).write_bytes(dump(calibration))
    names = {name: sha256(folder / name) for name in (bundles.MODEL, bundles.CALIBRATION)}
    channels, height, width = shape
    manifest = Manifest(
        name="linear",
        input=InputShape(channels=channels, height=height, width=width),
        preprocessing=Preprocessing(colour="rgb" if channels == 3 else "grey"),
        class_names=["cat", "dog", "ship"],
        files=names,
    )
    (folder / bundles.MANIFEST).write_bytes(dump(manifest))
    return folder


def guard_of(folder: Path, *, policy: Policy | None = None, **changes: Any) -> Guard:
    path = write_bundle(folder, linear(WEIGHT), **changes)
    return Guard.from_bundle(path, "cpu", policy=policy or Policy())


def image(*pixels: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(pixels, np.float32).reshape(1, 1, 2, 2)


def dumped(decision: Decision) -> dict[str, Any]:
    """What travels: JSON without NaN or infinity."""
    text = decision.model_dump_json()
    found: dict[str, Any] = json.loads(text)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_answer_of_a_linear_model_has_the_contracts_form_and_closed_values(tmp_path: Path) -> None:
    guard = guard_of(tmp_path / "b", threshold=9.0)
    (decision,) = guard.classify(image(1.0, 0.5, 0, 0))  # logits 4, 1.5, 0
    answer = dumped(decision)
    powers = np.exp([4.0, 1.5, 0.0])
    p = powers / powers.sum()
    expected = WEIGHT.T @ p
    rows = [p[i] * np.linalg.norm(WEIGHT[i] - expected) for i in range(2)]
    assert set(answer) == {
        "label",
        "class_name",
        "probability",
        "top",
        "accepted",
        "reasons",
        "detector",
        "certificate",
        "model",
    }
    assert (answer["label"], answer["class_name"]) == (0, "cat")
    assert answer["probability"] == pytest.approx(p[0], rel=1e-6)
    assert [entry["class_name"] for entry in answer["top"]] == ["cat", "dog", "ship"]
    assert [entry["probability"] for entry in answer["top"]] == pytest.approx(p, rel=1e-6)
    assert answer["accepted"] is True
    assert answer["reasons"] == []
    assert answer["detector"] == {
        "name": "jacobian",
        "score": pytest.approx(max(rows), rel=1e-5),
        "threshold": 9.0,
        "fpr": 0.05,
    }
    assert answer["certificate"]["margin"] == pytest.approx(2.5)
    # ω = 0, so the radius is the margin over its gradient's dual norm: (4, -3), in l2 5, in l1 7.
    assert answer["certificate"]["l2"] == {
        "radius": pytest.approx(0.5),
        "kind": "estimate",
        "method": "omega-bound",
        "violation_rate": 0.01,
        "violation_upper": 0.047,
        "others": [],
    }
    assert answer["certificate"]["linf"]["radius"] == pytest.approx(2.5 / 7, rel=1e-6)
    assert answer["model"] == {"name": "linear", "digest": guard.bundle.digest}
    assert answer["model"]["digest"].startswith("sha256:")


def test_decisions_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    guard = guard_of(tmp_path / "b", threshold=1.0)
    batch = images(20, (1, 2, 2))
    together = guard.classify(batch)
    alone = [guard.classify(single[None])[0] for single in batch]
    assert [d.accepted for d in together] == [d.accepted for d in alone]
    assert len({d.accepted for d in together}) == 2
    assert [d.detector.score for d in together] == pytest.approx([d.detector.score for d in alone], rel=1e-5)
    assert guard.classify(batch[:0]) == []


def test_a_score_equal_to_the_threshold_is_accepted_and_the_next_rejected(tmp_path: Path) -> None:
    probe = guard_of(tmp_path / "probe", threshold=9.0).classify(image(1.0, 0.5, 0, 0))[0]
    score = probe.measured.score
    at = guard_of(tmp_path / "at", threshold=score).classify(image(1.0, 0.5, 0, 0))[0]
    below = math.nextafter(score, 0)
    above = guard_of(tmp_path / "above", threshold=below).classify(image(1.0, 0.5, 0, 0))[0]
    assert at.accepted
    assert not above.accepted
    assert above.reasons == ["jacobian_norm"]


def test_a_rejected_image_has_radii_of_zero_and_keeps_its_kinds(tmp_path: Path) -> None:
    conformal = {"alpha": 0.05, "kappa": 0.5, "n": 100, "suite": ["pgd"]}
    l2 = calibration_record("")["l2"] | {"conformal": conformal}
    (decision,) = guard_of(tmp_path / "b", threshold=0.0, l2=l2).classify(image(1.0, 0.5, 0, 0))
    assert decision.reasons == ["jacobian_norm"]
    answer = dumped(decision)["certificate"]
    assert answer["l2"]["radius"] == 0
    assert answer["l2"]["kind"] == "conformal"
    assert [other["radius"] for other in answer["l2"]["others"]] == [0]
    assert answer["linf"]["radius"] == 0
    assert answer["margin"] == pytest.approx(2.5)
    assert decision.measured.l2 == pytest.approx(0.25)


def test_a_conformal_radius_stands_before_the_estimate(tmp_path: Path) -> None:
    attacked = {"count": 6, "n": 100, "value": 0.06, "upper": 0.115}
    conformal = {"alpha": 0.05, "kappa": 0.5, "n": 100, "suite": ["pgd"], "violations": attacked}
    l2 = calibration_record("")["l2"] | {"conformal": conformal}
    (decision,) = guard_of(tmp_path / "b", threshold=9.0, l2=l2).classify(image(1.0, 0.5, 0, 0))
    found = dumped(decision)["certificate"]["l2"]
    assert found.pop("others") == [
        {
            "radius": pytest.approx(0.5),
            "kind": "estimate",
            "method": "omega-bound",
            "violation_rate": 0.01,
            "violation_upper": 0.047,
        }
    ]
    assert found == {
        "radius": pytest.approx(0.25),
        "kind": "conformal",
        "method": "scaled-first-order",
        "violation_rate": 0.06,
        "violation_upper": 0.115,
        "alpha": 0.05,
    }


def test_conformal_radii_of_several_alphas_by_hand(tmp_path: Path) -> None:
    suite = {"n": 100, "suite": ["pgd"]}
    scales = [{"alpha": 0.01, "kappa": 0.3, **suite}, {"alpha": 0.05, "kappa": 0.6, **suite}]
    l2 = calibration_record("")["l2"] | {"conformal": scales, "slope": 8.0}
    guard = guard_of(tmp_path / "b", threshold=9.0, l2=l2)
    (decision,) = guard.classify(image(1.0, 0.5, 0, 0))  # logits 4, 1.5, 0: M = 2.5, M3 = 4, g = 5
    found = dumped(decision)["certificate"]["l2"]
    rho = 2.5 / math.hypot(5.0, 8.0 * 2.5 / 4)
    others = found["others"]
    assert found["radius"] == pytest.approx(0.3 * rho)
    assert others[0]["radius"] == pytest.approx(0.6 * rho)
    assert others[1]["radius"] == pytest.approx(rho), (
        "omega is 0: the first-order radius, third class and all"
    )
    assert [one["kind"] for one in (found, *others)] == ["conformal", "conformal", "estimate"]
    assert [one.get("alpha") for one in (found, *others)] == [0.01, 0.05, None]
    assert guard.calibration.l2.conformal[0].violations is None


def test_no_radius_reaches_beyond_what_was_examined(tmp_path: Path) -> None:
    conformal = {"alpha": 0.05, "kappa": 0.5, "n": 100, "suite": ["pgd"]}
    l2 = calibration_record("")["l2"] | {"conformal": conformal}
    model = linear(np.zeros((3, 4), np.float32), np.array([2.0, 1.0, 0.0], np.float32))
    guard = Guard.from_bundle(write_bundle(tmp_path / "b", model, l2=l2), "cpu", policy=Policy())
    (decision,) = guard.classify(image(0, 0, 0, 0))
    found = dumped(decision)["certificate"]
    assert (found["l2"]["kind"], found["linf"]["kind"]) == ("conformal", "estimate")
    assert (found["l2"]["radius"], found["linf"]["radius"]) == (1.0, 1.0), "the table's end"


@pytest.mark.parametrize(
    ("policy", "reasons"),
    [
        (Policy(min_radius_l2=0.49), []),
        (Policy(min_radius_l2=0.51), ["min_radius"]),
        (Policy(min_radius_linf=0.35, min_radius_l2=0.49), []),
        (Policy(min_radius_linf=0.36), ["min_radius"]),
    ],
)
def test_min_radius(tmp_path: Path, policy: Policy, reasons: list[str]) -> None:
    guard = guard_of(tmp_path / "b", threshold=9.0, policy=policy)
    (decision,) = guard.classify(image(1.0, 0.5, 0, 0))
    assert decision.reasons == reasons
    assert decision.accepted == (not reasons)
    assert (decision.certificate.l2.radius == 0) == bool(reasons)


def test_hidden_scores(tmp_path: Path) -> None:
    tests = [{"name": "jacobian", "threshold": 9.0}, {"name": "radius", "threshold": 9.0}]
    guard = guard_of(
        tmp_path / "b", score="combined", threshold=1.0, tests=tests, policy=Policy(expose_scores=False)
    )
    (decision,) = guard.classify(image(1.0, 0.503, 0, 0))
    answer = dumped(decision)
    assert answer["detector"] == {
        "name": "combined",
        "threshold": 1.0,
        "fpr": 0.05,
        "tests": [{"name": "jacobian", "threshold": 9.0}, {"name": "radius", "threshold": 9.0}],
    }
    assert answer["certificate"]["l2"]["radius"] == 0.49
    assert answer["certificate"]["linf"]["radius"] == 0.35
    assert answer["certificate"]["margin"] == 2.4
    assert [one["probability"] for one in answer["top"]] == [0.91, 0.08, 0.02], "their ratios tell the margin"
    assert answer["probability"] == 0.91
    assert decision.measured.score > 0
    assert decision.measured.l2 == pytest.approx(2.491 / 5, rel=1e-5)
    assert "0.498" not in decision.model_dump_json()


def test_combined_rejects_where_either_test_does(tmp_path: Path) -> None:
    def decide(jacobian: float, radius: float) -> Decision:
        tests = [{"name": "jacobian", "threshold": jacobian}, {"name": "radius", "threshold": radius}]
        folder = tmp_path / f"{jacobian}-{radius}"
        guard = guard_of(folder, score="combined", threshold=1.0, tests=tests)
        return guard.classify(image(1.0, 0.5, 0, 0))[0]

    # ||∇M|| / M is 5 / 2.5 = 2.
    passed, failed, both = decide(9.0, 2.5), decide(9.0, 1.6), decide(0.01, 1.6)
    assert passed.accepted
    assert passed.detector.score == pytest.approx(0.8)
    assert failed.reasons == ["radius"]
    assert failed.detector.score == pytest.approx(1.25)
    assert both.reasons == ["jacobian_norm", "radius"]
    assert both.detector.tests is not None
    assert [(test.name, test.threshold) for test in both.detector.tests] == [
        ("jacobian", 0.01),
        ("radius", 1.6),
    ]


@pytest.mark.parametrize(
    ("score", "reason"),
    [("radius", "radius"), ("margin-gradient", "margin_gradient"), ("jacobian-full", "jacobian_norm")],
)
def test_every_score_decides(tmp_path: Path, score: str, reason: str) -> None:
    accepted = guard_of(tmp_path / "a", score=score, threshold=9.0).classify(image(1.0, 0.5, 0, 0))[0]
    rejected = guard_of(tmp_path / "r", score=score, threshold=1e-6).classify(image(1.0, 0.5, 0, 0))[0]
    assert accepted.accepted
    assert accepted.detector.name == score
    assert rejected.reasons == [reason]
    assert accepted.detector.score == rejected.detector.score


def test_a_tie_is_no_margin(tmp_path: Path) -> None:
    (decision,) = guard_of(tmp_path / "b", score="radius", threshold=9.0).classify(image(0, 0, 0, 0))
    assert decision.reasons == ["radius"]
    answer = dumped(decision)
    assert "score" not in answer["detector"], "an infinite score has no number"
    assert answer["label"] == 0
    assert answer["certificate"]["margin"] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("score", ["jacobian", "combined", "radius", "margin-gradient"])
def test_nothing_undefined_is_accepted(tmp_path: Path, value: float, score: str) -> None:
    tests = [{"name": "jacobian", "threshold": 1e9}, {"name": "radius", "threshold": 1e9}]
    guard = guard_of(tmp_path / "b", score=score, threshold=1e9, tests=tests if score == "combined" else [])
    (decision,) = guard.classify(image(value, 0.5, 0, 0))
    assert not decision.accepted
    assert "not_finite" in decision.reasons
    answer = dumped(decision)
    assert answer["certificate"]["l2"]["radius"] == 0
    assert 0 <= answer["probability"] <= 1


@pytest.mark.parametrize("name", ["margin", "gradient_l2", "gradient_l1", "jacobian", "logits"])
def test_any_measurement_that_is_undefined_rejects(tmp_path: Path, name: str) -> None:
    guard = guard_of(tmp_path / "b", threshold=1e9)
    measured = guard.detector.measure(image(1.0, 0.5, 0, 0))
    assert next(guard.decide(measured)).accepted
    broken: Mapping[str, Any] = {name: np.full_like(getattr(measured, name), np.nan)}
    decision = next(guard.decide(replace(measured, **broken)))
    assert decision.reasons == ["not_finite"]
    assert decision.certificate.linf.radius == 0


def test_further_rows_can_reject(tmp_path: Path) -> None:
    # The third class is unlikely, but its row is twice as long as those of the two that share the rest.
    weight = np.array([[4.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 1e4, 0]], np.float32) * np.float32(4 / 3)
    bias = np.array([0, 0, -3.0], np.float32)
    path = write_bundle(tmp_path / "b", linear(weight, bias), threshold=4.5, row_bound=2e4)
    found = Guard.from_bundle(path, "cpu", policy=Policy())
    picture = image(0.75, 1.0, 0, 0)
    assert found.detector.measure(picture).jacobian[0] < 4.5
    (decision,) = found.classify(picture)
    assert decision.reasons == ["jacobian_norm"]
    assert decision.measured.score > 4.5


def test_bundles_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "shape", linear(WEIGHT), shape=(1, 2, 3))
    with pytest.raises(BundleError, match="says input shape"):
        Guard.from_bundle(path, "cpu")
    path = write_bundle(tmp_path / "classes", linear(WEIGHT[:2]))
    with pytest.raises(BundleError, match="says number of classes 3"):
        Guard.from_bundle(path, "cpu")
    path = write_bundle(tmp_path / "version", linear(WEIGHT), graph_version=GRAPH_VERSION + 1)
    with pytest.raises(BundleError, match="gradient graph version"):
        Guard.from_bundle(path, "cpu")
    good = bundles.load(write_bundle(tmp_path / "score", linear(WEIGHT)))
    with pytest.raises(BundleError, match="calibrated for the score"):
        Guard(good, Detector(good.model, score="radius", provider="cpu"), Policy())
    with pytest.raises(BundleError, match="not calibrated"):
        Guard(Bundle(good.path, good.manifest, None), Detector(good.model, provider="cpu"), Policy())


def test_the_environment_sets_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bundle(tmp_path / "b", linear(WEIGHT), threshold=9.0)
    monkeypatch.setenv("GUARD_EXPOSE_SCORES", "0")
    monkeypatch.setenv("GUARD_MIN_RADIUS_L2", "0.51")
    (decision,) = Guard.from_bundle(path, "cpu").classify(image(1.0, 0.5, 0, 0))
    assert decision.reasons == ["min_radius"]
    assert decision.detector.score is None


def test_an_answer_can_be_read_back(tmp_path: Path) -> None:
    (decision,) = guard_of(tmp_path / "b", threshold=9.0).classify(image(1.0, 0.5, 0, 0))
    named = decision.model_copy(update={"request_id": "abc"})
    assert json.loads(named.model_dump_json())["request_id"] == "abc"
    assert Decision.model_validate_json(named.model_dump_json()).model_dump() == named.model_dump()
    schema = Decision.model_json_schema(mode="serialization")
    assert set(schema["properties"]) == {*dumped(named)}


@given(st.floats(0, 1e300), st.floats(0, 1e300))
def test_ratio_says_what_the_comparison_says(score: float, threshold: float) -> None:
    (found,) = ratio(np.array([score]), threshold)
    assert (found <= 1) == (score <= threshold)


def test_ratio_of_the_undefined_is_undefined() -> None:
    found = ratio(np.array([np.nan, np.inf, 0.0, 1.0]), 0.0)
    assert np.isnan(found[0])
    assert found[1] == np.inf
    assert found[2] == 0
    assert found[3] > 1


@pytest.mark.parametrize(
    ("value", "cut"),
    [(0.0, 0.0), (0.419, 0.41), (0.00319, 0.0031), (12.9, 12.0), (0.41, 0.41), (199.0, 190.0), (-2.99, -2.9)],
)
def test_two_digits(value: float, cut: float) -> None:
    assert two_digits(value) == cut


@given(st.floats(1e-300, 1e300))
def test_two_digits_never_enlarges_and_stays(value: float) -> None:
    cut = two_digits(value)
    assert 0.9 * value <= cut <= value
    assert two_digits(cut) == cut


def test_bytes_are_no_pixel_values(tmp_path: Path) -> None:
    guard = guard_of(tmp_path / "b", threshold=9.0)
    with pytest.raises(DataError, match=r"from 0 to 255: expected floats in \[0, 1\]\. Divide bytes by 255"):
        guard.classify(image(255.0, 128.0, 0, 0))
    with pytest.raises(DataError, match="from -1 to 1"):
        guard.classify(image(1.0, -1.0, 0, 0))
    assert guard.classify(image(1.0 + 1e-6, -1e-6, 0, 0))[0].accepted
