"""Batches form from what waits, keep each result with its item, and never share a failure."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from guard.batching import Batcher


class Recorder:
    """Doubles numbers; notes every batch, can be held, fails on negative numbers."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: list[int]) -> Sequence[int]:
        self.gate.wait(5)
        self.batches.append(items)
        if min(items) < 0:
            raise ValueError(f"negative: {items}")
        return [2 * item for item in items]


def test_an_idle_batcher_runs_one_item_at_once() -> None:
    recorder = Recorder()

    async def scenario() -> list[int]:
        batcher = Batcher(recorder, max_batch=4)
        return [await batcher.submit(3), await batcher.submit(4)]

    assert asyncio.run(scenario()) == [6, 8]
    assert recorder.batches == [[3], [4]]


def test_what_waits_becomes_one_batch_in_order_and_no_larger_than_the_limit() -> None:
    recorder = Recorder()

    async def scenario() -> list[int]:
        batcher = Batcher(recorder, max_batch=4)
        recorder.gate.clear()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(batcher.submit(item)) for item in range(1, 11)]
        await asyncio.sleep(0.01)
        recorder.gate.set()
        return list(await asyncio.gather(first, *others))

    assert asyncio.run(scenario()) == [2 * item for item in range(11)]
    assert recorder.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


def test_a_failing_item_fails_alone() -> None:
    recorder = Recorder()

    async def scenario() -> list[int | BaseException]:
        batcher = Batcher(recorder, max_batch=8)
        tasks = [asyncio.create_task(batcher.submit(item)) for item in (1, -1, 2)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    one, minus_one, two = asyncio.run(scenario())
    assert (one, two) == (2, 4)
    assert isinstance(minus_one, ValueError)
    assert recorder.batches == [[1, -1, 2], [1], [-1], [2]]


def test_items_of_a_failed_batch_whose_waiters_have_gone_cost_nothing() -> None:
    recorder = Recorder()

    async def scenario() -> None:
        batcher = Batcher(recorder, max_batch=8)
        recorder.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(item)) for item in (1, -1, 2, 3)]
        await asyncio.sleep(0.05)
        for task in (tasks[0], tasks[3]):
            task.cancel()
        recorder.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
    assert recorder.batches == [[1, -1, 2, 3], [-1], [2]]


def test_an_item_whose_waiter_has_gone_costs_nothing() -> None:
    recorder = Recorder()

    async def scenario() -> int:
        batcher = Batcher(recorder, max_batch=4)
        recorder.gate.clear()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await batcher.submit(7)
        last = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0)
        recorder.gate.set()
        await first
        return await last

    assert asyncio.run(scenario()) == 2
    assert recorder.batches == [[0], [1]]


def test_the_event_loop_stays_free_while_a_batch_runs() -> None:
    recorder = Recorder()

    async def scenario() -> bool:
        batcher = Batcher(recorder, max_batch=4)
        recorder.gate.clear()
        task = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.02)
        alive = not task.done()
        recorder.gate.set()
        await task
        return alive

    assert asyncio.run(scenario())


def test_a_wrong_number_of_results_is_an_error() -> None:
    def one_too_many(items: list[int]) -> list[int]:
        return [*items, 0]

    async def scenario() -> None:
        await Batcher(one_too_many, max_batch=4).submit(1)

    with pytest.raises(RuntimeError, match="2 results for 1 items"):
        asyncio.run(scenario())


def test_closing_cancels_what_waits_and_lets_the_batch_in_hand_end() -> None:
    recorder = Recorder()

    async def scenario() -> list[int | BaseException]:
        batcher = Batcher(recorder, max_batch=4)
        recorder.gate.clear()
        running = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0)
        batcher.close()
        recorder.gate.set()
        return list(await asyncio.gather(running, waiting, return_exceptions=True))

    done, cancelled = asyncio.run(scenario())
    assert done == 2
    assert isinstance(cancelled, asyncio.CancelledError)


def test_an_empty_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(Recorder(), max_batch=0)
