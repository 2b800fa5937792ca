"""`guard calibrate`: a bundle's detection threshold and radii, fitted and then audited on disjoint folds.

    threshold   the conformal threshold of the score
    radii       bound of Jacobian rows G, gradient bound L, modulus of continuity omega; levels of `combined`
    conformal   scale of the conformal radius
    report      realized false positive rate, accuracy, agreement, violations, tightness: looked at, never
                fitted

Works on any bundle through onnxruntime, without torch. Folds, starts and blocks follow the seed; an
interrupted run goes on where it stopped.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from guard import attacks, bundle, data, fitting, statistics
from guard.attacks import Norm, WithRows
from guard.bundle import (
    CALIBRATION,
    CARD,
    MODEL,
    Agreement,
    Bundle,
    Calibration,
    ConformalScale,
    ExtremeFit,
    Histogram,
    OmegaRecord,
    PredictedShare,
    RadiusCalibration,
    ScoreName,
    ScoreThreshold,
    Share,
)
from guard.card import with_calibration
from guard.certificate import OmegaTable, effective_slope, first_order_radius, l_bound, omega_radius
from guard.data import Dataset
from guard.decision import ratio
from guard.errors import BundleError, CalibrationError
from guard.extremes import Extreme
from guard.files import atomic_folder, provenance, write_bytes, write_text
from guard.fitting import Effort, FittedOmega
from guard.guarded import GRAPH_VERSION, Score
from guard.progress import Progress
from guard.runtime import Detector, Measurement, score_of
from guard.stages import Arrays, Piece, Stages

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

STAGES_VERSION = 6
"""Raised whenever a stage computes something else: an interrupted run of another version starts anew."""

NORMS: tuple[Norm, Norm] = ("l2", "linf")
TESTS: tuple[Literal["jacobian", "radius"], ...] = ("jacobian", "radius")
SUITE = {norm: [f"minimum-norm {norm}", f"minimum-norm {norm} towards each likely class"] for norm in NORMS}

_SPREAD = 2.5  # the histogram's even bins end at so many thresholds
_BINS = 50
_RADIUS_BINS = 100

# Cost in passes that give one gradient, per image: for the time that is left.
_PASS = 1.4


@dataclass(frozen=True)
class Settings:
    """What is promised. `fpr` is the clean false positive rate of the detector; with `guarantee` "pac" it
    holds with probability 1 - `delta` over the calibration images, with "marginal" on average over them.
    `alphas` are the conformal radii's shares of accepted images with a successful attack inside, in rising
    order. `seed` fixes folds, blocks and the attacks' random starts.
    """

    score: ScoreName = "jacobian"
    fpr: float = 0.05
    guarantee: Literal["marginal", "pac"] = "marginal"
    delta: float = 0.05
    alphas: tuple[float, ...] = (0.01, 0.05)
    seed: int = 0

    @property
    def risk(self) -> float | None:
        """`delta` where it plays a part."""
        return self.delta if self.guarantee == "pac" else None


def calibrate(
    folder: str | Path,
    dataset: Dataset,
    settings: Settings = Settings(),
    effort: Effort = Effort(),  # noqa: B008 - immutable
    *,
    provider: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 0,
    arguments: Mapping[str, Any] | None = None,
    silent: bool = False,
) -> Calibration:
    """Calibrates the bundle in `folder` on held-out images and writes `calibration.json` (and the card) into
    it.

    `dataset` must not overlap with the model's training images; labels are needed for accuracy alone.
    `provider` and `threads` are those of `guard.runtime.Detector`; `arguments` go to the provenance; `silent`
    shows no progress. An earlier calibration is replaced at once, when all is done. Raises `DataError` where
    images do not fit the model, `CalibrationError` where they are too few or the model's numbers are
    unusable, `BundleError` for the bundle, and what `Detector` raises.
    """
    found = bundle.load(folder, recalibrating=True)  # whatever its old one is, it is replaced
    _check(dataset, found, settings)
    detector = Detector(found.model, score=settings.score, provider=provider, threads=threads)
    run = _Run(found, dataset, settings, effort, detector)
    key = {
        "version": STAGES_VERSION,
        "model": found.manifest.files[MODEL],
        "graph": GRAPH_VERSION,
        "data": dataset.digest,
        "settings": asdict(settings),
        "effort": asdict(effort),
        "provider": detector.provider,
    }
    with (
        Progress(run.work(), "calibrate", silent=silent) as progress,
        Stages(found.path, key, progress) as stages,
    ):
        calibration = run.calibration(stages, arguments or {})
        _write(found, calibration)
    return calibration


def rescored(
    found: Bundle,
    dataset: Dataset,
    score: ScoreName,
    stages: Stages,
    *,
    provider: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 0,
) -> Calibration:
    """What the bundle's calibration would be for another score: new thresholds, at the same promised rate.

    `dataset` must be the one the bundle was calibrated on, so that folds and images are the same. The bound
    of Jacobian rows stays, and so do the radii, though conformal scales and violations are of images that the
    bundle's own score accepts. Raises `BundleError` where the bundle is not calibrated, `CalibrationError`
    where the score's numbers are unusable.
    """
    old = found.calibrated()
    settings = Settings(
        score=score, fpr=old.fpr, guarantee=old.guarantee, delta=old.delta or Settings.delta, seed=old.seed
    )
    detector = Detector(found.model, score=score, provider=provider, threads=threads)
    run = _Run(found, dataset, settings, Effort(), detector)
    run.row_bound = old.row_bound
    return run.rescored(old, stages)


def rescoring_work(folds: Mapping[str, Int64]) -> int:
    """What `rescored` takes at most, about, in passes that give one gradient for one image."""
    return round(_PASS * (2 * len(folds["threshold"]) + len(folds["radii"]) + len(folds["report"])))


def _check(dataset: Dataset, found: Bundle, settings: Settings) -> None:
    shape = found.manifest.input
    data.check_shape(dataset, (shape.channels, shape.height, shape.width))
    parts = data.folds(len(dataset), settings.seed)
    if any(not len(part) for part in parts.values()):
        raise CalibrationError(
            f"{dataset.name}: {len(dataset)} images are too few to split: expected at least 10."
        )
    try:
        statistics.rank_of(len(parts["threshold"]), settings.fpr, settings.risk)
    except CalibrationError as error:
        share = len(parts["threshold"]) / len(dataset)
        raise CalibrationError(
            f"{dataset.name}: {len(dataset)} images are too few, as {share:.0%} of them set the threshold: "
            f"{error}"
        ) from error


class _Run:
    """One calibration: images, folds and thresholds that its stages share."""

    def __init__(
        self, found: Bundle, dataset: Dataset, settings: Settings, effort: Effort, detector: Detector
    ) -> None:
        self.found, self.dataset, self.settings, self.effort = found, dataset, settings, effort
        self.detector = detector
        self.model: WithRows = detector
        generator = np.random.default_rng([settings.seed, 1])
        # Data come sorted by class where they are a folder: blocks and subsamples need random order.
        parts = data.folds(len(dataset), settings.seed)
        self.folds: dict[str, Int64] = {name: generator.permutation(part) for name, part in parts.items()}
        self.tests: dict[Score, float] = {}
        self.row_bound = 0.0

    @property
    def counts_rows(self) -> bool:
        """Whether the score is decided from fewer rows than the Jacobian has."""
        return self.settings.score in ("jacobian", "combined")

    def work(self) -> int:
        """The whole calibration in passes that give one gradient for one image."""
        effort, folds = self.effort, self.folds
        omega = min(effort.omega_images, len(folds["radii"]))
        violations = min(effort.violation_images, len(folds["report"]))
        conformal = min(effort.distance_images, len(folds["conformal"]))
        per_norm = (
            omega * (self._screening() + effort.kept * self._ascent())
            + 0.05 * omega * 2 * (self._screening() + self._ascent())
            + violations * (self._nearest() + self._pgd())
            + conformal * self._nearest()
        )
        rows = min(effort.row_images, len(folds["radii"])) * self._rows()
        scores = rescoring_work(folds) + _PASS * len(folds["conformal"])
        agreement = 4 * self._agreement_images() * self.detector.num_classes
        return round(2 * per_norm + rows + scores + agreement)

    def _screening(self) -> float:
        ascent = self.effort.starts * (self.effort.steps // 2 + 1) + 1
        return ascent + 1.25 * self.effort.steps + 12

    def _ascent(self) -> float:
        return len(fitting.EPS) * (self.effort.steps + 1) + 1

    def _pgd(self) -> float:
        return self.effort.violation_restarts * (self.effort.violation_steps + 1)

    def _nearest(self) -> float:
        return 2.5 * self.effort.distance_steps + 12

    def _agreement_images(self) -> int:
        """Fewer where there are many classes: every image takes a full Jacobian, in four variants."""
        affordable = max(4, 10 * self.effort.agreement_images // self.detector.num_classes)
        return min(self.effort.agreement_images, affordable, len(self.folds["report"]))

    def _rows(self) -> float:
        return 3 * self.effort.row_steps + min(self.detector.num_classes, 16)

    def calibration(self, stages: Stages, arguments: Mapping[str, Any]) -> Calibration:
        """Every stage in turn, then the record of it all."""
        settings, folds = self.settings, self.folds
        clean = {
            name: self._measure(stages, f"scores-{name}", folds[name]) for name in ("threshold", "radii")
        }
        row_fit = self._fit_rows(stages, clean["radii"])
        scores, rank = self._fit_threshold(stages, clean)
        report = self._measure(stages, "scores-report", folds["report"], decided=True)
        conformal = self._measure(stages, "scores-conformal", folds["conformal"], decided=True)
        rejected = self._rejects(report)
        radii = {
            norm: self._radii(stages, norm, clean["radii"], report, rejected, conformal) for norm in NORMS
        }
        labels = None if self.dataset.labels is None else self.dataset.labels[folds["report"]]
        accuracy = None if labels is None else _share(report.labels == labels)
        m, threshold = len(folds["report"]), self._threshold()
        predicted = statistics.predicted_rate(len(scores), rank, m)
        return Calibration(
            model_sha256=self.found.manifest.files[MODEL],
            graph_version=GRAPH_VERSION,
            score=settings.score,
            guarantee=settings.guarantee,
            delta=settings.risk,
            fpr=settings.fpr,
            threshold=threshold,
            tests=[ScoreThreshold(name=name, threshold=self.tests[name]) for name in TESTS]
            if settings.score == "combined"
            else [],
            n=len(scores),
            seed=settings.seed,
            data={"name": self.dataset.name, "n": len(self.dataset), "digest": self.dataset.digest},
            folds={name: len(part) for name, part in folds.items()},
            predicted_fpr=PredictedShare(
                lower=predicted.lower, upper=predicted.upper, level=predicted.level, m=m
            ),
            realized_fpr=_share(rejected),
            accuracy=accuracy,
            row_bound=self.row_bound,
            row_fit=_record(row_fit),
            agreement=self._agreement(stages) if self.counts_rows else [],
            histogram=histogram(scores, threshold),
            l2=radii["l2"],
            linf=radii["linf"],
            provenance=provenance(
                arguments, seed=settings.seed, settings=asdict(settings), effort=asdict(self.effort)
            ),
        )

    def rescored(self, old: Calibration, stages: Stages) -> Calibration:
        """`old` with this score's thresholds and the rate they realize."""
        clean = {
            name: self._measure(stages, f"scores-{name}", self.folds[name]) for name in ("threshold", "radii")
        }
        scores, _ = self._fit_threshold(stages, clean)
        report = self._measure(stages, "scores-report", self.folds["report"], decided=True)
        threshold, several = self._threshold(), self.settings.score == "combined"
        tests = [ScoreThreshold(name=name, threshold=self.tests[name]) for name in TESTS] if several else []
        changed = {
            "score": self.settings.score,
            "threshold": threshold,
            "tests": tests,
            "realized_fpr": _share(self._rejects(report)),
            "histogram": histogram(scores, threshold),
            "agreement": [],
        }
        return old.model_copy(update=changed)

    def pixels(self, indices: Int64) -> NDArray[np.float32]:
        """Images (B, C, H, W) in [0, 1]."""
        return data.to_floats(self.dataset.images[indices])

    def _generator(self, piece: Int64, salt: int) -> np.random.Generator:
        """Randomness of one piece, whatever was computed before it."""
        return np.random.default_rng([self.settings.seed, salt, int(piece[0])])

    # --- detection

    def _measure(self, stages: Stages, name: str, indices: Int64, *, decided: bool = False) -> Measurement:
        """Measurements of a fold, in order; `decided` with every row that could matter to the threshold."""
        limits: dict[str, float] = {}
        if decided and self.counts_rows:
            limits = {"threshold": self.tests["jacobian"], "row_bound": self.row_bound}

        def piece(part: Int64) -> Arrays:
            return dict(vars(self.detector.measure(self.pixels(part), **limits)))

        return Measurement(**stages.run(name, indices, piece, cost=_PASS))

    def _fit_rows(self, stages: Stages, clean: Measurement) -> Extreme:
        """G: how long u_i gets, at images and under attack; `_agreement` checks what hangs on it."""
        indices = self.folds["radii"][: self.effort.row_images]
        radius = first_order_radius(clean.margin, clean.gradient_l2)
        usable = radius[np.isfinite(radius) & (radius > 0)]
        eps = float(np.median(usable)) if len(usable) else 0.0

        def piece(part: Int64) -> Arrays:
            lengths, attacked = fitting.longest_rows(self.model, self.pixels(part), eps, self.effort)
            return {"clean": lengths, "attacked": attacked}

        found = stages.run("rows", indices, piece, cost=self._rows())
        fit = fitting.bound(found["attacked"], self.effort.blocks)
        self.row_bound = fit.value
        return fit

    def _fit_threshold(self, stages: Stages, clean: Mapping[str, Measurement]) -> tuple[Float64, int]:
        """Sets the thresholds; returns the scores they come from, and their rank.

        The threshold is that of the full Jacobian's scores, though most rows are never computed: rows beyond
        the first two are computed for images at or below the threshold that could lie above it, and again
        for the threshold that follows, until it stays where it is. Then exactly those images lie at or below
        it whose full Jacobian does.
        """
        names = self._test_names
        scores, reference = self._columns(clean["threshold"]), self._columns(clean["radii"])
        self.tests = self._thresholds(scores, reference)
        look = 0
        while self.counts_rows:
            before, look = self.tests, look + 1
            decided = self._measure(stages, f"rows-{look}-threshold", self.folds["threshold"], decided=True)
            scores = np.maximum(scores, self._columns(decided))
            self.tests = self._thresholds(scores, reference)
            if self.tests == before:
                break
        if self.settings.score == "combined":
            ratios = [ratio(scores[:, at], self.tests[name]) for at, name in enumerate(names)]
            scores = np.max(ratios, axis=0)
        return scores.ravel(), statistics.rank_of(len(scores), self.settings.fpr, self.settings.risk)

    @property
    def _test_names(self) -> tuple[Score, ...]:
        return TESTS if self.settings.score == "combined" else (self.settings.score,)

    def _columns(self, measured: Measurement) -> Float64:
        """Scores (B, T) of the detector's tests."""
        return np.stack([score_of(measured, name) for name in self._test_names], axis=1)

    def _thresholds(self, scores: Float64, reference: Float64) -> dict[Score, float]:
        """The tests' thresholds from the scores (n, T) of the threshold fold; `reference` is for several."""
        fpr, risk = self.settings.fpr, self.settings.risk
        if self.settings.score != "combined":
            return {self.settings.score: statistics.conformal_threshold(scores, fpr, risk)}
        thresholds, _ = statistics.joint_thresholds(reference, scores, fpr, risk)
        return dict(zip(TESTS, thresholds.tolist(), strict=True))

    def _threshold(self) -> float:
        return 1.0 if self.settings.score == "combined" else self.tests[self.settings.score]

    def _rejects(self, measured: Measurement) -> NDArray[np.bool_]:
        """Rejections (B,), as `guard.decision` has them."""
        numbers = np.column_stack(
            [measured.logits, measured.margin, measured.gradient_l2, measured.gradient_l1]
        )
        passed = [np.isfinite(numbers).all(axis=1)]
        passed += [score_of(measured, name) <= threshold for name, threshold in self.tests.items()]
        rejected: NDArray[np.bool_] = ~np.all(passed, axis=0)
        return rejected

    def _agreement(self, stages: Stages) -> list[Agreement]:
        """Served decisions beside those of the full Jacobian, on clean and on attacked report images."""
        effort, indices = self.effort, self.folds["report"][: self._agreement_images()]
        full = Detector(
            self.detector.model,
            score="jacobian-full",
            provider=self.detector.provider,
            threads=self.detector.threads,
        )

        def piece(part: Int64) -> Arrays:
            images = self.pixels(part)
            labels = self.model.logits(images).argmax(axis=1)
            nearest = attacks.minimum_norm(
                self.model, images, labels, norm="l2", steps=effort.distance_steps, clip=True
            )
            eps = 2 * float(np.median(nearest.distance[nearest.success])) if nearest.success.any() else 0.1
            deep = attacks.pgd(self.model, images, labels, eps, norm="l2", restarts=1, clip=True, stop=False)
            sets = {
                "clean": images,
                "minimum-norm l2": nearest.images,
                "PGD l2 at twice the median distance": deep.images,
                "third row hidden": attacks.hide_row(self.model, images, eps),
            }
            limits = {"threshold": self.tests["jacobian"], "row_bound": self.row_bound}
            return {
                name: self._rejects(self.detector.measure(batch, **limits))
                == self._rejects(full.measure(batch))
                for name, batch in sets.items()
            }

        found = stages.run("agreement", indices, piece, cost=4 * self.detector.num_classes)
        return [Agreement(images=name, n=len(same), agree=int(same.sum())) for name, same in found.items()]

    # --- radii

    def _radii(
        self,
        stages: Stages,
        norm: Norm,
        clean: Measurement,
        report: Measurement,
        rejected: NDArray[np.bool_],
        conformal: Measurement,
    ) -> RadiusCalibration:
        known = _finite(_slope(clean, norm))
        typical = float(np.median(known)) if len(known) else 0.0
        slopes, fitted, change = self._fit_omega(stages, norm, clean, typical)
        slope = _slope(report, norm, typical)
        radius = omega_radius(report.margin, slope, fitted.table)
        accepted = np.flatnonzero(~rejected)
        if not len(accepted):
            raise CalibrationError("the detector rejects every report image; its threshold is of no use.")
        tried = accepted[: self.effort.violation_images]
        distance = self._distances(stages, f"distances-{norm}", norm, self.folds["report"][tried])
        # What `nearest` left unbroken is attacked from inside its radius, on another loss.
        rows = np.flatnonzero(distance >= radius[tried])
        distance[rows] = np.minimum(
            distance[rows], self._inside(stages, norm, self.folds["report"][tried[rows]], radius[tried[rows]])
        )
        finite, reached = _finite(radius[tried]), np.isfinite(distance) & np.isfinite(radius[tried])
        near = float(radius[tried][reached].mean()) if reached.any() else 0.0
        mean_distance = float(distance[reached].mean()) if reached.any() else 0.0
        lipschitz = fitting.bound(slopes, self.effort.blocks)
        scales = self._conformal(stages, norm, conformal, typical)
        first_order = first_order_radius(report.margin, slope)
        stated = [np.minimum(scale.kappa * first_order, fitted.table.reach.max()) for scale in scales]
        judged = [
            scale.model_copy(
                update={
                    "violations": _violated(distance < values[tried]),
                    "mean_radius": float(values[tried].mean()),
                }
            )
            for scale, values in zip(scales, stated, strict=True)
        ]
        return RadiusCalibration(
            lipschitz=lipschitz.value,
            slope=typical,
            lipschitz_fit=_record(lipschitz),
            omega=_omega_record(fitted.table),
            omega_fits=[[_record(fit) for fit in row] for row in fitted.fits],
            violations=_violated(distance < radius[tried]),
            mean_radius=float(finite.mean()) if len(finite) else 0.0,
            mean_distance=mean_distance,
            tightness=near / mean_distance if mean_distance else 0.0,
            attack={
                "images": "report images that the detector accepts; attacks are not clipped to [0, 1]",
                "violations": {
                    "name": "those of distance, and PGD on the cross-entropy inside the radius",
                    "steps": self.effort.violation_steps,
                    "restarts": self.effort.violation_restarts,
                },
                "distance": {
                    "name": " and ".join(SUITE[norm]),
                    "steps": self.effort.distance_steps,
                    "n": len(tried),
                    "found": int(reached.sum()),
                    "median": float(np.median(distance)) if reached.all() else None,
                },
            },
            effort={"images": len(slopes), "exceeded": fitting.EXCEEDED, **change},
            ablation={
                "l_bound": float(l_bound(report.margin[tried], lipschitz.value).mean()),
                "first_order": float(
                    _finite(first_order_radius(report.margin, _slope(report, norm))[tried]).mean()
                ),
            },
            conformal=judged,
            histogram=radius_histogram(np.where(rejected, 0.0, [*stated, radius][0])),
        )

    def _fit_omega(
        self, stages: Stages, norm: Norm, clean: Measurement, typical: float
    ) -> tuple[Float64, FittedOmega, dict[str, Any]]:
        """Longest gradients met (B,), the table, and what a second look with twice the effort changed."""
        indices = self.folds["radii"][: self.effort.omega_images]
        place = {int(index): at for at, index in enumerate(indices)}

        def screening(part: Int64) -> Arrays:
            generator = self._generator(part, NORMS.index(norm))
            images = self.pixels(part)
            margin, _, value, slope, shift = fitting.screen(
                self.model,
                images,
                norm,
                self.effort,
                generator,
                beyond=self._beyond(images, norm),
                typical=typical,
            )
            # Half precision is enough for a start, and halves the largest of the kept arrays.
            return {"margin": margin, "value": value, "slope": slope, "shift": shift.astype(np.float16)}

        screened = stages.run(f"omega-{norm}-screen", indices, screening, cost=self._screening())
        some = clean[: len(indices)]
        plan = fitting.layout(first_order_radius(some.margin, _slope(some, norm, typical)), self.effort)

        def ascent(effort: Effort, start: NDArray[np.float16]) -> Piece:
            def piece(part: Int64) -> Arrays:
                at = np.array([place[int(index)] for index in part])
                values, slope = fitting.remainders(
                    self.model,
                    self.pixels(part),
                    norm,
                    effort,
                    start[at].astype(np.float32),
                    typical=typical,
                )
                return {"values": values, "slope": slope}

            return piece

        chosen = fitting.survivors(plan, screened["value"], self.effort)
        cost = self._ascent()
        found = stages.run(
            f"omega-{norm}", indices[chosen], ascent(self.effort, screened["shift"]), cost=cost
        )
        values = np.zeros((len(indices), len(fitting.EPS)))
        values[chosen] = found["values"]
        slopes = screened["slope"].copy()
        slopes[chosen] = np.fmax(slopes[chosen], found["slope"])

        # A second look, from other starts and with twice the steps, at the images that hold a block's
        # maximum.
        leading = fitting.leaders(plan, values)
        again = self.effort.scaled(2)

        def second(part: Int64) -> Arrays:
            generator = self._generator(part, 10 + NORMS.index(norm))
            images = self.pixels(part)
            beyond = self._beyond(images, norm)
            shift = fitting.screen(
                self.model, images, norm, again, generator, beyond=beyond, typical=typical
            )[4]
            found_values, slope = fitting.remainders(self.model, images, norm, again, shift, typical=typical)
            return {"values": found_values, "slope": slope}

        cost = 2 * (self._screening() + cost)
        looked = stages.run(f"omega-{norm}-again", indices[leading], second, cost=cost)
        first = fitting.omega(plan, values)
        values[leading] = np.fmax(values[leading], looked["values"])
        slopes[leading] = np.fmax(slopes[leading], looked["slope"])
        fitted = fitting.omega(plan, values)
        return slopes, fitted, {"second_look": _change(first.table, fitted.table), "leaders": len(leading)}

    def _beyond(self, images: NDArray[np.float32], norm: Norm) -> NDArray[np.float32]:
        """Near points of another class (B, C, H, W), by half the steps: they only start a search."""
        labels = self.model.logits(images).argmax(axis=1)
        steps = max(1, self.effort.steps // 2)
        return attacks.nearest(self.model, images, labels, norm=norm, steps=steps).images

    def _inside(self, stages: Stages, norm: Norm, indices: Int64, radius: Float64) -> Float64:
        limit = {int(index): float(value) for index, value in zip(indices, radius, strict=True)}

        def piece(part: Int64) -> Arrays:
            images = self.pixels(part)
            found = attacks.inside(
                self.model,
                images,
                self.model.logits(images).argmax(axis=1),
                np.array([limit[int(index)] for index in part]),
                norm=norm,
                losses=("cross-entropy",),
                steps=self.effort.violation_steps,
                restarts=self.effort.violation_restarts,
                seed=int(part[0]),
            )
            return {"distance": found.distance}

        found = stages.run(f"violations-{norm}", indices, piece, cost=self._pgd())
        return np.asarray(found.get("distance", np.empty(0)), dtype=np.float64)

    def _distances(self, stages: Stages, name: str, norm: Norm, indices: Int64) -> Float64:
        def piece(part: Int64) -> Arrays:
            images = self.pixels(part)
            labels = self.model.logits(images).argmax(axis=1)
            found = attacks.nearest(self.model, images, labels, norm=norm, steps=self.effort.distance_steps)
            return {"distance": found.distance}

        return np.asarray(stages.run(name, indices, piece, cost=self._nearest())["distance"], np.float64)

    def _conformal(
        self, stages: Stages, norm: Norm, measured: Measurement, typical: float
    ) -> list[ConformalScale]:
        """The finite-sample scales by alpha; none for an alpha with too few accepted images, or where only
        the scale 0 would keep the promise.

        No scale is above 1: where models are linear, all that lies beyond the first-order radius is the
        attack's own overshoot, and a smaller radius keeps the promise as well. `typical` comes from the radii
        fold, so the scores of this one stay exchangeable with a fresh image's.
        """
        radius = first_order_radius(measured.margin, _slope(measured, norm, typical))
        accepted = np.flatnonzero(~self._rejects(measured) & np.isfinite(radius) & (radius > 0))
        accepted = accepted[: self.effort.distance_images]
        ranks = {}
        for alpha in self.settings.alphas:
            with suppress(CalibrationError):
                # The floor((n + 1) alpha)-th smallest of n, counted from the other end.
                ranks[alpha] = len(accepted) + 1 - statistics.conformal_rank(len(accepted), alpha)
        if not ranks:
            return []
        indices = self.folds["conformal"][accepted]
        distance = self._distances(stages, f"conformal-{norm}", norm, indices)
        scores = np.sort(distance / radius[accepted])
        return [
            ConformalScale(alpha=alpha, kappa=min(kappa, 1.0), n=len(accepted), suite=list(SUITE[norm]))
            for alpha, rank in ranks.items()
            if 0 < (kappa := float(scores[rank - 1])) < math.inf
        ]


def _violated(events: NDArray[np.bool_]) -> Share:
    """A share with a one-sided upper bound."""
    count, n = int(events.sum()), len(events)
    return Share(count=count, n=n, value=count / n, upper=statistics.clopper_pearson_upper(count, n))


def histogram(scores: Float64, threshold: float) -> Histogram:
    """Counts of finite scores in even bins up to 2.5 thresholds, and one more bin for those beyond."""
    finite = scores[np.isfinite(scores)]
    end = _SPREAD * threshold if threshold > 0 else 1.0
    edges = np.linspace(0.0, end, _BINS + 1)
    counts, _ = np.histogram(finite, edges)
    beyond = int((finite > end).sum())
    if beyond:
        edges = np.append(edges, np.nextafter(finite.max(), np.inf))
        counts = np.append(counts, beyond)
    return Histogram(edges=edges.tolist(), counts=counts.tolist())


def radius_histogram(radii: Float64) -> Histogram:
    """Counts of radii in even bins up to the largest; unbounded ones count in the last."""
    finite = radii[np.isfinite(radii)]
    end = float(finite.max(initial=0.0)) or 1.0
    counts, edges = np.histogram(np.where(np.isposinf(radii), end, radii), _RADIUS_BINS, (0.0, end))
    return Histogram(edges=edges.tolist(), counts=counts.tolist())


def _change(first: OmegaTable, second: OmegaTable) -> dict[str, float]:
    """Largest relative growth of omega, over the whole grid and where radii end up (omega between 0.2 and
    0.8).
    """
    growth = (second.values - first.values) / np.maximum(first.values, 1e-12)
    near = (first.values > 0.2) & (first.values < 0.8)
    return {
        "largest_growth": float(np.where(first.values > 1e-6, growth, 0.0).max()),
        "growth_where_radii_end": float(growth[near].max()) if near.any() else 0.0,
    }


def _slope(measured: Measurement, norm: Norm, typical: float = 0.0) -> Float64:
    """The margin's slope (B,), as radii take it; with `typical` 0 the dual norm of its gradient."""
    chosen = measured.gradient_l2 if norm == "l2" else measured.gradient_l1
    return effective_slope(measured.logits, np.asarray(chosen, dtype=np.float64), typical)


def _finite(values: Float64) -> Float64:
    return values[np.isfinite(values)]


def _share(events: NDArray[np.bool_]) -> Share:
    count, n = int(events.sum()), len(events)
    interval = statistics.clopper_pearson(count, n)
    return Share(count=count, n=n, value=count / n, lower=interval.lower, upper=interval.upper)


def _record(fit: Extreme) -> ExtremeFit:
    return ExtremeFit(**asdict(fit))


def _omega_record(table: OmegaTable) -> OmegaRecord:
    return OmegaRecord(
        eps=table.eps.tolist(),
        edges=table.edges.tolist(),
        values=table.values.tolist(),
        reach=table.reach.tolist(),
        conditioned_on=table.conditioned_on,
        relative=table.relative,
    )


def _write(found: Bundle, calibration: Calibration) -> None:
    """Swaps the bundle for one with this calibration; a crash leaves the old one whole."""
    if bundle.load(found.path, recalibrating=True).manifest.files[MODEL] != found.manifest.files[MODEL]:
        raise BundleError(f"{found.path}: its model was replaced during the calibration. Calibrate again.")
    with atomic_folder(found.path, keep=True) as folder:
        write_bytes(folder / CALIBRATION, bundle.dump(calibration))
        card = folder / CARD
        write_text(card, with_calibration(card.read_text() if card.is_file() else "", calibration))
        bundle.seal(folder, found.manifest)
