"""`guard info`: what is in a bundle, or in a data set, in one screen."""

import argparse
import math
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.cli.options import (
    Subparsers,
    add_bundle,
    add_command,
    chosen_bundle,
    class_list,
    emit,
    file_size,
    screen_lines,
)
from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.bounds import WeightBounds
    from guard.bundle import Bundle, Calibration, Manifest, RadiusCalibration


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "info",
        run,
        description="""\
Show what is in a bundle: the model, how uploads become its inputs, what the
calibration promises and what was measured. All digests are checked.

With --dataset: facts about labelled images instead. How far apart they lie,
which are duplicates, and the Lipschitz constant that the classes' distance
forces on a classifier. 50,000 images of CIFAR take some minutes.""",
        example="""\
guard info
guard info models/resnet50 --json
guard info --bounds
guard info --dataset cifar10 --out stability.svg""",
    )
    add_bundle(parser)
    parser.add_argument(
        "--bounds",
        action="store_true",
        help="also bound the logits' slope by the weights alone (takes some seconds)",
    )
    parser.add_argument(
        "--dataset",
        metavar="D",
        help="a known data set's name, an .npz file, or a folder with one sub-folder per class",
    )
    parser.add_argument(
        "--split", choices=("train", "test"), help="with --dataset: which part of it (default: train)"
    )
    parser.add_argument("--norm", choices=("l2", "linf"), help="with --dataset: of distances (default: l2)")
    parser.add_argument(
        "--eps",
        type=_number,
        metavar="E",
        help="with --dataset: also the shares of images within 2 eps of another, such as 8/255",
    )
    parser.add_argument(
        "--out", type=Path, metavar="F.svg", help="with --dataset: draw the data-stability curve"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.dataset is not None:
        from guard.cli import dataset_facts

        return dataset_facts.run(arguments)
    for name in ("split", "norm", "eps", "out"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} is about a data set: give --dataset D with it.")
    return _run_bundle(arguments)


def _run_bundle(arguments: argparse.Namespace) -> int:
    from guard import bundle as bundles
    from guard.guarded import GRAPH_VERSION

    bundle = bundles.load(chosen_bundle(arguments), graph_version=GRAPH_VERSION)
    calibration = bundle.calibration
    record: dict[str, Any] = {
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "bytes": sum((bundle.path / name).stat().st_size for name in bundle.manifest.files),
        "manifest": bundle.manifest.model_dump(mode="json"),
        "calibration": None if calibration is None else calibration.model_dump(mode="json"),
    }
    bounds = None
    if arguments.bounds:
        import onnx

        from guard.bounds import weight_bounds

        bounds = weight_bounds(onnx.load(bundle.path / "model.onnx"))
        record["bounds"] = asdict(bounds)
    emit(arguments, record, "\n".join(_screen(bundle, record["bytes"], bounds)))
    return 0


def _screen(bundle: "Bundle", size: int, bounds: "WeightBounds | None") -> list[str]:
    manifest, shape = bundle.manifest, bundle.manifest.input
    facts = [
        ("bundle", f"{bundle.path}, {file_size(size)}, digests match"),
        ("model sha256", bundle.digest.removeprefix("sha256:")),
        ("input", f"{shape.channels} x {shape.height} x {shape.width}, pixels in [0, 1]"),
        ("uploads", _uploads(manifest)),
        ("classes", class_list(manifest.class_names)),
        ("made", _made(manifest.provenance)),
    ]
    calibration = bundle.calibration
    if calibration is None:
        facts.append(("calibration", f"none yet: guard calibrate {bundle.path} --val DATA"))
    else:
        facts += _detection(calibration)
        facts += [(f"{norm} radius", _radius(radii)) for norm, radii in _norms(calibration)]
        if calibration.caveat is not None:
            facts.append(("caution", calibration.caveat))
    if bounds is None:
        facts.append(("slopes", "what the weights alone allow: guard info --bounds"))
    else:
        facts += _slopes(bounds, calibration)
    return screen_lines(manifest.name, facts)


def _uploads(manifest: "Manifest") -> str:
    how, shape = manifest.preprocessing, manifest.input
    size = f"{shape.width} x {shape.height}"
    if how.resize is None:
        return f"{how.colour}, resized to {size} ({how.interpolation})"
    return (
        f"{how.colour}, shorter side resized to {how.resize} ({how.interpolation}), centre cropped to {size}"
    )


def _made(provenance: dict[str, Any]) -> str:
    versions = provenance.get("versions", {})
    commit = provenance.get("commit")
    source = provenance.get("source", {})
    parts = [f"guard {versions.get('guard', '?')}"]
    parts += [f"commit {commit[:10]}{'+' if commit.endswith('+') else ''}"] if commit else []
    parts += [f"from {source['file']}"] if isinstance(source, dict) and "file" in source else []
    return ", ".join(parts)


def _detection(calibration: "Calibration") -> list[tuple[str, str]]:
    from guard.card import percent

    promised, realized = calibration.predicted_fpr, calibration.realized_fpr
    name = calibration.data.get("name", "held-out images")
    guarantee: str = calibration.guarantee
    if calibration.delta is not None:
        guarantee += f", with probability {percent(1 - calibration.delta)}"
    facts = [
        (
            "accepts",
            f"{calibration.score} <= {calibration.threshold:.4g}, set on {calibration.n} images of {name}",
        ),
        ("rejects clean", f"at most {percent(calibration.fpr)} ({guarantee})"),
        (
            "  measured",
            f"{realized.value:.2%} of {realized.n} (predicted {promised.lower:.2%} to {promised.upper:.2%})",
        ),
    ]
    if calibration.accuracy is not None:
        facts.append(("accuracy", f"{calibration.accuracy.value:.2%} of {calibration.accuracy.n}"))
    if calibration.agreement:
        agree = sum(entry.agree for entry in calibration.agreement)
        total = sum(entry.n for entry in calibration.agreement)
        facts.append(("agreement", f"decided as the full Jacobian on {agree} of {total} images"))
    return facts


def _norms(calibration: "Calibration") -> list[tuple[str, "RadiusCalibration"]]:
    return [("l2", calibration.l2), ("linf", calibration.linf)]


def _radius(radii: "RadiusCalibration") -> str:
    inside = radii.violations
    text = (
        f"mean {radii.mean_radius:.4g} (an estimate), {radii.tightness:.2f} of the way to the nearest attack "
        f"found; attacked inside: {inside.value:.2%} of {inside.n}, at most {inside.upper:.2%} with "
        f"{inside.level:.0%} confidence"
    )
    if radii.conformal:
        text += f"; conformal ones at alpha {' and '.join(f'{one.alpha:g}' for one in radii.conformal)}"
    return text


def _slopes(bounds: "WeightBounds", calibration: "Calibration | None") -> list[tuple[str, str]]:
    """The margin's slope: what is fitted, and what the weights alone allow."""
    radii = {} if calibration is None else dict(_norms(calibration))
    facts = []
    for norm in ("l2", "linf"):
        parts = [f"L = {radii[norm].lipschitz:.3g} fitted (an estimate)"] if norm in radii else []
        for name, bound, status in (
            ("product of layer norms", bounds.layers[norm], "sound, up to rounding"),
            ("product of absolute weights", bounds.paths[norm], "sound, up to rounding"),
            ("product of weights", bounds.lemma[norm], "no bound"),
        ):
            value = (
                f"not computed: {bound.reason}" if bound.margin is None else f"{bound.margin:.3g} ({status})"
            )
            parts.append(f"{name} {value}")
        facts.append((f"{norm} slope", "margin: " + "; ".join(parts)))
    return facts


def _number(text: str) -> float:
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number such as 0.5 or 8/255, not {text!r}")
    return value
