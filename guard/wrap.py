"""From any ONNX classifier to a bundle, checked against the original. Nothing here needs torch.

`guard.adapt` rewrites the graph; this module finds out what running alone can tell, verifies that the result
says what the original said, for one image and for many, and writes the bundle.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from guard.adapt import Form, Outputs, Outside, adapt, arranged, form_of, in_float32
from guard.bundle import (
    CARD,
    MODEL,
    InputShape,
    Manifest,
    Preprocessing,
    check_target,
    seal,
)
from guard.card import UNCALIBRATED
from guard.errors import DataError, GuardError, ModelError, UsageError
from guard.files import atomic_folder, provenance, sha256, write_bytes, write_text
from guard.graph import OPSET_FLOOR
from guard.guarded import IMAGES, LOGITS
from guard.images import Interpolation
from guard.runtime import Detector

Float32 = NDArray[np.float32]

CHECKED_IMAGES = 6
BATCH_SIZES = (2, 3, 5)

# Deviations are relative to how far outputs vary from image to image, so that mixed-up images cannot hide
# behind logits that are large but alike. Float32 kernels differ between batch sizes by about 1e-4.
_TOLERANCE = 1e-2
_TOLERANCE_HALF = 0.2  # where the original computes in 16 bits
_PLACE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (/\S+:\d+ .*?\) (?=[A-Z]))?")
_CROPPED_FROM = 128  # pixels: models with inputs of this size and above are usually trained on centre crops
_PATH, _STEPS = 0.1, 12  # how far from one image to the next gradients are added up, and in how many parts
_NOISE, _NOISE_HALF = 1e-5, 2e-2  # of margins, over the largest logit
_CROP = 0.875  # 224 of 256 pixels
_LARGEST_RESIZE = 8  # times the input's size: an upload enlarged to more costs much and shows little


@dataclass(frozen=True)
class Wrapped:
    """A wrapped model, and how it compares with the original on random images.

    `outputs` is what the original gives, `difference` the largest deviation seen between original and wrapped
    model and between batch sizes, relative to how far outputs vary from image to image.
    """

    model: onnx.ModelProto
    form: Form
    num_classes: int
    outputs: Outputs
    difference: float


def read_model(path: str | Path) -> onnx.ModelProto:
    """An ONNX model with its external data.

    Raises `ModelError` where the file is missing or no ONNX model, or where data it refers to is missing.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ModelError(f"{path}: {what}. Give the path of an ONNX file.")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's decoding errors have no public base
        raise ModelError(
            f"{path}: not an ONNX model (it cannot be parsed). Export it to ONNX first."
        ) from error
    if not model.graph.node or not model.graph.output:
        raise ModelError(f"{path}: not an ONNX model, or one without nodes. Export it to ONNX first.")
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # missing, cut off, or outside the model's folder
        files = ", ".join(sorted(_external_files(model))) or "its external data"
        raise ModelError(
            f"{path}: its weights lie in other files that cannot be read ({files}). Put them beside it."
        ) from error
    return model


def wrap_model(model: onnx.ModelProto, outside: Outside) -> Wrapped:
    """A copy of the classifier in the form that bundles hold, verified against the original.

    Random images run through both, alone and in batches of several sizes: results must agree, and no image
    may change another's. Guarded batches show that gradients exist and add up to the logits' changes.

    Raises `ModelError` for a model that cannot be guarded, naming what stands in the way
    (`UnsupportedOperatorError` for an operator without a differentiation rule), and `UsageError` where
    `outside` contradicts the model.
    """
    form = form_of(model, outside)
    batch = form.batch or 1
    images = _examples(form.shape, -(-CHECKED_IMAGES // batch) * batch)
    expected = _run_original(model, form, images, outside)
    probabilities = _gives_probabilities(expected, outside.outputs)
    num_classes = expected.shape[1]
    wrapped = adapt(model, form, outside, num_classes=num_classes, probabilities=probabilities)
    tolerance = _TOLERANCE_HALF if form.half else _TOLERANCE
    difference = _verify(
        wrapped, images[:CHECKED_IMAGES], expected[:CHECKED_IMAGES], probabilities, tolerance
    )
    detector = Detector(wrapped, provider="cpu")
    try:
        measured = detector.measure(images[:2])
    except GuardError:
        raise
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise ModelError(f"the model's gradients cannot be computed: {_reason(error)}") from error
    if not np.isfinite([measured.margin, measured.gradient_l2, measured.jacobian]).all():
        raise ModelError("the model's gradients are NaN or infinite on random images; it cannot be guarded.")
    if not measured.gradient_l2.any():
        raise ModelError(
            "the model's gradients are zero on random images, as after rounding: it cannot be guarded. "
            "Export it without quantization."
        )
    _check_gradients(detector, images[:CHECKED_IMAGES], noise=_NOISE_HALF if form.half else _NOISE)
    outputs: Outputs = "probabilities" if probabilities else "logits"
    return Wrapped(wrapped, form, num_classes, outputs, difference)


def preprocessing(
    shape: tuple[int, int, int],
    *,
    resize: int | None = None,
    crop: float | None = None,
    stretch: bool = False,
    interpolation: Interpolation = "bilinear",
) -> Preprocessing:
    """How uploads become inputs of shape (C, H, W).

    With `resize` the shorter side gets so many pixels and the centre is cropped; `crop` says the same as a
    share: the input's size over the shorter side. `stretch` resizes straight to the input's size. Without
    them, square inputs of 128 pixels and more are cropped to 0.875 (224 of 256), smaller ones to 1.0, and
    others are stretched. `interpolation` is how the resizing is done. Raises `UsageError` for what
    contradicts itself or the shape.
    """
    channels, height, width = shape
    colour: Literal["rgb", "grey"] = "rgb" if channels == 3 else "grey"
    largest = max(height, width)
    if sum((resize is not None, crop is not None, stretch)) > 1:
        raise UsageError("give only one of --resize, --crop and --stretch.")
    if stretch or (resize is None and crop is None and height != width):
        return Preprocessing(colour=colour, interpolation=interpolation)
    if resize is None:
        share = crop if crop is not None else (_CROP if largest >= _CROPPED_FROM else 1.0)
        if not 0 < share <= 1:
            raise UsageError(f"--crop is {share}: expected a share above 0 and at most 1, such as 0.875.")
        resize = round(largest / share)
    if resize < largest:
        raise UsageError(
            f"--resize {resize} is less than the model's {height} x {width} pixels, which are cropped from "
            f"it: give at least {largest}, or --stretch."
        )
    if resize > _LARGEST_RESIZE * largest:
        raise UsageError(
            f"uploads would be resized to {resize} pixels and cropped to {largest}: expected at most "
            f"{_LARGEST_RESIZE * largest} (--resize), or --crop {1 / _LARGEST_RESIZE} or more."
        )
    return Preprocessing(colour=colour, resize=resize, interpolation=interpolation)


def read_classes(path: str | Path, num_classes: int) -> list[str]:
    """Class names from a text file (one a line) or JSON (a list, or an object keyed by class number).

    Values of a JSON object may be lists, as in ImageNet's index; their last entry is the name. Raises
    `DataError` where the file cannot be read or its number of names is not `num_classes`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise DataError(f"{path}: class names cannot be read: {reason}.") from error
    names = _json_names(path, text) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
    while names and not names[-1].strip():
        names.pop()
    if len(names) != num_classes:
        raise DataError(
            f"{path}: holds {len(names)} class names, but the model has {num_classes} classes. "
            "Give one name per class, in the order of the model's outputs."
        )
    return [name.strip() for name in names]


def wrap(
    source: str | Path,
    out: str | Path,
    outside: Outside,
    *,
    classes: str | Path | None = None,
    name: str | None = None,
    resize: int | None = None,
    crop: float | None = None,
    stretch: bool = False,
    interpolation: Interpolation = "bilinear",
    arguments: Mapping[str, Any] | None = None,
) -> tuple[Manifest, Wrapped]:
    """Writes the bundle `out` for the ONNX classifier in the file `source`; `arguments` go to its provenance.

    An existing bundle is replaced whole, its calibration included; any other non-empty folder is refused.
    Raises what `read_model`, `wrap_model`, `preprocessing` and `read_classes` raise, and `BundleError`.
    """
    source, out = Path(source), Path(out)
    check_target(out)
    model = read_model(source)
    uploads = preprocessing(
        form_of(model, outside).shape,
        resize=resize,
        crop=crop,
        stretch=stretch,
        interpolation=interpolation,
    )
    wrapped = wrap_model(model, outside)
    channels, height, width = wrapped.form.shape
    names = (
        read_classes(classes, wrapped.num_classes)
        if classes is not None
        else [f"class {index}" for index in range(wrapped.num_classes)]
    )
    description = Manifest(
        name=name or out.resolve().name,
        input=InputShape(channels=channels, height=height, width=width),
        class_names=names,
        preprocessing=uploads,
        provenance=provenance(arguments or {}, source={"file": source.name, "sha256": sha256(source)}),
    )
    with atomic_folder(out) as folder:
        write_bytes(folder / MODEL, wrapped.model.SerializeToString())
        write_text(folder / CARD, _card(description, wrapped, source))
        manifest = seal(folder, description)
    return manifest, wrapped


def _external_files(model: onnx.ModelProto) -> set[str]:
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location"}


def _examples(shape: tuple[int, int, int], count: int) -> Float32:
    """Coarse patches of colour under noise, which models tell apart better than noise alone.

    Pixels are whole 8-bit values, so that a model that takes integers sees the same.
    """
    rng = np.random.default_rng(0)
    channels, height, width = shape
    patches = rng.random((count, channels, 4, 4))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    noisy = 0.7 * patches[:, :, rows][..., columns] + 0.3 * rng.random((count, *shape))
    return (np.rint(255 * noisy) / 255).astype(np.float32)


def _run_original(model: onnx.ModelProto, form: Form, images: Float32, outside: Outside) -> Float32:
    """Outputs (B, K) of the model as it came, in its own batch size, or one image at a time.

    In float32 where onnxruntime has no kernels for the model's own element type (bfloat16, double).
    """
    size = form.batch or 1
    try:
        session = _session(model)
    except ModelError:
        session = _session(in_float32(model))
        form = form if form.dtype == np.uint8 else replace(form, dtype=np.dtype(np.float32))
    feed = arranged(images, form, outside)
    try:
        results = [
            session.run([form.output], {form.input: feed[start : start + size]})[0]
            for start in range(0, len(feed), size)
        ]
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise ModelError(
            f"the model does not run on images of shape {form.shape}: {_reason(error)}"
        ) from error
    shapes = {result.shape for result in results}
    if any(len(shape) < 2 or shape[0] != size or set(shape[2:]) - {1} for shape in shapes):
        raise ModelError(
            f"for {size} image(s) the model's output {form.output!r} has shape {results[0].shape}: expected "
            "one row of class scores per image. If it has another output, choose it by --output."
        )
    rows = np.concatenate(results).astype(np.float32).reshape(len(feed), -1)
    if rows.shape[1] < 2:
        raise ModelError("the model gives a single number per image: expected scores of two classes or more.")
    if not np.isfinite(rows).all():
        raise ModelError("the model gives NaN or infinity on random images: check --mean, --std and --range.")
    if (rows == rows[0]).all():
        raise ModelError("the model gives the same output for every image; it classifies nothing.")
    return rows


def _gives_probabilities(rows: Float32, said: Outputs | None) -> bool:
    sums = rows.sum(axis=1)
    found = bool((rows >= 0).all() and np.allclose(sums, 1, atol=5e-3))
    if said == "logits" and found:
        raise UsageError(
            "the model's outputs sum to one, so they are no logits: give --outputs probabilities."
        )
    if said is None and not found and (rows >= 0).all() and (rows.max() <= 1 or _constant(sums)):
        raise UsageError(
            "the model's outputs look like neither logits nor probabilities: on random images they are from "
            f"{rows.min():.3g} to {rows.max():.3g} and sum to {sums.min():.3g} up to {sums.max():.3g}. "
            "Export it without what comes after its logits (a Sigmoid, say), or give --outputs logits to "
            "take them as they are."
        )
    if said == "probabilities" and not found:
        raise UsageError(
            f"the model's outputs are no probabilities: on random images they sum to {sums.min():.3g} up to "
            f"{sums.max():.3g} instead of one. Give --outputs logits if they are logits."
        )
    return found


def _check_gradients(detector: Detector, images: Float32, *, noise: float) -> None:
    """Raises `ModelError` where gradients do not add up to what they are the gradients of.

    The margin's change from one image a tenth of the way to the next is the integral of its slope, kinks or
    not. Where a Round or a Sign stands on one of several ways to the logits, gradients leave that way out,
    and the margin jumps past them.
    """
    labels = detector.logits(images).argmax(axis=1)
    path = (_PATH * (np.roll(images, 1, axis=0) - images)).astype(np.float32)
    change, slope, size = np.zeros(len(images)), np.zeros((_STEPS, len(images))), 0.0
    for sign, end in ((-1, images), (1, images + path)):
        logits, margin, _ = detector.loss_gradient(end, labels, "margin")
        change += sign * margin
        size = max(size, float(np.abs(logits).max()))
    for step in range(_STEPS):
        at = images + np.float32((step + 0.5) / _STEPS) * path
        gradient = detector.loss_gradient(at, labels, "margin")[2]
        slope[step] = (gradient * path).reshape(len(images), -1).sum(axis=1)
    off, amount = np.abs(change - slope.mean(axis=0)).sum(), np.abs(slope).mean(axis=0).sum()
    if off > 0.5 * amount + noise * size * len(images):
        changed, said = np.abs(change).sum(), np.abs(slope.mean(axis=0)).sum()
        raise ModelError(
            "the model's logits do not follow their gradients: between random images margins change by "
            f"{changed:.3g} in all where gradients add up to {said:.3g}. A Round, a Sign or the like stands "
            "on a way to them, past which no gradient leads, and radii would be too long. Export it without "
            "quantization."
        )


def _constant(sums: Float32) -> bool:
    return bool(sums.max() > 0 and np.ptp(sums) <= 5e-3 * sums.max())


def _verify(
    wrapped: onnx.ModelProto, images: Float32, expected: Float32, probabilities: bool, tolerance: float
) -> float:
    """Runs images alone and together; returns the largest deviation, relative to the outputs' spread."""
    session = _session(wrapped)

    def run(batch: Float32) -> Float32:
        try:
            logits: Float32 = session.run([LOGITS], {IMAGES: batch})[0]
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise ModelError(
                f"the model does not run on {len(batch)} image(s) at once: {_reason(error)} "
                "Export it with a dynamic batch axis."
            ) from error
        return logits

    alone = np.concatenate([run(image[None]) for image in images])
    deviation = _distance(_softmax(alone) if probabilities else alone, expected, spread_of=expected)
    if not deviation <= tolerance:
        raise ModelError(
            f"the wrapped model differs from the original by {deviation:.2g} of its outputs' spread: "
            f"expected at most {tolerance:g}. Either the original is not deterministic, or images change "
            "each other there: export it in evaluation mode, with a dynamic batch axis."
        )
    for size in BATCH_SIZES:
        together = run(images[:size])
        apart = _distance(together, alone[:size], spread_of=alone)
        if not apart <= tolerance:
            raise ModelError(
                f"images change each other's outputs: {size} of them together give other logits than alone "
                f"(by {apart:.2g} of their spread). Export it in evaluation mode, with a dynamic batch axis."
            )
        deviation = max(deviation, apart)
    return deviation


def _distance(found: Float32, expected: Float32, *, spread_of: Float32) -> float:
    """Largest difference, relative to how far one class's outputs vary between images (B, K)."""
    spread = float(np.ptp(spread_of, axis=0).max())
    return float(np.abs(found - expected).max()) / spread if found.shape == expected.shape else np.inf


def _softmax(logits: Float32) -> Float32:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    normalized: Float32 = powers / powers.sum(axis=1, keepdims=True)
    return normalized


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, and said once
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's and protobuf's own exceptions have no common base
        opsets = ", ".join(f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in model.opset_import)
        raise ModelError(
            f"onnxruntime {onnxruntime.__version__} cannot load the model (operator sets: {opsets}): "
            f"{_reason(error).rstrip('.')}. If they are too new or too old for it, export the model at opset "
            f"{OPSET_FLOOR}."
        ) from error


def _reason(error: Exception) -> str:
    """What onnxruntime says, without its codes and the place in its source."""
    return _PLACE.sub("", str(error).strip().splitlines()[0])


def _json_names(path: Path, text: str) -> list[str]:
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            content = [content[str(index)] for index in range(len(content))]
        return [str(entry[-1] if isinstance(entry, list) else entry) for entry in content]
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"{path}: expected a JSON list of names, or an object whose keys are the class numbers from 0."
        ) from error


def _card(manifest: Manifest, wrapped: Wrapped, source: Path) -> str:
    channels, height, width = wrapped.form.shape
    given = "probabilities; logits are recovered" if wrapped.outputs == "probabilities" else "logits"
    batch = "any" if wrapped.form.batch is None else f"any (the original's was fixed to {wrapped.form.batch})"
    return f"""\
# {manifest.name}

Wrapped by `guard wrap` from `{source.name}` (sha256 `{manifest.provenance["source"]["sha256"]}`).

| | |
|---|---|
| input | {channels} x {height} x {width} pixels in [0, 1] |
| batch size | {batch} |
| classes | {wrapped.num_classes} |
| the original gives | {given} |
| largest deviation from the original on random images | {wrapped.difference:.1e} of its outputs' spread |

{UNCALIBRATED}"""
