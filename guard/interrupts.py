"""Ctrl-C and SIGTERM where it is safe: between two steps of a loop, not somewhere inside one.

Python raises `KeyboardInterrupt` wherever the main thread is. Inside the locks of a thread pool that can
leave one taken, and the program hanging.
"""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_Item = TypeVar("_Item")


@contextmanager
def stop_requests(*, insistent: bool = True) -> Iterator[list[signal.Signals]]:
    """Inside, SIGINT and SIGTERM are entered into the list that is yielded, for the loop to look at.

    A second one raises `KeyboardInterrupt` at once, where `insistent`. One that is ignored stays so. Python
    takes signals in the main thread only: in another, nothing changes.
    """
    asked: list[signal.Signals] = []

    def ask(number: int, _: object) -> None:
        if asked and insistent:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interruptible(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items; SIGINT and SIGTERM raise `KeyboardInterrupt` between two of them, a second one at once."""
    with stop_requests() as stop:
        for item in items:
            yield item
            if stop:
                raise KeyboardInterrupt
