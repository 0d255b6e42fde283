"""Our files in folders where others may write, such as `/tmp`: nothing that others put there redirects us.

A symlink is followed only if this user, root or the folder's owner made it and no other user could have moved it there
(like Linux' `protected_symlinks`, which covers sticky folders alone).
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterable
from pathlib import Path

# Prompts, links and pictures are for the user who runs the command.
FILE_MODE = 0o600
# Linux follows 40 at most. A few are enough.
MAX_LINKS = 8


def open_own(path: Path, flags: int) -> int:
    """Open `path` like os.open, without following a symlink of others. Never blocks at a FIFO.

    Raises OSError: PermissionError for a symlink of others, and EINVAL if it is not a regular file.
    """
    file = os.open(final(path), flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, FILE_MODE)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def final(path: Path) -> Path:
    """The target of the symlinks at `path`, each of which may be followed. Raises PermissionError or other OSErrors."""
    for _ in range(MAX_LINKS):
        try:
            link = path.lstat()
        except FileNotFoundError:
            return path
        if not stat.S_ISLNK(link.st_mode):
            return path
        folder = path.parent.stat()
        is_ours = link.st_uid in (0, os.geteuid(), folder.st_uid)
        if not is_ours or (is_shared(folder) and not folder.st_mode & stat.S_ISVTX):
            raise PermissionError(errno.EPERM, "is a symlink that other users may have made; remove it", str(path))
        path = path.parent / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def is_shared(state: os.stat_result) -> bool:
    """Whether the mode lets anyone but owner and root write. A user's private group counts as the user."""
    if state.st_mode & stat.S_IWOTH:
        return True
    if not state.st_mode & stat.S_IWGRP:
        return False
    try:
        owner, group = pwd.getpwuid(state.st_uid), grp.getgrgid(state.st_gid)
    except KeyError:
        return True
    return not (group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name})


def is_writable_by_others(state: os.stat_result) -> bool:
    """Whether anyone but this user and root may change the file."""
    return state.st_uid not in (0, os.geteuid()) or is_shared(state)


def narrow(paths: Iterable[Path]) -> list[Path]:
    """Remove access that earlier releases gave other users to this user's files. Returns the changed files."""
    changed = []
    for path in paths:
        try:
            state = path.lstat()
            # By its name, because closing a descriptor of the database would end the locks that SQLite holds on it.
            if stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid() and state.st_mode & 0o077:
                path.chmod(FILE_MODE)
                changed.append(path)
        except OSError:  # the file is missing, or its disk has no modes
            continue
    return changed
