"""The command `guard`: one module per command, imported only when that command runs."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import guard
from guard.cli.options import Parser
from guard.errors import GuardError, UsageError

COMMANDS = {
    "train": "train a classifier that is hard to fool",
    "export": "turn a training run into a bundle",
    "wrap": "turn any ONNX classifier into a bundle",
    "calibrate": "fit a bundle's threshold and radii on data",
    "certify": "classify files offline, with verdicts and radii",
    "evaluate": "attack a bundle and report what is left standing",
    "report": "turn an evaluation's results into a page and a card's section",
    "info": "show what is in a bundle, or facts about a data set",
    "graph": "write the guarded graph for other runtimes",
    "serve": "serve a bundle over HTTP",
}

_EXTRAS = {
    "torch": "train",
    "torchvision": "train",
    "onnxscript": "train",
    "pyarrow": "parquet",
    "foolbox": "attacks",
    "pyautoattack": "attacks",
    "art": "attacks",
}

_EPILOG = """\
A command's own page: guard COMMAND --help
BUNDLE may be left out everywhere: $GUARD_MODEL is used, then models/cifar10.

example:
  guard wrap resnet50.onnx --out models/resnet50 --classes imagenet.txt
  guard calibrate models/resnet50 --val photos/
  guard serve models/resnet50
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        with _log_to_stderr():
            arguments = _parse(words)
            return int(arguments.run(arguments))
    except SystemExit as leave:  # argparse, after --help or a usage error
        return leave.code if isinstance(leave.code, int) else 1
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted", 130, debug=debug)
    except BrokenPipeError:  # the reader of our output has gone: `guard certify --json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        return _fail(str(error), 2, debug=debug)
    except GuardError as error:
        return _fail(str(error), 1, debug=debug)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            return _unexpected(error, debug=debug)
        extra = _EXTRAS[package]
        return _fail(
            f"this command needs {package}, which is not installed. In guard's folder, run: "
            f"pip install -e '.[{extra}]'",
            1,
            debug=debug,
        )
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{where}{error.strerror or error}", 1, debug=debug)
    except Exception as error:
        return _unexpected(error, debug=debug)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _parser(words)
    arguments, rest = parser.parse_known_args(words)
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(arguments, "inputs")):
        raise UsageError(f"unexpected {' '.join(rest)} (see guard {arguments.command} --help).")
    if rest:  # argparse takes no further positional arguments after an option
        arguments.inputs += rest
    return arguments


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command among the words; of the others only names and summaries."""
    parser = Parser(
        prog="guard",
        usage="guard [-h] [--version] COMMAND ...",
        description="Image classifiers that say when not to trust them.\n\ncommands:\n"
        + "\n".join(f"  {name:10s} {summary}" for name, summary in COMMANDS.items()),
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"guard {guard.__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, prog="guard", help=argparse.SUPPRESS
    )
    wanted = words[0] if words else None
    if wanted and not wanted.startswith("-") and wanted not in COMMANDS:
        raise UsageError(f"{wanted!r} is no command: expected {', '.join(COMMANDS)} (see guard --help).")
    for name in COMMANDS:
        if name == wanted:
            import_module(f"guard.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, add_help=False)
    return parser


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("guard: %(message)s"))
    logger = logging.getLogger("guard")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _fail(message: str, status: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"guard: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _unexpected(error: Exception, *, debug: bool) -> int:
    hint = "" if debug else " (this is a defect of guard; --debug shows the traceback)"
    return _fail(f"unexpected {type(error).__name__}: {error}{hint}", 1, debug=debug)
