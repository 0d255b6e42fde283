"""How dispatches are settled: what several threads have sent shares a transaction."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event
from sqlmodel import col, select

from receiver.events.dispatcher import Dispatcher, Message
from storage.database import group_writer
from storage.database.sessions import Database
from storage.operations import outbox
from storage.operations.outbox import Subscription
from storage.rows import claims
from storage.rows.events import EventName, record
from storage.rows.models import Dispatch
from storage.states import DispatchState
from tests.harness import wait_until
from tests.rows import new_task
from tests.sink_pairs import ENVELOPE, RETRY_SECONDS

SECONDS = 30
COUNT = 6


class Accepting:
    """A receiver that accepts everything at once."""

    batch, threads = 1, COUNT

    def send(self, messages: Sequence[Message]) -> list[None]:
        return [None for _ in messages]

    def check(self) -> str:
        return "accepts everything"

    def close(self) -> None:
        pass


def claimed(database: Database) -> list[Dispatch]:
    with database.write() as session:
        for _ in range(COUNT):
            record(session, EventName.TASK_ARCHIVED, new_task(session).id)
    outbox.sequence_all(database, [Subscription("it", frozenset({EventName.TASK_ARCHIVED}))])
    with database.write() as session:
        return claims.claim(session, Dispatch, limit=COUNT, lease_seconds=60)


def test_events_sent_by_several_threads_are_settled_in_few_transactions(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SQLite an acknowledgement waits for each."""
    monkeypatch.setattr(group_writer, "MAX_GROUP_SECONDS", SECONDS)  # a busy machine splits no group
    rows, commits = claimed(database), list[Any]()
    work = Dispatcher(database, "it", Accepting(), ENVELOPE, retry_seconds=RETRY_SECONDS)
    note = commits.append
    begun, go_on = threading.Event(), threading.Event()
    with ThreadPoolExecutor(COUNT + 1) as threads:
        first = threads.submit(database.write_in_group, lambda _: begun.set() or go_on.wait(SECONDS))
        try:
            assert begun.wait(SECONDS)
            event.listen(database.writer, "commit", note)
            settled = [threads.submit(work.work, row) for row in rows]
            wait_until(lambda: database._group_writer._waiting.qsize() == COUNT)
        finally:
            go_on.set()
        for each in (first, *settled):
            each.result(SECONDS)
    event.remove(database.writer, "commit", note)
    assert len(commits) == 2, "of the writer that was busy, and of them all"
    with database.read() as session:
        assert set(session.exec(select(col(Dispatch.state)))) == {DispatchState.DELIVERED}
