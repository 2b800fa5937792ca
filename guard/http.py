"""The edge of the service: what every request meets first and every answer passes last.

`Edge` counts the bytes of a body as they arrive, gives each request an id, and turns every error, its own,
the routes' and BentoML's, into one envelope: `{"error": {"code", "message"}, "request_id"}`.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard import metrics
from guard.errors import GuardError, ImageError

log = logging.getLogger(__name__)

CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    422: "unprocessable",
    429: "too_many_requests",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# Probes come every few seconds and their answers are logged where they change.
_QUIET = frozenset({"/livez", "/healthz", "/readyz", "/metrics"})

_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class RequestError(GuardError):
    """A request that is answered with an error: HTTP status, machine-readable code, message for people."""

    def __init__(
        self, message: str, *, status: int, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or CODES[status]
        self.headers = dict(headers or {})


def request_id(scope: Scope) -> str:
    """The id of the request, as its answer and its log line carry it."""
    return str(scope["guard.request_id"])


def annotate(scope: Scope, **fields: Any) -> None:
    """Adds fields to the request's log line."""
    scope["guard.fields"].update(fields)


class Edge:
    """ASGI middleware around the whole application.

    A body of more than `max_bytes`, or one that has not arrived after `upload_seconds`, ends the request with
    413 or 400; a declared length above the cap does so before a byte is read. `paths` are those that are
    labels in the metrics. With `instead`, that application answers in place of `app`, except on `left`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        upload_seconds: float,
        paths: frozenset[str] = frozenset(),
        instead: ASGIApp | None = None,
        left: frozenset[str] = frozenset(),
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.upload_seconds = upload_seconds
        self.paths = paths
        self.instead = instead
        self.left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; never raises for what a client sent."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] == "http":
            app = self.app if self.instead is None or scope["path"] in self.left else self.instead
            await _Exchange(self, scope, receive, send).run(app)
        else:
            await self.app(scope, receive, send)


class _Exchange:
    """One request and its answer."""

    def __init__(self, edge: Edge, scope: Scope, receive: Receive, send: Send) -> None:
        self.edge = edge
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        self.fields: dict[str, Any] = {}
        self.scope: Scope = {**scope, "guard.request_id": self.id, "guard.fields": self.fields}
        self._receive = receive
        self._send = send
        self.received = 0
        self.arrived = False
        self.status = 0
        self.withheld: Message | None = None
        self.started = time.perf_counter()

    async def run(self, app: ASGIApp) -> None:
        try:
            self._check_length()
            await app(self.scope, self.receive, self.send)
            if self.withheld is not None:
                await self._replace(self.withheld)
        except (RequestError, ImageError) as error:
            await self._refuse(error.status, error.code, str(error), getattr(error, "headers", {}))
        except ClientDisconnect:
            # Nobody reads this answer, but BentoML's timer around us holds the request, and with it the end
            # of the server, until there is one.
            await self._refuse(400, "client_left", "The connection ended before the body did.")
            self.status = 499
        except Exception:
            log.exception("unexpected error", extra={"fields": {"request_id": self.id}})
            if self.status:
                raise
            await self._refuse(500, CODES[500], "The server made a mistake; its log has the details.")
        finally:
            self._account()

    def _check_length(self) -> None:
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.edge.max_bytes:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return RequestError(f"The body is larger than the {self.edge.max_bytes} bytes accepted.", status=413)

    async def receive(self) -> Message:
        """The next message, as long as the body is neither too large nor too slow."""
        deadline = self.started + self.edge.upload_seconds - time.perf_counter()
        try:
            async with asyncio.timeout(None if self.arrived else deadline):
                message = await self._receive()
        except TimeoutError:
            raise RequestError(
                f"The body did not arrive within {self.edge.upload_seconds:g} seconds.",
                status=400,
                code="upload_too_slow",
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self.arrived = not message.get("more_body", False)
            if self.received > self.edge.max_bytes:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        """Passes an answer on; withholds an error that does not wear the envelope."""
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self.withheld = message
                return
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *self._own_headers()]}
        if self.withheld is None:
            await self._send(message)

    async def _replace(self, start: Message) -> None:
        status, headers = start["status"], Headers(raw=start.get("headers", []))
        kept = {name: headers[name] for name in ("allow", "retry-after") if name in headers}
        path, method = self.scope["path"], self.scope["method"]
        texts = {
            404: f"There is nothing at {path[:200]}. The page is at /, the interface at /docs.json.",
            405: f"{method} is not possible here; use {headers.get('allow', 'another method')}.",
            503: "The server is not well; /readyz says why.",
        }
        known = status if status in CODES else 500 if status >= 500 else 400
        await self._refuse(known, CODES[known], texts.get(known, "The request cannot be answered."), kept)

    async def _refuse(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status = status
        self.fields |= {"code": code}
        metrics.REFUSED.labels(code).inc()
        body = json.dumps({"error": {"code": code, "message": message}, "request_id": self.id}).encode()
        lines = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in lines.items()]
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [*raw, *self._own_headers()]}
        )
        await self._send({"type": "http.response.body", "body": body})

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self.id.encode()), *_SECURITY_HEADERS]

    def _account(self) -> None:
        path, seconds = self.scope["path"], time.perf_counter() - self.started
        self.status = self.status or 499  # cancelled before there was an answer
        # Only known paths become labels: a client must not be able to fill the memory with names.
        route = path if path in self.edge.paths else "other"
        metrics.REQUESTS.labels(route, self.status).inc()
        metrics.REQUEST_SECONDS.labels(route).observe(seconds)
        if path in _QUIET and self.status in {200, 503}:
            return
        level = logging.ERROR if self.status == 500 else logging.INFO
        fields = {
            "request_id": self.id,
            "method": self.scope["method"],
            "path": path[:200],
            "status": self.status,
            "milliseconds": round(1000 * seconds, 2),
            "bytes": self.received,
            **self.fields,
        }
        log.log(level, "request", extra={"fields": fields})


@dataclass(frozen=True)
class Upload:
    """The bytes of one image and the media type its sender declared, if any."""

    data: bytes
    declared: str | None


class _Parser(MultiPartParser):
    """Keeps files in memory, whose size `Edge` bounds, and refuses a body that stops before its end."""

    def __init__(self, request: Request, *, max_bytes: int) -> None:
        stream = self._to_its_end(request.stream())
        super().__init__(request.headers, stream, max_files=8, max_fields=8, max_part_size=max_bytes)
        self.spool_max_size = max_bytes + 1
        self.complete = False

    def on_part_begin(self) -> None:
        super().on_part_begin()
        # Of all codecs that a client can name, some raise and some take hours.
        self._charset = "utf-8"

    def on_end(self) -> None:
        self.complete = True

    async def _to_its_end(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self.complete:
            raise MultiPartException("It ends too early.")


async def read_upload(request: Request, *, max_bytes: int) -> Upload:
    """The one image of a request: the multipart field `image`, or a raw body of type `image/*`.

    Raises `RequestError`: 415 for another media type, 400 for a body that is not what its headers say, 422
    for a form without `image`, with several images, or with anything else in it.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise RequestError("Send the image without Content-Encoding.", status=415)
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.startswith("image/"):
        return Upload(b"".join([chunk async for chunk in request.stream()]), media_type)
    if media_type != "multipart/form-data":
        raise RequestError(
            "Send an image: as the multipart/form-data field `image`, or as the body itself with its type, "
            "such as image/png.",
            status=415,
        )
    try:
        form = await _Parser(request, max_bytes=max_bytes).parse()
    except (MultiPartException, FormParserError) as error:  # starlette lets some of its parser's own through
        message = getattr(error, "message", str(error))
        raise RequestError(
            f"The multipart body cannot be read: {message}", status=400, code="malformed_body"
        ) from error
    try:
        names = [name for name, _ in form.multi_items()]
        if names.count("image") > 1:
            raise RequestError("Send one image, not several.", status=422, code="several_images")
        if "image" not in names:
            raise RequestError("The form has no field `image`.", status=422, code="missing_field")
        if len(names) > 1:
            other = next(name for name in names if name != "image")
            raise RequestError(
                f"The form has a field {other[:80]!r}; send only `image`.",
                status=422,
                code="unexpected_field",
            )
        part = form["image"]
        if not isinstance(part, UploadFile):
            raise RequestError(
                "The field `image` holds text; send it as a file (with a file name).",
                status=422,
                code="not_a_file",
            )
        return Upload(await part.read(), part.content_type)
    finally:
        await form.close()
