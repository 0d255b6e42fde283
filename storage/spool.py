"""A file that is fetched, checked and put: in memory while it is small, then on disk.

The memory is used again by the next file. Fresh memory for each picture of 3 MB and the copies that reads of a file
object make took 0.7 ms of CPU. The source's socket writes into it (`free`, `keep`). Hashes, checks and the put read it
in place (`memory_of`, `blocks`).
"""

from __future__ import annotations

import io
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from storage.errors import SpoolUnavailable

# Nearly every picture (about 3 MB) fits into memory. Eight threads hold 32 MiB, and those beside them that wait for
# commits twice as much.
SPOOL_MEMORY_BYTES = 4 * 1024 * 1024
SPOOL_PREFIX = "receiver-spool-"
# Far longer than a fetch and the put after it may take. A spool file this old belongs to a crashed process.
SPOOL_STALE_HOURS = 24.0
BLOCK_BYTES = 256 * 1024
# Where Python finds the system's temporary folder first.
TEMPORARY = ("TMPDIR", "TEMP", "TMP")
# The beginnings of the messages of `SpoolUnavailable` and `DiskFull`, by which stored errors are recognised.
MESSAGES = ("RECEIVER_SPOOL_DIR: ", "the disk of the spool folder ")

# Memory of closed spools, for reuse. At most as many as were open at once, one for each thread that archives.
_free: list[memoryview] = []


class Spool(io.RawIOBase):
    """An empty file to write and read. Closing it removes it."""

    def __init__(self, directory: Path | None, memory_bytes: int) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        try:
            self._room = _free.pop()
        except IndexError:
            self._room = memoryview(bytearray(SPOOL_MEMORY_BYTES))
        self._memory_bytes = min(memory_bytes, len(self._room))
        self._size = self._at = 0

    @property
    def free(self) -> memoryview:
        """The memory of the next bytes, to receive them into; empty on disk. `keep` makes them part of the file."""
        return self._room[self._at : self._memory_bytes]

    def keep(self, count: int) -> None:
        self._at += count
        self._size = max(self._size, self._at)

    def write(self, block: Any) -> int:
        if self._file is None and self._at + len(block) > self._memory_bytes:
            self._move_to_disk()
        if self._file is not None:
            return self._file.write(block)
        end = self._at + len(block)
        if self._at > self._size:  # a gap must not show the memory's previous file
            self._room[self._size : self._at] = bytes(self._at - self._size)
        self._room[self._at : end] = block
        self._size, self._at = max(self._size, end), end
        return len(block)

    def read(self, size: int = -1) -> bytes:
        if self._file is not None:
            return self._file.read(size)
        found = bytes(self._room[self._at : self._size if size < 0 else min(self._size, self._at + size)])
        self._at += len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        if self._file is not None:
            return cast(io.BufferedRandom, self._file).readinto(buffer)
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = self._room[self._at : self._at + count]
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self._file is not None:
            return self._file.seek(offset, whence)
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._file.tell() if self._file is not None else self._at

    def truncate(self, size: int | None = None) -> int:
        if self._file is not None:
            return self._file.truncate(size)
        self._size = min(self._size, self._at if size is None else size)
        return self._size

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self._file is not None:
                self._file.close()
            else:
                _free.append(self._room)

    def _move_to_disk(self) -> None:
        self._file = _on_disk(self._directory)
        self._file.write(self._room[: self._size])
        self._file.seek(self._at)
        self._room = memoryview(b"")  # freed, because large files are rare and eight at once would keep 32 MiB


def _on_disk(directory: Path | None) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(prefix=SPOOL_PREFIX, dir=str(directory) if directory else None)
    except OSError as error:
        where = directory or "the system's temporary folder"
        words = f"RECEIVER_SPOOL_DIR: {where} cannot be written ({error.strerror})"
        raise SpoolUnavailable(f"{words}: choose a folder that this user may write, with enough room") from error


def room(directory: Path | None) -> tuple[Path, int]:
    """The folder of spools, and the bytes that a spool may use there. Raises `SpoolUnavailable`.

    Python takes another temporary folder while the disk of the first is full. Workers that run already do not.
    """
    with _on_disk(directory):
        pass
    first = next((found for name in TEMPORARY if (found := os.environ.get(name))), "/tmp")  # noqa: S108 - only looked at
    folder = directory or Path(first)
    if not os.access(folder, os.W_OK | os.X_OK):
        folder = Path(tempfile.gettempdir())
    free = os.statvfs(folder)
    return folder, free.f_bavail * free.f_frsize


def spool(directory: Path | None, *, memory_bytes: int = SPOOL_MEMORY_BYTES) -> BinaryIO:
    """Open a file to fetch into: in memory up to `memory_bytes`, then in `directory` (None: the system's).

    Closing it removes it, so use it as a context manager. On Linux the file has no name and a crash leaves nothing;
    elsewhere `sweep` finds it.
    """
    return cast(BinaryIO, Spool(directory, memory_bytes))


def memory_of(file: BinaryIO) -> memoryview | None:
    """The whole content of a spool in memory, valid until the next write and the close; None for every other file."""
    return file._room[: file._size].toreadonly() if isinstance(file, Spool) and file._file is None else None


def spool_with_room(file: BinaryIO, count: int | None) -> Spool | None:
    """The spool, if `count` more bytes and another one fit into its memory; None for every other file."""
    return file if count is not None and isinstance(file, Spool) and count < len(file.free) else None


def blocks(file: BinaryIO) -> Iterator[memoryview]:
    """The whole file in blocks, each valid until the next: one block if it is in memory."""
    memory = memory_of(file)
    if memory is not None:
        yield memory
        return
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        yield memoryview(block)


def sweep(directory: Path | None) -> int:
    """Remove spool files of crashed processes from `directory` (None: the system's). Returns how many."""
    before = time.time() - SPOOL_STALE_HOURS * 3_600
    removed = 0
    for path in Path(directory or tempfile.gettempdir()).glob(f"{SPOOL_PREFIX}*"):
        try:
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime < before:
                path.unlink()
                removed += 1
        except OSError:
            continue  # another process has removed the file, or we may not
    return removed
