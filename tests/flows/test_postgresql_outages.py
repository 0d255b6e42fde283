"""The whole product on PostgreSQL in users' setups: behind a pooler, turned read-only, moved to another place."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks.task_view import is_over
from storage.database import outages
from tests.harness import wait_until
from tests.moving_address import MovingAddress
from tests.pgbouncer import NEEDED, PgBouncer
from tests.pipeline import Web, assert_archived, callbacks_of, insert_row, task_of, working
from tests.postgres import MigratedDatabases, Postgres
from tests.unreported_tasks import REQUEST

TASKS, DELIVERIES = 6, 60
SETTINGS = {"worker_threads": 2}


@pytest.fixture
def changes() -> dict[str, Any]:
    return dict(SETTINGS)


class Sender:
    """Posts deliveries, each with a body of its own, and counts the answers."""

    def __init__(self, web: Web, parts: Parts) -> None:
        self._url = f"{web.url}/callbacks/kling/{parts.tokens.sign('kling', insert_row(parts, expected=1).id)}"
        self._ready_url = f"{web.url}/readyz"
        self._http = httpx.Client(timeout=20)
        self._count = 0
        self.statuses: Counter[int] = Counter()

    def post(self) -> int:
        self._count += 1
        body = b'{"task_id": "901", "task_status": "processing", "n": %d}' % self._count
        status = self._http.post(self._url, content=body).status_code
        self.statuses[status] += 1
        return status

    def is_ready(self) -> bool:
        return self._http.get(self._ready_url).status_code == 200


@pytest.fixture
def sender(web: Web, parts: Parts) -> Iterator[Sender]:
    made = Sender(web, parts)
    yield made
    made._http.close()


def events(logs: list[Any]) -> Counter[str]:
    return Counter(line["event"] for line in logs if line["log_level"] in ("warning", "error", "critical"))


class TestBehindAPooler:
    @pytest.fixture
    def database_url(self, postgres: Postgres, migrated_databases: MigratedDatabases) -> Iterator[str]:
        lent = migrated_databases.lend()
        with PgBouncer(postgres) as pooler:
            yield pooler.url(next(lent))
        next(lent, None)

    @NEEDED
    def test_tasks_are_archived_and_no_delivery_is_refused(
        self, web: Web, parts: Parts, sandbox: Sandbox, sender: Sender
    ) -> None:
        with capture_logs() as logs, working(parts), ThreadPoolExecutor(8) as threads:
            made = [parts.submitter.submit(REQUEST).task.external_task_id for _ in range(TASKS)]
            statuses = list(threads.map(lambda _: sender.post(), range(DELIVERIES)))
            wait_until(lambda: all(is_over(task_of(parts, each)) for each in made), seconds=60)
        assert statuses == [200] * DELIVERIES
        assert events(logs) == Counter()
        for each in made:
            assert_archived(parts, sandbox, task_of(parts, each))
        assert parts.database.sessions.is_pooled


class TestReadOnly:
    @pytest.fixture
    def database_kind(self) -> str:
        return "postgresql"

    def test_read_only_window_logs_one_line_at_each_end_and_ends_old_sessions(
        self, web: Web, parts: Parts, sender: Sender, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(outages, "STEADY_SECONDS", 1.0)
        name = str(parts.database.url.database)
        assert sender.post() == 200
        with capture_logs() as logs, working(parts):
            with postgres.read_only(name):
                postgres.end_sessions(name)
                wait_until(lambda: not sender.is_ready())
                ends_at = time.monotonic() + 2
                while time.monotonic() < ends_at:
                    assert (sender.post(), sender.is_ready()) == (503, False)
            wait_until(lambda: sender.post() == 200)
            wait_until(sender.is_ready)
            wait_until(lambda: [line["event"] for line in logs].count("database.recovered") == 1)
        assert set(events(logs)) <= {"database.lost", "group_commit.delegated"}
        assert events(logs)["database.lost"] == 1
        assert len(callbacks_of(parts)) == sender.statuses[200]


class TestMoved:
    @pytest.fixture
    def primary(self, postgres_data: Path) -> Iterator[Postgres]:
        with Postgres(data=postgres_data) as server:
            yield server

    @pytest.fixture
    def address(self, primary: Postgres) -> Iterator[MovingAddress]:
        with MovingAddress(primary.port) as address:
            yield address

    @pytest.fixture
    def database_url(self, primary: Postgres, address: MovingAddress) -> str:
        url = primary.create_database("moved", MigratedDatabases.template)
        return url.replace(f":{primary.port}/", f":{address.port}/")

    def test_a_primary_at_another_port_is_found_and_nothing_is_lost(
        self, web: Web, parts: Parts, sender: Sender, sandbox: Sandbox, primary: Postgres, address: MovingAddress,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(outages, "STEADY_SECONDS", 1.0)
        assert sender.post() == 200
        with capture_logs() as logs, working(parts):
            made = [parts.submitter.submit(REQUEST).task.external_task_id for _ in range(TASKS)]
            primary.stop()
            wait_until(lambda: sender.post() == 503)
            assert not sender.is_ready()
            primary.move()
            primary.start()
            address.move(primary.port)
            wait_until(lambda: sender.post() == 200)
            wait_until(sender.is_ready)
            wait_until(lambda: all(is_over(task_of(parts, each)) for each in made), seconds=60)
            wait_until(lambda: [line["event"] for line in logs].count("database.recovered") == 1)
        assert "worker.step_failed" not in events(logs) and events(logs)["database.lost"] == 1
        for each in made:
            assert_archived(parts, sandbox, task_of(parts, each), manifests=3)  # at most two commits fail
        assert len([row for row in callbacks_of(parts) if row.source == "push"]) >= sender.statuses[200]
