"""Many waits and one timer, on an event loop whose clock stands still while anything can run."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

import pytest

from receiver.web.timeouts import Timeouts

SECONDS = 0.05


class Leaping(selectors.DefaultSelector):
    """Where a loop would sleep, its clock goes on to the next timer instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._leaping = Leaping()
        super().__init__(self._leaping)

    def time(self) -> float:
        return self._leaping.now


def run(main: Coroutine[Any, Any, None], *, seconds: float = 5) -> None:
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(asyncio.wait_for(main, seconds))


def test_an_await_that_takes_too_long_is_a_timeout_error() -> None:
    async def main() -> None:
        timeouts = Timeouts()
        with pytest.raises(TimeoutError), timeouts.within(SECONDS):
            await asyncio.sleep(10)
        await asyncio.sleep(0)  # and nothing of the cancellation is left

    run(main())


def test_an_await_that_ends_in_time_is_left_alone() -> None:
    async def main() -> None:
        timeouts = Timeouts()
        for _ in range(3):
            with timeouts.within(SECONDS):
                await asyncio.sleep(0)
        await asyncio.sleep(2 * SECONDS)

    run(main())


def test_each_of_many_ends_at_its_own_time() -> None:
    timeouts = Timeouts()
    took: dict[int, float] = {}

    async def wait(number: int) -> None:
        await asyncio.sleep(number * SECONDS / 10)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            with timeouts.within(SECONDS):
                await asyncio.sleep(10 if number % 2 else 0.001)
        except TimeoutError:
            took[number] = loop.time() - began

    async def main() -> None:
        await asyncio.gather(*(wait(number) for number in range(20)))

    run(main())
    assert took == pytest.approx(dict.fromkeys(range(1, 20, 2), SECONDS))


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

    run(main())


def test_an_error_inside_passes_through() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="mine"), Timeouts().within(10):
            raise ValueError("mine")

    run(main())
