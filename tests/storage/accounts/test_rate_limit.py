"""The rate limit of reads, shared by all processes."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import update

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from storage.accounts.rate_limit import ReadRateLimit, TooManyReads
from storage.database.clock import db_now
from storage.database.sessions import Database
from storage.rows.models import ProviderRate, Task
from storage.states import Step, TaskState
from tests.pipeline import make_due_now, run, task_of
from tests.unreported_tasks import REQUEST, queries, submit


def test_free_moments_are_one_interval_apart(database: Database) -> None:
    limit = ReadRateLimit(database, per_second=0.1, patience_seconds=25)
    with database.write() as session:
        waits = [limit.reserve(session, "kling") for _ in range(4)]
    assert [round(seconds / 10) for seconds in waits] == [0, 1, 2, 3]
    with database.write() as session:
        assert limit.reserve(session, "another") == 0


def test_moment_too_far_ahead_is_not_reserved(database: Database) -> None:
    impatient = ReadRateLimit(database, per_second=0.01, patience_seconds=0)
    impatient.wait("kling")
    for _ in range(2):
        with pytest.raises(TooManyReads) as caught:
            impatient.wait("kling")
        assert caught.value.after is not None
        assert 0 < caught.value.after <= 100


def test_moment_reserved_by_a_clock_that_was_ahead_stops_no_reads(database: Database) -> None:
    limit = ReadRateLimit(database)
    limit.wait("kling")
    with database.write() as session:
        session.execute(update(ProviderRate).values(next_free_at=db_now(86_400.0)))
    with database.write() as session:
        waits = [limit.reserve(session, "kling") for _ in range(2)]
    assert waits[0] == 0 and 0 < waits[1] <= 0.2, "and the rate holds again"


def test_processes_share_one_rate(database_url: str) -> None:
    """Eight threads on two handles reserve twenty moments: none twice, one interval apart."""
    opened = [Database(database_url) for _ in range(2)]
    limits = [ReadRateLimit(each, per_second=0.01, patience_seconds=100_000) for each in opened]
    waits: list[float] = []

    def take(limit: ReadRateLimit) -> None:
        for _ in range(5):
            with limit._database.write() as session:
                waits.append(limit.reserve(session, "kling"))

    threads = [threading.Thread(target=take, args=(limit,)) for limit in limits for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(round(seconds / 100) for seconds in waits) == list(range(20))
    for each in opened:
        each.close()


def test_read_beyond_the_rate_is_due_later_and_counts_no_attempt(parts: Parts, sandbox: Sandbox) -> None:
    parts.__dict__["read_rate_limit"] = ReadRateLimit(parts.database, per_second=0.01, patience_seconds=0)
    (task,) = submit(parts, 1)
    with parts.database.write() as session:
        session.add(ProviderRate(account="kling", next_free_at=parts.database.now() + timedelta(seconds=50)))
    run(parts, "reads")
    row = task_of(parts, task.external_task_id)
    assert (row.step, row.attempts, row.polls, row.note) == (Step.READ, 0, 0, None)
    assert row.due_at is not None
    assert row.due_at > parts.database.now() + timedelta(seconds=30)
    assert queries(sandbox) == 0


def test_lookup_of_an_unsettled_create_keeps_the_rate(parts: Parts, sandbox: Sandbox) -> None:
    parts.__dict__["read_rate_limit"] = ReadRateLimit(parts.database, per_second=0.01, patience_seconds=0)
    sandbox.set(create_faults=["5000:created"])
    task = parts.submitter.submit(REQUEST).task
    with parts.database.write() as session:
        session.add(ProviderRate(account="kling", next_free_at=parts.database.now() + timedelta(seconds=50)))
    make_due_now(parts, Task)
    run(parts, "creates")
    assert (task_of(parts, task.external_task_id).state, queries(sandbox)) == (TaskState.CREATED, 0)
