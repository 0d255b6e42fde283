"""Which SQLite file, log and index the running processes have open, noted beside the file.

SQLite takes the files that it finds at the paths. A process that began while another one had a removed index made a new
one: two indexes of one log. What it committed went when the other process ended, which wrote its own rows and removed
the log.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from contextlib import suppress
from pathlib import Path

from storage.own_files import open_own

# Inode numbers of the file, its log and its index; 0 = there is none. A file that is open keeps its number to itself.
Inodes = tuple[int, int, int]
# Whether this process was forked from one that had a database open.
_is_deceived = False


class OpenFiles:
    """The note in `path`. The first process that opens the database writes it.

    While a process has the database open it holds a shared lock on a byte of `path`, which the kernel ends with the
    process. A note without such a lock is of processes that have ended. Linux has these locks; elsewhere, and where
    `path` cannot be written, nothing is noted. Neither does a program that is no receiver.

    It is not the turnstile's file: on a network file system flock() is a lock of all bytes (flock(2)), so no writer
    would get its turn while any process has the database open.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: int | None = None  # holds the shared lock

    def of_others(self) -> Inodes | None:
        """What others have open. None: no other has the database open, or it cannot be seen. For a process that holds
        no lock of its own.
        """
        with suppress(OSError):
            file = open_own(self._path, os.O_RDONLY)
            try:
                return _noted(file)
            finally:
                os.close(file)
        return None

    def note(self, opened: Inodes) -> Inodes:
        """Hold the lock, and note what this process has opened if it is the first. Returns what is noted."""
        with self._lock, suppress(OSError):
            if self._file is not None or _is_deceived:
                return opened
            file = open_own(self._path, os.O_RDWR | os.O_CREAT)
            try:
                noted = _noted(file)
                if noted is None:
                    os.pwrite(file, "{:20} {:20} {:20}\n".format(*opened).encode(), 0)
                if noted in (None, opened) and _lock(file, fcntl.F_RDLCK):
                    self._file, file = file, -1
                return noted or opened
            finally:
                if file >= 0:
                    os.close(file)
        return opened

    def forget(self) -> None:
        """Release the lock. Before the last connection closes, because SQLite then removes log and index."""
        with self._lock:
            if self._file is not None:
                _lock(self._file, fcntl.F_UNLCK)  # a child that was just forked has the descriptor too
                os.close(self._file)
                self._file = None

    def begin_in_child(self, *, is_open: bool) -> None:
        """Leave the lock to the parent, and note nothing if the parent has the database open (`is_open`).

        SQLite believes then that this process holds the parent's locks, and the last other process that closes the
        database removes log and index from under it.
        """
        global _is_deceived
        self._lock = threading.Lock()
        _is_deceived = _is_deceived or is_open
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _noted(file: int) -> Inodes | None:
    """The note, if another process holds the lock."""
    if not hasattr(fcntl, "F_OFD_GETLK"):
        return None
    (kind, *_) = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK)))
    if kind == fcntl.F_UNLCK:
        return None
    with suppress(ValueError):
        database, log, index = map(int, os.pread(file, 100, 0).split())
        return database, log, index
    return None


def _lock(file: int, kind: int) -> bool:
    """Lock or unlock. False: this system has no locks of open files."""
    if not hasattr(fcntl, "F_OFD_SETLK"):
        return False
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _flock(kind))
    return True


# `struct flock`. SQLite's kind of lock belongs to a process, which loses it when any descriptor of the file is closed.
_FLOCK = "hhqqi0q"


def _flock(kind: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 1, 0)
