"""`bentoml serve` itself: a real process, real sockets, what operators and strangers see."""

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from guard import samples
from guard.bundle import CALIBRATION, MANIFEST, MODEL, digests
from guard.files import sha256
from tests.serving import (
    CAT,
    GREY,
    ROOT,
    Server,
    clean_environment,
    error_of,
    free_port,
    serving,
    spawn,
    stop,
    write_bundle,
)

MEGABYTE = 2**20
COLD_START_SECONDS = 5.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("service") / "colours")


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(bundle, tmp_path_factory.mktemp("server"), GUARD_MAX_UPLOADS="8") as running:
        yield running


def post(server: Server, data: bytes, media_type: str = "image/png", **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/classify", content=data, headers={"content-type": media_type, **headers})


def processes(server: Server) -> list[psutil.Process]:
    main = psutil.Process(server.process.pid)
    return [main, *main.children(recursive=True)]


def test_ready_after_little_work_without_torch_or_scipy(server: Server) -> None:
    """Processor seconds of all processes: a busy machine does not change them, an idle one needs no more."""
    found = processes(server)
    assert len(found) == 2
    seconds = sum(sum(process.cpu_times()[:2]) for process in found)
    assert seconds < COLD_START_SECONDS
    for process in found:
        libraries = {part for entry in process.memory_maps() for part in Path(entry.path).parts}
        assert not libraries & {"torch", "scipy"}


def test_importing_the_service_imports_neither_torch_nor_scipy_nor_reads_a_bundle() -> None:
    code = "import sys, guard.service, guard.decision; print(*sys.modules)"
    environment = clean_environment() | {"GUARD_MODEL": "/nowhere", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180, check=True
    )
    assert not {"torch", "scipy"} & set(done.stdout.split())


def test_an_image_is_classified(server: Server) -> None:
    answer = post(server, CAT).json()
    assert (answer["class_name"], answer["accepted"], answer["model"]["name"]) == ("cat", True, "colours")
    form = httpx.post(f"{server.url}/classify", files={"image": ("cat.png", CAT, "image/png")}).json()
    assert form["class_name"] == "cat"
    assert post(server, GREY).json()["reasons"] == ["jacobian_norm"]


def test_probes_page_model_and_interface(server: Server) -> None:
    assert httpx.get(f"{server.url}/livez").status_code == 200
    assert httpx.get(f"{server.url}/readyz").json()["provider"] == "cpu"
    assert httpx.get(f"{server.url}/model").json()["name"] == "colours"
    assert "/classify" in httpx.get(f"{server.url}/docs.json").json()["paths"]


def test_the_page_is_ours_and_names_no_other_host(server: Server) -> None:
    page = httpx.get(server.url)
    assert page.status_code == 200
    assert "<title>guard</title>" in page.text
    for path in ("/", "/page/page.js", "/page/page.css", "/page/icon.svg"):
        text = httpx.get(f"{server.url}{path}").text.replace("http://www.w3.org/", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "googletagmanager" not in text


@pytest.mark.parametrize(
    "path", ["/nothing", "/assets/x", "/static_content/index.css", "/schema.json", "/classify/submit"]
)
def test_bentomls_own_pages_are_out_of_reach(server: Server, path: str) -> None:
    response = httpx.get(f"{server.url}{path}")
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/livez", "/healthz", "/readyz", "/metrics", "/docs.json"])
def test_probes_and_facts_refuse_other_methods_in_the_envelope(server: Server, path: str) -> None:
    response = httpx.post(f"{server.url}{path}")
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")


def send_megabytes(server: Server, count: int, headers: dict[str, str]) -> tuple[int, bytes]:
    """Sends it all in one go, as simple clients do, then reads the answer: status and body."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    with closing(connection):
        connection.putrequest("POST", "/classify")
        for name, value in {"Content-Type": "image/png", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        chunked = "Transfer-Encoding" in headers
        block = bytes(MEGABYTE)
        for _ in range(count):
            connection.send(b"%x\r\n%s\r\n" % (MEGABYTE, block) if chunked else block)
        if chunked:
            connection.send(b"0\r\n\r\n")
        response = connection.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize(
    "headers",
    [{"Content-Length": str(100 * MEGABYTE)}, {"Transfer-Encoding": "chunked"}],
    ids=["length", "chunked"],
)
def test_a_hundred_megabytes_get_413_and_are_not_kept(server: Server, headers: dict[str, str]) -> None:
    worker = processes(server)[1]
    before = worker.memory_info().rss
    status, body = send_megabytes(server, 100, headers)
    assert status == 413
    assert b"body_too_large" in body
    assert worker.memory_info().rss - before < 40 * MEGABYTE
    assert post(server, CAT).status_code == 200


def test_a_request_that_is_not_http_does_no_harm(server: Server) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        assert b" 400 " in raw.recv(1000)
    assert post(server, CAT).status_code == 200


def test_a_websocket_is_refused(server: Server) -> None:
    headers = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert httpx.get(f"{server.url}/classify", headers=headers).status_code in {403, 405}
    assert post(server, CAT).status_code == 200


def test_many_clients_at_once_are_served_or_told_to_wait(server: Server) -> None:
    headers = {"content-type": "image/png"}
    with (
        httpx.Client(base_url=server.url, headers=headers, timeout=60) as client,
        ThreadPoolExecutor(32) as pool,
    ):
        bodies = [CAT if index % 2 else b"odd" for index in range(96)]
        responses = list(pool.map(lambda body: client.post("/classify", content=body), bodies))
    statuses = [response.status_code for response in responses]
    assert set(statuses) <= {200, 415, 429}
    assert statuses.count(200) > 0
    assert all(r.json()["class_name"] == "cat" for r in responses if r.status_code == 200)
    for response in responses:
        if response.status_code != 200:
            error_of(response)
    assert post(server, CAT).status_code == 200


def test_metrics_are_prometheus_text_of_the_worker_process(server: Server) -> None:
    def metric(line: str) -> float:
        text = httpx.get(f"{server.url}/metrics")
        assert text.headers["content-type"].startswith("text/plain")
        return sum(float(row.rpartition(" ")[2]) for row in text.text.splitlines() if row.startswith(line))

    names = (
        "guard_accepted_total",
        'guard_rejected_total{reason="jacobian_norm"}',
        'guard_requests_total{route="/classify",status="200"}',
        "guard_inference_seconds_count",
        "guard_score_ratio_count",
        'guard_radius_count{norm="l2"}',
    )
    before = [metric(name) for name in names]
    post(server, CAT)
    post(server, GREY)
    assert [metric(name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 2, 2, 2, 1]
    calibration = httpx.get(f"{server.url}/readyz").json()["calibration"]
    assert metric(f'guard_model{{calibration="{calibration}",detector="jacobian",digest="sha256:') == 1


def test_log_lines_are_json_with_the_request(server: Server) -> None:
    response = post(server, GREY, **{"x-request-id": "find-me"})
    assert response.headers["x-request-id"] == "find-me"
    line = until(lambda: next((line for line in server.lines() if line.get("request_id") == "find-me"), None))
    assert line["status"] == 200
    assert line["accepted"] is False
    assert line["score"] > line["threshold"]
    (ready,) = (line for line in server.lines() if line["message"] == "ready")
    assert ready["provider"] == "cpu"
    assert ready["threshold"] == httpx.get(f"{server.url}/model").json()["calibration"]["threshold"]
    assert (ready["min_radius_l2"], ready["expose_scores"]) == (None, True)
    assert all(line["level"] in {"info", "warning"} for line in server.lines())
    assert all(line.startswith("{") for line in server.log.read_text().splitlines())


def test_one_request_cannot_write_many_log_lines(server: Server) -> None:
    before = len(server.lines())
    post(server, CAT, baggage="%," * 4000, **{"x-request-id": "chatty"})
    until(lambda: any(line.get("request_id") == "chatty" for line in server.lines()))
    assert len(server.lines()) - before < 5


def until(look: Any, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_second_server_keeps_its_own_metrics_and_ends_with_all_its_processes(
    server: Server, bundle: Path, tmp_path: Path
) -> None:
    post(server, CAT)
    post(server, CAT)
    home = str(server.log.parent / "home")
    with serving(bundle, tmp_path / "second", BENTOML_HOME=home) as second:
        post(second, CAT)
        ours, theirs = (httpx.get(f"{url}/metrics").text for url in (server.url, second.url))
        found = processes(second)
    assert "guard_accepted_total 1.0" in theirs
    assert "guard_accepted_total 1.0" not in ours
    assert "guard_accepted_total" in ours
    assert second.process.returncode == 0
    assert psutil.wait_procs(found, timeout=60)[1] == []


def test_clients_that_left_do_not_delay_the_end(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "left") as running:
        address = urlsplit(running.url)
        for start in (b"Content-Length: 9\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n"):
            with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as raw:
                raw.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n" + start)
        until(lambda: [line.get("status") for line in running.lines()].count(499) == 2)
        began = time.monotonic()
    assert running.process.returncode == 0
    assert time.monotonic() - began < 10


def test_bundles_that_do_not_match_are_refused_at_start(tmp_path: Path) -> None:
    corrupt = write_bundle(tmp_path / "corrupt")
    expected = sha256(corrupt / MODEL)
    data = bytearray((corrupt / MODEL).read_bytes())
    data[100] ^= 1
    (corrupt / MODEL).write_bytes(data)
    swapped = write_bundle(tmp_path / "swapped", model_sha256="0" * 64)
    old = write_bundle(tmp_path / "old", graph_version=0)
    missing = tmp_path / "missing"
    uncalibrated = write_bundle(tmp_path / "uncalibrated")
    (uncalibrated / CALIBRATION).unlink()
    unlisted = write_bundle(tmp_path / "unlisted")
    index = unlisted / samples.FOLDER / samples.INDEX
    index.write_bytes(b"[{}]")
    manifest = json.loads((unlisted / MANIFEST).read_bytes())
    manifest["files"] = digests(unlisted)
    (unlisted / MANIFEST).write_text(json.dumps(manifest))
    fine = write_bundle(tmp_path / "fine")

    def start(name: Path, **settings: str) -> tuple[subprocess.Popen[bytes], Path]:
        folder = tmp_path / f"server-{name.name}-{len(settings)}"
        return spawn(name, folder, port=free_port(), **settings), folder / "log"

    cases = {
        start(corrupt): [MODEL, expected, sha256(corrupt / MODEL)],
        start(swapped): [CALIBRATION, "0" * 64, sha256(swapped / MODEL)],
        start(old): [CALIBRATION, "version 0"],
        start(missing): [str(missing), "no such bundle folder"],
        start(uncalibrated): [CALIBRATION],
        start(unlisted): [str(index), "file"],
        start(fine, GUARD_MIN_RADIUS_L2="far"): ["GUARD_MIN_RADIUS_L2", "far"],
        start(fine, GUARD_MAX_BYTES="0", GUARD_TIMEOUT="1"): ["GUARD_MAX_BYTES"],
    }
    for (process, log), words in cases.items():
        try:
            assert process.wait(180) == 1, log.read_text()
        finally:
            stop(process)
        text = log.read_text()
        assert "Traceback" not in text
        assert len(text.splitlines()) == 1, text
        assert text.startswith("guard: ")
        for word in words:
            assert word in text
    assert (missing / MANIFEST).exists() is False


def test_the_bento_packs_the_package_and_the_shipped_bundle() -> None:
    bento = yaml.safe_load((ROOT / "bentofile.yaml").read_text())
    assert bento["service"] == "guard.service:GuardService"
    included = {path.rstrip("/*") for path in bento["include"]}
    assert {"guard", "models/cifar10", "pyproject.toml"} <= included
    # A container installs "." before it gets the rest: what the package is built from is there by then.
    assert bento["python"]["packages"] == ["."]
    code = "from guard.service import IMAGE; print(*IMAGE.build_include_paths)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(found.split()) == {"guard", "pyproject.toml", "README.md", "LICENSE"} <= included
