"""Does the served decision equal the full Jacobian's? Every image of a data set, decided both ways.

    python benchmarks/agreement.py models/cifar10 --val cifar10 --out benchmarks/results/agreement.json

The served way is two rows, then the rows with p_i G > t; the other is all K rows. Only a bundle calibrated
with the score `jacobian` has a threshold to compare at.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import onnxruntime

from guard import bundle as bundles
from guard.data import load, to_floats
from guard.errors import UsageError
from guard.progress import Progress
from guard.runtime import Detector

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--val", default="cifar10")
    parser.add_argument("--limit", type=int, help="only the first N images")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    bundle = bundles.load(given.bundle)
    calibration = bundle.calibrated()
    if calibration.score != "jacobian":
        raise UsageError(f"{given.bundle} is calibrated for {calibration.score!r}; expected 'jacobian'.")
    images = load(given.val, "test").images[: given.limit]
    served = Detector(bundle.model, threads=given.threads)
    full = Detector(bundle.model, score="jacobian-full", threads=given.threads)
    threshold, bound = calibration.threshold, calibration.row_bound
    agree = rejected = further = missed = 0
    with Progress(len(images), "images decided both ways") as progress:
        for start in range(0, len(images), BATCH):
            batch = to_floats(images[start : start + BATCH])
            lazy = served.measure(batch, threshold=threshold, row_bound=bound)
            every = full.measure(batch)
            agree += int(((lazy.jacobian <= threshold) == (every.jacobian <= threshold)).sum())
            rejected += int((~(every.jacobian <= threshold)).sum())
            further += int((lazy.rows > 2).sum())
            missed += int((every.jacobian > lazy.jacobian * (1 + 1e-4)).sum())
            progress.advance(len(batch))
    result = {
        "command": "python benchmarks/agreement.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
        "bundle": bundle.manifest.name,
        "model": bundle.digest,
        "classes": full.num_classes,
        "threshold": threshold,
        "row_bound": bound,
        "n": len(images),
        "same_decision": agree,
        "rejected_by_full_jacobian": rejected,
        "images_with_further_rows": further,
        "images_whose_longest_row_was_not_computed": missed,
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
