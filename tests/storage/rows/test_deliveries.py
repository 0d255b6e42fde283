"""Deliveries as rows: equal ones have one key, a poll keeps its newest answer, batches do not deadlock."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlmodel import select

from storage.database.sessions import Database, run
from storage.rows import deliveries, group_commit
from storage.rows.deliveries import Delivery
from storage.rows.loop_connections import SqliteLoopConnection, SqliteLoopReads
from storage.rows.models import Callback
from storage.states import CallbackState
from tests.rows import wait_until_blocked

TASK = uuid.UUID(int=1)
GOOD = Delivery("kling", "push", TASK, b"{}")
SIGNED = replace(GOOD, webhook_id="w1")
REJECTED = replace(GOOD, state=CallbackState.REJECTED)
POLLED = replace(GOOD, source="poll")
SECONDS = 30  # a future that takes longer hangs


def test_equal_deliveries_have_one_key_with_any_headers() -> None:
    assert replace(GOOD, headers={"date": "today"}, reason="why").key == GOOD.key
    assert replace(REJECTED, reason="another id").key == REJECTED.key
    assert replace(POLLED, webhook_id="w1").key == POLLED.key


def test_any_other_delivery_has_another_key() -> None:
    different = [GOOD, SIGNED, REJECTED, POLLED, replace(SIGNED, webhook_id="w2"), replace(GOOD, body=b"{ }")]
    different += [replace(GOOD, task_id=None), replace(POLLED, task_id=None), replace(GOOD, provider="fal")]
    different += [replace(GOOD, webhook_id="{}", body=b""), replace(REJECTED, webhook_id="w1")]
    assert len({delivery.key for delivery in different}) == len(different)


def test_keys_of_earlier_releases_stay() -> None:
    """Rows have them, so another way to compute them would store every delivery again that arrives again."""
    signed, rejected = replace(SIGNED, task_id=uuid.UUID(int=7)), replace(REJECTED, task_id=None)
    assert signed.key == "de45504feb3b575236925abe784f1202887278e650629e8c819608654f25194e"
    assert rejected.key == "cce925b81a5f1785b00b87a147117e556157ff1aa30e45db8ee1251f3a15f8ae"
    polled = replace(POLLED, task_id=uuid.UUID(int=7))
    assert polled.key == "0c30985b6e9d3cb5e8c256999c1ddc52e1eae2bd8f6da336a862865364e28e8a"


def test_the_newest_poll_answer_replaces_the_one_before(database: Database) -> None:
    for number, other in ((1, TASK), (2, TASK), (2, TASK), (1, TASK), (1, uuid.UUID(int=2))):
        answer = replace(POLLED, body=b"%d" % number, task_id=other)
        with database.write() as session:
            deliveries.store_poll(session, answer)
            rows = session.exec(select(Callback).where(Callback.task_id == other)).all()
            assert [(row.delivery_key, row.state, row.due_at) for row in rows] == [
                (answer.key, CallbackState.APPLIED, None)
            ]
    with database.read() as session:
        assert len(session.exec(select(Callback)).all()) == 2


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_batches_with_the_same_deliveries_do_not_deadlock(database: Database) -> None:
    """Each waits for the smallest shared key before it locks a larger one, in any order of the batch."""
    low, high = sorted((replace(GOOD, body=body) for body in (b"1", b"2")), key=lambda delivery: delivery.key)

    def store_both() -> set[str]:
        with database.write() as session:
            return deliveries.store(session, [high, low])

    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            assert deliveries.store(session, [low]) == {low.key}
            other = pool.submit(store_both)
            wait_until_blocked(database, other)
            assert deliveries.store(session, [high]) == {high.key}
        assert other.result(SECONDS) == set()


def plans(connection: Any, ask: Callable[[], object]) -> str:
    """How SQLite runs the statements of `ask`."""
    said: list[str] = []
    connection.set_trace_callback(said.append)
    ask()
    connection.set_trace_callback(None)
    looks = [words for words in said if words.startswith(("SELECT", "WITH", "UPDATE", "DELETE"))]
    return str([connection.execute(f"EXPLAIN QUERY PLAN {words}").fetchall() for words in looks])


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_a_delivery_is_found_without_reading_the_others(database: Database) -> None:
    """No index has all keys, so each statement says which of the others it means."""
    keys, found = {"a", "b"}, []
    loop, reads = SqliteLoopConnection(database), SqliteLoopReads(database)
    found.append(plans(loop._connection, lambda: asyncio.run(loop.unreadable(keys))))
    found.append(plans(reads._connection, lambda: reads.is_stored("a")))
    with database.write() as session:
        driver = session.connection().connection.driver_connection
        found.append(plans(driver, lambda: run(session, deliveries._APPLY_AGAIN, {"keys": keys})))
        found.append(plans(driver, lambda: group_commit._beyond_limit(session.connection(), [GOOD], {TASK})))
    assert all("callback" in plan and not re.search(r"SCAN (TABLE )?callback\b", plan) for plan in found), found
    asyncio.run(loop.close())
    reads.close()
