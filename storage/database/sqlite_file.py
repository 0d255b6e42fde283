"""The file of an SQLite database: created for this user alone, and the same file for the whole life of the process.

If the file is removed or replaced, SQLite silently continues to write to the old one, which is gone with the last
connection. Deliveries were answered 200 that way and lost.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from storage import own_files
from storage.errors import DatabaseUnavailable


class SqliteFile:
    """One path, and the file that was there at the first connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None

    def check(self) -> None:
        """Raises `DatabaseUnavailable` if another file, or none, is at the path. Takes a microsecond."""
        found = None
        with suppress(OSError):
            state = os.stat(self.path)
            found = state.st_dev, state.st_ino
        if self._identity is None:
            self._identity = found
        elif found != self._identity:
            what = "was replaced" if found else "was removed"
            advice = "stop all that uses it, put the right file there, and start again"
            raise DatabaseUnavailable(f"database: {self.path.absolute()} {what} while it was open: {advice}")

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
