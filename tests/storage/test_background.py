"""Turns with rests, on a real event loop."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from storage.background import RESTS, RestingTurns


def fail() -> None:
    raise OSError("a page that fails")


def test_turns_do_not_overlap_and_rest_by_the_time_they_took() -> None:
    running, began = threading.Semaphore(1), list[float]()

    def work() -> None:
        began.append(time.monotonic())
        assert running.acquire(blocking=False)
        time.sleep(0.02)
        running.release()

    async def three() -> None:
        turns = RestingTurns()
        await asyncio.gather(*(turns.run(work) for _ in range(3)))

    asyncio.run(three())
    assert began[2] - began[0] >= 2 * (1 + RESTS) * 0.02


def test_a_turn_that_fails_leaves_room_for_the_next() -> None:
    async def two() -> int:
        turns = RestingTurns()
        with pytest.raises(OSError, match="fails"):
            await turns.run(fail)
        return await turns.run(lambda: 7)

    assert asyncio.run(two()) == 7
