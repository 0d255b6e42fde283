"""`/readyz`: its load on the database, and its answer when the database fails for deliveries alone."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event, text

from receiver.app import checks
from receiver.app.findings import Status
from receiver.app.wiring import Parts
from receiver.cli import show
from receiver.web import readiness
from storage.bucket.bucket import Bucket
from storage.database import free_space
from storage.database.sessions import Database
from storage.operations import heartbeats
from storage.rows.models import Task
from tests.harness import wait_until
from tests.pipeline import Web, callbacks_of, insert_row

ON_SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"])
CALLERS = 8


def ready_status(web: Web) -> int:
    return httpx.get(f"{web.url}/readyz", timeout=10).status_code


def deliver(web: Web, parts: Parts, task: Task) -> int:
    path = f"/callbacks/kling/{parts.tokens.sign('kling', task.id)}"
    return httpx.post(
        web.url + path, content=b'{"task_id": "901", "task_status": "processing"}', timeout=10
    ).status_code


@pytest.mark.databases("sqlite")
def test_eight_callers_check_the_database_once_a_second(web: Web, parts: Parts) -> None:
    checks: list[float] = []

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE FROM worker"):
            checks.append(time.monotonic())

    def ask_often(_: int) -> list[int]:
        return [ready_status(web) for _ in range(20)]

    event.listen(parts.database.writer, "before_cursor_execute", count)
    started = time.monotonic()
    with ThreadPoolExecutor(CALLERS) as callers:
        answers = [answer for some in callers.map(ask_often, range(CALLERS)) for answer in some]
    assert answers == [200] * CALLERS * 20
    assert 1 <= len(checks) <= 1 + (time.monotonic() - started) / readiness.FRESH_SECONDS


@ON_SQLITE
def test_check_that_hangs_is_not_ready_and_delays_nobody(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ready_status(web) == 200
    monkeypatch.setattr(readiness, "HANG_SECONDS", 0.3)
    time.sleep(readiness.FRESH_SECONDS)
    with parts.database.write(), ThreadPoolExecutor(CALLERS) as callers:
        wait_until(lambda: ready_status(web) == 503)
        started = time.monotonic()
        assert list(callers.map(ready_status, [web] * CALLERS)) == [503] * CALLERS
        assert time.monotonic() - started < 2
    wait_until(lambda: ready_status(web) == 200)


@ON_SQLITE
def test_caller_that_asks_seldom_gets_no_result_of_then(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ready_status(web) == 200
    monkeypatch.setattr(readiness, "HANG_SECONDS", 2 * readiness.PATIENCE_SECONDS)
    monkeypatch.setattr(readiness, "RECENT_SECONDS", 0.5)
    time.sleep(readiness.FRESH_SECONDS)
    with parts.database.write() as session:
        session.execute(text("DELETE FROM worker"))
        assert ready_status(web) == 503
    wait_until(lambda: ready_status(web) == 200)


def test_check_that_begins_as_a_slow_one_ends_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "FRESH_SECONDS", 0.0)

    async def ask() -> list[dict[str, str]]:
        asked = readiness.Readiness(lambda: time.sleep(0.2) or {"database": "ok"}, {"database": "hangs"})
        waiting = asyncio.create_task(asked.checks())
        await asyncio.sleep(0)
        while asked._checking is not None:
            await asyncio.sleep(0)
        return [asked.latest(), await waiting]

    assert asyncio.run(ask()) == [{"database": "ok"}] * 2


@pytest.fixture
def silent_store(parts: Parts) -> Iterator[socket.socket]:
    """A store that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        parts.__dict__["bucket"] = Bucket(parts.bucket.name, endpoint_url=url)
        yield server


@ON_SQLITE
def test_silent_store_delays_only_callers_that_need_it(silent_store: socket.socket, web: Web, parts: Parts) -> None:
    heartbeats.register(parts.database, 1)
    assert httpx.get(f"{web.url}/readyz", timeout=10).json() == {"status": "ok"}, "the store was not waited for"
    wait_until(lambda: httpx.get(f"{web.url}/readyz", timeout=10).json() == {"status": "degraded"})
    assert httpx.get(f"{web.url}/readyz?strict=1", timeout=10).status_code == 503


@ON_SQLITE
def test_store_is_asked_while_the_database_is_waited_for(
    silent_store: socket.socket, web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "HANG_SECONDS", 60.0)
    silent_store.settimeout(20)
    with ThreadPoolExecutor(1) as callers:
        with parts.database.write():
            answer = callers.submit(httpx.get, f"{web.url}/readyz?strict=1", timeout=90)
            silent_store.accept()[0].close()
            assert not answer.done()
        assert answer.result().status_code == 503


@ON_SQLITE
@pytest.mark.parametrize("changes", [{"metrics_token": "a-token"}])
def test_lack_of_room_on_the_disk_is_named_wherever_an_operator_looks(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(free_space, "MIN_FREE_SHARE", 2.0)  # no disk has as much
    assert wait_until(lambda: deliver(web, parts, insert_row(parts)) == 503)
    ready = httpx.get(f"{web.url}/readyz", headers={"Authorization": "Bearer a-token"}, timeout=10)
    fault = next(each for each in checks.database(parts) if each.status is Status.FAULT)
    show.show_latest(parts, 1)
    says = "% free, and deliveries need 200 %"
    assert ready.status_code == 503 and says in ready.json()["checks"]["intake"]
    assert fault.name == "database: room" and says in fault.line
    assert says in capsys.readouterr().out


def set_read_only(database: Database, how: str) -> None:
    """Turn the database read-only under the running server, like a full disk, or back."""
    name = database.url.database
    with database.autocommit_writer() as connection:
        if database.is_sqlite:
            connection.execute(text(f"PRAGMA query_only = {how}"))
            return
        connection.execute(text("SET default_transaction_read_only = off"))
        connection.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {how}'))
    database.writer.dispose()


def test_delivery_that_meets_a_read_only_database_makes_it_not_ready(web: Web, parts: Parts) -> None:
    task = insert_row(parts)
    assert ready_status(web) == 200
    set_read_only(parts.database, "on")
    try:
        assert deliver(web, parts, task) == 503
        ends_at = time.monotonic() + 2 * readiness.FRESH_SECONDS
        while time.monotonic() < ends_at:
            assert ready_status(web) == 503
            time.sleep(0.05)
    finally:
        set_read_only(parts.database, "off")
    wait_until(lambda: ready_status(web) == 200)
    assert callbacks_of(parts) == []
    assert deliver(web, parts, task) == 200


@pytest.fixture
def no_more_growth() -> Iterator[Callable[[int], None]]:
    """Limit the size of files of this process, like a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@ON_SQLITE
def test_file_that_takes_small_deliveries_alone_is_not_ready(
    web: Web, parts: Parts, no_more_growth: Callable[[int], None]
) -> None:
    task, statuses = insert_row(parts), list[int]()
    path = f"{web.url}/callbacks/kling/{parts.tokens.sign('kling', task.id)}"
    no_more_growth(Path(f"{parts.database.url.database}").stat().st_size + 2**20)
    while 503 not in statuses and len(statuses) < 60:
        statuses.append(httpx.post(path, content=os.urandom(60_000), timeout=10).status_code)
    ends_at = time.monotonic() + 2 * readiness.FRESH_SECONDS
    while time.monotonic() < ends_at:
        statuses.append(httpx.post(path, content=os.urandom(16), timeout=10).status_code)
        assert ready_status(web) == 503
        time.sleep(0.05)
    assert statuses.count(200) == len(callbacks_of(parts))
    no_more_growth(resource.RLIM_INFINITY)
    wait_until(lambda: ready_status(web) == 200)
    assert httpx.post(path, content=os.urandom(60_000), timeout=10).status_code == 200
