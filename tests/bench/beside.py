"""Row 15: the slowest statement of pages and commands, with 1,000,000 tasks and with 20,000."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import event

from receiver.tasks.operate import Operator
from storage.database.sessions import Database
from storage.filters import TaskFilter
from storage.operations.ended import EndedLastDay
from storage.operations.lists import newest_tasks
from storage.operations.measures import measure
from storage.rows import events, tasks
from storage.rows.reports import Schedule
from tests.bench import stage
from tests.bench.million import DAYS, TASKS, build
from tests.bench.table import Sample, say
from tests.statements import hear_prepared_statements

FEW, SMALL = 20_000, (50, 200)
ROUNDS = 3
# Tasks in the range of a dry run of `replay` and of `prune`, beside few and beside many: more than one batch.
CONCERNED = 2_500
# The growth of shorter statements is noise.
LEAST_SECONDS = 0.005


def slowest_statement(small: bool) -> Sample:
    """Milliseconds of the query that grows most, on either database; the figure is the factor of its growth."""
    return max(_found(small), key=lambda sample: sample.figure)


def longest_statement(small: bool) -> Sample:
    """Milliseconds of the longest query with many tasks, from the run of the other row, or from a new one."""
    longest = max(_last.pop() if _last else _found(small), key=lambda sample: sample.ours)
    return Sample(longest.ours, longest.reference, value=longest.ours)


_last: list[list[Sample]] = []


def _found(small: bool) -> list[Sample]:
    """Milliseconds of each query on each database, with many tasks and beside few."""
    few, many = SMALL if small else (FEW, TASKS)
    samples = []
    with stage.folder() as place, ExitStack() as stack:
        for kind in ("sqlite", "postgresql"):
            create = stack.enter_context(stage.databases(kind, place))
            found = []
            for count in (few, many):
                database = Database(create(f"tasks_{count}"))
                build(database, count)
                looks = _looks(database, count).items()
                found.append({look: _slowest(database, run, 1 if small else ROUNDS) for look, run in looks})
                database.close()
            for look, seconds in found[1].items():
                samples.append(Sample(seconds * 1e3, max(found[0][look], LEAST_SECONDS) * 1e3))
                say(
                    f"row 15, {kind}, {look}: {seconds * 1e3:.1f} ms beside many, {found[0][look] * 1e3:.1f} beside few"
                )
    _last[:] = [samples]
    return samples


def _looks(database: Database, count: int) -> dict[str, Callable[[], object]]:
    concerned = timedelta(days=DAYS) * min(1, CONCERNED / count)
    operator, day = Operator(database, {}, Schedule(), dry_run=True), EndedLastDay()

    def reading(look: Callable[[Any], object]) -> Callable[[], object]:
        def run() -> object:
            with database.read() as session:
                return look(session)

        return run

    return {
        "scrape": reading(lambda session: measure(session, deadline_seconds=21_600, ended=day)),
        "rare events": reading(lambda session: events.page(session, 0, 100, ["account.paused"])),
        "events": reading(lambda session: events.page(session, 0, 100, ["task.archived"])),
        "page": reading(lambda session: tasks.newest(session, 500, skip=500)),
        "console": reading(lambda session: newest_tasks(session, TaskFilter(state="failed"), None)),
        "retry": lambda: operator.retry_failed(limit=10),
        "replay": lambda: operator.replay(since=database.now() - concerned),
        "reconcile": operator.reconcile,
        "prune": lambda: operator.prune(timedelta(days=DAYS) - concerned),
    }


def _slowest(database: Database, run: Callable[[], object], count: int) -> float:
    """Seconds of the slowest statement, in the quickest of some rounds."""
    rounds = []
    for _ in range(count):
        with _timed_statements(database) as seconds:
            run()
        rounds.append(max(seconds))
    return min(rounds)


@contextmanager
def _timed_statements(database: Database) -> Iterator[list[float]]:
    seconds: list[float] = []
    began = 0.0

    def begin(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(*_: Any) -> None:
        seconds.append(time.perf_counter() - began)

    hear_prepared_statements()
    engines = [database.reader, database.writer] if database.is_sqlite else [database.writer]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", begin)
        event.listen(engine, "after_cursor_execute", end)
    yield seconds
    for engine in engines:
        event.remove(engine, "before_cursor_execute", begin)
        event.remove(engine, "after_cursor_execute", end)
