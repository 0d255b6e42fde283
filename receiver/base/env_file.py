"""The `.env` file: where it is, whether others may write it, and whether it is text."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

NAME = ".env"


def find() -> Path | None:
    """The `.env` of the folder one stands in, where there is one."""
    path = Path(NAME).absolute()
    return path if path.is_file() else None


def fault() -> str | None:
    """What is wrong with a `.env` that others may write, or that is no text, naming file and line."""
    path = find()
    if path is None:
        return None
    try:
        content, state = path.read_bytes(), path.stat()
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if is_writable_by_others(state):
        return (
            f"{path}: other users may write it, and what it says decides where your keys are sent: "
            "make it your own and run `chmod go-w` on it, or remove it"
        )
    if b"\0" in content or content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"{path}:1: is UTF-16, as PowerShell writes it; save it as UTF-8 (Set-Content -Encoding utf8)"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"{path}:{line}: is not UTF-8 text; save the file as UTF-8"
    return None


def is_writable_by_others(state: os.stat_result) -> bool:
    """Whether anyone but this user and root may change the file. A user's private group is the user."""
    if state.st_uid not in (0, os.geteuid()) or state.st_mode & stat.S_IWOTH:
        return True
    if not state.st_mode & stat.S_IWGRP:
        return False
    try:
        owner, group = pwd.getpwuid(state.st_uid), grp.getgrgid(state.st_gid)
    except KeyError:
        return True
    return not (group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name})
