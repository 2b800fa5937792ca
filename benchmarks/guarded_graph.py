"""Cost of the guarded graph over the bare classifier, as ratios from one interleaved run.

    python benchmarks/guarded_graph.py --network cifar-resnet18 --out benchmarks/results/guarded_graph.json
    python benchmarks/guarded_graph.py --network resnet50 --batches 1 --repeats 5

Every contender runs once per repeat, in an order drawn anew, on fresh random images, with the same number of
threads and without spinning worker threads; a ratio is the median over repeats of contender / bare of the
same repeat. Batches are split into chunks as `guard.runtime.Detector` does it.
Weights are random: no timed path depends on them (rows beyond the second are not part of the timed call).
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torchvision

from guard.guarded import guarded_model, vjp_model
from guard.runtime import Detector, session_of

FLOP_LIMITS = {"two rows (jacobian)": "3", "one row (margin-gradient)": "2", "all rows, one graph": "1 + K"}


def network(name: str, classes: int | None = None) -> tuple[torch.nn.Module, tuple[int, int, int], int]:
    """A classifier with random weights in evaluation mode, its input shape and number of classes."""
    torch.manual_seed(0)
    if name == "cifar-resnet18":
        net = torchvision.models.resnet18(num_classes=classes or 10)
        net.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = torch.nn.Identity()
        return net.eval(), (3, 32, 32), classes or 10
    return torchvision.models.resnet50(num_classes=classes or 1000).eval(), (3, 224, 224), classes or 1000


def exported(net: torch.nn.Module, shape: tuple[int, int, int]) -> onnx.ModelProto:
    """The network as ONNX with a dynamic batch axis."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        batch = torch.export.Dim("batch", min=1, max=4096)
        torch.onnx.export(
            net,
            (torch.rand(7, *shape),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )
        return onnx.load(path)


def contenders(
    net: torch.nn.Module, shape: tuple[int, int, int], classes: int, threads: int, *, rows: bool
) -> dict[str, Callable[[np.ndarray[Any, Any]], object]]:
    """What is timed, by name; each takes images (B, C, H, W)."""
    model = exported(net, shape)
    chunk = Detector(model, provider="cpu").chunk

    def chunked(session: onnxruntime.InferenceSession) -> Callable[[np.ndarray[Any, Any]], object]:
        names = [output.name for output in session.get_outputs()]
        return lambda x: [session.run(names, {"images": x[i : i + chunk]}) for i in range(0, len(x), chunk)]

    bare = session_of(model, threads=threads)
    vjp = session_of(vjp_model(model), threads=threads)
    found: dict[str, Callable[[np.ndarray[Any, Any]], object]] = {
        "bare": lambda x: bare.run(None, {"images": x}),
        "one row (margin-gradient)": chunked(
            session_of(guarded_model(model, "margin-gradient"), threads=threads)
        ),
        "two rows (jacobian)": chunked(session_of(guarded_model(model, "jacobian"), threads=threads)),
    }
    if not rows:
        return found

    def per_class(x: np.ndarray[Any, Any]) -> None:
        for row in np.eye(classes, dtype=np.float32):
            vjp.run(["gradient"], {"images": x, "cotangents": np.tile(row, (len(x), 1))})

    def jacrev(x: np.ndarray[Any, Any]) -> None:
        one = torch.func.jacrev(lambda image: torch.softmax(net(image[None])[0], 0))
        torch.func.vmap(one)(torch.from_numpy(x))

    found["all rows, one graph"] = chunked(session_of(guarded_model(model, "jacobian-full"), threads=threads))
    found["all rows, a loop over classes"] = per_class
    found["all rows, torch jacrev"] = jacrev
    return found


def measure(
    name: str, classes: int | None, batches: list[int], repeats: int, threads: int
) -> list[dict[str, Any]]:
    """One row per batch size and contender: median milliseconds, median ratio to bare and its quartiles."""
    torch.set_num_threads(threads)
    net, shape, classes = network(name, classes)
    timed = contenders(net, shape, classes, threads, rows=name == "cifar-resnet18" and classes <= 32)
    rng = np.random.default_rng(0)
    table = []
    for batch in batches:
        seconds: dict[str, list[float]] = {key: [] for key in timed}
        rounds = repeats * max(1, 4 // batch)  # a single image is timed the least surely
        for repeat in range(rounds + 2):
            images = rng.random((batch, *shape), dtype=np.float32)
            for key in rng.permutation(list(timed)):
                run = timed[key]
                start = time.perf_counter()
                run(images)
                if repeat >= 2:
                    seconds[key].append(time.perf_counter() - start)
            print(f"\r{name} batch {batch}: {repeat + 1}/{rounds + 2}", end="", file=sys.stderr)
        print(file=sys.stderr)
        for key, values in seconds.items():
            ratios = [v / b for v, b in zip(values, seconds["bare"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            table.append(
                {
                    "network": name,
                    "classes": classes,
                    "batch": batch,
                    "what": key,
                    "milliseconds": round(1e3 * statistics.median(values), 3),
                    "ratio": round(middle, 3),
                    "quartiles": [round(low, 3), round(high, 3)],
                    "n": rounds,
                    "flop_limit": FLOP_LIMITS.get(key),
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=["cifar-resnet18", "resnet50"], default="cifar-resnet18")
    parser.add_argument("--classes", type=int, help="(default: 10, and 1000 for resnet50)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    table = measure(given.network, given.classes, given.batches, given.repeats, given.threads)
    for row in table:
        low, high = row["quartiles"]
        print(
            f"{row['network']:15} batch {row['batch']:3}  {row['what']:30} "
            f"{row['milliseconds']:9.2f} ms  {row['ratio']:6.2f}x [{low:.2f}, {high:.2f}]"
        )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python benchmarks/guarded_graph.py " + " ".join(sys.argv[1:]),
            "hardware": f"{given.threads} threads, {platform.machine()}, {cpu()}",
            "versions": {
                "python": platform.python_version(),
                "onnxruntime": onnxruntime.__version__,
                "torch": torch.__version__,
            },
            "rows": table,
        }
        given.out.write_text(json.dumps(result, indent=1) + "\n")


def cpu() -> str:
    """The processor's name and instruction sets that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    sets = [s for s in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {s}" in text]
    return f"{name} ({', '.join(sets)})"


if __name__ == "__main__":
    main()
