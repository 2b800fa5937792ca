"""Does the served decision equal the full Jacobian's where there are 1000 classes? ResNet-50 at 224 x 224.

    python -m benchmarks.agreement_resnet50 --val cifar10 --out benchmarks/results/agreement_resnet50.json

Weights are random, as none can be shipped; logits are scaled so that the median image's largest probability
is 0.9, which makes them about as uneven as a trained network's. Of `--images` real images, enlarged, two rows
set the 5% threshold, and the bound of rows comes from calibration's own search. All 1000 rows are then
computed for the `--subsample` images nearest the threshold, where decisions could differ most easily.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from benchmarks.guarded_graph import cpu, exported
from guard import statistics
from guard.calibration import fitting
from guard.calibration.fitting import Effort
from guard.certificate import first_order_radius
from guard.data import load, to_floats
from guard.progress import Progress
from guard.runtime import Detector

SIDE = 224
CONFIDENCE = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--val", default="cifar10")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--subsample", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    generator = np.random.default_rng(given.seed)
    dataset = load(given.val, "test")
    chosen = generator.choice(len(dataset), given.images, replace=False)
    images = np.concatenate([enlarged(image) for image in dataset.images[chosen]])
    torch.manual_seed(given.seed)
    net = torchvision.models.resnet50().eval()
    scale = confidence_scale(Detector(exported(net, (3, SIDE, SIDE)), provider="cpu").logits(images))
    with torch.no_grad():
        net.fc.weight.mul_(scale)
        net.fc.bias.mul_(scale)
    model = exported(net, (3, SIDE, SIDE))
    served = Detector(model, provider="cpu", threads=given.threads)
    two_rows = served.measure(images)
    threshold = statistics.conformal_threshold(two_rows.jacobian, 0.05)
    radius = first_order_radius(two_rows.margin, two_rows.gradient_l2)
    _, attacked = fitting.longest_rows(served, images[:8], float(np.median(radius)), Effort())
    bound = fitting.bound(attacked, Effort().blocks).value
    nearest = np.argsort(np.abs(np.log(two_rows.jacobian / threshold)), kind="stable")[: given.subsample]
    full = Detector(model, score="jacobian-full", provider="cpu", threads=given.threads)
    rows, seconds, agree = [], 0.0, 0
    with Progress(len(nearest), "images decided both ways") as progress:
        for at in nearest:
            one = images[at : at + 1]
            decided = served.measure(one, threshold=threshold, row_bound=bound)
            begun = time.perf_counter()
            longest = float(full.measure(one).jacobian[0])
            seconds += time.perf_counter() - begun
            same = bool((decided.jacobian[0] > threshold) == (longest > threshold))
            agree += same
            rows.append(
                {
                    "score": float(decided.jacobian[0]),
                    "full": longest,
                    "rows": int(decided.rows[0]),
                    "largest_probability": float(decided.probabilities[0].max()),
                    "agree": same,
                }
            )
            progress.advance(1)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.agreement_resnet50 " + " ".join(sys.argv[1:]),
        "hardware": f"{given.threads or 'all'} threads, {platform.machine()}, {cpu()}",
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
        },
        "classes": served.num_classes,
        "images": len(images),
        "threshold": threshold,
        "row_bound": bound,
        "subsample": len(nearest),
        "agree": agree,
        "seconds_per_full_jacobian": round(seconds / len(nearest), 1),
        "decided": rows,
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")


def enlarged(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """An image (H, W, 3) as floats (1, 3, 224, 224)."""
    return to_floats(np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))[None])


def confidence_scale(logits: NDArray[np.float32]) -> float:
    """The factor of the logits at which the median largest probability is `CONFIDENCE`."""
    centred = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        median = np.median(1 / np.exp(middle * centred).sum(axis=1))
        low, high = (middle, high) if median < CONFIDENCE else (low, middle)
    return low


if __name__ == "__main__":
    main()
