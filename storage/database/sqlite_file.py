"""The file of an SQLite database: created for this user alone, and the same file for the whole life of the process.

If the file or its log is removed or replaced, SQLite silently continues to write to the old one, which is gone with the
last connection. Deliveries were answered 200 that way and lost.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from storage import own_files
from storage.errors import DatabaseUnavailable

# Device and inode; None if there is no file.
Identity = tuple[int, int] | None


class SqliteFile:
    """One path, the file that was there at the first connection, and the log and its index while there are any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: Identity = None
        self.begin_in_child()

    def begin_in_child(self) -> None:
        """Leave connections to the parent: SQLite removes the log once all are closed."""
        self._open: set[int] = set()
        self._sides: list[tuple[Path, Identity]] = []

    def check(self) -> None:
        """Raises `DatabaseUnavailable` if another file, or none, is at a path. Takes a microsecond for each of three.

        As long as a connection is open, SQLite itself neither removes nor replaces the log and its index.
        """
        found = _identity(self.path)
        if self._identity is None:
            self._identity = found
        elif found != self._identity:
            advice = "stop all that uses it, put the right file there, and start again"
            raise DatabaseUnavailable(f"database: {_changed(self.path, found)}: {advice}")
        for path, known in self._sides:
            if (found := _identity(path)) != known:
                advice = "stop all that uses the database, and start again; what was committed is still written then"
                raise DatabaseUnavailable(f"database: {_changed(path, found)}: {advice}")

    def opened(self, connection: object) -> None:
        """Note a connection that has read, and with the first one the log and its index."""
        if not self._open:
            paths = [Path(f"{self.path}{suffix}") for suffix in ("-wal", "-shm")]
            self._sides = [(path, found) for path in paths if (found := _identity(path))]
        self._open.add(id(connection))

    def closed(self, connection: object) -> None:
        self._open.discard(id(connection))
        if not self._open:
            self._sides = []

    def make(self) -> None:
        """Create the file if it does not exist. SQLite gives its -wal and -shm the mode of the file.

        Raises `DatabaseUnavailable`, also for a symlink that another user may have made.
        """
        try:
            own_files.final(self.path)
        except PermissionError as error:
            raise DatabaseUnavailable(f"database: {error.filename}: {error.strerror}") from error
        except OSError:  # SQLite reports it
            return
        if self._identity is None:
            with suppress(OSError):  # the file exists, or SQLite reports why it cannot be created
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, own_files.FILE_MODE))
        self.check()


def _identity(path: Path) -> Identity:
    with suppress(OSError):
        state = os.stat(path)
        return state.st_dev, state.st_ino
    return None


def _changed(path: Path, found: Identity) -> str:
    return f"{path.absolute()} {'was replaced' if found else 'was removed'} while it was open"
