"""How long a claim takes with a million finished rows, and with 100,000 that wait for later: within 1.3 times.

python -m tests.bench.claims [--finished 1000000] [--waiting 100000] [--rounds 300] [--database sqlite] [--lane assets]

Three databases side by side, whose claims are measured in turn: one with only the due rows, one with finished rows
besides, one with waiting rows. Exit 1 if a ratio is above the goal. Ends by itself; everything is on loopback and in a
temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import bindparam, text
from sqlmodel import Session, col

from storage.database.sessions import Database
from storage.rows import claims, migrations
from storage.rows.models import Asset, Callback, Dispatch, Task
from storage.states import AssetState, CallbackState, Step, TaskState
from tests.postgres import Postgres

GOAL = 1.3
# Rows that are always due, and rows per claim: a lane of eight threads with some rows claimed ahead.
DUE, CLAIMED = 200, 8
KINDS = ("sqlite", "postgresql")
With = ("nothing", "finished", "waiting")
# Rows inserted in one transaction.
CHUNK = 100_000
PAST, LATER = datetime(2026, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=1)
LANES: dict[str, tuple[Any, Sequence[Any], dict[str, dict[str, Any]]]] = {
    "assets": (Asset, (), {"due": {"state": AssetState.DUE}, "finished": {"state": AssetState.ARCHIVED}}),
    "reads": (
        Task,
        (Task.step == Step.READ,),
        {"due": {"state": TaskState.SUBMITTED, "step": Step.READ}, "finished": {"state": TaskState.SUCCEEDED}},
    ),
    "callbacks": (
        Callback,
        (col(Callback.state) == CallbackState.RECEIVED,),
        {"due": {"state": CallbackState.RECEIVED}, "finished": {"state": CallbackState.APPLIED}},
    ),
}


@dataclass
class Times:
    """Seconds of the claiming statement, and of its whole transaction with the check before it and the commit."""

    statement: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def new_row(model: Any, task_id: uuid.UUID, /, **values: Any) -> Any:
    if model is Task:
        name = uuid.uuid4().hex
        start = {"provider": "kling", "created_at": PAST, "request": {"prompt": "a boat"}}
        return Task(external_task_id=name, **{**start, **values})
    if model is Callback:
        body = b"{}" * 200
        key = uuid.uuid4().hex
        return Callback(delivery_key=key, provider="kling", source="push", body=body, received_at=PAST, **values)
    if model is Dispatch:
        return Dispatch(event_id=uuid.uuid4().int >> 70, created_at=PAST, **values)
    place = {"task_id": task_id, "kind": "image", "index": 0, "original": uuid.uuid4().hex}
    expiry = PAST + timedelta(days=30)
    place |= {"source_url": "https://a/b", "created_at": PAST, "files_expire_at": expiry}
    return Asset(id=uuid.uuid4(), **{**place, **values})


def multiply(session: Session, row: Any, count: int) -> None:
    """Insert `count` copies of this existing row, each with a name of its own."""
    table = row.__table__
    on_sqlite = session.get_bind().dialect.name == "sqlite"
    uuid_ = "lower(hex(randomblob(16)))" if on_sqlite else "gen_random_uuid()"
    word = uuid_ if on_sqlite else f"{uuid_}::text"
    fresh = {"external_task_id": word, "delivery_key": word, "index": "n.n", "event_id": "one.event_id + n.n"}
    columns = [name for name in table.columns.keys() if not (name == "id" and isinstance(row, Callback | Dispatch))]  # noqa: SIM118
    if isinstance(row, Asset | Task):
        fresh["id"] = uuid_
    values = ", ".join(fresh.get(name, f'one."{name}"') for name in columns)
    names = ", ".join(f'"{name}"' for name in columns)
    series = "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < :count)"
    chosen = f'SELECT {values} FROM "{table.name}" one, n WHERE one.id = :id'
    statement = f'INSERT INTO "{table.name}" ({names}) {series} {chosen}'
    session.execute(text(statement).bindparams(bindparam("id", row.id, table.c.id.type), count=count))


def fill(database: Database, model: Any, count: int, /, **values: Any) -> None:
    """Insert this many rows of a kind."""
    while count > 0:
        chunk = min(count, CHUNK)
        with database.write() as session:
            task = new_row(Task, uuid.uuid4())
            session.add(task)
            session.flush()
            row = new_row(model, task.id, **values)
            session.add(row)
            session.flush()
            if chunk > 1:
                multiply(session, row, chunk - 1)
        count -= chunk


def prepared(url: str, lane: str, beside: str, rows: int) -> Database:
    """A database with the due rows and this many rows of another kind."""
    database = Database(url)
    migrations.upgrade(database)
    model, _, kinds = LANES[lane]
    if beside == "finished":
        fill(database, model, rows, **kinds["finished"])
    elif beside == "waiting":
        fill(database, model, rows, due_at=LATER, **kinds["due"])
    fill(database, model, DUE, due_at=PAST, **kinds["due"])
    if not database.is_sqlite:  # the server does it by itself within a minute
        with database.write() as session:
            session.execute(text("ANALYZE"))
    return database


def claim_once(database: Database, lane: str, times: Times) -> None:
    """Claim some rows like a worker, and release them."""
    model, where, _ = LANES[lane]
    began = time.perf_counter()
    with database.autocommit_reader() as connection:
        assert connection.execute(claims.any_due(model, where=where)).first()
    with database.write() as session:
        started = time.perf_counter()
        rows = claims.claim(session, model, limit=CLAIMED, lease_seconds=60, where=where)
        times.statement.append(time.perf_counter() - started)
    times.whole.append(time.perf_counter() - began)
    assert len(rows) == CLAIMED
    with database.write() as session:
        for row in rows:
            claims.settle(session, row, due_in=0)


def measure(urls: Sequence[str], lane: str, *, finished: int, waiting: int, rounds: int) -> dict[str, Times]:
    """Times by the kind of the other rows; `urls`: of three empty databases of one kind."""
    amounts = (0, finished, waiting)
    began = time.monotonic()
    databases = [prepared(url, lane, *each) for url, each in zip(urls, zip(With, amounts, strict=True), strict=True)]
    say(f"{databases[0].url.get_backend_name()}, {lane}: set up in {time.monotonic() - began:.0f} s")
    found = {beside: Times() for beside in With}
    for number in range(rounds + 10):
        for beside, database in zip(With, databases, strict=True):
            claim_once(database, lane, found[beside] if number >= 10 else Times())
    for database in databases:
        database.close()
    return found


def ratio(found: dict[str, Times], beside: str) -> float:
    """The ratio of the claiming statement's lower quartiles. The slower times show other work of the machine."""
    return quartile(found[beside].statement) / quartile(found["nothing"].statement)


def quartile(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=4)[0]


def show(found: dict[str, Times]) -> None:
    for beside, times in found.items():
        statement, whole = quartile(times.statement) * 1e3, quartile(times.whole) * 1e3
        say(f"  beside {beside:<9} statement {statement:6.2f} ms, with look and commit {whole:6.2f} ms, "
            f"ratio {ratio(found, beside):.2f}")  # fmt: skip


def say(words: str) -> None:
    print(words, flush=True)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finished", type=int, default=1_000_000)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--database", choices=KINDS, action="append", help="only this one")
    parser.add_argument("--lane", choices=LANES, action="append", help="only this one")
    given = parser.parse_args(arguments)
    worst = 0.0
    for kind in given.database or KINDS:
        for lane in given.lane or LANES:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="receiver-bench-")))
                urls = [f"sqlite:///{folder}/{beside}.db" for beside in With]
                if kind == "postgresql":
                    server = stack.enter_context(Postgres())
                    urls = [server.create_database(beside) for beside in With]
                found = measure(urls, lane, finished=given.finished, waiting=given.waiting, rounds=given.rounds)
            show(found)
            worst = max(worst, *(ratio(found, beside) for beside in With))
    say(f"worst ratio {worst:.2f}, goal {GOAL}")
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
