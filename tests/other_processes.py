"""What another process does beside a test, forked from the one that has imported everything (`tests.forked`)."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sqlalchemy import text

from storage.database.sessions import Database
from storage.database.turnstile import Turnstile
from storage.errors import FetchTooLarge
from storage.fetch.addresses import AddressPolicy
from storage.fetch.client import Fetcher
from storage.spool import spool
from tests.forked import FORKS


@contextmanager
def forked(run: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """`run(connection, *arguments)` in a process of its own, and the other end of its connection."""
    ours, its = FORKS.Pipe()
    process = FORKS.Process(target=run, args=(its, *arguments))
    process.start()
    its.close()
    with ours:
        try:
            yield ours
        finally:
            process.kill()
            process.join()


def write(connection: Connection, url: str) -> None:
    """Write a hundred times, then send the longest of these writes in seconds."""
    database, longest = Database(url), 0.0
    connection.send("ready")
    for _ in range(100):
        started = time.monotonic()
        with database.write() as session:
            session.execute(text("UPDATE counter SET value = value"))
        longest = max(longest, time.monotonic() - started)
    database.close()
    connection.send(longest)


def take_turns(connection: Connection, folder: Path) -> None:
    """Increase the number in a file two hundred times, once the test says so."""
    turnstile, file = Turnstile(folder / "db.lock"), folder / "count"
    connection.send("ready")
    connection.recv()
    for _ in range(200):
        with turnstile.turn():
            file.write_text(str(int(file.read_text()) + 1))
    turnstile.close()
    connection.send("done")


def fetch(connection: Connection, port: int, max_bytes: int) -> None:
    """Fetch a file that is too large, then send by how many MiB this process has grown at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fetcher = Fetcher(AddressPolicy(private_hosts=frozenset({("127.0.0.1", port)})), max_bytes=max_bytes)
    try:
        with spool(None) as sink:
            fetcher.fetch(f"http://127.0.0.1:{port}/", sink)
    except FetchTooLarge:
        connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    fetcher.close()


def hold(connection: Connection, url: str) -> None:
    """Insert a row into `one` and keep the database open until the test says so."""
    database = Database(url)
    with database.autocommit_writer() as writer:
        writer.exec_driver_sql("INSERT INTO one VALUES (2)")
    connection.send("ready")
    connection.recv()
    database.close()


def come_and_go(connection: Connection, url: str) -> None:
    """Open the database, write and close it, fifty times."""
    connection.send("ready")
    connection.recv()
    for _ in range(50):
        database = Database(url)
        with database.autocommit_writer() as writer:
            writer.exec_driver_sql("INSERT INTO one VALUES (3)")
        database.close()
    connection.send("done")
