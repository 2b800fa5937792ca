"""The HTTP service, as `bentoml serve` runs it.

BentoML gives processes, sockets, probes and packaging; routes and batches are our own, because every byte a
client sends has to be judged before anything parses it, and because one error envelope has to cover them
all. `docs/http.md` describes the interface, `docs/decisions/` says why.
"""

import asyncio
import math
import warnings

import bentoml

from guard import bundle as bundles
from guard import logs, metrics, samples
from guard.errors import GuardError, UsageError
from guard.http import Edge, RequestError
from guard.routes import PATHS, Routes
from guard.settings import Policy, bundle_path
from guard.worker import RETRY, Settings, Worker

MULTIPART_OVERHEAD = 2**16
"""Bytes that a form's boundaries and headers may add to the image's own."""

IMAGE = bentoml.images.Image(python_version="3.11").build_include(
    "guard", "pyproject.toml", "README.md", "LICENSE"
)
"""What a container holds before it installs guard from its own source, as bentofile.yaml asks for."""

try:
    SETTINGS = Settings.from_environment()
except UsageError as error:
    raise SystemExit(f"guard: error: {error}") from None


def _worker() -> Worker:
    service: GuardService | None = bentoml.get_current_service()
    if service is None:
        raise RequestError("The server is starting.", status=503, code="not_ready", headers=RETRY)
    return service.worker


@bentoml.service(
    name="guard",
    workers=SETTINGS.workers,
    # A last resort: ours ends a request first, and with the envelope.
    traffic={"timeout": math.ceil(SETTINGS.upload_seconds + SETTINGS.timeout) + 30},
    # BentoML labels its metrics with the path asked for, which lets clients fill the memory.
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    image=IMAGE,
)
class GuardService:
    """One server process."""

    def __init__(self) -> None:
        logs.configure()
        # Pillow warns of oddities in files; clients must not be able to fill the log.
        warnings.filterwarnings("ignore", module="PIL")
        self.worker = Worker(bundle_path(), SETTINGS)

    # Makes a static method of it.
    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    def check() -> None:
        """Runs once, before any worker: a bundle that cannot be served ends the server here, in one line."""
        from guard.guarded import GRAPH_VERSION

        try:
            Policy.from_environment()
            bundles.load(bundle_path(), graph_version=GRAPH_VERSION).calibrated()
            samples.load(bundle_path())
        except GuardError as error:
            raise SystemExit(f"guard: error: {error}") from None
        logs.configure()
        metrics.own_folder()

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """Loads in the background, so that probes are answered meanwhile."""
        self.loading = asyncio.create_task(asyncio.to_thread(self.worker.load))

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        """Lets the batch in hand end."""
        self.worker.close()

    def __is_alive__(self) -> bool:
        return self.worker.failure is None


GuardService.add_asgi_middleware(  # type: ignore[attr-defined]
    Edge,
    max_bytes=SETTINGS.max_bytes + MULTIPART_OVERHEAD,
    upload_seconds=SETTINGS.upload_seconds,
    paths=PATHS,
    # BentoML's own routes, its interface's page among them, are out of reach but for its probes.
    instead=Routes(_worker).application(),
    left=frozenset({"/livez", "/healthz"}),
)
