"""What benchmarks share that make choices: training images which a model never saw, so that the folds of a
calibration stay unseen, and work kept by piece, to go on where a run stopped.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import scipy
from numpy.typing import NDArray

from guard import data
from guard.decision import Guard
from guard.files import write_text
from guard.progress import Progress
from guard.settings import Policy
from guard.stages import Arrays, Stages

PIECE = 50


def parser(text: str | None, images: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("bundle", type=Path)
    found.add_argument("--dataset", default="cifar10")
    found.add_argument("--held-out", type=int, default=1000, help="last training images, as in the training")
    found.add_argument("--images", type=int, default=images)
    found.add_argument("--threads", type=int, default=0)
    found.add_argument("--cache", type=Path, required=True)
    found.add_argument("--out", type=Path)
    return found


def load(given: argparse.Namespace) -> tuple[Guard, NDArray[np.float32]]:
    """The served decision, and images of those held out."""
    guard = Guard.from_bundle(given.bundle, threads=given.threads, policy=Policy())
    dataset = data.load(given.dataset, "train")
    last = np.arange(len(dataset) - given.held_out, len(dataset))
    chosen = np.random.default_rng(5).permutation(last)[: given.images]
    return guard, data.to_floats(dataset.images[chosen])


def facts(name: str, guard: Guard, images: NDArray[np.float32]) -> dict[str, Any]:
    """What stands above the results."""
    return {
        "command": f"python -m benchmarks.{name} " + " ".join(sys.argv[1:]),
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "scipy": scipy.__version__,
        },
        "machine": platform.processor() or platform.machine(),
        "model": guard.bundle.digest,
        "images": len(images),
    }


def pieces(
    name: Path,
    guard: Guard,
    images: NDArray[np.float32],
    rows: NDArray[np.int64],
    compute: Callable[[NDArray[np.int64]], Arrays],
) -> Arrays:
    """What `compute` gives for the `images` at `rows`, kept for this bundle and them."""
    key = {
        "model": guard.bundle.digest,
        "calibration": guard.calibration.model_dump(mode="json"),
        "images": hashlib.sha256(images.tobytes()).hexdigest(),
    }
    with Progress(len(rows), name.name) as progress:
        return Stages(name, key, progress, doing="kept").run(name.name, rows, compute, size=PIECE)


def write(out: Path | None, result: dict[str, Any]) -> None:
    if out:
        write_text(out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
