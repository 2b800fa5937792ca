"""The answer for an image: prediction, verdict and radii, from one guarded pass and a calibration.

The service, the command line and every report decide through `Guard.classify`, so they cannot disagree. An
image is accepted only where every test holds; NaN or infinity anywhere rejects it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, Decimal
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from guard import bundle as bundles
from guard.bundle import Bundle, Calibration, OmegaRecord
from guard.certificate import (
    Kind,
    OmegaTable,
    Radius,
    effective_slope,
    first_order_radius,
    omega_radius,
    strongest_first,
)
from guard.errors import BundleError, DataError
from guard.guarded import GRAPH_VERSION
from guard.images import LIMITS, Limits, decode
from guard.norms import NORMS, Norm
from guard.runtime import Detector, Measurement, score_of
from guard.settings import Policy

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

TOP = 5
"""The number of classes listed, most probable first."""

_ROUNDING = 1e-3  # of pixel values outside [0, 1] that arithmetic may leave

REASONS = {
    "jacobian": "jacobian_norm",
    "jacobian-full": "jacobian_norm",
    "margin-gradient": "margin_gradient",
    "radius": "radius",
}
"""The reason an image is rejected for, by the test that failed. `not_finite` and `min_radius` come on top."""


def _absent(value: object) -> bool:
    return value is None


def _false(value: object) -> bool:
    return value is False


class Answer(BaseModel):
    """Base of all parts of an answer: what has no value is left out, and no number is NaN or infinite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Prediction(Answer):
    """One class and the softmax probability that the model gives it."""

    label: int
    class_name: str
    probability: float


class TestResult(Answer):
    """One test of a combined detector: it failed where not `score <= threshold`."""

    __test__ = False  # not a test of ours, whatever pytest makes of the name

    name: str
    score: float | None = Field(default=None, exclude_if=_absent)
    threshold: float


class DetectorResult(Answer):
    """The calibrated score of the image against its threshold, at a clean false positive rate `fpr`.

    `score` is left out where it is infinite or undefined, and where the operator does not expose scores.
    `tests` is there for a combined detector, whose score is the largest ratio of a test's score to its
    threshold, so that `threshold` is 1.
    """

    name: str
    score: float | None = Field(default=None, exclude_if=_absent)
    threshold: float
    fpr: float
    tests: list[TestResult] | None = Field(default=None, exclude_if=_absent)


class RadiusResult(Answer):
    """A radius in pixels of the model's input ([0, 1] scale) within which the prediction should not change.

    `kind` says what it rests on (estimate, conformal, probabilistic, sound). An unbounded radius is null with
    `unbounded` true; `unbounded` is left out otherwise.
    """

    radius: float | None
    unbounded: bool = Field(default=False, exclude_if=_false)
    kind: Kind
    method: str
    violation_rate: float | None = Field(default=None, exclude_if=_absent)
    violation_upper: float | None = Field(default=None, exclude_if=_absent)
    alpha: float | None = Field(default=None, exclude_if=_absent)


class NormResult(RadiusResult):
    """The strongest kind of radius available for a norm; further ones in `others`."""

    others: list[RadiusResult] = []


class CertificateResult(Answer):
    """The logit margin of the prediction over the runner-up, and the radii in both norms."""

    margin: float
    l2: NormResult
    linf: NormResult


class ModelResult(Answer):
    """The bundle that answered."""

    name: str
    digest: str


@dataclass(frozen=True)
class Measured:
    """What was measured for one image, whatever an answer shows of it: for metrics and reports.

    `score` is the calibrated score; `l2`, `linf` the strongest radii, before rejection set them to 0.
    """

    score: float
    l2: float
    linf: float


class Decision(Answer):
    """The answer for one image. `reasons` is empty where `accepted`; radii of a rejected image are 0."""

    label: int
    class_name: str
    probability: float
    top: list[Prediction]
    accepted: bool
    reasons: list[str]
    detector: DetectorResult
    certificate: CertificateResult
    model: ModelResult
    request_id: str | None = Field(default=None, exclude_if=_absent)
    _measured: Measured = PrivateAttr()

    @property
    def measured(self) -> Measured:
        """The undisguised measurements; they never leave through `model_dump`."""
        return self._measured


class Guard:
    """A calibrated bundle, ready to decide. Safe to call from several threads.

    `policy` is what the operator demands on top; its least radii are compared with the radius that stands
    first, of the strongest kind. Raises `BundleError` where the bundle is not calibrated, or its parts do not
    belong together.
    """

    def __init__(self, bundle: Bundle, detector: Detector, policy: Policy) -> None:
        self.bundle = bundle
        self.detector = detector
        self.policy = policy
        self.calibration: Calibration = bundle.calibrated()
        manifest = bundle.manifest
        shape = manifest.input.shape
        for what, said, found in (
            ("input shape", shape, detector.input_shape),
            ("number of classes", len(manifest.class_names), detector.num_classes),
        ):
            if said != found:
                raise BundleError(
                    f"{bundle.path / bundles.MANIFEST}: says {what} {said}, but {bundles.MODEL} has {found}. "
                    "Make the bundle again."
                )
        if detector.score != self.calibration.score:
            raise BundleError(
                f"{bundle.path}: calibrated for the score {self.calibration.score!r}, but the detector "
                f"computes {detector.score!r}."
            )
        self._model = ModelResult(name=manifest.name, digest=bundle.digest)
        self._tables = {norm: table_of(self.calibration.radii(norm).omega) for norm in NORMS}

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        provider: Literal["auto", "cpu", "cuda"] = "auto",
        *,
        threads: int = 0,
        policy: Policy | None = None,
    ) -> Self:
        """Loads and checks the bundle in the folder `path`; `policy` is the environment's where not given.

        `provider` and `threads` are those of `guard.runtime.Detector`. Raises `BundleError` for the bundle,
        `UsageError` for the environment, and what `Detector` raises.
        """
        bundle = bundles.load(path, graph_version=GRAPH_VERSION)
        score = bundle.calibrated().score
        chosen = Policy.from_environment() if policy is None else policy
        detector = Detector(bundle.model, score=score, provider=provider, threads=threads)
        return cls(bundle, detector, chosen)

    def decode(self, data: bytes, limits: Limits = LIMITS, *, declared: str | None = None) -> Float32:
        """The model's input (C, H, W) from an image file's bytes, as the manifest has it; raises `ImageError`
        as `guard.images.decode` does.
        """
        manifest = self.bundle.manifest
        options = manifest.preprocessing.model_dump()
        return decode(data, manifest.input.shape, **options, declared=declared, limits=limits)

    def classify(self, images: Float32) -> list[Decision]:
        """Decides images (B, C, H, W) in [0, 1], B >= 0: one decision each, in order.

        Raises `DataError` for images of another shape, and for pixel values outside [0, 1], as in 0 to 255.
        NaN and infinity are no error, but a reason to reject.
        """
        values = np.asarray(images)[np.isfinite(images)]
        if values.size and (values.min() < -_ROUNDING or values.max() > 1 + _ROUNDING):
            raise DataError(
                f"images have pixel values from {values.min():g} to {values.max():g}: expected floats in "
                "[0, 1]. Divide bytes by 255."
            )
        return list(self.decide(self.measure(images))) if len(images) else []

    def measure(self, images: Float32) -> Measurement:
        """Measures images (B, C, H, W) in [0, 1], B >= 1, with every row that could matter to a decision."""
        return self.detector.measure(
            images, threshold=self._row_threshold(), row_bound=self.calibration.row_bound
        )

    @property
    def needs_rows(self) -> bool:
        """Whether an image that two rows do not decide gets further ones."""
        return self._row_threshold() is not None

    def decide(self, measurement: Measurement) -> Iterator[Decision]:
        """Turns measurements of B images into decisions: everything but running the model."""
        tests = self.tests(measurement)
        scores = self._scores(tests)
        radii = {norm: self.radii(measurement, norm) for norm in NORMS}
        finite = measurement.finite
        logits = np.where(np.isnan(measurement.logits), -np.inf, measurement.logits)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
        probabilities = np.nan_to_num(measurement.probabilities.astype(np.float64), nan=0.0)
        for index in range(len(measurement)):
            here = {name: (float(values[index]), threshold) for name, (values, threshold) in tests.items()}
            own = {
                norm: [replace(radius, radius=float(values[index])) for radius, values in radii[norm]]
                for norm in NORMS
            }
            reasons = self._reasons(here, own, finite=bool(finite[index]))
            top = [
                Prediction(
                    label=int(label),
                    class_name=self.bundle.manifest.class_names[label],
                    probability=self._probability(float(probabilities[index, label])),
                )
                for label in order[index]
            ]
            decision = Decision(
                **top[0].model_dump(),
                top=top,
                accepted=not reasons,
                reasons=reasons,
                detector=self._detector_result(float(scores[index]), here),
                certificate=CertificateResult(
                    margin=self._number(float(measurement.margin[index])) or 0.0,
                    **{norm: self._norm_result(own[norm], rejected=bool(reasons)) for norm in NORMS},
                ),
                model=self._model,
            )
            decision._measured = Measured(
                score=float(scores[index]), l2=own["l2"][0].radius, linf=own["linf"][0].radius
            )
            yield decision

    def ratios(self, measurement: Measurement) -> Float64:
        """Largest score over its threshold (B,): at most 1 exactly where all tests pass; NaN stays."""
        return _largest_ratio(self.tests(measurement))

    def _row_threshold(self) -> float | None:
        """The threshold of the Jacobian test, where one may need more than two rows."""
        if self.calibration.score == "jacobian":
            return self.calibration.threshold
        if self.calibration.score == "combined":
            return next(test.threshold for test in self.calibration.tests if test.name == "jacobian")
        return None

    def tests(self, measurement: Measurement) -> dict[str, tuple[Float64, float]]:
        """Scores (B,) and threshold of every test that an accepted image must pass, by name."""
        if self.calibration.score == "combined":
            pairs = [(test.name, test.threshold) for test in self.calibration.tests]
            return {name: (score_of(measurement, name), threshold) for name, threshold in pairs}
        score = self.calibration.score
        return {score: (score_of(measurement, score), self.calibration.threshold)}

    def _scores(self, tests: dict[str, tuple[Float64, float]]) -> Float64:
        """The calibrated score (B,): the only test's, or the largest ratio of score to threshold."""
        if self.calibration.score != "combined":
            ((values, _),) = tests.values()
            return values
        return _largest_ratio(tests)

    def radii(self, measurement: Measurement, norm: Norm) -> list[tuple[Radius, Float64]]:
        """The kinds of radius there are for a norm, strongest first, each with the images' values (B,).

        They are what accepted images are answered; that rejected ones get 0 is not in them yet.
        """
        calibration = self.calibration.radii(norm)
        violations = calibration.violations
        estimate = Radius(
            radius=math.nan,
            kind="estimate",
            method="omega-bound",
            violation_rate=violations.value,
            violation_upper=violations.upper,
        )
        slope = effective_slope(measurement.logits, measurement.slope(norm), calibration.slope)
        found = {estimate: omega_radius(measurement.margin, slope, self._tables[norm])}
        # A smaller radius keeps the promise; this one would grow without end as the slope vanishes.
        largest = self._tables[norm].reach.max()
        first_order = first_order_radius(measurement.margin, slope)
        for scale in calibration.conformal:
            attacked = scale.violations
            conformal = Radius(
                radius=math.nan,
                kind="conformal",
                method="scaled-first-order",
                violation_rate=None if attacked is None else attacked.value,
                violation_upper=None if attacked is None else attacked.upper,
                alpha=scale.alpha,
            )
            found[conformal] = np.minimum(scale.kappa * first_order, largest)
        return [(radius, found[radius]) for radius in strongest_first(list(found))]

    def _reasons(
        self, tests: dict[str, tuple[float, float]], radii: dict[Norm, list[Radius]], *, finite: bool
    ) -> list[str]:
        reasons = []
        if not finite or any(math.isnan(score) for score, _ in tests.values()):
            reasons.append("not_finite")
        reasons += [REASONS[name] for name, (score, threshold) in tests.items() if score > threshold]
        least = {"l2": self.policy.min_radius_l2, "linf": self.policy.min_radius_linf}
        if any(not radii[norm][0].radius >= (least[norm] or 0.0) for norm in NORMS):
            reasons.append("min_radius")
        return reasons

    def _detector_result(self, score: float, tests: dict[str, tuple[float, float]]) -> DetectorResult:
        calibration = self.calibration
        parts = [
            TestResult(name=name, score=self._score(value), threshold=threshold)
            for name, (value, threshold) in tests.items()
        ]
        return DetectorResult(
            name=calibration.score,
            score=self._score(score),
            threshold=calibration.threshold,
            fpr=calibration.fpr,
            tests=parts if calibration.score == "combined" else None,
        )

    def _norm_result(self, radii: list[Radius], *, rejected: bool) -> NormResult:
        first, *others = (self._radius_values(radius, rejected=rejected) for radius in radii)
        return NormResult(**first, others=[RadiusResult(**other) for other in others])

    def _radius_values(self, radius: Radius, *, rejected: bool) -> dict[str, Any]:
        values = dict(vars(radius))
        if rejected or math.isnan(radius.radius):
            return values | {"radius": 0.0}
        if math.isinf(radius.radius):
            return values | {"radius": None, "unbounded": True}
        return values | {"radius": self._number(radius.radius)}

    def _score(self, value: float) -> float | None:
        return value if self.policy.expose_scores and math.isfinite(value) else None

    def _probability(self, value: float) -> float:
        """As answers show it: two decimals where scores are not exposed, since ratios tell the margin."""
        return float(f"{value:.7g}") if self.policy.expose_scores else round(value, 2)

    def _number(self, value: float) -> float | None:
        """A margin or radius as answers show it: two digits where scores are not exposed, rounded down."""
        if not math.isfinite(value):
            return None
        return value if self.policy.expose_scores else two_digits(value)


def table_of(record: OmegaRecord) -> OmegaTable:
    """The stored modulus of continuity as the table that radii are read from."""
    return OmegaTable(
        eps=np.array(record.eps, np.float64),
        values=np.array(record.values, np.float64),
        reach=np.array(record.reach, np.float64),
        edges=np.array(record.edges, np.float64),
        conditioned_on=record.conditioned_on,
        relative=record.relative,
    )


def ratio(scores: Float64, threshold: float) -> Float64:
    """Scores (B,) in units of their threshold: at most 1 exactly where `score <= threshold`; NaN stays."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.where(scores > 0, scores / threshold, 0.0)
    quotient = np.where(
        scores <= threshold, np.minimum(quotient, 1.0), np.maximum(quotient, np.nextafter(1, 2))
    )
    return np.where(np.isnan(scores), np.nan, quotient)


def _largest_ratio(tests: dict[str, tuple[Float64, float]]) -> Float64:
    return np.asarray(np.max([ratio(*test) for test in tests.values()], axis=0), np.float64)


def two_digits(value: float) -> float:
    """A finite number cut to two significant decimal digits, towards zero."""
    exact = Decimal(repr(value))
    return (
        float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 1), rounding=ROUND_DOWN)) if value else 0.0
    )
