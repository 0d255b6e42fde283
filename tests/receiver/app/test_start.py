"""The start: waiting for a database server within bounds, and the settings of the web server."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from receiver.app.console_parts import make_console
from receiver.app.process import await_schema, web_config
from receiver.app.wiring import Parts
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.operations import heartbeats
from storage.rows.models import Worker
from tests.harness import ROOT, wait_until
from tests.postgres import MigratedDatabases, Postgres
from tests.rows import LONG_AGO


@pytest.fixture
def absent(postgres: Postgres, migrated_databases: MigratedDatabases) -> Iterator[Database]:
    """A database of a server that does not run (yet)."""
    lent = migrated_databases.lend()
    database = Database(next(lent))
    postgres.stop()
    yield database
    database.close()
    if postgres.process is None or postgres.process.poll() is not None:
        postgres.start()
    next(lent, None)


def test_start_waits_for_a_database_server(
    absent: Database, postgres: Postgres, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ""

    def has_said() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return "start.database_not_reached" in said and f"127.0.0.1:{postgres.port}: Connection refused" in said

    with ThreadPoolExecutor(1) as starter:
        started = starter.submit(await_schema, absent, migrate=False)
        wait_until(has_said)
        postgres.start()
        started.result(timeout=30)


def test_start_waits_only_for_a_bounded_time(absent: Database) -> None:
    with pytest.raises(DatabaseUnavailable):
        await_schema(absent, migrate=False, seconds=0)


def test_file_that_cannot_be_opened_ends_the_start_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DatabaseUnavailable):
        await_schema(Database(f"sqlite:///{tmp_path}/missing/receiver.db"), migrate=True)
    assert "start.database_not_reached" not in capsys.readouterr().out


def test_starting_worker_deletes_rows_of_workers_that_died_long_ago(database: Database) -> None:
    old = Worker(host="gone", pid=1, threads=1, started_at=LONG_AGO, seen_at=LONG_AGO)
    with database.write() as session:
        session.add(old)
    first, second = heartbeats.register(database, 1), heartbeats.register(database, 1)
    with database.read() as session:
        assert session.get(Worker, old.id) is None
        assert session.get(Worker, first) is not None
    heartbeats.unregister(database, second)
    assert heartbeats.count_alive(database) == 1


def test_server_keeps_connections_longer_than_clients() -> None:
    """A connection that we close as it is reused loses a delivery."""
    ours = web_config(None, "127.0.0.1", 0).timeout_keep_alive
    routes = (ROOT / "infra" / "proxy" / "routes.yaml").read_text()
    named = re.search(r"idleConnTimeout: ([0-9]+)s", routes)
    assert named is not None
    assert int(named[1]) < ours
    assert ours > 90  # Traefik's own default; nginx and AWS 60 s, Java's HttpClient 30 s


def test_console_starts_without_a_temporary_folder(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only root. No thumbnail is kept then."""

    def none_found() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none_found)
    assert make_console(parts) is not None
