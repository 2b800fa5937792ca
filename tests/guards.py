"""Guards of small models in memory, with thresholds of our choice."""

from typing import Any

import onnx

from guard.bundle import MODEL, Bundle, InputShape, Manifest, Preprocessing, ScoreName
from guard.decision import Guard
from guard.evaluation.target import Target
from guard.runtime import Detector
from guard.settings import Policy
from tests import serving

DIGEST = "0" * 64


def guard_of(
    model: onnx.ModelProto,
    score: ScoreName,
    threshold: float,
    *,
    tests: dict[str, float] | None = None,
    policy: Policy | None = None,
    **changes: Any,
) -> Guard:
    """The guard that accepts where `score` is at most `threshold`; for `combined`, where `tests` are.

    Its radii are M / ||∇M||_*, at most 2: the modulus of continuity is 0.
    """
    detector = Detector(model, score=score, provider="cpu")
    listed = [{"name": name, "threshold": value} for name, value in (tests or {}).items()]
    record = {"score": score, "threshold": threshold, "tests": listed} | changes
    channels, height, width = detector.input_shape
    manifest = Manifest(
        name="small",
        input=InputShape(channels=channels, height=height, width=width),
        preprocessing=Preprocessing(colour="rgb" if channels == 3 else "grey"),
        class_names=[str(label) for label in range(detector.num_classes)],
        files={MODEL: DIGEST},
    )
    bundle = Bundle(serving.ROOT, manifest, serving.calibration(DIGEST, **record))
    return Guard(bundle, detector, policy or Policy())


def target_of(guard: Guard) -> Target:
    """The model and its one guard."""
    return Target(guard.detector, {guard.calibration.score: guard})
