"""The edge and the routes, in process: what a client sees, whatever it sends."""

import asyncio
import io
import json
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client import REGISTRY
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard import http, images, runtime
from guard.errors import UsageError
from guard.files import sha256
from guard.http import Edge, RequestError
from guard.routes import PATHS, Routes
from guard.settings import Policy
from guard.worker import Settings, Worker, clean_rejection
from tests.serving import CAT, DOG, GREY, SHAPE, calibration, colour, error_of, write_bundle

MAX_BYTES = 200_000
BODY_CAP = MAX_BYTES + 4096
BOUNDARY = "----boundary"


class Client:
    """Calls the whole application but BentoML, in one event loop that the worker shares."""

    def __init__(self, worker: Worker, *, upload_seconds: float = 5) -> None:
        routes = Routes(lambda: worker)
        self.worker = worker
        self.app = Edge(
            routes.application(),
            max_bytes=BODY_CAP,
            upload_seconds=upload_seconds,
            paths=PATHS,
        )

    def run(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with self.session() as session:
                return await session.request(method, path, **options)

        return asyncio.run(once())

    def session(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://guard")

    def classify(self, data: bytes, media_type: str = "image/png") -> httpx.Response:
        return self.run("POST", "/classify", content=data, headers={"content-type": media_type})

    def form(self, *parts: bytes, end: bytes = b"--\r\n") -> httpx.Response:
        body = b"".join(b"--" + BOUNDARY.encode() + b"\r\n" + part + b"\r\n" for part in parts)
        content = body + b"--" + BOUNDARY.encode() + end
        media_type = f"multipart/form-data; boundary={BOUNDARY}"
        return self.classify(content, media_type)


def part(data: bytes, name: str = "image", *, file: str | None = "cat.png", kind: str | None = None) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{file}"' if file else "")
    lines = [disposition] + ([f"Content-Type: {kind}"] if kind else [])
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def loaded(path: Path, **options: Any) -> Worker:
    worker = Worker(path, Settings(**{"max_bytes": MAX_BYTES, "max_pixels": 1_000_000} | options))
    worker.load()
    assert worker.failure is None
    return worker


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("http") / "colours")


@pytest.fixture(scope="module")
def client(bundle: Path) -> Client:
    return Client(loaded(bundle))


def test_a_raw_body_and_a_form_get_the_contracts_answer(client: Client) -> None:
    raw, form = client.classify(CAT), client.form(part(CAT, kind="image/png"))
    assert raw.status_code == form.status_code == 200
    answer = raw.json()
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
        "request_id",
    }
    assert (answer["label"], answer["class_name"], answer["accepted"], answer["reasons"]) == (
        0,
        "cat",
        True,
        [],
    )
    assert answer["detector"]["name"] == "jacobian"
    assert answer["detector"]["score"] <= answer["detector"]["threshold"]
    assert answer["certificate"]["l2"]["kind"] == "estimate"
    assert answer["certificate"]["l2"]["radius"] > 0
    assert answer["model"] == {"name": "colours", "digest": client.worker.guard.bundle.digest}
    assert answer["request_id"] == raw.headers["x-request-id"]
    assert {**form.json(), "request_id": ""} == {**answer, "request_id": ""}
    assert raw.headers["cache-control"] == "no-store"


def test_a_rejection_is_a_normal_answer(client: Client) -> None:
    response = client.classify(GREY)
    answer = response.json()
    assert (response.status_code, answer["accepted"], answer["reasons"]) == (200, False, ["jacobian_norm"])
    assert answer["certificate"]["l2"]["radius"] == answer["certificate"]["linf"]["radius"] == 0


def test_each_of_many_at_once_gets_its_own_answer(client: Client, bundle: Path) -> None:
    async def scenario() -> list[httpx.Response]:
        async with Client(loaded(bundle)).session() as session:
            requests = [
                session.post("/classify", content=image, headers={"content-type": "image/png"})
                for image in [CAT, DOG, GREY, b"odd"] * 8
            ]
            return await asyncio.gather(*requests)

    answers = asyncio.run(scenario())
    assert [response.status_code for response in answers] == [200, 200, 200, 415] * 8
    assert [a.json()["class_name"] for a in answers[0::4]] == ["cat"] * 8
    assert [a.json()["class_name"] for a in answers[1::4]] == ["dog"] * 8
    assert [a.json()["accepted"] for a in answers[2::4]] == [False] * 8


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP"])
def test_other_formats(client: Client, kind: str) -> None:
    response = client.classify(colour(0, 0, 255, size=64, kind=kind), f"image/{kind.lower()}")
    assert response.json()["class_name"] == "ship"


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


def animation() -> bytes:
    frames = [Image.new("RGB", (8, 8), shade) for shade in ("red", "green")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>"

MALFORMED = {
    "truncated": (CAT[:40], "image/png", 422, "corrupt_image"),
    "empty": (b"", "image/png", 422, "empty_image"),
    "wrong type": (b"{}", "application/json", 415, "unsupported_media_type"),
    "no type": (CAT, "", 415, "unsupported_media_type"),
    "text": (b"hello", "text/plain", 415, "unsupported_media_type"),
    "mislabelled": (CAT, "image/jpeg", 415, "mislabelled_type"),
    "not an image": (b"hello", "image/png", 415, "unsupported_format"),
    "svg": (SVG, "image/svg+xml", 415, "unsupported_format"),
    "svg as png": (SVG, "image/png", 415, "unsupported_format"),
    "gif": (b"GIF89a" + bytes(50), "image/gif", 415, "unsupported_format"),
    "bomb": (png(20_000, 20_000), "image/png", 413, "too_many_pixels"),
    "20,000 x 1": (png(20_000, 1), "image/png", 422, "extreme_aspect"),
    "animated": (animation(), "image/webp", 422, "animated_image"),
    "too large": (CAT + bytes(MAX_BYTES), "image/png", 413, "body_too_large"),
    "far too large": (CAT + bytes(2 * BODY_CAP), "image/png", 413, "body_too_large"),
    "no boundary": (CAT, "multipart/form-data", 400, "malformed_body"),
    "another boundary": (b"--a\r\n\r\n--a--", "multipart/form-data; boundary=b", 400, "malformed_body"),
    "empty form": (b"", "multipart/form-data; boundary=b", 400, "malformed_body"),
    "form encoded": (b"image=abc", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_uploads_and_the_next_one(client: Client, case: str) -> None:
    data, media_type, status, code = MALFORMED[case]
    response = client.classify(data, media_type)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert client.classify(CAT).status_code == 200


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([part(CAT, "picture")], 422, "missing_field"),
        ([part(CAT), part(CAT)], 422, "several_images"),
        ([part(CAT), part(CAT, "image2")], 422, "unexpected_field"),
        ([part(CAT), part(b"9", "threshold", file=None)], 422, "unexpected_field"),
        ([part(b"http://127.0.0.1/cat.png", file=None)], 422, "not_a_file"),
        ([part(b"")], 422, "empty_image"),
        ([part(CAT, kind="image/webp")], 415, "mislabelled_type"),
        ([part(CAT, kind="text/plain")], 415, "mislabelled_type"),
        ([part(SVG, kind="image/svg+xml")], 415, "unsupported_format"),
        ([part(CAT) for _ in range(20)], 400, "malformed_body"),
        ([b"no header\r\n\r\n" + CAT], 400, "malformed_body"),
        ([b"Content-Disposition: form-data\r\n\r\n" + CAT], 400, "malformed_body"),
        ([part(CAT + bytes(MAX_BYTES))], 413, "body_too_large"),
    ],
)
def test_malformed_forms(client: Client, parts: list[bytes], status: int, code: str) -> None:
    response = client.form(*parts)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert client.form(part(CAT)).status_code == 200


def test_a_form_that_stops_early(client: Client) -> None:
    response = client.form(part(CAT), end=b"")
    assert (response.status_code, error_of(response)["code"]) == (400, "malformed_body")


def test_a_part_without_a_type_is_recognized_by_its_content(client: Client) -> None:
    assert client.form(part(CAT, kind=None)).status_code == 200
    assert client.form(part(CAT, kind="application/octet-stream", file="x.bin")).status_code == 200


@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "iso-8859-1", "nothing"])
def test_the_charset_of_a_form_changes_nothing(client: Client, charset: str) -> None:
    media_type = f"multipart/form-data; charset={charset}; boundary={BOUNDARY}"
    for name, status in (("image", 200), ("a..b", 422)):
        content = f"--{BOUNDARY}\r\n".encode() + part(CAT, name) + f"\r\n--{BOUNDARY}--\r\n".encode()
        assert client.classify(content, media_type).status_code == status


def test_no_codec_of_the_clients_choice_holds_the_server_up(client: Client) -> None:
    long = b"ba" * 90_000  # as punycode, several seconds
    content = f"--{BOUNDARY}\r\n".encode() + part(long, file=None) + f"\r\n--{BOUNDARY}--\r\n".encode()
    began = time.process_time()
    response = client.classify(content, f"multipart/form-data; charset=punycode; boundary={BOUNDARY}")
    assert (response.status_code, error_of(response)["code"]) == (422, "not_a_file")
    assert time.process_time() - began < 1


def test_a_compressed_body_is_refused(client: Client) -> None:
    headers = {"content-type": "image/png", "content-encoding": "gzip"}
    response = client.run("POST", "/classify", content=zlib.compress(CAT), headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


def test_a_body_without_length_is_counted_as_it_arrives(client: Client) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)

    for media_type in ("image/png", f"multipart/form-data; boundary={BOUNDARY}"):
        sent = 0
        response = client.run("POST", "/classify", content=endless(), headers={"content-type": media_type})
        assert response.status_code in {400, 413}
        error_of(response)
        assert sent <= BODY_CAP + 20_000


def test_a_declared_length_is_refused_before_a_byte_is_read(client: Client) -> None:
    read = 0

    async def receive() -> Message:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x", "more_body": True}

    headers = [(b"content-type", b"image/png"), (b"content-length", b"104857600")]
    messages = exchange(client.app, receive, headers)
    assert messages[0]["status"] == 413
    assert read == 0


def exchange(app: ASGIApp, receive: Receive, headers: list[tuple[bytes, bytes]]) -> list[Message]:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    asyncio.run(_call(app, receive, send, headers))
    return messages


async def _call(app: ASGIApp, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/classify",
        "raw_path": b"/classify",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "server": ("guard", 80),
        "client": ("127.0.0.1", 1),
        "headers": headers,
    }
    await app(scope, receive, send)


def test_a_slow_upload_ends_with_400(client: Client) -> None:
    slow = Client(client.worker, upload_seconds=0.05)

    async def receive() -> Message:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    start, body = exchange(slow.app, receive, [(b"content-type", b"image/png")])
    assert start["status"] == 400
    assert (b"connection", b"close") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "upload_too_slow"


def test_a_client_that_leaves_is_answered_for_whoever_waits_around_and_does_no_harm(client: Client) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    before = sample_of("guard_requests_total", route="/classify", status="499")
    messages = exchange(client.app, receive, [(b"content-type", b"image/png")])
    assert [message["type"] for message in messages] == ["http.response.start", "http.response.body"]
    assert sample_of("guard_requests_total", route="/classify", status="499") == before + 1
    assert client.classify(CAT).status_code == 200


def test_websockets_are_refused(client: Client) -> None:
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        messages.append(message)

    asyncio.run(client.app({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert [message["type"] for message in messages] == ["websocket.close"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("GET", "/nothing", 404, "not_found", None),
        ("GET", "/model/", 404, "not_found", None),
        ("GET", "/page/../../settings.py", 404, "not_found", None),
        ("GET", "/page/%2e%2e/service.py", 404, "not_found", None),
        ("GET", "/samples/nothing.png", 404, "not_found", None),
        ("GET", "/samples/samples.json", 404, "not_found", None),
        ("GET", "/classify", 405, "method_not_allowed", "POST"),
        ("DELETE", "/classify", 405, "method_not_allowed", "POST"),
        ("POST", "/model", 405, "method_not_allowed", "GET"),
        ("POST", "/readyz", 405, "method_not_allowed", "GET"),
        ("OPTIONS", "/", 405, "method_not_allowed", "GET"),
        ("POST", "/page/page.js", 405, "method_not_allowed", None),
    ],
)
def test_wrong_paths_and_methods(
    client: Client, method: str, path: str, status: int, code: str, allow: str | None
) -> None:
    response = client.run(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    if allow is not None:
        assert allow in response.headers["allow"]


def test_request_ids_are_kept_where_they_are_harmless(client: Client) -> None:
    def answered(given: str) -> str:
        headers = [(b"x-request-id", given.encode())]
        return str(client.run("GET", "/model", headers=headers).headers["x-request-id"])

    assert answered("trace-1.2_3") == "trace-1.2_3"
    for bad in ("", "x" * 65, "<script>", "a b", "ü"):
        assert answered(bad) != bad
        assert len(answered(bad)) == 32


def test_every_answer_carries_the_security_headers(client: Client) -> None:
    for path in ("/", "/model", "/nothing"):
        headers = client.run("GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    policy = client.run("GET", "/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_model_describes_manifest_calibration_and_policy(client: Client) -> None:
    answer = client.run("GET", "/model").json()
    assert answer["name"] == "colours"
    assert answer["manifest"]["class_names"] == ["cat", "dog", "ship"]
    assert answer["calibration"]["threshold"] == 0.2
    assert sum(answer["calibration"]["histogram"]["counts"]) == 100
    assert "omega" not in answer["calibration"]["l2"]
    # where things lie on the machine that made the bundle is nobody's business
    assert answer["manifest"]["provenance"] == {"commit": "c0ffee", "training": {"provenance": {"seed": 0}}}
    assert answer["policy"] == {
        "min_radius_l2": None,
        "min_radius_linf": None,
        "expose_scores": True,
        "clean_rejection": None,
    }


def test_readyz_names_model_calibration_and_provider(client: Client) -> None:
    answer = client.run("GET", "/readyz").json()
    bundle = client.worker.guard.bundle
    assert answer == {
        "status": "ready",
        "model": "colours",
        "digest": bundle.digest,
        "calibration": f"sha256:{sha256(bundle.path / 'calibration.json')}",
        "provider": "cpu",
    }


def test_samples_are_listed_and_served(client: Client) -> None:
    listed = client.run("GET", "/samples.json").json()
    assert [(sample["title"], sample["kind"]) for sample in listed] == [
        ("cat", "clean"),
        ("a cat, once", "adversarial"),
    ]
    picture = client.run("GET", f"/{listed[0]['url']}")
    assert (picture.headers["content-type"], picture.content) == ("image/png", CAT)


def test_the_interface_document_is_complete_and_closed(client: Client) -> None:
    document = client.run("GET", "/docs.json").json()
    assert {"/classify", "/model", "/livez", "/readyz", "/metrics"} <= set(document["paths"])
    responses = document["paths"]["/classify"]["post"]["responses"]
    assert set(responses) == {"200", "400", "413", "415", "422", "429", "500", "503", "504"}
    schemas = document["components"]["schemas"]
    references = {word for word in json.dumps(document).split('"') if word.startswith("#/")}
    assert {reference.rpartition("/")[2] for reference in references} <= set(schemas)
    answer = client.classify(CAT).json()
    assert set(answer) <= set(schemas["Decision"]["properties"])


def test_a_warm_up_leaves_no_session_to_be_built_by_a_request(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(bundle, Settings())
    worker.load()

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("a session was built after the warm-up")

    monkeypatch.setattr(runtime, "session_of", unexpected)
    image = np.full((1, *SHAPE), 0.5, np.float32)
    limits = {"threshold": 1e3, "row_bound": 1e9}  # every row could matter
    assert worker.guard.detector.measure(image, **limits).rows[0] == worker.guard.detector.num_classes


def test_nothing_is_served_before_the_model_is_loaded(bundle: Path) -> None:
    early = Client(Worker(bundle, Settings()))
    for method, path in (
        ("GET", "/readyz"),
        ("GET", "/model"),
        ("GET", "/samples.json"),
        ("GET", "/samples/red.png"),
        ("POST", "/classify"),
    ):
        response = early.run(method, path)
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "1"
    assert early.run("GET", "/").status_code == 200


def test_a_bundle_that_does_not_load_says_so(tmp_path: Path) -> None:
    broken = write_bundle(tmp_path / "broken")
    with (broken / "model.onnx").open("ab") as file:
        file.write(b"x")

    worker = Worker(broken, Settings())
    worker.load()
    response = Client(worker).run("GET", "/readyz")
    assert response.status_code == 503
    error = error_of(response)
    assert error["code"] == "failed"
    assert "model.onnx" in error["message"]
    assert "sha256" in error["message"]


def test_more_uploads_than_there_is_room_for_get_429(bundle: Path) -> None:
    client = Client(loaded(bundle, max_uploads=2))

    async def scenario() -> tuple[httpx.Response, list[httpx.Response], httpx.Response]:
        gate = asyncio.Event()
        begun: list[int] = []

        async def held() -> AsyncIterator[bytes]:
            yield CAT[:10]
            begun.append(1)
            await gate.wait()
            yield CAT[10:]

        headers = {"content-type": "image/png"}
        async with client.session() as session:
            slow = [
                asyncio.create_task(session.post("/classify", content=held(), headers=headers))
                for _ in range(2)
            ]
            while len(begun) < 2:
                await asyncio.sleep(0.01)
            refused = await session.post("/classify", content=CAT, headers=headers)
            gate.set()
            served = list(await asyncio.gather(*slow))
            return refused, served, await session.post("/classify", content=CAT, headers=headers)

    refused, served, after = asyncio.run(scenario())
    assert (refused.status_code, error_of(refused)["code"]) == (429, "too_many_requests")
    assert refused.headers["retry-after"] == "1"
    assert [response.status_code for response in [*served, after]] == [200, 200, 200]


def test_an_answer_that_takes_too_long_is_504_and_the_next_is_served(bundle: Path) -> None:
    worker = loaded(bundle, timeout=0.05)
    client = Client(worker)
    guard = worker.guard
    decide = guard.classify
    gate = threading.Event()

    def slowly(images: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
        gate.wait(60)
        return decide(images)

    guard.classify = slowly  # type: ignore[method-assign]
    try:
        response = client.classify(CAT)
    finally:
        gate.set()
    assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
    worker.settings = replace(worker.settings, timeout=60)
    assert client.classify(CAT).status_code == 200


def test_decodings_that_outlive_their_requests_keep_their_places(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    worker = loaded(bundle, timeout=0.2)
    client = Client(worker)
    gate = threading.Event()
    begun = []
    decode = images.decode

    def held(*arguments: Any, **options: Any) -> Any:
        begun.append(1)
        gate.wait(60)
        return decode(*arguments, **options)

    monkeypatch.setattr("guard.decision.decode", held)

    async def scenario() -> list[int]:
        async with client.session() as session:
            headers = {"content-type": "image/png"}
            posts = [await session.post("/classify", content=CAT, headers=headers) for _ in range(5)]
            gate.set()
            worker.settings = replace(worker.settings, timeout=60)
            posts.append(await session.post("/classify", content=CAT, headers=headers))
            return [response.status_code for response in posts]

    try:
        assert asyncio.run(scenario()) == [504] * 5 + [200]
    finally:
        gate.set()
    assert len(begun) == 3


def test_a_mistake_of_the_server_is_an_envelope_too(caplog: pytest.LogCaptureFixture) -> None:
    async def faulty(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("secret detail")

    client_app = Edge(faulty, max_bytes=10, upload_seconds=1)
    start, body = exchange(client_app, nothing, [])
    assert start["status"] == 500
    assert b"secret" not in body["body"]
    assert json.loads(body["body"])["error"]["code"] == "internal_error"
    assert "secret detail" in caplog.text


async def nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


@pytest.mark.parametrize(
    ("status", "expected", "code"),
    [
        (400, 400, "bad_request"),
        (418, 400, "bad_request"),
        (502, 500, "internal_error"),
        (504, 504, "timeout"),
    ],
)
def test_errors_of_others_are_put_into_the_envelope(status: int, expected: int, code: str) -> None:
    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-secret", b"1")]})
        await send({"type": "http.response.body", "body": b'{"error": ', "more_body": True})
        await send({"type": "http.response.body", "body": b'["a list"]}'})

    start, body = exchange(Edge(other, max_bytes=10, upload_seconds=1), nothing, [])
    assert start["status"] == expected
    assert json.loads(body["body"])["error"]["code"] == code
    assert b"x-secret" not in dict(start["headers"])


def test_a_request_error_keeps_its_headers() -> None:
    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        raise RequestError("Later.", status=429, headers={"Retry-After": "7"})

    start, body = exchange(Edge(busy, max_bytes=10, upload_seconds=1), nothing, [])
    headers = dict(start["headers"])
    assert (start["status"], headers[b"retry-after"]) == (429, b"7")
    assert int(headers[b"content-length"]) == len(body["body"])


def test_log_lines_tell_the_story_of_a_request(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="guard.http"):
        response = client.classify(GREY)
    fields: dict[str, Any] = caplog.records[-1].fields  # type: ignore[attr-defined]
    assert fields["request_id"] == response.json()["request_id"]
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/classify", 200)
    assert fields["milliseconds"] > 0
    assert fields["bytes"] == len(GREY)
    assert (fields["accepted"], fields["reasons"]) == (False, ["jacobian_norm"])
    assert fields["score"] > fields["threshold"]


@pytest.fixture
def hidden(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("GUARD_EXPOSE_SCORES", "0")
    return Client(loaded(bundle))


def test_hidden_scores_reach_neither_answer_nor_log_nor_metrics(
    hidden: Client, caplog: pytest.LogCaptureFixture
) -> None:
    counted = sample_of("guard_score_ratio_count")
    with caplog.at_level("INFO", logger="guard.http"):
        answer = hidden.classify(CAT).json()
    assert "score" not in answer["detector"]
    radius = answer["certificate"]["l2"]["radius"]
    assert radius == float(f"{radius:.2g}")
    assert "score" not in caplog.records[-1].fields  # type: ignore[attr-defined]
    assert sample_of("guard_score_ratio_count") == counted


def sample_of(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_metrics_count_requests_verdicts_and_refusals(client: Client) -> None:
    def counts() -> dict[str, float]:
        return {
            "requests": sample_of("guard_requests_total", route="/classify", status="200"),
            "accepted": sample_of("guard_accepted_total"),
            "rejected": sample_of("guard_rejected_total", reason="jacobian_norm"),
            "refused": sample_of("guard_refused_total", code="corrupt_image"),
            "scores": sample_of("guard_score_ratio_count"),
            "radii": sample_of("guard_radius_count", norm="l2"),
            "batches": sample_of("guard_inference_seconds_count"),
            "other": sample_of("guard_requests_total", route="other", status="404"),
        }

    before = counts()
    for data in (CAT, GREY, CAT[:40]):
        client.classify(data)
    for path in ("/a", "/b"):
        client.run("GET", path)
    changed = {name: value - before[name] for name, value in counts().items()}
    assert changed == {
        "requests": 2,
        "accepted": 1,
        "rejected": 1,
        "refused": 1,
        "scores": 2,
        "radii": 1,
        "batches": 2,
        "other": 2,
    }
    text = client.run("GET", "/metrics").text
    assert 'guard_requests_total{route="/classify",status="422"}' in text
    assert "guard_inference_seconds_bucket" in text
    assert '"/a"' not in text


def test_every_refused_upload_is_counted_by_its_code(client: Client) -> None:
    def counts() -> list[float]:
        codes = ("missing_field", "malformed_body", "body_too_large", "mislabelled_type")
        return [sample_of("guard_refused_total", code=code) for code in codes]

    before = counts()
    client.form(part(CAT, "picture"))
    client.form(part(CAT), end=b"")
    client.classify(bytes(2 * BODY_CAP))
    client.classify(CAT, "image/jpeg")
    assert [now - old for now, old in zip(counts(), before, strict=True)] == [1, 1, 1, 1]


@settings(max_examples=150, deadline=None)
@given(
    body=st.binary(max_size=300)
    | st.lists(
        st.sampled_from(
            [
                b"--b",
                b"--",
                b"\r\n",
                b"\n",
                b":",
                b"Content-Disposition: form-data",
                b'; name="image"',
                b'; filename="x"',
                CAT[:20],
                b"\0",
                b"\xff",
            ]
        ),
        max_size=14,
    ).map(b"".join),
    media_type=st.sampled_from(
        [
            "image/png",
            "multipart/form-data; boundary=b",
            'multipart/form-data;boundary="',
            "multipart/form-data; boundary=",
            "multipart/form-data; charset=x; boundary=b",
        ]
    ),
)
def test_whatever_is_sent_the_answer_is_an_envelope_below_500(
    client: Client, body: bytes, media_type: str
) -> None:
    response = client.classify(body, media_type)
    assert response.status_code in {400, 413, 415, 422}
    error_of(response)


def test_settings_come_from_the_environment() -> None:
    assert Settings.from_environment({}) == Settings()
    given_ = {
        "GUARD_MAX_BYTES": "1000",
        "GUARD_TIMEOUT": "0.5",
        "GUARD_WORKERS": " 2 ",
        "GUARD_MAX_BATCH": "",
    }
    assert Settings.from_environment(given_) == Settings(max_bytes=1000, timeout=0.5, workers=2)


@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf", "1e400", "1.5 "])
def test_a_setting_that_means_nothing_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="GUARD_MAX_PIXELS is 200000000: expected at most 178956970"):
        Settings.from_environment({"GUARD_MAX_PIXELS": "200000000"})
    with pytest.raises(UsageError, match=r"GUARD_MAX_UPLOADS.*whole number"):
        Settings.from_environment({"GUARD_MAX_UPLOADS": value})
    if value.strip() != "1.5":
        with pytest.raises(UsageError, match="GUARD_TIMEOUT"):
            Settings.from_environment({"GUARD_TIMEOUT": value})


def test_clean_rejection_is_unknown_without_a_histogram_and_absent_without_a_demand() -> None:
    record = calibration("0" * 64)
    assert clean_rejection(record, Policy()) is None
    assert clean_rejection(record, Policy(min_radius_l2=0.1)) is None


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(min_radius_l2=0.2), (0.3, 0.3)),
        (Policy(min_radius_l2=0.25), (0.3, 0.6)),
        (Policy(min_radius_l2=9.0), (1.0, 1.0)),
        (Policy(min_radius_l2=0.01), (0.1, 0.3)),
        (Policy(min_radius_l2=0.2, min_radius_linf=0.2), (0.3, 0.5)),
    ],
)
def test_clean_rejection_bounds_what_detector_and_radii_reject(
    policy: Policy, expected: tuple[float, float]
) -> None:
    # A tenth is rejected by the detector and lies, with radius 0, in the first bin.
    radii = SimpleNamespace(histogram=SimpleNamespace(edges=[0.0, 0.2, 0.4, 1.0], counts=[30, 30, 40]))
    record: Any = SimpleNamespace(realized_fpr=SimpleNamespace(value=0.1), l2=radii, linf=radii)
    assert clean_rejection(record, policy) == pytest.approx(expected)


def test_codes_cover_the_contracts_statuses() -> None:
    assert set(http.CODES) == {400, 404, 405, 413, 415, 422, 429, 500, 503, 504}
