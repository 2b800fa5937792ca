"""`guard train`: a classifier that is hard to fool, from a data set."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from guard.cli.options import MOST_THREADS, Subparsers, add_command, arguments_of, emit

if TYPE_CHECKING:
    from guard.training.presets import Preset
    from guard.training.settings import Settings

# Mirrored digits are not digits.
_NOT_MIRRORED = frozenset({"mnist"})


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "train",
        run,
        description="""\
Train a classifier whose loss changes slowly around its training images.

Regularizers take their hyperparameters after a colon; several may be given
(docs/training.md has their formulas):
  none                           plain training
  tv-l2:eps=E, tv-l1:eps=E       one step of length E up the loss; l1: its sign
  lipschitz:weight=W             the largest gradient of each batch
  tulip:eps=E,weight=W           tv-l2 and lipschitz
  gradient-penalty-l2:weight=W   the squared gradient norm, l2 attacks
  gradient-penalty-l1:weight=W   the same against linf attacks
  each of these with -exact      itself, by double backpropagation
  stability:weight=W,eps=E       like outputs at opposite corners of a cube
  hamming:weight=W,alpha=A,eps=E like ReLU patterns there
  dense-manifold:weight=W,eps=E  like outputs, over all pairs of a batch
  adversarial-linf:eps=E, adversarial-l2:eps=E, free-linf:eps=E,
  gaussian:sigma=S               baselines: attacked or noisy images

A hyperparameter may be a fraction (8/255) or ramp, as in
stability:weight=0.8..8@0.2..0.8: straight from 0.8 to 8 between a fifth and
four fifths of training.

Architectures, with their widths, and their parameters for 32x32 images:
  compact-resnet     32   1.9 million  made for CPUs
  preactresnet18     64  11.2 million
  resnet34           16   0.5 million  three stages of five blocks
  resnext34-2x32     32   3.9 million  the same with two branches each
  resnext34-4x32     32   7.8 million  with four
  allcnn-c           96   1.4 million  no pooling, no shortcuts
  verification-cnn   16   0.3 million  two convolutions
  cw-cnn             32   0.4 million  made for MNIST
  resnet50, torchvision:resnet34, ...  any classifier of torchvision; most
                                       take images of 64x64 pixels and more

A preset is a recipe of a paper's table: data set, network, regularizer and
all settings below; what is given beside it takes its place.

An .npz file holds x_train and y_train: uint8 images (N, H, W, C) and integer
labels from 0; class_names if wanted; x_test and y_test for the accuracy. A
folder holds train/CLASS/IMAGE and, for the accuracy, test/CLASS/IMAGE or
val/CLASS/IMAGE; small ones are kept in memory, others decoded as needed.
Several GPUs or machines train together under torchrun. Ctrl-C and SIGTERM save
a checkpoint first.

RUN gets config.json, checkpoint.pt, metrics.jsonl (a line per epoch) and
curves.html, to look at while it trains and after.
Pixels are in [0, 1]: so are E and all radii.""",
        example="""\
guard train --presets lipgen
guard train --preset lipgen-0.01-0.1 --epochs 30 --out runs/lipgen
guard train --dataset cifar10 --regularizer tulip:eps=0.05,weight=0.1 \\
    --epochs 20 --out runs/tulip
guard train --dataset cifar10 --regularizer tulip:eps=0.05,weight=0.1 \\
    --epochs 20 --out runs/tulip --resume
torchrun --nproc_per_node=8 -m guard train --dataset imagenet/ \\
    --arch resnet50 --regularizer tv-l2:eps=0.1 --batch-size 1024 \\
    --out runs/imagenet
guard export runs/tulip --out models/tulip""",
    )
    # `dest` is the field in Settings; no defaults here, so that the preset's hold, else the general ones.
    parser.add_argument(
        "--dataset",
        metavar="D",
        help="cifar10, cifar100, mnist, fashion-mnist, an .npz file, or a folder with one folder per class "
        "(default: the preset's)",
    )
    parser.add_argument("--preset", metavar="P", help="a recipe of the papers, as listed by --presets")
    parser.add_argument(
        "--presets",
        nargs="?",
        const="",
        metavar="START",
        help="list the presets (whose names start with START) and stop; a whole name shows all of it",
    )
    parser.add_argument(
        "--arch",
        dest="architecture",
        metavar="A",
        help="one of the architectures above (default: compact-resnet)",
    )
    parser.add_argument(
        "--width", type=int, metavar="N", help="channels of its first stage (default: as listed)"
    )
    parser.add_argument(
        "--pre-logit-sigmoid",
        action=argparse.BooleanOptionalAction,
        help="bound the features before the last layer by t tanh(x/t), t learned (default: no)",
    )
    parser.add_argument(
        "--regularizer", dest="regularizers", nargs="+", metavar="R", help="as above (default: none)"
    )
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN, if there is one")

    course = parser.add_argument_group("training")
    course.add_argument("--epochs", type=int, metavar="N", help="(default: 20)")
    course.add_argument(
        "--batch-size", type=int, metavar="N", help="of all processes together (default: 256)"
    )
    course.add_argument(
        "--accumulate",
        type=int,
        metavar="N",
        help="compute batches in N parts, for less memory (default: 1)",
    )
    course.add_argument("--learning-rate", type=float, metavar="X", help="the highest (default: 0.2)")
    course.add_argument(
        "--schedule",
        metavar="S",
        help="of the learning rate after warm-up: one-cycle, cosine, step, fifths, tenths, three-slopes, "
        "constant, or knots share:value, as in 0:0,0.4:1,0.8:0.05,1:0; those that start at 0 have no other "
        "warm-up (default: one-cycle)",
    )
    course.add_argument("--warmup", type=float, metavar="SHARE", help="of all steps (default: 0.2)")
    course.add_argument("--momentum", type=float, metavar="X", help="(default: 0.9)")
    course.add_argument(
        "--nesterov", action=argparse.BooleanOptionalAction, help="Nesterov's momentum (default: yes)"
    )
    course.add_argument("--weight-decay", type=float, metavar="X", help="(default: 0.0005)")
    course.add_argument(
        "--held-out",
        type=int,
        metavar="N",
        help="last training images (random ones if sorted by class) kept for the log's accuracy "
        "(default: 1000, at most a tenth)",
    )
    course.add_argument("--seed", type=int, metavar="N", help="(default: 0)")

    images = parser.add_argument_group("changes to the images")
    images.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="of folders: train on random parts of images, scaled to N x N pixels, and serve their centre "
        "(default: the images' own size, 224 where sizes differ)",
    )
    images.add_argument(
        "--crop",
        dest="padding",
        type=int,
        metavar="N",
        help="shift by up to N pixels, unless images are scaled (default: 4)",
    )
    images.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="mirror half of them (default: yes, but not for mnist)",
    )
    images.add_argument("--cutout", type=int, metavar="N", help="paint a square of N x N pixels (default: 8)")

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda or cuda:N (default: cuda where it works)"
    )
    machine.add_argument(
        "--precision",
        choices=("auto", "bf16", "float32"),
        help="of convolutions and products (default: auto, bf16 where the device computes in it; with a "
        "preset float32, as in the papers)",
    )
    machine.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the passes that allow it (default: no)",
    )
    machine.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode a folder's images (default: one per core, at most 16)",
    )
    machine.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=300.0,
        metavar="S",
        help="between checkpoints inside an epoch (default: 300)",
    )
    machine.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: torch's)")
    machine.add_argument(
        "--deterministic", action="store_true", help="bit-exact resume on CUDA too, and slower"
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from guard.errors import UsageError
    from guard.training import curves, distributed, folders, presets
    from guard.training.batches import usual_workers
    from guard.training.loop import chosen_device, train

    if arguments.presets is not None or arguments.preset == "list":
        return _list_presets(arguments)
    preset = None if arguments.preset is None else presets.preset(arguments.preset)
    name = arguments.dataset or (preset.dataset if preset else None)
    if name is None:
        why = (
            f"{preset.name} is trained on a data set that is not fetched"
            if preset
            else "there is no --preset"
        )
        raise UsageError(f"--dataset is missing, and {why}: expected a name, an .npz file or a folder.")
    if arguments.out is None:
        raise UsageError("--out is missing: expected the folder that the run is kept in.")
    for flag, value, least in (("--threads", arguments.threads, 1), ("--workers", arguments.workers, 0)):
        if value is not None and not least <= value <= MOST_THREADS:
            raise UsageError(f"{flag} is {value}: expected {least} to {MOST_THREADS}.")
    if not arguments.checkpoint_seconds >= 0:
        raise UsageError(f"--checkpoint-seconds is {arguments.checkpoint_seconds}: expected 0 or more.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with distributed.processes(chosen_device(arguments.device)) as device:
        with distributed.together():
            settings = _settings(arguments, preset, name, device)
            settings.check()
            with distributed.first():  # which fetches a data set that is absent
                training = folders.load(name, image_size=arguments.image_size)
                test = folders.test_split(name, training)
            if arguments.held_out is None:
                settings = replace(settings, held_out=min(1000, len(training) // 10))
        result = train(
            training,
            settings,
            arguments.out,
            test=test,
            resume=arguments.resume,
            device=device,
            deterministic=arguments.deterministic,
            workers=usual_workers() if arguments.workers is None else arguments.workers,
            checkpoint_seconds=arguments.checkpoint_seconds,
            arguments=arguments_of(arguments),
        )
        if distributed.rank() > 0:
            return 0
    page = arguments.out / curves.CURVES
    record = {
        "run": str(arguments.out),
        "curves": str(page),
        **result.metrics,
        "test_accuracy": result.test_accuracy,
    }
    lines = [f"wrote {arguments.out}"]
    held_out = result.metrics.get("held_out_accuracy")
    if held_out is not None:
        lines.append(f"  accuracy  {held_out:.2%} of {settings.held_out} images held out")
    if result.test_accuracy is not None:
        lines.append(f"  accuracy  {result.test_accuracy:.2%} of the test images")
    lines.append(f"  curves    {page}")
    lines.append(f"next: guard export {arguments.out} --out BUNDLE")
    emit(arguments, record, "\n".join(lines))
    return 0


def _settings(
    arguments: argparse.Namespace, preset: "Preset | None", dataset: str, device: str
) -> "Settings":
    """The flags that were given, else the preset's settings, else the general ones."""
    from guard.training.loop import chosen_precision
    from guard.training.settings import Settings

    base = preset.settings if preset else Settings()
    given = {name: getattr(arguments, name, None) for name in asdict(base)}
    given["regularizers"] = tuple(arguments.regularizers) if arguments.regularizers else None
    if arguments.precision or not preset:
        regularizers = given["regularizers"] or base.regularizers
        given["precision"] = chosen_precision(arguments.precision or "auto", device, regularizers)
    if given["mirror"] is None and Path(dataset).stem in _NOT_MIRRORED:
        given["mirror"] = False
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def _list_presets(arguments: argparse.Namespace) -> int:
    from guard.training import presets

    found = presets.chosen(arguments.presets or "")
    whole = [entry for entry in found if entry.name == arguments.presets]
    record = {"presets": [asdict(entry) for entry in found]}
    emit(arguments, record, presets.details(whole[0]) if whole else presets.table(found))
    return 0
