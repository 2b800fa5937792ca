"""Images per second of offline scoring, beside the raw session of the same guarded graph.

    python benchmarks/throughput.py models/cifar10 --val cifar10 --out benchmarks/results/throughput.json

Blocks of images go in turn through the bare onnxruntime session of the guarded graph (float arrays ready
in memory, outputs thrown away) and through all that `guard certify` does: decoding the array, further rows,
radii, decisions, one JSON line each. Same run, same threads, same chunks.
"""

import argparse
import dataclasses
import io
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime

from guard import data, offline, tables
from guard.decision import Guard
from guard.guarded import guarded_model
from guard.progress import Progress
from guard.runtime import load_model, session_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--val", default="cifar10")
    parser.add_argument("--block", type=int, default=500)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    guard = Guard.from_bundle(given.bundle, "cpu", threads=given.threads)
    chunk, score = guard.detector.chunk, guard.calibration.score
    session = session_of(guarded_model(load_model(given.bundle / "model.onnx"), score), threads=given.threads)
    names = [output.name for output in session.get_outputs()]
    dataset = data.load(given.val, "test")
    images = dataset.images[: given.limit]
    seconds: dict[str, list[float]] = {"raw": [], "scored": []}
    with Progress(len(images), "throughput") as progress:
        for start in range(0, len(images), given.block):
            block = images[start : start + given.block]
            floats = data.to_floats(block)
            begun = time.perf_counter()
            for i in range(0, len(floats), chunk):
                session.run(names, {"images": floats[i : i + chunk]})
            seconds["raw"].append(time.perf_counter() - begun)
            source = offline.Source(arrays=dataclasses.replace(dataset, images=block, labels=None))
            begun = time.perf_counter()
            with tables.writer(io.BytesIO(), "jsonl") as write:
                for row in offline.classify(guard, [source]):
                    write(row.record())
            seconds["scored"].append(time.perf_counter() - begun)
            progress.advance(len(block))
    ratios = [raw / scored for raw, scored in zip(seconds["raw"], seconds["scored"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result: dict[str, Any] = {
        "command": "python benchmarks/throughput.py " + " ".join(sys.argv[1:]),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
        "images": len(images),
        "chunk": chunk,
        "raw_images_per_second": round(len(images) / sum(seconds["raw"]), 1),
        "scored_images_per_second": round(len(images) / sum(seconds["scored"]), 1),
        "scored_of_raw": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
