"""Seconds from starting `bentoml serve` to a ready server, and what its process has imported.

python benchmarks/cold_start.py models/cifar10 --repeats 5 --out benchmarks/results/cold_start.json
"""

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def seconds_to_ready(bundle: Path, limit: float = 60.0) -> float:
    """Starts the server on a free port, waits until /readyz says 200, stops it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GUARD_MODEL": str(bundle.resolve()), "BENTOML_DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "bentoml", "serve", "--port", str(port)]
    started = time.perf_counter()
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while time.perf_counter() - started < limit:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
                    if answer.status == 200:
                        return time.perf_counter() - started
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.02)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    raise SystemExit(f"not ready after {limit} seconds")


def imported() -> dict[str, bool]:
    """Whether importing the service brings torch or scipy into a fresh process."""
    code = "import guard.service, guard.decision, sys; print(*{m.split('.')[0] for m in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: name in found.stdout.split() for name in ("torch", "scipy")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    seconds = [seconds_to_ready(given.bundle) for _ in range(given.repeats)]
    result = {
        "command": "python benchmarks/cold_start.py " + " ".join(sys.argv[1:]),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "seconds": [round(value, 2) for value in seconds],
        "median": round(statistics.median(seconds), 2),
        "imported_by_the_service": imported(),
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
