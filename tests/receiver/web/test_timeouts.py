"""Many waits with one timer, on an event loop whose clock stops while anything can run."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

import pytest

from receiver.web.timeouts import Timeouts

SECONDS = 0.05


class Leaping(selectors.DefaultSelector):
    """Instead of sleeping, the clock of the loop jumps to the next timer."""

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


def test_await_that_takes_too_long_raises_timeout_error() -> None:
    async def main() -> None:
        timeouts = Timeouts()
        with pytest.raises(TimeoutError), timeouts.within(SECONDS):
            await asyncio.sleep(10)
        await asyncio.sleep(0)  # raises if a cancellation is left

    run(main())


def test_await_that_ends_in_time_is_not_cancelled() -> None:
    async def main() -> None:
        timeouts = Timeouts()
        for _ in range(3):
            with timeouts.within(SECONDS):
                await asyncio.sleep(0)
        await asyncio.sleep(2 * SECONDS)

    run(main())


def test_each_wait_ends_at_its_own_time() -> None:
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


def test_cancellation_by_others_stays_a_cancellation() -> None:
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


def test_error_in_the_block_passes_through() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="mine"), Timeouts().within(10):
            raise ValueError("mine")

    run(main())
