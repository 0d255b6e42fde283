"""Turns with rests, on a real event loop, and checks in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from storage.background import MOST_TURNS, RESTS, BackgroundCheck, RestingTurns, Turn

T = TypeVar("T")


def queue(turns: RestingTurns, person: str, function: Callable[[], T]) -> Turn[T]:
    turn = turns.queue(person, function)
    assert turn is not None
    return turn


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
        await asyncio.gather(*(queue(turns, "ann", work).result() for _ in range(3)))

    asyncio.run(three())
    assert began[2] - began[0] >= 2 * (1 + RESTS) * 0.02


def test_a_turn_that_fails_leaves_room_for_the_next() -> None:
    async def two() -> int:
        turns = RestingTurns()
        with pytest.raises(OSError, match="fails"):
            await queue(turns, "ann", fail).result()
        return await queue(turns, "ann", lambda: 7).result()

    assert asyncio.run(two()) == 7


def test_one_person_has_half_of_the_turns_and_people_alternate() -> None:
    order: list[str] = []

    async def many() -> None:
        turns = RestingTurns()
        queued = [queue(turns, "ben", lambda: order.append("ben")) for _ in range(MOST_TURNS // 2)]
        assert turns.queue("ben", lambda: None) is None
        queued += [queue(turns, "ann", lambda: order.append("ann")) for _ in range(MOST_TURNS // 2)]
        assert turns.queue("cid", lambda: None) is None
        await asyncio.gather(*(each.result() for each in queued))
        await queue(turns, "ben", lambda: None).result()

    asyncio.run(many())
    assert order == ["ben", "ann"] * (MOST_TURNS // 2)


def test_a_turn_that_all_have_left_is_given_up_before_it_begins_and_finished_after() -> None:
    is_over, done = threading.Event(), list[str]()

    def first() -> None:
        is_over.wait(30)
        done.append("first")

    async def leave(readers: list[asyncio.Task[None]]) -> None:
        for each in readers:
            each.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    async def several() -> None:
        turns = RestingTurns()
        begun, left, shared = (
            queue(turns, "ann", function)
            for function in (first, lambda: done.append("left"), lambda: done.append("shared"))
        )
        readers = [asyncio.create_task(each.result()) for each in (begun, left, left, shared, shared)]
        await asyncio.sleep(0.1)
        await leave(readers[:4])
        assert [each.is_given_up for each in (begun, left, shared)] == [False, True, False]
        is_over.set()
        await readers[4]

    asyncio.run(several())
    assert done == ["first", "shared"]


def test_a_check_that_got_no_thread_runs_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    check = BackgroundCheck("check", lambda: "ok", "none yet", refresh_seconds=60, max_wait_seconds=10)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            check.state()
    assert check.state() == "ok"
