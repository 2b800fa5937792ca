"""Seconds per training step under each regularizer, over those of the plain step, beside its passes' limit.

    python -m benchmarks.training --out benchmarks/results/training.json

Interleaved: in every round each regularizer makes one step (passes, the weights' gradient, the update) on
the same batch; a round's ratios are to its own plain step. Limits count a forward pass as 1, a backward pass
to weights and images as 2 and one to the images alone as 1, so that a plain step is 3. On the CPU with one
thread the clock is the processor time of the process, which other load hardly lengthens; else it is the wall
clock.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from guard.files import write_text
from guard.progress import Progress
from guard.training import architectures, grammar
from guard.training.loop import chosen_precision
from guard.training.passes import Passes, compiled


@dataclass(frozen=True)
class Cost:
    """Regularizers and the passes of their step, over a plain step's three; None: not countable."""

    regularizers: tuple[str, ...]
    limit: float | None


COSTS = {
    "none": Cost(("none",), 1),
    "tv-l2": Cost(("tv-l2:eps=0.1",), 5 / 3),
    "tv-l1": Cost(("tv-l1:eps=2/255",), 5 / 3),
    "lipschitz": Cost(("lipschitz:weight=0.1",), 4 / 3),
    "tulip": Cost(("tulip:eps=0.1,weight=0.1",), 5 / 3),
    "tulip (papers' penalty form)": Cost(("tv-l2:eps=0.1,form=penalty", "lipschitz:weight=0.1"), 7 / 3),
    "gradient-penalty-l2": Cost(("gradient-penalty-l2:weight=0.1",), 7 / 3),
    "gradient-penalty-l1": Cost(("gradient-penalty-l1:weight=0.1",), 7 / 3),
    "tv-l2-exact": Cost(("tv-l2-exact:eps=0.1",), None),
    "tv-l1-exact": Cost(("tv-l1-exact:eps=2/255",), None),
    "lipschitz-exact": Cost(("lipschitz-exact:weight=0.1",), None),
    "tulip-exact": Cost(("tulip-exact:eps=0.1,weight=0.1",), None),
    "gradient-penalty-l2-exact": Cost(("gradient-penalty-l2-exact:weight=0.1",), None),
    "gradient-penalty-l1-exact": Cost(("gradient-penalty-l1-exact:weight=0.1",), None),
    "stability": Cost(("stability:weight=0.8",), 3),
    "hamming": Cost(("hamming:weight=2400",), 3),
    "stability hamming": Cost(("stability:weight=0.8", "hamming:weight=2400"), 3),
    "dense-manifold": Cost(("dense-manifold:weight=0.8",), 3),
    "adversarial-linf (PGD-7)": Cost(("adversarial-linf:eps=8/255,steps=7",), 17 / 3),
    "adversarial-l2 (PGD-7)": Cost(("adversarial-l2:eps=0.5,steps=7",), 17 / 3),
    "free-linf": Cost(("free-linf:eps=8/255",), 1),
    "gaussian": Cost(("gaussian:sigma=0.1",), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="compact-resnet")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hardware", default=platform.processor() or platform.machine())
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    precision = chosen_precision(given.precision, given.device)
    model = architectures.build(
        given.arch, mean=[0.5] * 3, deviation=[0.25] * 3, num_classes=10, size=(32, 32)
    )
    model = model.to(given.device).to(memory_format=torch.channels_last)
    fast = compiled(model) if given.compile else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    images = torch.rand(given.batch_size, 3, 32, 32, device=given.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (given.batch_size,), device=given.device)
    cuda = given.device.startswith("cuda")
    clock = time.process_time if not cuda and given.threads == 1 else time.perf_counter
    state: dict[str, torch.Tensor] = {}

    def step(chosen: list[grammar.Regularizer]) -> float:
        if cuda:
            torch.cuda.synchronize()
        begun = clock()
        passes = Passes(
            model,
            images,
            labels,
            generator=torch.Generator().manual_seed(0),
            autocast=torch.bfloat16 if precision == "bf16" else None,
            compiled=fast,
            state=state,
        )
        loss, _ = grammar.regularized_loss(chosen, passes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for call in passes.after_backward:
            call()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        return clock() - begun

    parsed = {name: grammar.parse_all(cost.regularizers) for name, cost in COSTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in COSTS}
    with Progress((given.rounds + 2) * len(COSTS), "training") as progress:
        for turn in range(given.rounds + 2):
            for name, chosen in parsed.items():
                taken = step(chosen)
                if turn >= 2:  # the first ones set up
                    seconds[name].append(taken)
                progress.advance(1, name)
    ratios = {
        name: [mine / plain for mine, plain in zip(taken, seconds["none"], strict=True)]
        for name, taken in seconds.items()
    }
    result: dict[str, Any] = {
        "command": "python -m benchmarks.training " + " ".join(sys.argv[1:]),
        "hardware": torch.cuda.get_device_name() if cuda else given.hardware,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "precision": precision,
        "threads": given.threads,
        "clock": "processor time" if clock is time.process_time else "wall clock",
        "plain_seconds": statistics.median(seconds["none"]),
        "steps": {
            name: {
                "regularizers": cost.regularizers,
                "limit": cost.limit,
                "ratio": statistics.median(ratios[name]),
                "lower_quartile": statistics.quantiles(ratios[name], n=4)[0],
                "upper_quartile": statistics.quantiles(ratios[name], n=4)[2],
                "rounds": given.rounds,
            }
            for name, cost in COSTS.items()
        },
    }
    for name, entry in result["steps"].items():
        limit = "" if entry["limit"] is None else f"{entry['limit']:.2f}"
        spread = f"[{entry['lower_quartile']:.2f}, {entry['upper_quartile']:.2f}]"
        print(f"{name:30s} {entry['ratio']:6.2f} {spread:14s} limit {limit}")
    if given.out:
        write_text(given.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
