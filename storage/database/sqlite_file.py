"""The file of an SQLite database: made for this user alone, and the same one as long as the process lives.

SQLite writes on into a file that was removed or replaced under it, and says nothing: all of it is gone with the last
connection. 200 was answered to deliveries that nobody will see.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from storage import own_files
from storage.errors import DatabaseUnavailable


class SqliteFile:
    """One path and the file that stood there at the first connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None

    def check(self) -> None:
        """Raises `DatabaseUnavailable` when another file stands at the path, or none. A microsecond."""
        found = self._found()
        if self._identity is None:
            self._identity = found
        elif found != self._identity:
            what = "was replaced" if found else "was removed"
            advice = "stop all that uses it, put the right file there, and start again"
            raise DatabaseUnavailable(f"database: {self.path.absolute()} {what} while it was open: {advice}")

    def make(self) -> None:
        """Make the file where there is none. SQLite gives its -wal and -shm the mode of the file.

        Raises `DatabaseUnavailable`, also for a symlink that another user may have made.
        """
        try:
            own_files.final(self.path)
        except PermissionError as error:
            raise DatabaseUnavailable(f"database: {error.filename}: {error.strerror}") from error
        except OSError:  # SQLite says so
            return
        if self._identity is None:
            with suppress(OSError):  # it is there, or cannot be: SQLite says so
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, own_files.FILE_MODE))
        self.check()

    def _found(self) -> tuple[int, int] | None:
        try:
            state = os.stat(self.path)
        except OSError:
            return None
        return state.st_dev, state.st_ino
