"""From a training run to a bundle: the network as ONNX, compared with torch before it is written."""

import logging
import shlex
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from guard.autodiff import check_differentiable
from guard.bundle import CARD, MODEL, InputShape, Manifest, Preprocessing, check_target, seal
from guard.card import UNCALIBRATED
from guard.errors import ModelError
from guard.files import atomic_folder, provenance, sha256, write_bytes, write_text
from guard.guarded import IMAGES, LOGITS
from guard.training import checkpoint
from guard.training.loop import read_metrics, trained

OPSET = 18
BATCH_SIZES = (1, 2, 7, 32)
TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order differ by about 1e-6

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Exported:
    """A finished export: the bundle's manifest, and the largest deviation that `compare` found."""

    manifest: Manifest
    difference: float


def export(
    run: Path, out: Path, *, name: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Exported:
    """Writes the network of the run in the folder `run` as the bundle `out`, with a card.

    The model takes `images` (B, C, H, W) float32 in [0, 1], B free, and gives `logits` (B, K). It is compared
    with torch on fresh random images at several batch sizes. An existing bundle is replaced whole, its
    calibration included. `arguments` go into the provenance.

    Raises `TrainingError` where `run` holds no run or no checkpoint, `ModelError` where ONNX and torch
    disagree or the model has no gradients, and `BundleError` where `out` is another kind of folder.
    """
    check_target(out)
    found = trained(run)
    config, data = found.config, found.config["data"]
    channels, height, width = shape = tuple(data["shape"])
    graph = to_onnx(found.model, shape)
    check_differentiable(graph, IMAGES, LOGITS)
    difference = compare(found.model, graph, shape)
    description = Manifest(
        name=name or out.resolve().name,
        input=InputShape(channels=channels, height=height, width=width),
        class_names=list(data["class_names"]),
        preprocessing=Preprocessing(
            colour="rgb" if channels == 3 else "grey",
            resize=data.get("resize") or (height if height == width else None),
        ),
        provenance=provenance(
            arguments or {},
            seed=config["settings"]["seed"],
            checkpoint=sha256(run / checkpoint.CHECKPOINT),
            epochs={"done": found.epochs, "planned": config["settings"]["epochs"]},
            training=config,
        ),
    )
    with atomic_folder(out) as folder:
        write_bytes(folder / MODEL, graph.SerializeToString())
        write_text(folder / CARD, card(description, config, read_metrics(run), difference))
        manifest = seal(folder, description)
    return Exported(manifest, difference)


def to_onnx(model: nn.Module, shape: tuple[int, int, int]) -> onnx.ModelProto:
    """A network that takes images of `shape` (C, H, W), in evaluation mode, as ONNX with a free batch axis.

    BatchNorm layers become part of the convolutions before them where they can.
    """
    model = model.eval().float().cpu().to(memory_format=torch.contiguous_format)
    # A batch size equal to another dimension would be taken for it.
    size = next(size for size in range(2, 99) if size not in {*shape, *_widths(model)})
    example = torch.rand(size, *shape)
    # The exporter talks on standard output and warns about its own internals.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                input_names=[IMAGES],
                output_names=[LOGITS],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            if program is None:
                raise ModelError("torch's exporter returned no model; another version of torch may.")
            graph: onnx.ModelProto = program.model_proto
    finally:
        logger.setLevel(level)
    _strip(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def compare(model: nn.Module, graph: onnx.ModelProto, shape: tuple[int, int, int]) -> float:
    """The largest difference between torch's logits and onnxruntime's, relative to the largest logit.

    The images are random, other ones for each of several batch sizes. Raises `ModelError` where it
    exceeds 1e-4.
    """
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    worst = 0.0
    for size in BATCH_SIZES:
        images = rng.random((size, *shape), dtype=np.float32)
        with torch.no_grad():
            expected: Float32 = model.eval()(torch.from_numpy(images)).numpy()
        found: Float32 = session.run([LOGITS], {IMAGES: images})[0]
        if found.shape != expected.shape:
            raise ModelError(
                f"for {size} images the exported model gives {found.shape}, torch {expected.shape}; not "
                "written."
            )
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not difference <= TOLERANCE:
            raise ModelError(
                f"the exported model differs from torch by {difference:.2g} of the largest logit at batch "
                f"size {size}: expected at most {TOLERANCE:g}. Not written; the weights may not be finite."
            )
        worst = max(worst, difference)
    return worst


def card(
    manifest: Manifest, config: Mapping[str, Any], metrics: list[dict[str, float]], difference: float
) -> str:
    """The bundle's `card.md`: what the network is, how it was trained, and how accurate it is."""
    settings, data, made = config["settings"], config["data"], config["provenance"]
    epochs = [line for line in metrics if "epoch" in line]
    tested = next((line for line in metrics if "test_accuracy" in line), None)
    shape = " x ".join(str(side) for side in data["shape"])
    rows = [
        ("network", f"{_network(settings)}, {len(data['class_names'])} classes"),
        ("input", f"{shape} pixels in [0, 1], normalization inside"),
        ("trained on", f"{data['name']} (sha256 `{data['digest']}`)"),
        ("held out", f"{settings['held_out']} training images"),
        ("regularizer", f"`{' '.join(settings['regularizers'])}`"),
        ("epochs", f"{len(epochs)} of {settings['epochs']}, batch size {settings['batch_size']}"),
        ("seed", str(settings["seed"])),
    ]
    if made.get("commit"):
        rows.append(("commit", f"`{made['commit']}`"))
    if epochs and "seconds" in epochs[-1]:
        rows.append(("training took", f"{epochs[-1]['seconds'] / 60:.0f} minutes"))
    if tested is not None:
        rows.append(
            ("test accuracy", f"{tested['test_accuracy']:.2%} of {int(tested['test_images'])} clean images")
        )
    if epochs and "held_out_accuracy" in epochs[-1]:
        rows.append(("accuracy on those held out", f"{epochs[-1]['held_out_accuracy']:.2%}"))
    rows.append(("deviation from torch", f"{difference:.1e} of the largest logit"))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"""\
# {manifest.name}

Trained by `{train_command(config)}`
and exported by `guard export`.

| | |
|---|---|
{table}

The accuracy is on clean images, all of them, accepted or not.

{UNCALIBRATED}"""


def train_command(config: Mapping[str, Any]) -> str:
    """The `guard train` command line that makes a run's weights; data that are no known set by their file's
    or folder's own name, wherever it lay.
    """
    settings, data, provenance = config["settings"], config["data"], config["provenance"]
    processes = provenance.get("processes", 1)
    flags = {
        "dataset": [Path(provenance["arguments"].get("dataset") or "").name or data["name"]],
        "arch": [settings["architecture"]],
        **({"width": [settings["width"]]} if settings["width"] else {}),
        **({"pre-logit-sigmoid": []} if settings["pre_logit_sigmoid"] else {}),
        "regularizer": settings["regularizers"],
        "epochs": [settings["epochs"]],
        "batch-size": [settings["batch_size"]],
        "learning-rate": [settings["learning_rate"]],
        "schedule": [settings["schedule"]],
        "warmup": [settings["warmup"]],
        "momentum": [settings["momentum"]],
        "nesterov" if settings["nesterov"] else "no-nesterov": [],
        "weight-decay": [settings["weight_decay"]],
        "crop": [settings["padding"]],
        "mirror" if settings["mirror"] else "no-mirror": [],
        "cutout": [settings["cutout"]],
        "precision": [settings["precision"]],
        "held-out": [settings["held_out"]],
        "seed": [settings["seed"]],
    }
    if settings["accumulate"] > 1:
        flags["accumulate"] = [settings["accumulate"]]
    if settings["compile"]:
        flags["compile"] = []
    if data.get("resize") is not None:
        flags["image-size"] = [data["shape"][1]]
    words = [word for flag, values in flags.items() for word in (f"--{flag}", *map(str, values))]
    start = ["torchrun", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    return shlex.join([*start, "guard", "train", *words])


def _network(settings: Mapping[str, Any]) -> str:
    width = f" of width {settings['width']}" if settings["width"] else ""
    sigmoid = " with a pre-logit sigmoid" if settings["pre_logit_sigmoid"] else ""
    return f"{settings['architecture']}{width}{sigmoid}"


def _widths(model: nn.Module) -> set[int]:
    return {side for weight in model.parameters() for side in weight.shape}


def _strip(graph: onnx.ModelProto) -> None:
    """Leaves out what the exporter tells about itself and the machine, such as stack traces with paths."""
    graph.doc_string = ""
    graph.graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.graph.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for tensor in graph.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        value.doc_string = ""
        del value.metadata_props[:]
