"""`guard serve`: `bentoml serve` with a bundle."""

import argparse
import os
import socket
import sys

from guard.cli.options import Subparsers, add_bundle, add_command, chosen_bundle, emit

SERVICE = "guard.service:GuardService"


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "serve",
        run,
        description="""\
Serve a calibrated bundle over HTTP, by `bentoml serve`. A page at / tries it;
POST /classify answers programs.

GUARD_MIN_RADIUS_L2, GUARD_MIN_RADIUS_LINF and GUARD_EXPOSE_SCORES=0 make it
stricter; no request can change them. docs/http.md lists all settings.""",
        example="""\
guard serve
guard serve models/resnet50 --port 8080 --host 0.0.0.0""",
    )
    add_bundle(parser)
    parser.add_argument("--port", type=_port, default=3000, metavar="N", help="(default: 3000)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)"
    )


def run(arguments: argparse.Namespace) -> int:
    from guard import bundle as bundles
    from guard.guarded import GRAPH_VERSION
    from guard.settings import Policy
    from guard.worker import Settings

    folder = chosen_bundle(arguments).resolve()
    bundles.load(folder, graph_version=GRAPH_VERSION).calibrated()
    Policy.from_environment()
    Settings.from_environment()
    _check_free(arguments.host, arguments.port)
    shown = "localhost" if arguments.host in ("0.0.0.0", "127.0.0.1", "::", "::1") else arguments.host  # noqa: S104
    url = f"http://{shown}:{arguments.port}"
    print(f"guard: starting {folder.name} at {url} (Ctrl-C stops)", file=sys.stderr, flush=True)
    if arguments.json:
        emit(arguments, {"bundle": str(folder), "url": url}, "")
        sys.stdout.flush()
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE]
    command += ["--host", arguments.host, "--port", str(arguments.port)]
    environment = {"BENTOML_DO_NOT_TRACK": "True"} | os.environ | {"GUARD_MODEL": str(folder)}
    os.execve(sys.executable, command, environment)  # noqa: S606


def _check_free(host: str, port: int) -> None:
    """A port in use is said in one line, before a server's worth of output."""
    from guard.errors import UsageError

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another by --port or "
            "--host."
        ) from error


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, not {text!r}")
    return int(text)
