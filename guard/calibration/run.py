"""`guard calibrate`: every stage in turn, and the record of it all in the bundle.

Works on any bundle through onnxruntime, without torch. Folds, starts and blocks follow the seed; an
interrupted run goes on where it stopped.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from guard import bundle, data, statistics
from guard.bundle import CALIBRATION, CARD, MODEL, Bundle, Calibration, ExtremeFit, PredictedShare, ScoreName
from guard.calibration import cost, histograms, radii, thresholds
from guard.calibration.fitting import Effort
from guard.calibration.work import Settings, Work, folds_of
from guard.card import with_calibration, without_attacks
from guard.data import Dataset
from guard.errors import BundleError, CalibrationError
from guard.files import atomic_folder, check_writable, provenance, sha256, write_bytes, write_text
from guard.guarded import GRAPH_VERSION
from guard.norms import NORMS
from guard.progress import Progress
from guard.runtime import Detector
from guard.shares import share
from guard.stages import Stages

STAGES_VERSION = 7
"""Raised whenever a stage computes something else: an interrupted run of another version starts anew."""


def calibrate(
    folder: str | Path,
    dataset: Dataset,
    settings: Settings = Settings(),  # noqa: B008 - immutable
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
    unusable, `BundleError` for the bundle, `UsageError` where its folder cannot be replaced, and what
    `Detector` raises.
    """
    found = bundle.load(folder, recalibrating=True)  # whatever its old one is, it is replaced
    check_writable(found.path)
    _check(dataset, found, settings)
    detector = Detector(found.model, score=settings.score, provider=provider, threads=threads)
    folds = folds_of(dataset, settings.seed)
    key = {
        "version": STAGES_VERSION,
        "model": found.manifest.files[MODEL],
        "graph": GRAPH_VERSION,
        "data": dataset.digest,
        "settings": asdict(settings),
        "effort": asdict(effort),
        "provider": detector.provider,
    }
    passes = cost.whole(effort, folds, detector.num_classes)
    with (
        Progress(passes, "calibrate", silent=silent) as progress,
        Stages(found.path, key, progress) as stages,
    ):
        work = Work(detector, dataset, folds, settings, effort, stages)
        calibration = _calibrated(work, found, arguments or {})
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
    work = Work(detector, dataset, folds_of(dataset, old.seed), settings, Effort(), stages)
    clean, reference = (thresholds.measure(work, name) for name in ("threshold", "radii"))
    chosen, scores = thresholds.fit(work, clean, reference, old.row_bound)
    report = thresholds.measure(work, "report", chosen)
    changed = {
        "score": score,
        "threshold": chosen.value,
        "tests": chosen.records(),
        "realized_fpr": share(chosen.rejects(report)),
        "histogram": histograms.of_scores(scores, chosen.value),
        "agreement": [],
    }
    return old.model_copy(update=changed)


def _check(dataset: Dataset, found: Bundle, settings: Settings) -> None:
    data.check_shape(dataset, found.manifest.input.shape)
    parts = data.folds(len(dataset), settings.seed)
    if any(not len(part) for part in parts.values()):
        raise CalibrationError(
            f"{dataset.name}: {len(dataset)} images are too few to split: expected at least 10."
        )
    try:
        statistics.rank_of(len(parts["threshold"]), settings.fpr, settings.risk)
    except CalibrationError as error:
        least = statistics.least_number(settings.fpr, settings.risk)
        raise CalibrationError(
            f"{dataset.name}: {len(dataset)} images are too few: expected at least "
            f"{math.ceil(least / data.FOLDS['threshold'])}, for a quarter sets the threshold: {error}"
        ) from error


def _calibrated(work: Work, found: Bundle, arguments: Mapping[str, Any]) -> Calibration:
    settings, dataset, folds = work.settings, work.dataset, work.folds
    clean, reference = (thresholds.measure(work, name) for name in ("threshold", "radii"))
    rows = thresholds.fit_rows(work, reference)
    chosen, scores = thresholds.fit(work, clean, reference, rows.value)
    report = thresholds.measure(work, "report", chosen)
    conformal = thresholds.measure(work, "conformal", chosen)
    measured = radii.Measured(reference, conformal, report)
    by_norm = {norm: radii.fit(work, norm, measured, chosen) for norm in NORMS}
    accuracy = None
    if dataset.labels is not None:
        accuracy = share(report.labels == dataset.labels[folds["report"]])
    m, rank = len(folds["report"]), statistics.rank_of(len(scores), settings.fpr, settings.risk)
    return Calibration(
        model_sha256=found.manifest.files[MODEL],
        graph_version=GRAPH_VERSION,
        score=settings.score,
        guarantee=settings.guarantee,
        delta=settings.risk,
        fpr=settings.fpr,
        threshold=chosen.value,
        tests=chosen.records(),
        n=len(scores),
        seed=settings.seed,
        data={"name": dataset.name, "n": len(dataset), "digest": dataset.digest},
        folds={name: len(part) for name, part in folds.items()},
        predicted_fpr=PredictedShare(**asdict(statistics.predicted_rate(len(scores), rank, m)), m=m),
        realized_fpr=share(chosen.rejects(report)),
        accuracy=accuracy,
        row_bound=chosen.row_bound,
        row_fit=ExtremeFit(**asdict(rows)),
        agreement=thresholds.agreement(work, chosen),
        histogram=histograms.of_scores(scores, chosen.value),
        l2=by_norm["l2"],
        linf=by_norm["linf"],
        provenance=provenance(
            arguments, seed=settings.seed, settings=asdict(settings), effort=asdict(work.effort)
        ),
    )


def _write(found: Bundle, calibration: Calibration) -> None:
    """Swaps the bundle for one with this calibration; a crash leaves the old one whole."""
    if bundle.load(found.path, recalibrating=True).manifest.files[MODEL] != found.manifest.files[MODEL]:
        raise BundleError(f"{found.path}: its model was replaced during the calibration. Calibrate again.")
    with atomic_folder(found.path, keep=True) as folder:
        write_bytes(folder / CALIBRATION, bundle.dump(calibration))
        card = folder / CARD
        text = with_calibration(card.read_text() if card.is_file() else "", calibration)
        if sha256(folder / CALIBRATION) != found.manifest.files.get(CALIBRATION):
            text = without_attacks(text)
        write_text(card, text)
        bundle.seal(folder, found.manifest)
