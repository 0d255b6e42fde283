"""An SQLite file that is removed or replaced under a running process takes no more writes."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import httpx
import pytest
from sqlalchemy import text

from receiver.app.wiring import Parts
from storage.database.sessions import Database
from storage.database.turnstile import Turnstile
from storage.errors import DatabaseUnavailable, FileChanged
from tests.other_processes import come_and_go, forked, hold
from tests.pipeline import Web, insert_row
from tests.receiver.web.test_callbacks import BODY, path_of


@pytest.fixture
def sqlite_file(tmp_path: Path) -> Path:
    return tmp_path / "own.db"


@pytest.fixture
def own(sqlite_file: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{sqlite_file}")
    write(database, "CREATE TABLE one (two)")
    yield database
    database.close()


def write(database: Database, statement: str = "INSERT INTO one VALUES (1)") -> None:
    with database.autocommit_writer() as connection:
        connection.exec_driver_sql(statement)


def test_a_removed_file_is_reported_and_not_made_again(own: Database, sqlite_file: Path) -> None:
    kept = sqlite_file.rename(sqlite_file.with_name("kept.db"))
    for use in (write, Database.now):
        with pytest.raises(DatabaseUnavailable, match="was removed while it was open"):
            use(own)
    assert not sqlite_file.exists()
    kept.rename(sqlite_file)
    write(own)


def test_a_replaced_file_is_reported_and_not_written(own: Database, sqlite_file: Path) -> None:
    copy = Path(shutil.copy(sqlite_file, sqlite_file.with_name("copy.db")))
    before = copy.read_bytes()
    copy.rename(sqlite_file)
    with pytest.raises(DatabaseUnavailable, match="was replaced while it was open: stop all that uses it"):
        write(own)
    assert sqlite_file.read_bytes() == before


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_log_that_is_gone_is_reported_and_nothing_committed_is_lost(
    own: Database, sqlite_file: Path, suffix: str, what: str
) -> None:
    write(own)
    log = Path(f"{sqlite_file}{suffix}")
    if what == "replaced":
        Path(shutil.copy(log, f"{log}.copy")).rename(log)
    else:
        log.unlink()
    with pytest.raises(DatabaseUnavailable, match=f"{suffix} was {what} while it was open: stop all that uses"):
        write(own)
    own.close()
    again = Database(f"sqlite:///{sqlite_file}")
    write(again)
    with again.read() as session:
        assert session.scalar(text("SELECT count(*) FROM one")) == 2
    again.close()


def test_a_log_that_sqlite_removed_with_the_last_connection_is_no_fault(own: Database, sqlite_file: Path) -> None:
    write(own)
    own.writer.dispose()
    own.reader.dispose()
    assert not Path(f"{sqlite_file}-wal").exists()
    write(own)


def count(database: Database) -> int:
    with database.read() as session:
        return int(session.scalar(text("SELECT count(*) FROM one")) or 0)


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_new_process_is_refused_while_another_has_removed_files_open(
    own: Database, sqlite_file: Path, suffix: str, what: str
) -> None:
    """SQLite makes a new log or index beside it. A row of the new process went when the other one ended."""
    own.close()
    file = Path(f"{sqlite_file}{suffix}")
    with forked(hold, f"sqlite:///{sqlite_file}") as other:
        assert other.recv() == "ready"
        kept = Path(shutil.copy(file, f"{file}.kept"))
        file.unlink()
        if what == "replaced":
            shutil.copy(kept, file)
        begun = Database(f"sqlite:///{sqlite_file}")
        for use in (write, Database.now):
            with pytest.raises(FileChanged, match=f"{file.name} was {what} while it was open: stop all"):
                use(begun)
        begun.close()
        assert file.exists() == (what == "replaced"), "SQLite has opened it"
        other.send("end")
        with pytest.raises(EOFError):
            other.recv()
    if not suffix:
        kept.rename(file)
    again = Database(f"sqlite:///{sqlite_file}")
    write(again)
    assert count(again) == 2
    again.close()


def test_a_process_begins_after_all_others_were_killed_whatever_is_gone(own: Database, sqlite_file: Path) -> None:
    own.close()
    for suffix in ("", "-shm"):
        with forked(hold, f"sqlite:///{sqlite_file}") as killed:
            assert killed.recv() == "ready"
        if suffix:
            Path(f"{sqlite_file}{suffix}").unlink()
        begun = Database(f"sqlite:///{sqlite_file}")
        write(begun)
        begun.close()
        assert count(own) == (2, 4)[bool(suffix)]
        own.close()


def test_a_child_of_a_process_that_has_it_open_keeps_no_other_out(own: Database, sqlite_file: Path) -> None:
    """SQLite gives it no locks of its own, and removes its log with the parent's last connection."""
    write(own)
    ours, its = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=hold, args=(its, f"sqlite:///{sqlite_file}"))
    child.start()
    try:
        assert ours.recv() == "ready"
        own.close()
        begun = Database(f"sqlite:///{sqlite_file}")
        write(begun)
        begun.close()
    finally:
        child.kill()
        child.join()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_waits_until_no_other_thread_uses_sqlite(own: Database) -> None:
    """A child inherited a lock of SQLite. It waited for ever inside its turn, and so did every writer of the file."""
    own.keep_forks_out()
    inside, ended = threading.Event(), threading.Event()

    def read() -> None:
        with own.read(), own.read():
            inside.set()
            time.sleep(0.3)
            ended.set()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(read)
        assert inside.wait(10)
        with own.read():  # its own reads do not hold a fork up
            child = os.fork()
        if not child:
            os._exit(0 if ended.is_set() else 1)
        assert os.waitpid(child, 0) == (child, 0)
        assert pool.submit(own.now).result(10)  # the gate is open again


def lock_all_bytes(file: TextIO, operation: int) -> None:
    """flock() of a network file system (Linux' flock(2))."""
    kind = {fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_UN: fcntl.F_UNLCK}[operation & ~fcntl.LOCK_NB]
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", kind, os.SEEK_SET, 0, 0, 0))


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="needs locks of open files")
def test_a_process_that_has_it_open_keeps_no_writer_out_on_a_network_file_system(
    own: Database, sqlite_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.now()
    monkeypatch.setattr(fcntl, "flock", lock_all_bytes)
    begun = Database(f"sqlite:///{sqlite_file}")
    assert isinstance(begun.turnstile, Turnstile)
    assert begun.turnstile.is_entered_at_once()
    begun.turnstile.leave()
    begun.close()


def test_processes_that_begin_and_end_at_once_refuse_nothing(own: Database, sqlite_file: Path) -> None:
    own.close()
    with ExitStack() as stack:
        others = [stack.enter_context(forked(come_and_go, f"sqlite:///{sqlite_file}")) for _ in range(3)]
        for step in ("ready", "done"):
            for other in others:
                assert other.recv() == step
            for other in others if step == "ready" else []:
                other.send("go")
    assert count(own) == 150


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_no_delivery_is_acknowledged_into_a_deleted_file(web: Web, parts: Parts) -> None:
    url = web.url + path_of(parts, insert_row(parts))
    assert httpx.post(url, content=BODY).status_code == 200
    file = Path(str(parts.database.url.database))
    file.rename(file.with_name("moved.db"))
    try:
        for number in range(3):
            assert httpx.post(url, content=b'{"n": %d}' % number, timeout=30).status_code == 503
        assert httpx.get(f"{web.url}/readyz").status_code == 503
        assert not file.exists()
    finally:
        file.with_name("moved.db").rename(file)
    assert httpx.post(url, content=b'{"n": 4}', timeout=30).status_code == 200
