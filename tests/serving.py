"""A tiny bundle whose answers have closed forms, and a real server process for it."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from PIL import Image

from guard import samples
from guard.bundle import CALIBRATION, MANIFEST, MODEL, Calibration, InputShape, Manifest, digests, dump
from guard.files import sha256
from guard.guarded import GRAPH_VERSION
from guard.samples import Sample
from tests.networks import linear

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (3, 8, 8)
CLASSES = ["cat", "dog", "ship"]
GAIN = 12.0
THRESHOLD = 0.2


def model() -> onnx.ModelProto:
    """Logit k is GAIN times the mean of colour channel k: red is a cat, green a dog, blue a ship.

    With probabilities p and all rows of the weight orthogonal and of length GAIN / 8, the Jacobian's row i
    has length p_i GAIN / 8 ||e_i - p||: nearly 0 for a pure colour, 0.4 for grey.
    """
    weight = np.zeros((3, *SHAPE), np.float32)
    for channel in range(3):
        weight[channel, channel] = GAIN / 64
    return linear(weight.reshape(3, -1), shape=SHAPE)


def calibration(digest: str, **changes: Any) -> Calibration:
    """A calibration of our choice for `model`."""
    share = {"count": 5, "n": 100, "value": 0.05, "upper": 0.1, "lower": 0.01, "level": 0.95}
    radii = {
        "lipschitz": 5.0,
        "omega": {"eps": [0.5, 1.0, 2.0], "edges": [], "values": [[0.0, 0.0, 0.0]], "reach": [2.0]},
        "violations": share | {"count": 1, "value": 0.01, "upper": 0.047},
        "mean_radius": 0.2,
        "mean_distance": 0.4,
        "tightness": 0.5,
        "attack": {},
        "effort": {},
    }
    edges = np.linspace(0, 0.4, 21)
    record = {
        "model_sha256": digest,
        "graph_version": GRAPH_VERSION,
        "score": "jacobian",
        "fpr": 0.05,
        "threshold": THRESHOLD,
        "n": 100,
        "seed": 0,
        "data": {"name": "colours"},
        "folds": {"threshold": 100},
        "predicted_fpr": {"lower": 0.01, "upper": 0.1, "level": 0.95, "m": 100},
        "realized_fpr": share,
        "row_bound": 2.0,
        "histogram": {
            "edges": edges.tolist(),
            "counts": [40, 20, 10, 8, 6, 5, 3, 2, 1, 1, *[1] * 4, *[0] * 6],
        },
        "l2": radii,
        "linf": radii,
    }
    return Calibration.model_validate(record | changes)


def colour(red: int, green: int, blue: int, *, size: int = 8, kind: str = "PNG") -> bytes:
    """A picture of one colour, as the bytes of a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (red, green, blue)).save(buffer, kind)
    return buffer.getvalue()


CAT = colour(255, 0, 0)
DOG = colour(0, 255, 0)
GREY = colour(128, 128, 128)


def write_bundle(folder: Path, **changes: Any) -> Path:
    """The bundle with two samples: a red picture, which is accepted, and a grey one, which is not."""
    (folder / samples.FOLDER).mkdir(parents=True)
    onnx.save(model(), folder / MODEL)
    (folder / CALIBRATION).write_bytes(dump(calibration(sha256(folder / MODEL), **changes)))
    (folder / samples.FOLDER / "red.png").write_bytes(CAT)
    (folder / samples.FOLDER / "grey.png").write_bytes(GREY)
    listed = [
        Sample(file="red.png", title="cat", note="Red all over."),
        Sample(file="grey.png", title="a cat, once", note="Neither of them.", kind="adversarial"),
    ]
    (folder / samples.FOLDER / samples.INDEX).write_bytes(samples.dump(listed))
    channels, height, width = SHAPE
    manifest = Manifest(
        name="colours",
        input=InputShape(channels=channels, height=height, width=width),
        class_names=CLASSES,
        files=digests(folder),
        provenance={
            "commit": "c0ffee",
            "arguments": {"out": "/home/me"},
            "training": {"provenance": {"seed": 0, "arguments": {"out": "/home/me"}}},
        },
    )
    (folder / MANIFEST).write_bytes(dump(manifest))
    return folder


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, its process, and the file with its output."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        """Its log lines that are JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(bundle: Path, folder: Path, *, port: int, **settings: str) -> subprocess.Popen[bytes]:
    """`bentoml serve` in the repository's root, with its output in `folder`/log."""
    environment = clean_environment() | {
        "GUARD_MODEL": str(bundle),
        "BENTOML_HOME": str(folder / "home"),
        "BENTOML_DO_NOT_TRACK": "1",
        **settings,
    }
    command = [sys.executable, "-m", "bentoml", "serve", "--port", str(port), "--host", "127.0.0.1"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def clean_environment() -> dict[str, str]:
    """This process's environment without guard's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GUARD_")}


@contextmanager
def serving(bundle: Path, folder: Path, **settings: str) -> Iterator[Server]:
    """A server that is ready; ended when the block ends."""
    port = free_port()
    process = spawn(bundle, folder, port=port, **settings)
    server = Server(f"http://127.0.0.1:{port}", process, folder / "log")
    try:
        wait(server)
        yield server
    finally:
        stop(process)


def wait(server: Server, seconds: float = 180) -> None:
    """Returns once the server is ready."""
    deadline = time.monotonic() + seconds
    while not _is_ready(server.url):
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not become ready:\n{server.log.read_text()}")
        time.sleep(0.05)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a server and everything it started."""
    process.terminate()
    try:
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def error_of(response: httpx.Response) -> Mapping[str, str]:
    """The error of an answer, whose envelope is checked."""
    body = response.json()
    assert set(body) == {"error", "request_id"}, body
    assert set(body["error"]) == {"code", "message"}
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["error"]["message"]
    return dict(body["error"])
