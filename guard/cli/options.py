"""What all commands share: their parser's form, the options every one has, and the bundle they work on."""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from guard.errors import UsageError
from guard.files import check_writable
from guard.settings import bundle_path, upload_limits

if TYPE_CHECKING:
    from guard.bundle import Manifest
    from guard.data import Dataset

Subparsers: TypeAlias = "argparse._SubParsersAction[Any]"

WIDTH = 80
"""Of a screen, in characters."""

_NAMED = 60  # characters of class names shown
_LONG_CHOICES = 40

MOST_THREADS = 1024
"""More than any machine has use for; some libraries crash on far more."""


class Parser(argparse.ArgumentParser):
    """Shows help as it was laid out, 80 columns wide, and says a usage error in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Writes one line and leaves with status 2."""
        self.exit(2, f"guard: error: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """80 columns; choices that would not fit into the usage line are listed with the option's help."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"width": WIDTH, "max_help_position": 26, **options})

    def _metavar_formatter(
        self, action: argparse.Action, default_metavar: str
    ) -> Callable[[int], tuple[str, ...]]:
        if not _has_long_choices(action):
            return super()._metavar_formatter(action, default_metavar)
        return lambda size: (action.dest.upper(),) * size

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        text = super()._format_args(action, default_metavar)
        return text.replace("[[BUNDLE] ", "[")  # of several words only the first may be a bundle

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not _has_long_choices(action):
            return action.help
        return f"{action.help}; one of {', '.join(map(str, action.choices or ()))}"


def _has_long_choices(action: argparse.Action) -> bool:
    return action.metavar is None and len(",".join(map(str, action.choices or ()))) > _LONG_CHOICES


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    """Adds the command `name`, with `--json` and `--debug`; returns its parser for the command's own options.

    `description` says in a few lines what it does; `example` is one or more command lines. Both are shown as
    written, so keep their lines below 80 columns.
    """
    indented = "\n".join(f"  {line}" for line in example.strip().splitlines())
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, description=description.strip(), epilog=f"example:\n{indented}"
    )
    parser.add_argument("--json", action="store_true", help="result on standard output as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Adds the optional BUNDLE; read it with `chosen_bundle`."""
    parser.add_argument(
        "bundle",
        nargs="?",
        metavar="BUNDLE",
        help="bundle folder (default: $GUARD_MODEL, then models/cifar10)",
    )


def chosen_bundle(arguments: argparse.Namespace) -> Path:
    """The folder of the bundle the command works on."""
    return bundle_path(arguments.bundle)


def held_out(arguments: argparse.Namespace, manifest: "Manifest") -> "Dataset":
    """The data set of `--val` as the model of the manifest takes it: image files resized, labels by its
    classes.
    """
    from guard import data, images

    uploads = manifest.preprocessing
    decode = partial(
        images.decode,
        shape=manifest.input.shape,
        colour=uploads.colour,
        resize=uploads.resize,
        interpolation=uploads.interpolation,
        limits=upload_limits(),
    )
    return data.aligned(data.load(arguments.val, "test", decode=decode), manifest.class_names)


def add_provider(parser: argparse.ArgumentParser) -> None:
    """Adds `--provider`."""
    parser.add_argument(
        "--provider",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: CUDA where it works, else CPU)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Adds `--threads`."""
    parser.add_argument(
        "--threads", type=_threads, default=0, metavar="N", help="CPU threads (default: one per core)"
    )


def check_output(option: str, path: Path, *suffixes: str) -> None:
    """Raises `UsageError` where a file that a command is to write would take the place of a folder, of a file
    of another kind than these suffixes tell, or of a part of a bundle or of results, and where it cannot be
    written. To be called before any work.
    """
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder: give the name of a file.")
    check_writable(path, f"{option} {path}")
    if not path.is_file():
        return
    whole = any((path.parent / name).is_file() for name in ("manifest.json", "settings.json", "results.json"))
    part = whole and path.suffix.lower() in (".json", ".onnx")
    if part or path.suffix.lower() not in suffixes:
        what = "is part of what lies in its folder" if part else "holds something of another kind"
        raise UsageError(
            f"{option} {path}: {what}, which would be lost. Give another name ending in {suffixes[0]}."
        )


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(
            f"expected a whole number up to {MOST_THREADS}, 0 for one per core, not {text!r}"
        )
    return int(text)


def emit(arguments: argparse.Namespace, record: Mapping[str, Any], text: str) -> None:
    """Writes a command's result to standard output: the record with `--json`, else the text."""
    if arguments.json:
        json.dump(record, sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
    else:
        print(text)


def file_size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def arguments_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command's arguments as provenance stores them, without what does not change the result."""
    left_out = {"run", "json", "debug", "command"}
    return {name: value for name, value in vars(arguments).items() if name not in left_out}


def screen_lines(title: str, facts: list[tuple[str, str]]) -> list[str]:
    """The facts by name under a title, wrapped to a screen's width."""
    lines = [title]
    for name, text in facts:
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {name:<13s} ", subsequent_indent=" " * 16, break_long_words=False
        )
    return lines


def class_list(names: Sequence[str]) -> str:
    """How many classes there are, and the first of them by name."""
    shown = textwrap.shorten(", ".join(names), _NAMED, placeholder=" ...")
    return f"{len(names)}: {shown}"
