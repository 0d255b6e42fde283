"""A local folder in which others may have put things: no symlink in it is followed and no name in it can be foreseen.

Every step below the folder is opened by itself, relative to the one before it (openat(2) with O_NOFOLLOW).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from storage.own_files import FILE_MODE, final

# Windows, and disks shared with it, open a device for these names whatever their extension, and drop a dot at the end.
DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)", re.IGNORECASE)
CAPITAL = re.compile("[A-Z]")
# Keys have none of these characters, except keys that `rebuild` restored from a bucket where others write.
UNSAFE = re.compile(r"[^A-Za-z0-9._~%-]")


class LocalFolder:
    """One folder and its contents. Raises OSError, among them NotADirectoryError for a symlink in the path.

    `folds_case`: whether this disk takes `A` and `a` for the same name; None: it is tried.
    """

    def __init__(self, path: Path, *, folds_case: bool | None = None) -> None:
        self.path = final(path.absolute())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path)) from None
        self._folds_case = self._tries_case() if folds_case is None else folds_case

    def _tries_case(self) -> bool:
        with self._opened(()) as folder:
            name = f".{secrets.token_hex(8)}.part"
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=folder))
            try:
                os.stat(name.upper(), dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return False
            finally:
                os.unlink(name, dir_fd=folder)
        return True

    def portable(self, name: str) -> str:
        """Like `portable` below, for this disk."""
        return portable(name, folds_case=self._folds_case)

    def _top(self) -> int:
        return _open_folder(str(self.path), None)

    @contextmanager
    def _opened(self, steps: Sequence[str]) -> Iterator[int]:
        """The folder below `steps`, which are created if they are missing."""
        folder = self._top()
        try:
            for step in steps:
                with suppress(FileExistsError):
                    os.mkdir(step, dir_fd=folder)
                below = _open_folder(step, folder)
                os.close(folder)
                folder = below
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def existing(self, steps: Sequence[str]) -> Iterator[BufferedReader | None]:
        """The regular file at `steps`; None: there is none, or it is not a regular file."""
        with self._opened(steps[:-1]) as folder:
            file = _regular(folder, steps[-1])
        if file is None:
            yield None
            return
        with file:
            yield file

    @contextmanager
    def writing(self, steps: Sequence[str]) -> Iterator[BinaryIO]:
        """A new file that gets its name at the end of the block. After an exception nothing of it is left."""
        with self._opened(steps[:-1]) as folder:
            part = f".{secrets.token_hex(16)}.part"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            try:
                with os.fdopen(os.open(part, flags, FILE_MODE, dir_fd=folder), "wb") as file:
                    yield file
                os.replace(part, steps[-1], src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(part, dir_fd=folder)


class PrivateFolder(LocalFolder):
    """A folder that only this user may enter, below one where others may write, such as `/tmp`.

    It is created, and its owner and mode are checked, at every use, because a cleaner of old files may remove it at any
    time. Raises PermissionError for one that another user owns or may write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._folds_case = False

    def _top(self) -> int:
        if not os.path.lexists(self.path):
            with suppress(FileExistsError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.mkdir(0o700)
        folder = _open_folder(str(self.path), None)
        try:
            state = os.fstat(folder)
            if state.st_uid != os.geteuid() or state.st_mode & 0o022:
                raise PermissionError(errno.EPERM, "other users own the folder or may write it", str(self.path))
            if state.st_mode & 0o055:  # earlier releases let others read it
                os.fchmod(folder, 0o700)
        except OSError:
            os.close(folder)
            raise
        return folder

    def files(self, pattern: str) -> list[tuple[float, int, Path]]:
        """The time, size and path of every file that matches, oldest first."""
        found = []
        for path in self.path.glob(pattern):
            with suppress(OSError):
                state = path.lstat()
                found.append((state.st_mtime, state.st_size, path))
        return sorted(found)


def portable(name: str, *, folds_case: bool) -> str:
    """A percent-encoded `name`, spelt differently if a disk does not allow it. Its characters neither separate nor
    control.

    `folds_case`: the disk takes `A` and `a` for the same, so capitals are encoded.
    """
    name = UNSAFE.sub(lambda found: _encoded(found[0]), name)
    if folds_case:
        name = CAPITAL.sub(lambda found: _encoded(found[0]), name)
    if DEVICE.match(name):
        name = _encoded(name[0]) + name[1:]
    return name[:-1] + _encoded(".") if name.endswith(".") else name


def _open_folder(name: str, folder: int | None) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):  # Linux, and the BSDs
            raise NotADirectoryError(error.errno, "is not a folder, and a symlink is not followed", name) from None
        raise


def _regular(folder: int, name: str) -> BufferedReader | None:
    try:
        # O_NONBLOCK, because opening a FIFO that another user put there would block.
        found = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(found).st_mode):
        return os.fdopen(found, "rb")
    os.close(found)
    return None


def _encoded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
