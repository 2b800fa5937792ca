"""`guard wrap`: any ONNX classifier to a bundle."""

import argparse
from pathlib import Path

from guard.cli.options import Subparsers, add_command, arguments_of, emit


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "wrap",
        run,
        description="""\
Turn any ONNX classifier into a bundle that can be calibrated and served.

What the model leaves to the program around it becomes part of it: give what
it expects by --mean, --std, --range, --layout and --order. The result is run
against the original before it is written. A bundle that is already there is
replaced, its calibration included.""",
        example="""\
guard wrap resnet50.onnx --out models/resnet50 --classes imagenet.txt \\
    --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225
guard calibrate models/resnet50 --val photos/""",
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="the classifier")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder of the new bundle")
    parser.add_argument("--name", help="name of the bundle (default: that of its folder)")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names: one a line, or a JSON list or object"
    )

    inputs = parser.add_argument_group("what the model expects")
    inputs.add_argument(
        "--mean",
        type=float,
        nargs="+",
        default=(),
        metavar="M",
        help="subtracted from pixels, in units of --range",
    )
    inputs.add_argument(
        "--std", type=float, nargs="+", default=(), metavar="S", help="then divides them, in the same units"
    )
    inputs.add_argument("--range", choices=("0-1", "0-255"), default="0-1", help="of pixels (default: 0-1)")
    inputs.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw", help="(default: nchw)")
    inputs.add_argument(
        "--order", choices=("rgb", "bgr"), default="rgb", help="of the colour channels (default: rgb)"
    )
    inputs.add_argument(
        "--size", type=_size, metavar="N|HxW", help="height and width, where the model leaves them open"
    )

    outputs = parser.add_argument_group("what the model gives")
    outputs.add_argument(
        "--outputs", choices=("logits", "probabilities"), help="(default: probabilities if they sum to one)"
    )
    outputs.add_argument("--output", metavar="NAME", help="which output holds them, where there are several")

    uploads = parser.add_argument_group(
        "how an upload becomes an input",
        "Default: --crop 0.875 for square inputs from 128 pixels a side on, --crop 1\n"
        "for smaller ones, --stretch for others.",
    )
    uploads.add_argument(
        "--resize",
        type=int,
        metavar="N",
        help="shorter side before the centre is cropped to the input's size",
    )
    uploads.add_argument(
        "--crop", type=float, metavar="F", help="the same as a share: input's size / shorter side"
    )
    uploads.add_argument("--stretch", action="store_true", help="no crop: resize whatever the aspect ratio")
    uploads.add_argument(
        "--interpolation",
        choices=("nearest", "bilinear", "bicubic", "lanczos"),
        default="bilinear",
        help="of resizing (default: bilinear)",
    )


def run(arguments: argparse.Namespace) -> int:
    from guard.adapt import Outside
    from guard.wrap import wrap

    outside = Outside(
        mean=tuple(arguments.mean),
        std=tuple(arguments.std),
        range=arguments.range,
        layout=arguments.layout,
        order=arguments.order,
        outputs=arguments.outputs,
        output=arguments.output,
        size=arguments.size,
    )
    manifest, wrapped = wrap(
        arguments.model,
        arguments.out,
        outside,
        classes=arguments.classes,
        name=arguments.name,
        resize=arguments.resize,
        crop=arguments.crop,
        stretch=arguments.stretch,
        interpolation=arguments.interpolation,
        arguments=arguments_of(arguments),
    )
    channels, height, width = wrapped.form.shape
    record = {
        "bundle": str(arguments.out),
        "name": manifest.name,
        "input": manifest.input.model_dump(),
        "num_classes": wrapped.num_classes,
        "outputs": wrapped.outputs,
        "fixed_batch": wrapped.form.batch,
        "difference": wrapped.difference,
        "preprocessing": manifest.preprocessing.model_dump(),
        "sha256": manifest.files["model.onnx"],
    }
    uploads = manifest.preprocessing
    lines = [
        f"wrote {arguments.out}",
        f"  input    {channels} x {height} x {width}, pixels in [0, 1]"
        + ("" if wrapped.form.batch is None else f"; batch size {wrapped.form.batch} freed"),
        f"  classes  {wrapped.num_classes}"
        + ("" if arguments.classes else ", unnamed (--classes names them)"),
        f"  outputs  {wrapped.outputs}"
        + (", turned into logits" if wrapped.outputs == "probabilities" else ""),
        "  uploads  " + _uploads(uploads.resize, height, width),
        f"  checked  against the original: {wrapped.difference:.1e} of the outputs' spread apart",
        f"next: guard calibrate {arguments.out} --val DATA",
    ]
    emit(arguments, record, "\n".join(lines))
    return 0


def _uploads(resize: int | None, height: int, width: int) -> str:
    if resize is None:
        return f"resized to {width} x {height}"
    return f"shorter side resized to {resize}, centre cropped to {width} x {height}"


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    try:
        height, width = (int(side) for side in (sides if len(sides) == 2 else sides * 2))
    except ValueError:
        height = width = 0
    if len(sides) > 2 or height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"expected 224 or 224x160 (height x width), not {text!r}")
    return height, width
