"""The file of an SQLite database: created for this user alone, and the same file in every process that has it open.

If the file or its log is removed or replaced, SQLite silently continues to write to the old one, which is gone with the
last connection. Deliveries were answered 200 that way and lost. So each process checks its own files, and one that
begins checks those of the others.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL

from storage import own_files
from storage.database.open_files import Inodes, OpenFiles
from storage.database.turnstile import SQLITE_BUSY_SECONDS
from storage.errors import DatabaseUnavailable, FileChanged

# checkpoints.py runs the checkpoints outside of commits. Where it does not run, a commit runs one at 64 MB of log. A
# log that another program's long transaction has made longer is cut to that when it is restarted.
SQLITE_PRAGMAS = (
    *("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"),
    *("wal_autocheckpoint=16384", "journal_size_limit=67108864"),
)
# Our execution option for connections on which each statement is a transaction of its own.
NO_BEGIN = "receiver_no_begin"
# Device and inode; None if there is no file.
Identity = tuple[int, int] | None


class SqliteFile:
    """One path, the file that was there at the first connection, and the log and its index while there are any.

    `note`: the file for `OpenFiles`.
    """

    def __init__(self, path: Path, note: Path) -> None:
        self.path = path
        self._identity: Identity = None
        self._open_files = OpenFiles(note)
        self._open: set[int] = set()
        self.begin_in_child()

    def begin_in_child(self) -> None:
        """Leave connections to the parent: SQLite removes the log once all are closed."""
        self._open_files.begin_in_child(is_open=bool(self._open))
        self._lock = threading.Lock()  # guards what follows
        self._open = set()
        self._sides: list[tuple[Path, Identity]] = []

    def check(self) -> None:
        """Raises `FileChanged` if another file, or none, is at a path. Takes a microsecond for each of three.

        As long as a connection is open, SQLite itself neither removes nor replaces the log and its index.
        """
        self._identity = self._identity or _identity(self.path)
        for path, known in ((self.path, self._identity), *self._sides):
            if (found := _identity(path)) != known:
                raise self._changed(path, found)

    def _changed(self, path: Path, found: object) -> FileChanged:
        advice = "stop all that uses the database, and start again; what was committed is still written then"
        if path == self.path:
            advice = "stop all that uses it, put the right file there, and start again"
        change = "was replaced" if found else "was removed"
        return FileChanged(f"database: {path.absolute()} {change} while it was open: {advice}")

    def _check_others(self) -> None:
        """Raises `FileChanged` if another process has other files open than those at the paths.

        A process that ends forgets its note before SQLite removes log and index, so between the two looks here they may
        be gone without a fault. The same result twice is a fault.
        """
        seen = None
        while noted := self._open_files.of_others():
            paths = self._paths()
            found = tuple(map(_inode, paths))
            if (noted, found) == seen:
                raise self._differing(noted, found)
            if noted == found:
                return
            seen = noted, found

    def _differing(self, noted: Inodes, found: tuple[int, ...]) -> FileChanged:
        return next(
            self._changed(path, inode)
            for path, known, inode in zip(self._paths(), noted, found, strict=True)
            if inode != known
        )

    def _paths(self) -> list[Path]:
        return [self.path, *(Path(f"{self.path}{suffix}") for suffix in ("-wal", "-shm"))]

    def opened(self, connection: object) -> None:
        """Note a connection that has read, and with the first one the log and its index.

        Raises `FileChanged` if another process has other files open.
        """
        with self._lock:
            sides = self._sides
            if not self._open:
                sides = [(path, found) for path in self._paths()[1:] if (found := _identity(path))]
            known = {path: found[1] for path, found in ((self.path, self._identity), *sides) if found}
            database, log, index = (known.get(path, 0) for path in self._paths())
            if (noted := self._open_files.note((database, log, index))) != (database, log, index):
                raise self._differing(noted, (database, log, index))
            self._sides = sides
            self._open.add(id(connection))

    def closed(self, connection: object) -> None:
        with self._lock:
            self._open.discard(id(connection))
            if not self._open:
                self._sides = []
                self._open_files.forget()

    def make(self) -> None:
        """Create the file if it does not exist. SQLite gives its -wal and -shm the mode of the file.

        Raises `FileChanged`, and `DatabaseUnavailable` for a symlink that another user may have made.
        """
        try:
            own_files.final(self.path)
        except PermissionError as error:
            raise DatabaseUnavailable(f"database: {error.filename}: {error.strerror}") from error
        except OSError:  # SQLite reports it
            return
        if not self._open:
            self._check_others()
        if self._identity is None:
            with suppress(OSError):  # the file exists, or SQLite reports why it cannot be created
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, own_files.FILE_MODE))
        self.check()


def _identity(path: Path) -> Identity:
    with suppress(OSError):
        state = os.stat(path)
        return state.st_dev, state.st_ino
    return None


def _inode(path: Path) -> int:
    found = _identity(path)
    return found[1] if found else 0


def sqlite_engine(url: URL, file: SqliteFile, begin: str, **pool: Any) -> Engine:
    """An engine whose connections have our pragmas. `begin`: the statement that begins its transactions."""
    options = {"timeout": SQLITE_BUSY_SECONDS, "check_same_thread": False}
    # Errors would quote parameters, which hold tokens and signed links.
    engine = create_engine(url, connect_args=options, hide_parameters=True, **pool)

    @event.listens_for(engine, "do_connect")
    def make(*_: object) -> None:
        """Create the files for this user alone, because they hold prompts and links."""
        file.make()

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # `start` sends BEGIN
        for pragma in SQLITE_PRAGMAS:
            _set_pragma(connection, pragma)
        _set_pragma(connection, "schema_version")  # a read, which opens the log
        try:
            file.opened(connection)
        except FileChanged:
            connection.close()
            raise

    @event.listens_for(engine, "close")
    def forget(connection: Any, _: object) -> None:
        file.closed(connection)

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        if not connection.get_execution_options().get(NO_BEGIN):
            connection.exec_driver_sql(begin)

    return engine


def _set_pragma(connection: sqlite3.Connection, pragma: str) -> None:
    """Wait for other processes: a new file's switch to WAL needs exclusive access, which SQLite's own timeout does not
    cover.
    """
    ends_at = time.monotonic() + SQLITE_BUSY_SECONDS
    while True:
        try:
            connection.execute(f"PRAGMA {pragma}")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > ends_at:
                raise
            time.sleep(0.02)
        else:
            return
