import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from guard.interrupts import interruptible, stop_requests
from tests.serving import ROOT

BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in BOTH]


def sends(*numbers: signal.Signals) -> Iterator[int]:
    """Three items; while the second one is made, the signals arrive."""
    for item in range(3):
        if item == 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        yield item


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_waits_for_the_item_under_way(number: signal.Signals) -> None:
    before, seen = handlers(), list[int]()
    with pytest.raises(KeyboardInterrupt):
        seen.extend(interruptible(sends(number)))
    assert seen == [0, 1]
    assert handlers() == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert list(interruptible(sends(signal.SIGINT))) == [0, 1, 2]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_does_not_wait() -> None:
    before, seen = handlers(), list[int]()
    with pytest.raises(KeyboardInterrupt):
        seen.extend(interruptible(sends(signal.SIGINT, signal.SIGTERM)))
    assert seen == [0]
    assert handlers() == before


def test_without_a_signal_every_item_comes() -> None:
    before = handlers()
    assert list(interruptible(range(3))) == [0, 1, 2]
    assert handlers() == before


def test_requests_are_listed() -> None:
    with stop_requests(insistent=False) as stop:
        for number in BOTH:
            os.kill(os.getpid(), number)
        assert stop == list(BOTH)


def test_in_another_thread_nothing_changes() -> None:
    before = handlers()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: (list(interruptible([1])), handlers())).result() == ([1], before)


def test_a_pool_of_threads_is_left_in_order() -> None:
    """Under the interpreter's own handler some of these end in a lock that is never released."""
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from guard.interrupts import interruptible\n"
        "def results(pool):\n"
        "    yield print('begun', flush=True)\n"
        "    while True:\n"
        "        yield pool.submit(abs, 1).result()\n"
        "try:\n"
        "    with ThreadPoolExecutor(1) as pool:\n"
        "        for one in interruptible(results(pool)):\n"
        "            pass\n"
        "except KeyboardInterrupt:\n"
        "    print('left')\n"
    )
    for attempt in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(0.1 + 0.013 * attempt)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "left\n")
