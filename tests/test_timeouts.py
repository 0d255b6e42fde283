"""Many waits and one timer."""

from __future__ import annotations

import asyncio
import time

import pytest

from receiver.timeouts import Timeouts

SECONDS = 0.05


def test_an_await_that_takes_too_long_is_a_timeout_error() -> None:
    async def main() -> None:
        timeouts = Timeouts()
        with pytest.raises(TimeoutError), timeouts.within(SECONDS):
            await asyncio.sleep(10)
        await asyncio.sleep(0)  # and nothing of the cancellation is left

    asyncio.run(asyncio.wait_for(main(), 5))


def test_an_await_that_ends_in_time_is_left_alone() -> None:
    async def main() -> None:
        timeouts = Timeouts()
        for _ in range(3):
            with timeouts.within(SECONDS):
                await asyncio.sleep(0)
        await asyncio.sleep(2 * SECONDS)

    asyncio.run(asyncio.wait_for(main(), 5))


def test_each_of_many_ends_at_its_own_time() -> None:
    timeouts = Timeouts()
    took: dict[int, float] = {}

    async def wait(number: int) -> None:
        await asyncio.sleep(number * SECONDS / 10)
        began = time.monotonic()
        try:
            with timeouts.within(SECONDS):
                await asyncio.sleep(10 if number % 2 else 0.001)
        except TimeoutError:
            took[number] = time.monotonic() - began

    async def main() -> None:
        await asyncio.gather(*(wait(number) for number in range(20)))

    asyncio.run(asyncio.wait_for(main(), 10))
    assert sorted(took) == list(range(1, 20, 2))
    assert min(took.values()) > SECONDS * 0.9


def test_somebody_elses_cancellation_stays_one() -> None:
    async def main() -> None:
        timeouts = Timeouts()

        async def wait() -> None:
            with timeouts.within(10):
                await asyncio.sleep(10)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), 5))


def test_an_error_inside_passes_through() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="mine"), Timeouts().within(10):
            raise ValueError("mine")

    asyncio.run(asyncio.wait_for(main(), 5))
