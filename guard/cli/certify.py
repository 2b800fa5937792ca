"""`guard certify`: the answers of `POST /classify` for files, offline."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from guard.cli.options import Subparsers, add_command, add_provider, add_threads, check_output
from guard.settings import bundle_path

if TYPE_CHECKING:
    from guard.tables import Format

FORMATS: "tuple[Format, ...]" = ("jsonl", "csv", "parquet")


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "certify",
        run,
        description="""\
Classify images offline: one row each, with the answer that POST /classify
gives and the image's path (or its index in an array). Radii are estimates or
conformal, as their kind says; neither is a proof.

An image that cannot be read gives a row with an error; the others are still
classified, and the exit status is 1. With --out the file appears when all is
done; a command that is interrupted leaves what was there before.""",
        example="""\
guard certify photo.png --json
guard certify models/resnet50 photos/ --format csv --out verdicts.csv
guard certify cifar10 --out cifar10.jsonl""",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="[BUNDLE] IMAGES",
        help="image files, folders of them, .npz files or known data sets; before them, where the first "
        "is one, a bundle (default: $GUARD_MODEL, then models/cifar10)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="(default: by the name of --out, else jsonl); parquet needs the package pyarrow",
    )
    parser.add_argument("--out", type=Path, metavar="F", help="file to write (default: standard output)")
    add_provider(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    from guard import offline, tables
    from guard.decision import Guard
    from guard.errors import UsageError
    from guard.interrupts import interruptible
    from guard.progress import Progress

    words = list(arguments.inputs)
    folder = bundle_path(words.pop(0) if _is_bundle(words[0]) else None)
    if not words:
        raise UsageError(f"{folder} is the bundle, but no images were given.")
    kind = _format(arguments)
    guard = Guard.from_bundle(folder, arguments.provider, threads=arguments.threads)
    given = offline.sources(words, guard.detector.input_shape)
    counts: Counter[str] = Counter()
    with (
        _output(arguments.out) as stream,
        tables.writer(stream, kind) as write,
        Progress(sum(map(len, given)), "certify") as progress,
    ):
        for row in interruptible(offline.classify(guard, given)):
            write(row.record())
            counts[row.verdict] += 1
            progress.advance()
    where = "" if arguments.out is None else f"wrote {arguments.out}: "
    text = f"{where}{counts['accepted']} accepted, {counts['rejected']} rejected"
    text += f", {counts['unread']} could not be read" if counts["unread"] else ""
    print(text, file=sys.stderr if arguments.out is None else sys.stdout)
    return 1 if counts["unread"] else 0


def _is_bundle(word: str) -> bool:
    return (Path(word) / "manifest.json").is_file()


def _format(arguments: argparse.Namespace) -> "Format":
    from guard.errors import UsageError

    suffix = "" if arguments.out is None else arguments.out.suffix.lstrip(".").lower()
    named: Format = next((known for known in FORMATS if known == suffix), "jsonl")
    kind: Format = arguments.format or named
    if arguments.json and (arguments.out is not None or kind != "jsonl"):
        raise UsageError("--json is JSON lines on standard output: leave out --out and --format, or --json.")
    if arguments.out is not None:
        others = (".json", ".txt", "") if kind == "jsonl" else (".txt",) if kind == "csv" else ()
        check_output("--out", arguments.out, f".{kind}", *others)
    if kind == "parquet" and arguments.out is None:
        raise UsageError("--format parquet needs --out FILE: it cannot be written to standard output.")
    return kind


@contextmanager
def _output(path: Path | None) -> Iterator[BinaryIO]:
    from guard.files import atomic_open

    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    else:
        with atomic_open(path) as stream:
            yield stream
