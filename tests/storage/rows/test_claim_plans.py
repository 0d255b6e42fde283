"""Rows that a claim and a check for work read of a queue, by the databases' own counts: beside 3,000 due rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlmodel import Session, col

from storage.database.sessions import Database
from storage.rows import claims
from storage.rows.models import Asset, Callback, Dispatch, Task
from storage.states import CallbackState, Step
from tests.bench.claims import LATER, PAST, fill

DUE, OTHERS, LIMIT = 3_000, 3_000, 5
LANES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "reads": (Task, Task.step == Step.READ, {"step": Step.READ}),
    "assets": (Asset, Asset.kind == "image", {}),
    "callbacks": (Callback, Callback.state == CallbackState.RECEIVED, {}),
    "events": (Dispatch, col(Dispatch.sink) == "hook", {"sink": "hook"}),
}
# SQLite's virtual machine takes 5 to 30 steps for a row or an entry of an index.
STEPS, EVERY = 20, 20


def queue(database: Database, lane: str) -> tuple[Any, Any]:
    """A lane with a long queue, among rows that are due later and rows that are finished."""
    model, where, values = LANES[lane]
    for count, due_at in ((OTHERS, None), (OTHERS, LATER), (DUE, PAST), (1, PAST - timedelta(days=1))):
        fill(database, model, count, due_at=due_at, **values)
    if model is Asset:  # a claimed file comes with facts of its task, and PostgreSQL reads a few rows without an index
        fill(database, Task, OTHERS, due_at=None)
    return model, where


def claim(session: Session, model: Any, where: Any, **how: bool) -> None:
    rows = claims.claim(session, model, limit=LIMIT, lease_seconds=60, where=(where,), **how)
    assert len(rows) == (0 if how.get("alone") else LIMIT)


def look(session: Session, model: Any, where: Any, *, alone: bool) -> None:
    found = session.execute(claims.any_due(model, alone=alone, where=(where,))).first()
    assert (found is None) is alone


ASKED: dict[str, Callable[[Session, Any, Any], None]] = {
    "look": lambda *asked: look(*asked, alone=False),
    "look for suspects": lambda *asked: look(*asked, alone=True),
    "claim": lambda *asked: claim(*asked),
    "claim in turn": lambda *asked: claim(*asked, in_turn=True),
    "claim alone": lambda *asked: claim(*asked, alone=True),
}


def rows_read_sqlite(session: Session, ask: Callable[[], object]) -> int:
    counted: list[None] = []
    driver: Any = session.connection().connection.driver_connection
    driver.set_progress_handler(lambda: counted.append(None), EVERY)
    ask()
    driver.set_progress_handler(None, 0)
    return len(counted) * EVERY // STEPS


def rows_read_postgresql(session: Session, ask: Callable[[], object]) -> int:
    """The most rows that one node of the statements' plans returns or drops."""
    sent: list[Any] = []
    connection = session.connection()
    event.listen(connection, "before_cursor_execute", lambda *call: sent.append(call[2:4]))
    session.begin_nested()
    ask()
    session.get_nested_transaction().rollback()  # type: ignore[union-attr]
    asked = [call for call in sent if re.match("(SELECT|WITH|UPDATE) ", call[0])]
    plans = [connection.exec_driver_sql("EXPLAIN ANALYZE " + call[0], call[1]).scalars() for call in asked]
    plan = "\n".join(line for lines in plans for line in lines)
    assert not re.search(r"Seq Scan on (?!account)(?!.*never executed)", plan), plan
    found = re.findall(r"rows=([\d.]+) loops=(\d+)|Rows Removed by Filter: (\d+)", plan)
    return int(max(float(rows or gone) * int(loops or 1) for rows, loops, gone in found))


@pytest.mark.parametrize("lane", LANES)
def test_long_queue_is_not_read_to_its_end(database: Database, lane: str) -> None:
    model, where = queue(database, lane)
    rows_read = rows_read_sqlite if database.is_sqlite else rows_read_postgresql
    read: dict[str, int] = {}
    for with_statistics in (False, True) if database.is_sqlite else (True,):
        with database.write() as session:
            session.execute(text("ANALYZE" if with_statistics else "SELECT 1"))
        for name, ask in ASKED.items():
            with database.write() as session:
                read[name] = rows_read(session, partial(ask, session, model, where))
                session.rollback()
        assert max(read.values()) <= claims.SHORT_QUEUE + 2 * LIMIT, read
    assert max(read["look"], read["look for suspects"], read["claim in turn"]) <= 20 * LIMIT, read


@pytest.mark.parametrize("due", [3, 3_000])
def test_files_that_expire_soonest_are_claimed_first_from_any_queue(database: Database, due: int) -> None:
    fill(database, Asset, due, due_at=PAST, files_expire_at=None)
    fill(database, Asset, due, due_at=PAST, files_expire_at=LATER)
    for days, due_at in ((3, PAST), (1, LATER), (2, PAST + timedelta(days=1))):
        fill(database, Asset, 1, due_at=due_at, files_expire_at=PAST + timedelta(days=days))
    with database.write() as session:
        rows = claims.claim(session, Asset, limit=3, lease_seconds=60)
    assert [row.files_expire_at for row in rows] == [*(PAST + timedelta(days=days) for days in (2, 3)), LATER]
