"""Rows that were written while the clock was ahead become due once it is right. Rows that wait by intention wait on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete
from sqlmodel import col, select

from receiver.app.process import work_once
from receiver.app.wiring import Parts
from receiver.base.retry_schedule import EVENT_RETRY_SECONDS
from receiver.workers import clock_steps
from receiver.workers.clock_steps import Longest
from storage.archive.unusable import DELAYS_SECONDS
from storage.database.sessions import Database
from storage.rows import claims
from storage.rows.models import Asset, Callback, Dispatch, Task
from storage.states import CallbackState, Step
from tests.bench.claims import fill
from tests.harness import wait_until
from tests.pipeline import working
from tests.rows import new_assets

LEASE_SECONDS = 60.0
DAY = 86_400.0
# Model, columns, and the longest wait of such a row in seconds, jitter included.
WAITS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "create": (Task, {"step": Step.CREATE}, 3_600),
    "read": (Task, {"step": Step.READ}, 7_200 * 1.2),
    "finish": (Task, {"step": Step.FINISH}, 3_600),
    "callback": (Callback, {"state": CallbackState.RECEIVED}, 3_600),
    "unmatched": (Callback, {"state": CallbackState.UNMATCHED}, 3_600),
    "file": (Asset, {}, 3_600),
    "first tries of an unusable file": (Asset, {"unusable_tries": 3}, 3_600),
    "last tries of an unusable file": (Asset, {"unusable_tries": 17}, DELAYS_SECONDS[-1] * 1.1),
    "unusable file": (Asset, {"unusable_tries": 13}, 172_800 * 1.1),
    "event": (Dispatch, {"sink": "hook"}, 3_600),
    "event's last try": (Dispatch, {"sink": "hook", "tries": 14}, DAY * 1.2),
    "event's ninth try": (Dispatch, {"sink": "hook", "tries": 9}, 7_200 * 1.2),
}


def longest() -> Sequence[Longest]:
    return clock_steps.longest(lease_seconds=LEASE_SECONDS, poll_seconds=7_200, event_retry_seconds=EVENT_RETRY_SECONDS)


def mend(database: Database) -> int:
    return clock_steps.mend(database, longest(), LEASE_SECONDS)


def due_in(database: Database, model: Any) -> list[float]:
    """Seconds until each row of the table is due."""
    now = database.now()
    with database.read() as session:
        found = session.exec(select(model.due_at).where(col(model.due_at).is_not(None))).all()
    return [(due_at - now).total_seconds() for due_at in found]


def test_row_that_waits_as_long_as_its_step_may_is_left_alone(database: Database) -> None:
    for name, (model, values, seconds) in WAITS.items():
        fill(database, model, 1, due_at=database.now() + timedelta(seconds=seconds), **values)
        assert (name, mend(database)) == (name, 0)
        assert min(due_in(database, model)) > 3_600 - 60


def test_row_whose_wait_began_a_day_ahead_is_due_now(database: Database) -> None:
    """The wait of a row that may wait for longest is taken at its end, of all others at its start."""
    for name, (model, values, seconds) in WAITS.items():
        ahead = DAY if seconds < DAY else DAY + seconds
        fill(database, model, 3, due_at=database.now() + timedelta(seconds=ahead), **values)
        assert (name, mend(database)) == (name, 3)
        assert max(due_in(database, model)) <= 0
        with database.write() as session:
            assert len(claims.claim(session, model, limit=9, lease_seconds=LEASE_SECONDS)) == 3
            session.execute(delete(model))


def test_claimed_row_gets_a_lease_from_now_on_and_keeps_its_owner(database: Database) -> None:
    new_assets(database, 1)
    with database.write() as session:
        (held,) = claims.claim(session, Asset, limit=1, lease_seconds=LEASE_SECONDS + DAY)
    assert mend(database) == 1
    assert LEASE_SECONDS - 30 < max(due_in(database, Asset)) <= LEASE_SECONDS
    with database.write() as session:
        assert held.lease is not None
        assert claims.renew(session, Asset, [held.id], held.lease, LEASE_SECONDS) == 1


def test_more_rows_than_one_transaction_corrects(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_steps, "BATCH", 2)
    fill(database, Callback, 5, due_at=database.now() + timedelta(seconds=DAY))
    assert mend(database) == 5


def strand(parts: Parts) -> Asset:
    """A file in backoff since a moment at which the clock was a day ahead."""
    (asset,) = new_assets(parts.database, 1, due_at=parts.database.now() + timedelta(seconds=DAY))
    return asset


def attempts(parts: Parts) -> int:
    with parts.database.read() as session:
        return session.exec(select(Asset.attempts)).one()


@pytest.mark.databases("sqlite")
def test_worker_tries_such_a_file_at_its_start(parts: Parts) -> None:
    strand(parts)
    with working(parts):
        wait_until(lambda: attempts(parts) > 0)


@pytest.mark.databases("sqlite")
def test_work_once_tries_such_a_file(parts: Parts) -> None:
    strand(parts)
    work_once(parts)
    assert attempts(parts) > 0
