"""A file host that sends slowly holds some of the archive's threads, and never all of them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from receiver.app import jobs
from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.workers import worker
from storage.archive import slow_hosts
from storage.archive.slow_hosts import OtherHosts
from storage.database.sessions import Database
from storage.rows import claims
from storage.rows.models import Asset, Task
from storage.states import ArchiveState
from tests.archived_tasks import REQUEST
from tests.harness import wait_until
from tests.pipeline import make_due_now, task_of, working
from tests.rows import LONG_AGO, new_asset, new_task

THREADS, SLOW_FILES = 2, 12


class DrippingHost:
    """Answers each request with a file that comes at 10 kB/s, above the least speed, for as long as it runs."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.name = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.serving = 0
        self._ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listener.accept()[:1], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65_536)
            self.serving += 1
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
            while not self._ended.wait(0.1):
                connection.sendall(bytes(1_000))

    def end(self) -> None:
        self._ended.set()
        self._listener.close()


@pytest.fixture
def slow() -> Iterator[DrippingHost]:
    host = DrippingHost()
    yield host
    host.end()


@pytest.fixture
def more_slow() -> Iterator[list[DrippingHost]]:
    hosts = [DrippingHost() for _ in range(3)]
    yield hosts
    for host in hosts:
        host.end()


@pytest.fixture
def changes(sandbox: Sandbox, slow: DrippingHost, more_slow: list[DrippingHost]) -> dict[str, Any]:
    hosts = ",".join([sandbox.url.removeprefix("http://"), slow.name, *(host.name for host in more_slow)])
    return {
        "public_url": "", "poll_after_seconds": 3_600, "worker_threads": THREADS, "private_result_hosts": hosts,
        "grace_seconds": 0,
    }  # fmt: skip


def slow_files(database: Database, host: str, count: int = SLOW_FILES) -> list[Asset]:
    """Files of that host, which the provider deletes before all others."""
    with database.write() as session:
        task = new_task(session, due_at=None)
        values = [{"source_url": f"http://{host}/{index}", "files_expire_at": LONG_AGO} for index in range(count)]
        return [new_asset(session, task, index, **values[index]) for index in range(count)]


@pytest.mark.databases("sqlite")
def test_slow_host_delays_no_other_host(
    parts: Parts, sandbox: Sandbox, slow: DrippingHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LASTING_SECONDS", 0.2)
    monkeypatch.setattr(jobs, "SPARE_CLAIM_PAUSE_SECONDS", 0.05)
    slow_files(parts.database, slow.name)
    with working(parts):
        wait_until(lambda: slow.serving == THREADS)  # every thread of the setting serves any host
        parts.submitter.submit({**REQUEST, "n": 4}, external_task_id="quick")
        wait_until(lambda: sandbox.ledger().task("quick").status == "succeed")
        make_due_now(parts, Task)
        wait_until(lambda: task_of(parts, "quick").archive is ArchiveState.ARCHIVED)
        assert slow.serving == THREADS
        slow.end()


@pytest.mark.databases("sqlite")
def test_several_slow_hosts_delay_no_other_host(
    parts: Parts, sandbox: Sandbox, slow: DrippingHost, more_slow: list[DrippingHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each slow host holds a spare thread for one file. Its other files wait for the archive's own threads."""
    monkeypatch.setattr(worker, "LASTING_SECONDS", 0.2)
    monkeypatch.setattr(jobs, "SPARE_CLAIM_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(slow_hosts, "SPARE_SECONDS", 1.0)
    slow_files(parts.database, slow.name)
    with working(parts):
        wait_until(lambda: slow.serving == THREADS)
        for host in more_slow:
            slow_files(parts.database, host.name)
        wait_until(lambda: sum(host.serving for host in more_slow) > 0)
        parts.submitter.submit({**REQUEST, "n": 4}, external_task_id="quick")
        wait_until(lambda: sandbox.ledger().task("quick").status == "succeed")
        make_due_now(parts, Task)
        wait_until(lambda: task_of(parts, "quick").archive is ArchiveState.ARCHIVED, seconds=40)
        assert slow.serving == THREADS and max(host.serving for host in more_slow) <= 2
        for host in (slow, *more_slow):
            host.end()


def test_spare_threads_take_nothing_while_files_come_quickly(database: Database) -> None:
    lasting = [Asset(source_url=f"https://a.example/{index}") for index in range(6)]
    slow_files(database, "b.example")
    assert OtherHosts(database, 8).conditions([]) is None
    assert OtherHosts(database, 8).conditions(lasting[:5]) is None  # a quarter of the threads has no slow file
    assert OtherHosts(database, 8).conditions(lasting) is not None
    assert OtherHosts(database, 1).conditions(lasting[:1]) is not None


@pytest.mark.parametrize(
    ("url", "is_taken"),
    [
        ("https://b.example/z3.png?x=a.example", True),
        (" https://A.example:443/2", False),
        ("https://a.example./3", False),
        ("https://a_example/4", True),
    ],
)
def test_spare_threads_take_files_of_other_hosts_alone(database: Database, url: str, is_taken: bool) -> None:
    slow = slow_files(database, "a.example")
    with database.write() as session:
        new_asset(session, new_task(session, due_at=None), 0, source_url=url)
    where = OtherHosts(database, 2).conditions(slow)
    assert (where is not None) is is_taken
    with database.write() as session:
        found = claims.claim(session, Asset, limit=9, lease_seconds=5, where=where) if where else []
    assert [asset.source_url for asset in found] == ([url] if is_taken else [])
