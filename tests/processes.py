"""Functions run in several processes that train together, as torchrun would start them."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from guard.training import distributed
from tests import colours

TIMEOUT = 120  # seconds


def run(function: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """What `function(*arguments)` returns, or the exception it raises, in each of `count` processes.

    An exit status where a process was killed.
    """
    context = get_context("forkserver")  # imports torch once
    context.set_forkserver_preload([__name__])
    port = _free_port()
    ends, processes = [], []
    for rank in range(count):
        end, other = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(other, rank, count, port, function, arguments))
        process.start()
        other.close()
        ends.append(end)
        processes.append(process)
    results: list[Any] = []
    for end, process in zip(ends, processes, strict=True):
        try:
            results.append(end.recv() if end.poll(TIMEOUT) else TimeoutError())
        except EOFError:
            process.join(TIMEOUT)
            results.append(process.exitcode)
    for process in processes:
        process.join(TIMEOUT)
        process.kill()
    return results


def _child(
    end: Connection, rank: int, count: int, port: int, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    colours.register()
    try:
        with distributed.processes("cpu"):
            result = function(*arguments)
    except BaseException as error:
        result = error
    end.send(result)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
