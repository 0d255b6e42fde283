"""What deliveries at the account URL may cost: the event loop, a thread and the disk. On both databases."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

import pytest
from sqlmodel import Session

from receiver.app.wiring import Parts
from receiver.web import account_budget
from receiver.web.account_budget import AccountBudget, AccountBusy, AccountOverdrawn, Ids
from storage.rows.deliveries import Delivery

LONG = b" " * 4_097
WAIT_SECONDS = 5.0


class SlowParser:
    """It returns once the test has continued in the event loop, or after `WAIT_SECONDS`."""

    def __init__(self) -> None:
        self.loop_goes_on = threading.Event()
        self.has_gone_on: list[bool] = []

    def __call__(self, _: Delivery) -> Ids:
        self.has_gone_on.append(self.loop_goes_on.wait(WAIT_SECONDS))
        return None, None


def take(parts: Parts, parser: SlowParser, count: int) -> list[object]:
    """Take places for this many long deliveries at once, and let the parser end after a turn of the loop."""

    async def main() -> list[object]:
        budget = AccountBudget(parts.database, parser)
        deliveries = [Delivery("kling", "push", None, LONG + b"%d" % number) for number in range(count)]
        taking = [asyncio.ensure_future(budget.take(each)) for each in deliveries]
        await asyncio.sleep(0.01)
        parser.loop_goes_on.set()
        outcomes: list[object] = await asyncio.gather(*taking, return_exceptions=True)
        budget.close()
        return outcomes

    return asyncio.run(main())


def test_the_event_loop_runs_while_a_long_body_is_parsed(parts: Parts) -> None:
    """One of 64 KiB that is full of numbers took 17 ms, in which no callback was answered."""
    parser = SlowParser()
    assert take(parts, parser, 1) == [None]
    assert parser.has_gone_on == [True]


def test_long_bodies_that_wait_for_the_parser_are_bounded(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_budget, "MAX_WAITING", 3)
    parser = SlowParser()
    assert Counter(map(type, take(parts, parser, 8))) == {type(None): 3, AccountBusy: 5}
    assert parser.has_gone_on == [True] * 3


def test_no_delivery_waits_for_the_count_of_another(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one waited for the lock: a queue of 200 that a flood kept full. All others were refused."""
    is_counting, may_end, count = threading.Event(), threading.Event(), account_budget.count

    def slow_count(session: Session) -> tuple[int, int]:
        is_counting.set()
        may_end.wait(WAIT_SECONDS)
        return count(session)

    async def main() -> None:
        budget = AccountBudget(parts.database, lambda _: (None, None))
        deliveries = [Delivery("kling", "push", None, b"%d" % number) for number in range(300)]
        assert await budget.take(deliveries[0]) is None
        monkeypatch.setattr(account_budget, "COUNT_SECONDS", 0)
        monkeypatch.setattr(account_budget, "count", slow_count)
        counting = asyncio.ensure_future(budget.take(deliveries[1]))
        assert await asyncio.to_thread(is_counting.wait, WAIT_SECONDS)
        assert await asyncio.gather(*(budget.take(each) for each in deliveries[2:])) == [None] * 298
        may_end.set()
        await asyncio.wait([counting])
        budget.close()

    asyncio.run(main())


def test_long_bodies_beyond_the_time_of_the_parser_are_not_parsed(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that limit the parser took as much of a processor as one could send."""
    monkeypatch.setattr(account_budget, "SECONDS_A_SECOND", 1e-6)
    monkeypatch.setattr(account_budget, "MOST_SECONDS", 0.01)
    parsed: list[Delivery] = []

    def parse(delivery: Delivery) -> Ids:
        parsed.append(delivery)
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return None, None

    async def main() -> None:
        budget = AccountBudget(parts.database, parse)
        long = [Delivery("kling", "push", None, LONG + b"%d" % number) for number in range(3)]
        assert await budget.take(long[0]) is None
        with pytest.raises(AccountOverdrawn):
            await budget.take(long[1])
        with pytest.raises(AccountOverdrawn):
            budget.check_length(len(long[2].body))
        budget.check_length(100)
        assert await budget.take(Delivery("kling", "push", None, b"{}")) is None, "a short one needs no thread"
        assert len(parsed) == 2
        budget.close()

    asyncio.run(main())


def test_stored_bytes_a_second_of_unmatched_deliveries_are_bounded(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account_budget, "BYTES_A_SECOND", 1)
    monkeypatch.setattr(account_budget, "MOST_BYTES_AT_ONCE", 3 * account_budget.ROW_BYTES - 1_000)

    async def main() -> None:
        budget = AccountBudget(parts.database, lambda _: (None, None))
        for number in range(3):
            delivery = Delivery("kling", "push", None, b"%02d" % number)
            assert await budget.take(delivery) is None
            budget.settle(delivery, None, is_new=True)
        with pytest.raises(AccountOverdrawn):
            await budget.take(Delivery("kling", "push", None, b"03"))
        budget.close()

    asyncio.run(main())
