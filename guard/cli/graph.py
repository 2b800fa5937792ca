"""`guard graph`: the guarded graph as one ONNX file."""

import argparse
from pathlib import Path

from guard.cli.options import (
    Subparsers,
    add_bundle,
    add_command,
    check_output,
    chosen_bundle,
    emit,
    file_size,
)

# Each test's score in terms of the graph's outputs.
FORMULAS = {
    "jacobian": "jacobian",
    "radius": "gradient_l2 / margin",
    "margin-gradient": "gradient_l2 / (1 + cosh(margin))",
    "jacobian-full": "jacobian",
}

SCORES = ("jacobian", "combined", "radius", "margin-gradient", "jacobian-full")


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "graph",
        run,
        description="""\
Write the guarded graph - the classifier with its backward pass - as one ONNX
file, for other runtimes (Triton, C++, Rust).

Its input is `images` (B, C, H, W) in [0, 1]; its outputs are logits, margins,
gradient norms and the Jacobian norm of each image. What the calibration says
of them stands in the file's metadata, under `guard.`.

But for jacobian-full, which takes at most 32 classes, the norm is that of the
two most probable classes' rows; as far as the fitted `guard.row_bound` (an
estimate) holds, row i can be longer than a threshold only where probability i
times `guard.row_bound` is.""",
        example="""\
guard graph --out cifar10-guarded.onnx
guard graph models/resnet50 --out guarded.onnx --score radius --provider cuda""",
    )
    add_bundle(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.onnx", help="file to write")
    parser.add_argument("--score", choices=SCORES, help="(default: the calibrated one, else jacobian)")
    parser.add_argument(
        "--provider", choices=("cpu", "cuda"), default="cpu", help="what it is laid out for (default: cpu)"
    )


def run(arguments: argparse.Namespace) -> int:
    import onnx

    from guard import bundle as bundles
    from guard.errors import UsageError
    from guard.files import write_bytes
    from guard.guarded import GRAPH_VERSION, UNROLLED_CLASSES, guarded_model
    from guard.runtime import load_model, session_of

    check_output("--out", arguments.out, ".onnx")
    bundle = bundles.load(chosen_bundle(arguments), graph_version=GRAPH_VERSION)
    calibration = bundle.calibration
    score = arguments.score or ("jacobian" if calibration is None else calibration.score)
    classes = len(bundle.manifest.class_names)
    if score == "jacobian-full" and classes > UNROLLED_CLASSES:
        raise UsageError(
            f"score jacobian-full needs all {classes} rows, and one graph holds at most {UNROLLED_CLASSES}. "
            "Give another --score: jacobian holds two rows, and says for which images more could matter."
        )
    model = guarded_model(load_model(bundle.model), score, provider=arguments.provider)
    facts = {
        "score": score,
        "graph_version": str(GRAPH_VERSION),
        "model": bundle.manifest.name,
        "model_digest": bundle.digest,
    }
    if calibration is not None and calibration.score == score:
        facts |= {
            "threshold": repr(calibration.threshold),
            "row_bound": repr(calibration.row_bound),
            "fpr": repr(calibration.fpr),
        }
        facts |= {f"threshold.{test.name}": repr(test.threshold) for test in calibration.tests}
    model.producer_name = "guard"
    onnx.helper.set_model_props(model, {f"guard.{name}": value for name, value in facts.items()})
    session = session_of(model)
    outputs = [output.name for output in session.get_outputs()]
    write_bytes(arguments.out, model.SerializeToString())
    record = {"out": str(arguments.out), "outputs": outputs, "metadata": facts}
    lines = [
        f"wrote {arguments.out} ({file_size(arguments.out.stat().st_size)})",
        f"  model    {bundle.manifest.name}, score {score}, laid out for {arguments.provider}",
        "  input    images (B, C, H, W) float32 in [0, 1]",
        *_wrapped("  outputs  ", outputs),
    ]
    if calibration is not None and calibration.score == score:
        tests: dict[str, float] = {test.name: test.threshold for test in calibration.tests}
        tests = tests or {score: calibration.threshold}
        accepted = [f"{FORMULAS[name]} <= {threshold:.6g}" for name, threshold in tests.items()]
        lines.append(f"  reject   where not {' and '.join(accepted)}")
    emit(arguments, record, "\n".join(lines))
    return 0


def _wrapped(label: str, names: list[str]) -> list[str]:
    import textwrap

    indent = " " * len(label)
    return textwrap.wrap(", ".join(names), 80, initial_indent=label, subsequent_indent=indent)
