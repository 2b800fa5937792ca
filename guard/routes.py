"""The routes of the service: `/classify`, `/model`, the page and its samples, metrics, the interface."""

from collections.abc import Callable
from pathlib import Path

import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from guard import metrics, openapi, samples
from guard.http import RequestError, read_upload, request_id
from guard.worker import ModelAnswer, Worker

PAGE = Path(__file__).parent / "page"

PATHS = frozenset({"/", "/classify", "/model", "/docs.json", "/metrics", "/livez", "/readyz"})
"""The paths that metrics tell apart."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Routes:
    """The routes of one worker, which `worker` gives as soon as there is one."""

    def __init__(self, worker: Callable[[], Worker]) -> None:
        self.worker = worker

    def application(self) -> Starlette:
        """All routes."""
        application = Starlette(
            routes=[
                Route("/", self.page),
                Route("/classify", self.classify, methods=["POST"]),
                Route("/model", self.model),
                Route("/samples.json", self.samples),
                Route("/samples/{name}", self.sample),
                Route("/readyz", self.ready),
                Route("/metrics", self.metrics),
                Route("/docs.json", self.interface),
                Mount("/page", StaticFiles(directory=PAGE)),
            ]
        )
        # To an address made of the Host header, which behind a proxy is not the client's.
        application.router.redirect_slashes = False
        return application

    async def page(self, _: Request) -> Response:
        """`GET /`."""
        headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "cache-control": "no-cache"}
        return FileResponse(PAGE / "index.html", headers=headers)

    async def classify(self, request: Request) -> Response:
        """`POST /classify`."""
        worker = self.worker()
        _ = worker.guard  # not ready: said before the upload is read
        with worker.admitted():
            upload = await read_upload(request, max_bytes=worker.settings.max_bytes)
            decision = await worker.classify(upload, request.scope)
        answer = decision.model_copy(update={"request_id": request_id(request.scope)})
        headers = {"cache-control": "no-store"}
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    async def model(self, _: Request) -> Response:
        """`GET /model`."""
        return JSONResponse(self.worker().describe().model_dump(mode="json"))

    async def samples(self, _: Request) -> Response:
        """`GET /samples.json`."""
        found = self.worker().samples.values()
        return JSONResponse([{**sample.model_dump(), "url": f"samples/{sample.file}"} for sample in found])

    async def sample(self, request: Request) -> Response:
        """`GET /samples/NAME`, for the names that the bundle's index lists."""
        worker, name = self.worker(), request.path_params["name"]
        if name not in worker.samples:
            raise RequestError("There is no such sample.", status=404)
        return FileResponse(worker.path / samples.FOLDER / name, media_type="image/png")

    async def metrics(self, _: Request) -> Response:
        """`GET /metrics`."""
        content, media_type = await anyio.to_thread.run_sync(metrics.exposition)
        return Response(content, headers={"content-type": media_type})

    async def interface(self, _: Request) -> Response:
        """`GET /docs.json`."""
        from guard.decision import Decision

        return JSONResponse(openapi.document(Decision, ModelAnswer))

    async def ready(self, _: Request) -> Response:
        """`GET /readyz`."""
        return JSONResponse(self.worker().ready().model_dump())
