"""Latency and throughput over HTTP: the guarded service beside a bare BentoML service of the same model.

    python benchmarks/service.py models/cifar10 --out benchmarks/results/service.json
    python benchmarks/service.py models/cifar10 --services guarded batched-guard --clients 32

Real server processes on this machine, one worker each, all started before the first measurement. Each client
keeps one connection and sends its next image when it has its answer. Rounds interleave: every service is
measured at every number of clients once per round, in turn. Figures are the mean and deviation over rounds;
p50 and p99 in milliseconds. The load comes from the same machine, so both services share it with their
clients.
"""

import argparse
import asyncio
import io
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from guard.files import provenance, write_text

SERVICES = {
    "guarded": "guard.service:GuardService",
    "bare": "benchmarks.bare_service:Bare",
    "batched": "benchmarks.bare_service:Batched",
    "batched-guard": "benchmarks.bare_service:BatchedGuard",
}
ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def server(name: str, bundle: Path) -> Iterator[int]:
    """A service that answers, by its port."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as home:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        environment = os.environ | {
            "GUARD_MODEL": str(bundle.resolve()),
            "BENTOML_HOME": home,
            "BENTOML_DO_NOT_TRACK": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "bentoml", "serve", SERVICES[name], "--port", str(port)]
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait(port, process)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait(port: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Returns once the service is ready."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("a service did not become ready; start it by hand to see why")


def pictures(bundle: Path, count: int = 64) -> list[bytes]:
    """Smooth random pictures of the model's input size, as PNG files."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    size = (manifest["input"]["width"], manifest["input"]["height"])
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def request(picture: bytes) -> bytes:
    """`POST /classify` with the picture as form field, ready to send."""
    head = b'Content-Disposition: form-data; name="image"; filename="x.png"\r\nContent-Type: image/png'
    body = b"--b\r\n" + head + b"\r\n\r\n" + picture + b"\r\n--b--\r\n"
    lines = [
        b"POST /classify HTTP/1.1",
        b"Host: localhost",
        b"Content-Type: multipart/form-data; boundary=b",
        b"Content-Length: %d" % len(body),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def client(port: int, requests: list[bytes], start: int, until: float, latencies: list[float]) -> int:
    """Sends one request after another until the time is over; returns how many were not answered with 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    turn, failures = start, 0
    try:
        while time.perf_counter() < until:
            began = time.perf_counter()
            writer.write(requests[turn % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            latencies.append(time.perf_counter() - began)
            failures += b" 200 " not in lines[0] + b" "
            turn += 1
    finally:
        writer.close()
    return failures


async def load(port: int, requests: list[bytes], clients: int, seconds: float) -> dict[str, float]:
    """Keeps `clients` connections busy; p50 and p99 in milliseconds, answers per second, failures."""
    latencies: list[float] = []
    began = time.perf_counter()
    tasks = [client(port, requests, 7 * index, began + seconds, latencies) for index in range(clients)]
    failures = sum(await asyncio.gather(*tasks))
    elapsed = time.perf_counter() - began
    p50, p99 = np.quantile(latencies, [0.5, 0.99]) * 1000
    return {
        "p50": float(p50),
        "p99": float(p99),
        "per_second": len(latencies) / elapsed,
        "failures": failures,
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and deviation over rounds."""
    figures: dict[str, Any] = {"failures": sum(int(one["failures"]) for one in rounds)}
    for name in ("p50", "p99", "per_second"):
        values = [one[name] for one in rounds]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        figures[name] = {"mean": round(statistics.mean(values), 3), "deviation": round(deviation, 3)}
    return figures


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cells, by service and number of clients."""
    requests = [request(picture) for picture in pictures(arguments.bundle)]
    cells: dict[tuple[str, int], list[dict[str, float]]] = {}
    with ExitStack() as running:
        ports = {name: running.enter_context(server(name, arguments.bundle)) for name in arguments.services}
        for port in ports.values():
            asyncio.run(load(port, requests, 8, arguments.warm_up))
        for index in range(arguments.rounds):
            for clients in arguments.clients:
                for name, port in ports.items():
                    figures = asyncio.run(load(port, requests, clients, arguments.seconds))
                    cells.setdefault((name, clients), []).append(figures)
                    text = " ".join(f"{key} {value:8.1f}" for key, value in figures.items())
                    print(f"round {index + 1}  {name:14} {clients:3} clients  {text}", file=sys.stderr)
    return {
        name: {str(clients): summary(cells[name, clients]) for clients in arguments.clients}
        for name in arguments.services
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--services", nargs="+", choices=SERVICES, default=["guarded", "bare"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="per cell and round")
    parser.add_argument("--warm-up", type=float, default=3, help="seconds, per service")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "benchmark": "service",
        "unit": "milliseconds; answers per second",
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "provenance": provenance(vars(arguments)),
        "results": measure(arguments),
    }
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out is None:
        print(text)
    else:
        write_text(arguments.out, text)


if __name__ == "__main__":
    main()
