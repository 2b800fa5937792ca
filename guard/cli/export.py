"""`guard export`: from a training run to a bundle."""

import argparse
from pathlib import Path

from guard.cli.options import Subparsers, add_command, arguments_of, emit


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "export",
        run,
        description="""\
Turn a training run into a bundle: model.onnx, manifest.json and card.md.

The ONNX model takes images in [0, 1], in batches of any size, and gives
logits. It is compared with torch before anything is written. A bundle that
is already there is replaced, its calibration included.""",
        example="""\
guard export runs/tulip --out models/tulip
guard calibrate models/tulip --val cifar10""",
    )
    parser.add_argument("training", type=Path, metavar="RUN", help="folder of a run of guard train")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder of the bundle")
    parser.add_argument("--name", help="name of the bundle (default: that of its folder)")


def run(arguments: argparse.Namespace) -> int:
    from guard.export import export

    exported = export(
        arguments.training, arguments.out, name=arguments.name, arguments=arguments_of(arguments)
    )
    manifest = exported.manifest
    record = {
        "bundle": str(arguments.out),
        "name": manifest.name,
        "input": manifest.input.model_dump(),
        "num_classes": len(manifest.class_names),
        "epochs": manifest.provenance["epochs"],
        "difference": exported.difference,
        "sha256": manifest.files["model.onnx"],
    }
    shape = manifest.input
    done, planned = manifest.provenance["epochs"]["done"], manifest.provenance["epochs"]["planned"]
    lines = [
        f"wrote {arguments.out}",
        f"  input    {shape.channels} x {shape.height} x {shape.width}, pixels in [0, 1]",
        f"  classes  {len(manifest.class_names)}",
        f"  epochs   {done} of {planned}" + ("" if done == planned else ": the run has not finished"),
        f"  checked  differs from torch by at most {exported.difference:.1e} of the largest logit",
        f"next: guard calibrate {arguments.out} --val DATA",
    ]
    emit(arguments, record, "\n".join(lines))
    return 0
