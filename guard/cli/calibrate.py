"""`guard calibrate`: a bundle's threshold and radii from held-out images."""

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from guard.cli.options import (
    WIDTH,
    Subparsers,
    add_bundle,
    add_command,
    add_provider,
    add_threads,
    arguments_of,
    chosen_bundle,
    emit,
    held_out,
)
from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.bundle import Calibration, RadiusCalibration, Share


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "calibrate",
        run,
        description="""\
Fit a bundle's detection threshold and radii on held-out images and write
calibration.json into it.

The images are split by the seed: a quarter sets the threshold, a quarter
fits the radii, half only reports what came of it. They must not be images
that the model was trained on; 76 are the least at --fpr 0.05 (236 with
--guarantee pac), 396 at 0.01. An interrupted calibration goes on where it
stopped when the same command is given again.""",
        example="""\
guard calibrate --val cifar10
guard calibrate models/resnet50 --val photos/ --fpr 0.01 --score combined""",
    )
    add_bundle(parser)
    parser.add_argument(
        "--val",
        required=True,
        metavar="D",
        help="held-out images: a known data set's name (its test set), an .npz file, or a folder",
    )
    parser.add_argument(
        "--fpr",
        type=_share,
        default=0.05,
        metavar="F",
        help="share of clean images that may be rejected (default: 0.05)",
    )
    parser.add_argument(
        "--score",
        choices=("jacobian", "combined", "radius", "margin-gradient", "jacobian-full"),
        default="jacobian",
        help="what is compared with the threshold (default: jacobian)",
    )
    parser.add_argument(
        "--guarantee",
        choices=("marginal", "pac"),
        default="marginal",
        help="F holds on average over calibration sets, or for nearly all of them (default: marginal)",
    )
    parser.add_argument(
        "--delta",
        type=_share,
        metavar="P",
        help="with --guarantee pac, the share of calibration sets it may fail for (default: 0.05)",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of the split and the attacks (default: 0)"
    )
    parser.add_argument(
        "--effort",
        type=_effort,
        default=1.0,
        metavar="X",
        help="multiplies the attacks' starts and steps; below 1 is for trying out (default: 1)",
    )
    add_provider(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    from guard import bundle
    from guard.calibration.fitting import Effort
    from guard.calibration.run import calibrate
    from guard.calibration.work import Settings

    if arguments.delta is not None and arguments.guarantee != "pac":
        raise UsageError("--delta is about --guarantee pac: give both.")
    folder = chosen_bundle(arguments)
    dataset = held_out(arguments, bundle.load(folder, recalibrating=True).manifest)
    settings = Settings(
        score=arguments.score,
        fpr=arguments.fpr,
        guarantee=arguments.guarantee,
        delta=Settings.delta if arguments.delta is None else arguments.delta,
        seed=arguments.seed,
    )
    calibration = calibrate(
        folder,
        dataset,
        settings,
        Effort().scaled(arguments.effort),
        provider=arguments.provider,
        threads=arguments.threads,
        arguments=arguments_of(arguments),
    )
    emit(arguments, _summary(folder, calibration), _text(folder, calibration))
    return 0


def _summary(folder: Path, calibration: "Calibration") -> dict[str, object]:
    return {
        "bundle": str(folder),
        "score": calibration.score,
        "threshold": calibration.threshold,
        "fpr": calibration.fpr,
        "n": calibration.n,
        "predicted_fpr": calibration.predicted_fpr.model_dump(),
        "realized_fpr": calibration.realized_fpr.model_dump(),
        "accuracy": None if calibration.accuracy is None else calibration.accuracy.model_dump(),
        "agreement": [entry.model_dump() for entry in calibration.agreement],
        **{
            norm: {
                "mean_radius": radii.mean_radius,
                "mean_distance": radii.mean_distance,
                "tightness": radii.tightness,
                "violations": radii.violations.model_dump(),
                "conformal": [scale.model_dump() for scale in radii.conformal],
            }
            for norm, radii in (("l2", calibration.l2), ("linf", calibration.linf))
        },
    }


def _text(folder: Path, calibration: "Calibration") -> str:
    realized, predicted = calibration.realized_fpr, calibration.predicted_fpr
    lines = [
        f"wrote {folder}/calibration.json (servers take it up when restarted)",
        f"  {calibration.score} threshold {calibration.threshold:.6g} from {calibration.n} images",
        (
            f"  clean images rejected: {realized.value:.2%} of {realized.n} "
            f"(predicted {predicted.lower:.2%} to {predicted.upper:.2%})"
        ),
    ]
    if calibration.accuracy is not None:
        lines.append(f"  accuracy {calibration.accuracy.value:.2%}")
    if calibration.agreement:
        agree = sum(entry.agree for entry in calibration.agreement)
        total = sum(entry.n for entry in calibration.agreement)
        lines.append(f"  decided as the full Jacobian: {agree} of {total} clean and attacked images")
    lines += [_radii_line("l2", calibration.l2), _radii_line("linf", calibration.linf)]
    if calibration.caveat is not None:
        lines += textwrap.wrap(calibration.caveat, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _radii_line(norm: str, radii: "RadiusCalibration") -> str:
    nearest = "no attack found an image"
    if radii.mean_distance:
        nearest = f"nearest attack found {radii.mean_distance:.4f}"
    text = (
        f"  {norm:4s} radius {radii.mean_radius:.4f} on average (an estimate), {nearest}\n"
        f"       {_inside(radii.violations)}"
    )
    for scale in radii.conformal:
        if scale.violations is not None and scale.mean_radius is not None:
            text += (
                f"\n       conformal at {scale.alpha:g}: {scale.mean_radius:.4f} on average\n"
                f"       {_inside(scale.violations)}"
            )
    return text


def _inside(share: "Share") -> str:
    return (
        f"attacked inside: {share.count} of {share.n} (at most {share.upper:.2%} with {share.level:.0%} "
        "confidence)"
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, such as 0.05, not {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, not {text!r}")
    return int(text)


def _effort(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to 100, such as 0.5, not {text!r}")
    return value
