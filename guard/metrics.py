"""What Prometheus may ask, summed over the server's worker processes.

Scores are counted relative to their threshold, so that one set of buckets fits every model.
"""

import atexit
import math
import os
import shutil
import tempfile
from pathlib import Path

_FOLDER = "GUARD_METRICS_DIR"

# Worker processes share their counts through files. BentoML keeps one folder for all servers of a user and
# empties it whenever another one starts; `own_folder` gives each server its own.
if _FOLDER in os.environ:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.environ[_FOLDER]

from prometheus_client import (  # noqa: E402 (reads the variable when imported)
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

LARGEST = 1e3

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

REQUESTS = Counter("guard_requests", "HTTP requests answered.", ["route", "status"])
REQUEST_SECONDS = Histogram(
    "guard_request_seconds", "From the request's first byte to the answer.", ["route"], buckets=_SECONDS
)
REFUSED = Counter("guard_refused", "Requests answered with an error, by its code.", ["code"])
ACCEPTED = Counter("guard_accepted", "Images classified and accepted.")
REJECTED = Counter(
    "guard_rejected", "Images classified and rejected, by reason; some have several.", ["reason"]
)
SCORE = Histogram(
    "guard_score_ratio",
    "Detector score over its threshold; above 1 is rejected.",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10),
)
RADIUS = Histogram(
    "guard_radius",
    "Radius of accepted images in pixels of the [0, 1] scale, first of each norm.",
    ["norm"],
    buckets=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10),
)
DECODE_SECONDS = Histogram("guard_decode_seconds", "Decoding one upload.", buckets=_SECONDS)
INFERENCE_SECONDS = Histogram("guard_inference_seconds", "Deciding one batch.", buckets=_SECONDS)
BATCH_SIZE = Histogram("guard_batch_size", "Images in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64))
IN_PROGRESS = Gauge("guard_uploads_in_progress", "Uploads being handled.", multiprocess_mode="livesum")
MODEL = Gauge(
    "guard_model",
    "1 for the model that is served.",
    ["name", "digest", "calibration", "detector", "provider"],
    multiprocess_mode="mostrecent",
)


def observe(histogram: Histogram, value: float) -> None:
    """Counts an infinite value as `LARGEST` and NaN not at all: either would spoil the sum."""
    if not math.isnan(value):
        histogram.observe(min(value, LARGEST))


def own_folder() -> None:
    """Gives the worker processes started from here a folder of their own for their counts."""
    folder = tempfile.mkdtemp(prefix="guard-metrics-")
    os.environ[_FOLDER] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _forget_the_dead(folder: Path) -> None:
    """A worker that was killed leaves its uploads in progress behind, which no other will ever end."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except PermissionError:
            pass


def exposition() -> tuple[bytes, str]:
    """All metrics in Prometheus' text format, and its media type."""
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        _forget_the_dead(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST
