"""The `.env` file: its path, whether others may write it, and whether it is text."""

from __future__ import annotations

from pathlib import Path

from storage.errors import UserError
from storage.own_files import final, is_writable_by_others

NAME = ".env"


def find() -> Path | None:
    """The `.env` of the current folder, if there is one. Raises `UserError` if that folder was removed."""
    try:
        path = Path(NAME).absolute()
    except FileNotFoundError:  # a deployment has replaced it, for example
        raise UserError("the current folder was removed; change to one that exists, by `cd`") from None
    return path if path.is_file() or path.is_fifo() else None


def fault() -> str | None:
    """The fault of a `.env` that others may write or that is not text, with file and line."""
    path = find()
    if path is None:
        return None
    try:
        kept = final(path)
        state = kept.stat()
        content = b"" if kept.is_fifo() else kept.read_bytes()  # the settings read it; a FIFO can be read only once
    except OSError as error:
        return f"{error.filename or path}: cannot be read: {error.strerror}"
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
