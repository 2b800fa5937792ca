"""The HTTP service, as `bentoml serve` runs it.

BentoML gives workers, sockets, probes and packaging; the routes are our own, because every byte a client
sends has to be judged before anything parses it, and because one error envelope has to cover them all. See
`docs/http.md` for the interface and `docs/decisions/` for why.
"""

import asyncio
import io
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import bentoml
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from guard import bundle as bundles
from guard import images, logs, metrics, openapi, samples
from guard.batching import Batcher
from guard.errors import GuardError, ImageError, UsageError
from guard.http import Edge, RequestError, annotate, read_upload, request_id
from guard.settings import Policy, bundle_path

if TYPE_CHECKING:
    from guard.decision import Decision, Guard

log = logging.getLogger("guard.service")

PAGE = Path(__file__).parent / "page"
MULTIPART_OVERHEAD = 2**16
"""Bytes that a form's boundaries and headers may add to the image's own."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Settings:
    """What an operator may set about the server, from environment variables.

    `GUARD_MAX_BYTES`, `GUARD_MAX_PIXELS`: largest upload, as sent and as decoded. `GUARD_MAX_UPLOADS`:
    uploads handled at once by one worker, others get 429. `GUARD_MAX_BATCH`: images decided at once.
    `GUARD_UPLOAD_SECONDS`: for a body to arrive. `GUARD_TIMEOUT`: seconds from the whole body to the answer,
    then 504. `GUARD_WORKERS`: processes.
    """

    max_bytes: int = images.LIMITS.bytes
    max_pixels: int = images.LIMITS.pixels
    max_uploads: int = 64
    max_batch: int = 16
    upload_seconds: float = 10
    timeout: float = 10
    workers: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Raises `UsageError` for a value that is not a positive number."""
        values: dict[str, Any] = {}
        for name, default in vars(cls()).items():
            text = environment.get(f"GUARD_{name.upper()}", "").strip()
            if not text:
                continue
            try:
                values[name] = type(default)(text)
            except ValueError:
                values[name] = 0
            if not 0 < values[name] < math.inf:
                raise UsageError(
                    f"GUARD_{name.upper()} is {text!r}: expected a positive number, like {default}."
                )
        return cls(**values)

    @property
    def limits(self) -> images.Limits:
        """What one image may cost."""
        return images.Limits(bytes=self.max_bytes, pixels=self.max_pixels)


try:
    SETTINGS = Settings.from_environment()
except UsageError as error:
    raise SystemExit(f"guard: {error}") from None


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


async def _page(_: Request) -> Response:
    headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "cache-control": "no-cache"}
    return FileResponse(PAGE / "index.html", headers=headers)


async def _classify(request: Request) -> Response:
    return await _service().classify(request)


async def _describe(_: Request) -> Response:
    return JSONResponse(_service().describe().model_dump(mode="json"))


async def _list_samples(_: Request) -> Response:
    found = _service().samples
    return JSONResponse(
        [{**sample.model_dump(), "url": f"samples/{sample.file}"} for sample in found.values()]
    )


async def _sample(request: Request) -> Response:
    service = _service()
    name = request.path_params["name"]
    if name not in service.samples:
        raise RequestError("There is no such sample.", status=404)
    return FileResponse(service.path / samples.FOLDER / name, media_type="image/png")


async def _measure(_: Request) -> Response:
    content, media_type = await anyio.to_thread.run_sync(metrics.exposition)
    return Response(content, headers={"content-type": media_type})


async def _interface(_: Request) -> Response:
    return JSONResponse(_service().openapi())


async def _ready(scope: Scope, receive: Receive, send: Send) -> None:
    answer = _service().readiness()
    await JSONResponse(answer)(scope, receive, send)


ROUTES = [
    Route("/", _page),
    Route("/classify", _classify, methods=["POST"]),
    Route("/model", _describe),
    Route("/samples.json", _list_samples),
    Route("/samples/{name}", _sample),
    Route("/metrics", _measure),
    Route("/docs.json", _interface),
    Mount("/page", StaticFiles(directory=PAGE)),
]


@bentoml.service(
    name="guard",
    workers=SETTINGS.workers,
    # Ours ends a request first, with the envelope; this one is BentoML's last resort.
    traffic={"timeout": math.ceil(SETTINGS.upload_seconds + SETTINGS.timeout) + 30},
    # BentoML labels its metrics with the path that was asked for, which lets a client fill the memory.
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(Starlette(routes=ROUTES), path="/")
class GuardService:
    """One worker: a bundle, its sessions and their batches."""

    def __init__(self) -> None:
        logs.configure()
        # Pillow warns about oddities in files; a client must not be able to write to the log.
        warnings.filterwarnings("ignore", module="PIL")
        self.path = bundle_path()
        self.guard: Guard | None = None
        self.failure: str | None = None
        self.samples: dict[str, samples.Sample] = {}
        self.uploads = 0
        self.decoders = anyio.CapacityLimiter(os.cpu_count() or 1)
        self.batcher = Batcher(self._decide, max_batch=SETTINGS.max_batch)
        self.loading: asyncio.Task[None] | None = None

    @staticmethod
    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    def check() -> None:
        """Runs once, before any worker: a bundle that cannot be served ends the server here, in one line."""
        try:
            Policy.from_environment()
            bundles.load(bundle_path()).calibrated()
        except GuardError as error:
            raise SystemExit(f"guard: {error}") from None
        metrics.own_folder()

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """Loads in the background, so that probes are answered meanwhile."""
        self.loading = asyncio.create_task(asyncio.to_thread(self._load))

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        """Lets the batch in hand end."""
        self.batcher.close()

    def __is_alive__(self) -> bool:
        return self.failure is None

    def readiness(self) -> dict[str, str]:
        """What `/readyz` says; raises `RequestError` (503) until the model has answered a warm-up."""
        guard = self._ready()
        return {
            "status": "ready",
            "model": guard.bundle.manifest.name,
            "digest": guard.bundle.digest,
            "provider": guard.detector.provider,
        }

    def describe(self) -> ModelAnswer:
        """What `/model` says."""
        guard = self._ready()
        bundle, policy = guard.bundle, guard.policy
        summary = bundle.calibrated().model_dump(
            mode="json",
            exclude={"provenance": True, "l2": {"omega"}, "linf": {"omega"}},
        )
        return ModelAnswer(
            name=bundle.manifest.name,
            digest=bundle.digest,
            provider=guard.detector.provider,
            manifest=bundle.manifest.model_dump(mode="json"),
            calibration=summary,
            policy=PolicyAnswer(
                min_radius_l2=policy.min_radius_l2,
                min_radius_linf=policy.min_radius_linf,
                expose_scores=policy.expose_scores,
                clean_rejection=_clean_rejection(bundle.calibrated(), policy),
            ),
        )

    def openapi(self) -> dict[str, Any]:
        """What `/docs.json` says."""
        from guard.decision import Decision

        return openapi.document(Decision, ModelAnswer)

    async def classify(self, request: Request) -> Response:
        """Answers one `POST /classify`."""
        self._ready()
        with self._admitted():
            upload = await read_upload(request, max_bytes=SETTINGS.max_bytes)
            try:
                async with asyncio.timeout(SETTINGS.timeout):
                    image = await anyio.to_thread.run_sync(
                        self._decode,
                        upload.data,
                        upload.declared,
                        limiter=self.decoders,
                        abandon_on_cancel=True,
                    )
                    decision = await self.batcher.submit(image)
            except TimeoutError:
                raise RequestError(
                    f"No answer within {SETTINGS.timeout:g} seconds; try again later.",
                    status=504,
                    headers={"Retry-After": "1"},
                ) from None
            except ImageError as error:
                metrics.REFUSED.labels(error.code).inc()
                raise
        self._record(request.scope, decision)
        answer = decision.model_copy(update={"request_id": request_id(request.scope)})
        return Response(
            answer.model_dump_json(), media_type="application/json", headers={"cache-control": "no-store"}
        )

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.uploads >= SETTINGS.max_uploads:
            raise RequestError(
                f"The server is busy with {self.uploads} uploads; try again later.",
                status=429,
                headers={"Retry-After": "1"},
            )
        self.uploads += 1
        metrics.IN_PROGRESS.inc()
        try:
            yield
        finally:
            self.uploads -= 1
            metrics.IN_PROGRESS.dec()

    def _ready(self) -> "Guard":
        if self.failure is not None:
            raise RequestError(self.failure, status=503, code="failed")
        if self.guard is None:
            raise RequestError(
                "The model is being loaded; try again in a few seconds.",
                status=503,
                code="not_ready",
                headers={"Retry-After": "2"},
            )
        return self.guard

    def _load(self) -> None:
        started = time.perf_counter()
        try:
            # Only workers pay for onnxruntime; the process that supervises them imports this module too.
            from guard.decision import Guard

            guard = Guard.from_bundle(self.path)
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
        self.samples = {sample.file: sample for sample in found}
        self.guard = guard
        manifest, calibration = guard.bundle.manifest, guard.bundle.calibrated()
        provider = guard.detector.provider
        metrics.MODEL.labels(manifest.name, guard.bundle.digest, calibration.score, provider).set(1)
        fields = {
            "model": manifest.name,
            "digest": guard.bundle.digest,
            "detector": calibration.score,
            "provider": provider,
            "seconds": round(time.perf_counter() - started, 2),
        }
        log.info("ready", extra={"fields": fields})

    def _warm_up(self, guard: "Guard") -> None:
        picture = io.BytesIO()
        Image.linear_gradient("L").save(picture, "PNG")
        image = _decode(guard, picture.getvalue())
        for size in {1, SETTINGS.max_batch}:
            guard.classify(np.stack([image] * size))

    def _decode(self, data: bytes, declared: str | None) -> NDArray[np.float32]:
        with metrics.DECODE_SECONDS.time():
            return _decode(self._ready(), data, declared)

    def _decide(self, batch: list[NDArray[np.float32]]) -> "list[Decision]":
        metrics.BATCH_SIZE.observe(len(batch))
        with metrics.INFERENCE_SECONDS.time():
            return self._ready().classify(np.stack(batch))

    def _record(self, scope: Scope, decision: "Decision") -> None:
        if decision.accepted:
            metrics.ACCEPTED.inc()
        for reason in decision.reasons:
            metrics.REJECTED.labels(reason).inc()
        fields = {"label": decision.label, "accepted": decision.accepted, "reasons": decision.reasons}
        # Counts of scores would be scores to whoever sends one image between two looks at the metrics.
        if self._ready().policy.expose_scores:
            measured, threshold = decision.measured, decision.detector.threshold
            fields |= {"score": measured.score, "threshold": threshold}
            metrics.SCORE.observe(measured.score / threshold if threshold else math.inf)
            if decision.accepted:
                metrics.RADIUS.labels("l2").observe(measured.l2)
                metrics.RADIUS.labels("linf").observe(measured.linf)
        annotate(scope, **fields)


def _clean_rejection(calibration: bundles.Calibration, policy: Policy) -> tuple[float, float] | None:
    """Bounds on the share of clean images rejected by the detector or a least radius.

    From the histograms of the radii of clean held-out images, where rejected ones count as radius 0. A bin
    that the least radius cuts counts wholly in the upper bound; two least radii at once add up in it.
    """
    lower, upper = 0.0, 0.0
    detector = calibration.realized_fpr.value
    for radii, least in ((calibration.l2, policy.min_radius_l2), (calibration.linf, policy.min_radius_linf)):
        if least is None:
            continue
        histogram = getattr(radii, "histogram", None)
        if histogram is None:
            return None
        counts, edges = np.asarray(histogram.counts), np.asarray(histogram.edges)
        lower = max(lower, float(counts[edges[1:] <= least].sum() / counts.sum()))
        upper += max(0.0, float(counts[edges[:-1] < least].sum() / counts.sum()) - detector)
    if policy.min_radius_l2 is None and policy.min_radius_linf is None:
        return None
    return lower, min(1.0, detector + upper)


def _decode(guard: "Guard", data: bytes, declared: str | None = None) -> NDArray[np.float32]:
    manifest = guard.bundle.manifest
    shape = (manifest.input.channels, manifest.input.height, manifest.input.width)
    options = manifest.preprocessing.model_dump()
    return images.decode(data, shape, **options, declared=declared, limits=SETTINGS.limits)


def _service() -> GuardService:
    service: GuardService | None = bentoml.get_current_service()
    if service is None:
        raise RequestError(
            "The server is starting.", status=503, code="not_ready", headers={"Retry-After": "2"}
        )
    return service


GuardService.add_asgi_middleware(  # type: ignore[attr-defined]
    Edge,
    max_bytes=SETTINGS.max_bytes + MULTIPART_OVERHEAD,
    upload_seconds=SETTINGS.upload_seconds,
    routes=frozenset({"/", "/classify", "/model", "/docs.json", "/metrics", "/livez", "/readyz"}),
    overrides={"/readyz": _ready},
)
