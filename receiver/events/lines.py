"""Events as JSON lines: to a file, flushed to the disk before they count as delivered, or to standard output.

Each batch opens the file again, so logrotate may move it at any time, and a batch during which it did is written again.
Several processes may write to the same file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import shlex
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from receiver.events.dispatcher import Message, NotTried, Outcome, SinkUnavailable
from storage.own_files import open_own

# Events that share one flush to the disk.
BATCH = 100
STDOUT = 1
# How long a batch waits for other writers. The sink is tried again later.
LOCK_SECONDS, LOCK_INTERVAL_SECONDS = 10.0, 0.01
FLAGS = os.O_APPEND | os.O_RDWR


class Lines:
    """A `receiver.events.dispatcher.Sink`. `path`: None = standard output, where a written line counts as delivered."""

    batch = BATCH
    threads = 1

    def __init__(self, path: Path | None, *, wait_seconds: float = LOCK_SECONDS) -> None:
        self._path = path
        self._wait_seconds = wait_seconds
        self._is_torn = False  # whether the last write ended within a line

    def send(self, messages: Sequence[Message]) -> list[Outcome]:
        """All or nothing: after a failure the same lines are written again, whatever part of them was written."""
        lines = b"".join(message.body + b"\n" for message in messages)
        try:
            with self._opened() as file:
                if _ends_within_line(file, self._is_torn):
                    self._write(file, b"\n")
                self._write(file, lines)
        except OSError as error:
            failed = SinkUnavailable(f"{self._path or 'standard output'}: {error.strerror}")
            return [failed, *(NotTried("not tried") for _ in messages[1:])]
        return [None] * len(messages)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        if self._path is None:
            with _alone_on(STDOUT):
                yield STDOUT
            return
        file = open_own(self._path, FLAGS | os.O_CREAT)
        try:
            self._lock(file)
            yield file
            os.fsync(file)
            if not _is_at(self._path, file):
                raise OSError(errno.ESTALE, "rotated while lines were written; they are written again")
        finally:
            os.close(file)

    def _lock(self, file: int) -> None:
        """Exclude other writers. Ours take milliseconds. A program with read access can hold it for ever."""
        ends_at = time.monotonic() + self._wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > ends_at:
                    words = f"locked by another program for {self._wait_seconds:g} s"
                    raise OSError(errno.EAGAIN, f"{words}; `fuser {shlex.quote(str(self._path))}` names it") from None
                time.sleep(LOCK_INTERVAL_SECONDS)
            else:
                return

    def _write(self, file: int, lines: bytes) -> None:
        """Write all of it. A pipe that another program has made non-blocking is waited for like any other."""
        rest = memoryview(lines)
        try:
            while rest:
                try:
                    rest = rest[os.write(file, rest) :]
                except BlockingIOError:
                    select.select([], [file], [])
        finally:
            if written := lines[: len(lines) - len(rest)]:
                self._is_torn = not written.endswith(b"\n")

    def check(self) -> str:
        """Open the file as `send` does, or check that it could be made. Makes no file."""
        if self._path is None:
            return "standard output"
        try:
            if not self._path.exists():
                _check_folder(self._path.parent)
                return f"{self._path} can be made"
            os.close(open_own(self._path, FLAGS))
        except OSError as error:
            raise SinkUnavailable(f"{self._path}: {error.strerror}") from error
        return f"{self._path} can be appended to"

    def close(self) -> None: ...


def _is_at(path: Path, file: int) -> bool:
    """Whether the open file still has this name. If not, logrotate may have compressed and removed it before the lines
    were written. Lines that are written before it gets another name are in it when it is compressed.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


@contextmanager
def _alone_on(file: int) -> Iterator[None]:
    """Exclude the other worker processes from an inherited descriptor: a pipe takes at most 4 KB at once.

    The lock belongs to the process and works on pipes, sockets and terminals. The children would share a `flock`.
    """
    fcntl.lockf(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN)


def _check_folder(folder: Path) -> None:
    """Raise the OSError with which the system would refuse a new file in `folder`."""
    is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    if is_read_only or not os.access(folder, os.W_OK | os.X_OK):
        number = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(number, f"{os.strerror(number)} ({folder})", str(folder))


def _ends_within_line(file: int, otherwise: bool) -> bool:
    """Whether the last line of a file has no end, because a full disk or a crash cut it off. Ours begin on a new line.

    `otherwise`: the answer for what cannot be read, such as a pipe.
    """
    state = os.fstat(file)
    if not stat.S_ISREG(state.st_mode):
        return otherwise
    if not state.st_size:
        return False
    try:
        reader = os.open(f"/dev/fd/{file}", os.O_RDONLY)  # standard output may be open for writing alone
    except OSError:
        return otherwise
    try:
        return os.pread(reader, 1, state.st_size - 1) != b"\n"
    finally:
        os.close(reader)
