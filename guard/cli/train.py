"""`guard train`: a classifier that is hard to fool, from a data set."""

import argparse
from dataclasses import replace
from pathlib import Path

from guard.cli.options import Subparsers, add_command, arguments_of, emit

# Mirrored digits are not digits.
_NOT_MIRRORED = frozenset({"mnist"})


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "train",
        run,
        description="""\
Train a classifier whose loss changes slowly around its training images.

Regularizers take their hyperparameters after a colon; several may be given:
  none                                 plain training
  tv-l2:eps=E                          one step of length E up the loss
  lipschitz:weight=W                   the largest gradient of each batch
  tulip:eps=E,weight=W                 both of them
  gradient-penalty-l2:weight=W         the squared gradient norm, l2 attacks
  gradient-penalty-l1:weight=W         the same against linf attacks

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

RUN gets config.json, checkpoint.pt and metrics.jsonl (a line per epoch).
Pixels are in [0, 1]: so are E and all radii.""",
        example="""\
guard train --dataset cifar10 --regularizer tulip:eps=0.05,weight=0.1 \\
    --epochs 20 --out runs/tulip
guard train --dataset cifar10 --regularizer tulip:eps=0.05,weight=0.1 \\
    --epochs 20 --out runs/tulip --resume
guard export runs/tulip --out models/tulip""",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="D",
        help="cifar10, cifar100, mnist, fashion-mnist, an .npz file, or a folder with one folder per class",
    )
    parser.add_argument(
        "--arch",
        default="compact-resnet",
        metavar="A",
        help="one of the architectures above (default: compact-resnet)",
    )
    parser.add_argument(
        "--width", type=int, metavar="N", help="channels of its first stage (default: as listed)"
    )
    parser.add_argument(
        "--pre-logit-sigmoid",
        action="store_true",
        help="normalize and bound the features before the last layer: t tanh(x/t), t learned",
    )
    parser.add_argument(
        "--regularizer", nargs="+", default=["none"], metavar="R", help="as above (default: none)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN, if there is one")

    course = parser.add_argument_group("training")
    course.add_argument("--epochs", type=int, default=20, metavar="N", help="(default: 20)")
    course.add_argument("--batch-size", type=int, default=256, metavar="N", help="(default: 256)")
    course.add_argument(
        "--learning-rate", type=float, default=0.2, metavar="X", help="the highest (default: 0.2)"
    )
    course.add_argument(
        "--schedule",
        choices=("one-cycle", "cosine", "step", "constant"),
        default="one-cycle",
        help="of the learning rate after warm-up (default: one-cycle)",
    )
    course.add_argument(
        "--warmup", type=float, default=0.2, metavar="SHARE", help="of all steps (default: 0.2)"
    )
    course.add_argument("--momentum", type=float, default=0.9, metavar="X", help="Nesterov's (default: 0.9)")
    course.add_argument("--weight-decay", type=float, default=5e-4, metavar="X", help="(default: 0.0005)")
    course.add_argument(
        "--held-out",
        type=int,
        metavar="N",
        help="last training images (random ones if sorted by class) kept for the log's accuracy "
        "(default: 1000, at most a tenth)",
    )
    course.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")

    images = parser.add_argument_group("changes to the images")
    images.add_argument(
        "--crop", type=int, default=4, metavar="N", help="shift by up to N pixels (default: 4)"
    )
    images.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="mirror half of them (default: yes, but not for mnist)",
    )
    images.add_argument(
        "--cutout", type=int, default=8, metavar="N", help="paint a square of N pixels (default: 8)"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda or cuda:N (default: cuda where it works)"
    )
    machine.add_argument(
        "--precision",
        choices=("auto", "bf16", "float32"),
        default="auto",
        help="of convolutions and products (default: bf16 where the device computes in it)",
    )
    machine.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: torch's)")
    machine.add_argument(
        "--deterministic", action="store_true", help="bit-exact resume on CUDA too, and slower"
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from guard import data
    from guard.errors import UsageError
    from guard.training.loop import Settings, chosen_device, chosen_precision, train

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads is {arguments.threads}: expected 1 or more.")
        torch.set_num_threads(arguments.threads)
    device = chosen_device(arguments.device)
    mirror = arguments.mirror
    settings = Settings(
        architecture=arguments.arch,
        width=arguments.width,
        pre_logit_sigmoid=arguments.pre_logit_sigmoid,
        regularizers=tuple(arguments.regularizer),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
        schedule=arguments.schedule,
        warmup=arguments.warmup,
        padding=arguments.crop,
        mirror=arguments.dataset not in _NOT_MIRRORED if mirror is None else mirror,
        cutout=arguments.cutout,
        held_out=arguments.held_out or 0,
        precision=chosen_precision(arguments.precision, device),
        seed=arguments.seed,
    )
    settings.check()
    training = data.load(arguments.dataset, "train")
    if arguments.held_out is None:
        settings = replace(settings, held_out=min(1000, len(training) // 10))
    result = train(
        training,
        settings,
        arguments.out,
        test=data.test_split(arguments.dataset, training),
        resume=arguments.resume,
        device=device,
        deterministic=arguments.deterministic,
        arguments=arguments_of(arguments),
    )
    record = {"run": str(arguments.out), **result.metrics, "test_accuracy": result.test_accuracy}
    lines = [f"wrote {arguments.out}"]
    held_out = result.metrics.get("held_out_accuracy")
    if held_out is not None:
        lines.append(f"  accuracy  {held_out:.2%} of {settings.held_out} images held out")
    if result.test_accuracy is not None:
        lines.append(f"  accuracy  {result.test_accuracy:.2%} of the test images")
    lines.append(f"next: guard export {arguments.out} --out BUNDLE")
    emit(arguments, record, "\n".join(lines))
    return 0
