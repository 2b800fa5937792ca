"""What one server process does with uploads: admit, decode, batch, decide, count.

Nothing here knows BentoML or routes; `guard.routes` gives it its requests, `guard.service` its life.
"""

import asyncio
import io
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from starlette.types import Scope

from guard import images, metrics, samples
from guard.batching import Batcher
from guard.bundle import CALIBRATION, Calibration
from guard.errors import GuardError
from guard.http import RequestError, Upload, annotate
from guard.settings import Policy, positive, upload_limits

if TYPE_CHECKING:
    from guard.decision import Decision, Guard

log = logging.getLogger(__name__)

RETRY = {"Retry-After": "1"}

COMMAND_LINES: dict[str, Any] = {"arguments": True, "training": {"provenance": {"arguments"}}}
"""What of a manifest's provenance `/model` leaves out: paths on the machine that made the bundle."""


@dataclass(frozen=True)
class Settings:
    """What an operator may set about a server, from environment variables.

    `GUARD_MAX_BYTES`, `GUARD_MAX_PIXELS`: largest upload, as sent and as decoded. `GUARD_MAX_UPLOADS`:
    uploads handled at once by one process, others get 429. `GUARD_MAX_BATCH`: images decided at once.
    `GUARD_UPLOAD_SECONDS`: for a body to arrive. `GUARD_TIMEOUT`: seconds from the whole body to the answer,
    then 504. `GUARD_WORKERS`: processes.
    """

    max_bytes: int = images.LIMITS.bytes
    max_pixels: int = images.LIMITS.pixels
    max_uploads: int = 64
    max_batch: int = 16
    upload_seconds: float = 10.0
    timeout: float = 10.0
    workers: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Raises `UsageError` for a value that is not a positive number."""
        upload_limits(environment)
        return cls(
            **{
                name: positive(environment, f"GUARD_{name.upper()}", default)
                for name, default in vars(cls()).items()
            }
        )


class PolicyAnswer(BaseModel):
    """What the operator demands beyond the detector, and what that costs.

    `clean_rejection` bounds the share of clean images that detector and least radii reject together,
    measured when the bundle was calibrated; null where no least radius is set or nothing was measured.
    """

    min_radius_l2: float | None
    min_radius_linf: float | None
    expose_scores: bool
    clean_rejection: tuple[float, float] | None


class ModelAnswer(BaseModel):
    """What `/model` says: manifest, summary of the calibration, and what the operator demands beyond it."""

    name: str
    digest: str
    provider: str
    manifest: dict[str, Any]
    calibration: dict[str, Any]
    policy: PolicyAnswer


class ReadyAnswer(BaseModel):
    """What `/readyz` says once the model answers: which one, how calibrated, and where it truly runs."""

    status: str = "ready"
    model: str
    digest: str
    calibration: str
    provider: str


class Worker:
    """One bundle, its sessions and its batches, in one event loop.

    Not ready until `load` has ended well; until then, and where it failed, everything raises `RequestError`
    with status 503.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.failure: str | None = None
        self._samples: dict[str, samples.Sample] = {}
        self._guard: Guard | None = None
        self._uploads = 0
        # Processes share the cores.
        self._cores = max(1, (os.cpu_count() or 1) // settings.workers)
        # A pool of our own: its threads stay taken until a decoding ends, even when nobody waits any more.
        self._decoders = ThreadPoolExecutor(self._cores, thread_name_prefix="decoding")
        self._batcher = Batcher(self._decide, max_batch=settings.max_batch)
        self._limits = images.Limits(bytes=settings.max_bytes, pixels=settings.max_pixels)

    @classmethod
    def of(cls, guard: "Guard", settings: Settings) -> "Worker":
        """A worker that is ready, of a guard loaded elsewhere; it has no samples."""
        worker = cls(guard.bundle.path, settings)
        worker._guard = guard
        return worker

    def load(self) -> None:
        """Loads and verifies the bundle and lets the model answer a warm-up; never raises. Takes seconds."""
        started = time.perf_counter()
        try:
            # Here, not above: the process that supervises the workers imports this module too, and can do
            # without onnxruntime.
            from guard.decision import Guard

            threads = self._cores if self.settings.workers > 1 else 0  # alone, onnxruntime takes them all
            guard = Guard.from_bundle(self.path, threads=threads)
            self._warm_up(guard)
            found = samples.load(self.path)
        except GuardError as error:
            self.failure = str(error)
            log.critical("cannot serve: %s", error)
            return
        except Exception:
            self.failure = "The model could not be loaded; the server's log says why."
            log.critical("cannot serve", exc_info=True)
            return
        self._samples = {sample.file: sample for sample in found}
        self._guard = guard
        ready = self.ready()
        detector = guard.calibration.score
        labels = (ready.model, ready.digest, ready.calibration, detector, ready.provider)
        metrics.MODEL.labels(*labels).set(1)
        fields = {
            "detector": detector,
            "threshold": guard.calibration.threshold,
            **asdict(guard.policy),
            "seconds": round(time.perf_counter() - started, 2),
        }
        log.info("ready", extra={"fields": ready.model_dump() | fields})
        if guard.calibration.caveat is not None:
            log.warning(guard.calibration.caveat)

    def close(self) -> None:
        """Lets the batch and the decodings in hand end and takes no other."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._batcher.close()

    @property
    def guard(self) -> "Guard":
        """What decides; raises `RequestError` as long as it is not ready."""
        if self.failure is not None:
            raise RequestError(self.failure, status=503, code="failed")
        if self._guard is None:
            raise RequestError(
                "The model is being loaded; try again in a moment.",
                status=503,
                code="not_ready",
                headers=RETRY,
            )
        return self._guard

    @property
    def samples(self) -> "Mapping[str, samples.Sample]":
        """The bundle's sample images by file name; raises `RequestError` as long as it is not ready."""
        _ = self.guard
        return self._samples

    def ready(self) -> ReadyAnswer:
        """What `/readyz` says."""
        bundle = self.guard.bundle
        return ReadyAnswer(
            model=bundle.manifest.name,
            digest=bundle.digest,
            calibration=f"sha256:{bundle.manifest.files[CALIBRATION]}",
            provider=self.guard.detector.provider,
        )

    def describe(self) -> ModelAnswer:
        """What `/model` says."""
        guard = self.guard
        manifest, calibration, policy = guard.bundle.manifest, guard.calibration, guard.policy
        fits = {"omega", "omega_fits", "lipschitz_fit"}
        unneeded: dict[str, Any] = {"provenance": True, "row_fit": True, "l2": fits, "linf": fits}
        return ModelAnswer(
            name=manifest.name,
            digest=guard.bundle.digest,
            provider=guard.detector.provider,
            manifest=manifest.model_dump(mode="json", exclude={"provenance": COMMAND_LINES}),
            calibration=calibration.model_dump(mode="json", exclude=unneeded),
            policy=PolicyAnswer(
                min_radius_l2=policy.min_radius_l2,
                min_radius_linf=policy.min_radius_linf,
                expose_scores=policy.expose_scores,
                clean_rejection=clean_rejection(calibration, policy),
            ),
        )

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Room for one more upload; raises `RequestError` (429) where there is none."""
        if self._uploads >= self.settings.max_uploads:
            raise RequestError(
                f"The server is busy with {self._uploads} uploads; try again later.",
                status=429,
                headers=RETRY,
            )
        self._uploads += 1
        metrics.IN_PROGRESS.inc()
        try:
            yield
        finally:
            self._uploads -= 1
            metrics.IN_PROGRESS.dec()

    async def classify(self, upload: Upload, scope: Scope) -> "Decision":
        """Decides one upload, together with those that wait at the same time; `scope` is its request's.

        Raises `ImageError` for what is not an acceptable image, `RequestError` (504) after
        `Settings.timeout`. Work already begun ends on its own; at most one batch and one decoding per core
        are in hand.
        """
        guard = self.guard
        try:
            async with asyncio.timeout(self.settings.timeout):
                image = await asyncio.get_running_loop().run_in_executor(
                    self._decoders, self._decode, guard, upload.data, upload.declared
                )
                decision = await self._batcher.submit(image)
        except TimeoutError:
            raise RequestError(
                f"No answer within {self.settings.timeout:g} seconds; try again later.",
                status=504,
                headers=RETRY,
            ) from None
        self._record(guard, decision, scope)
        return decision

    def _warm_up(self, guard: "Guard") -> None:
        picture = io.BytesIO()
        Image.linear_gradient("L").save(picture, "PNG")
        image = self._decode(guard, picture.getvalue())
        for size in {1, self.settings.max_batch}:
            guard.classify(np.stack([image] * size))
        if guard.needs_rows:  # an undecided image's further rows have a session of their own
            guard.detector.vjp(image[None], np.zeros((1, guard.detector.num_classes), np.float32))

    def _decode(self, guard: "Guard", data: bytes, declared: str | None = None) -> NDArray[np.float32]:
        with metrics.DECODE_SECONDS.time():
            return guard.decode(data, self._limits, declared=declared)

    def _decide(self, batch: list[NDArray[np.float32]]) -> "list[Decision]":
        metrics.BATCH_SIZE.observe(len(batch))
        with metrics.INFERENCE_SECONDS.time():
            return self.guard.classify(np.stack(batch))

    def _record(self, guard: "Guard", decision: "Decision", scope: Scope) -> None:
        if decision.accepted:
            metrics.ACCEPTED.inc()
        for reason in decision.reasons:
            metrics.REJECTED.labels(reason).inc()
        annotate(scope, label=decision.label, accepted=decision.accepted, reasons=decision.reasons)
        # Counts of scores would be scores to whoever sends one image between two looks at the metrics.
        if not guard.policy.expose_scores:
            return
        measured, threshold = decision.measured, decision.detector.threshold
        annotate(scope, score=measured.score, threshold=threshold)
        metrics.observe(metrics.SCORE, measured.score / threshold if threshold else math.inf)
        if decision.accepted:
            metrics.observe(metrics.RADIUS.labels("l2"), measured.l2)
            metrics.observe(metrics.RADIUS.labels("linf"), measured.linf)


def clean_rejection(calibration: Calibration, policy: Policy) -> tuple[float, float] | None:
    """Bounds on the share of clean images that the detector or a least radius rejects.

    From the histograms of the radii of clean held-out images, where rejected ones count as radius 0. A bin
    that the least radius cuts counts wholly in the upper bound; two least radii at once add up in it. None
    where no least radius is set, or the bundle was calibrated without such histograms.
    """
    detector = calibration.realized_fpr.value
    lower, further = detector, 0.0
    least = [(calibration.l2, policy.min_radius_l2), (calibration.linf, policy.min_radius_linf)]
    demanded = [(radii, radius) for radii, radius in least if radius is not None]
    for radii, radius in demanded:
        histogram = radii.histogram
        if histogram is None:
            return None
        counts, edges = np.asarray(histogram.counts), np.asarray(histogram.edges)
        lower = max(lower, float(counts[edges[1:] <= radius].sum() / counts.sum()))
        further += max(0.0, float(counts[edges[:-1] < radius].sum() / counts.sum()) - detector)
    return (lower, min(1.0, detector + further)) if demanded else None
