"""The `.env` file: its path, whether others may write it, and whether it can be read."""

from __future__ import annotations

import io
from pathlib import Path

from dotenv.parser import parse_stream

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
    """The fault of a `.env` that others may write, that is not text, or one of whose settings cannot be read, with file
    and line.
    """
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
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"{path}:{line}: is not UTF-8 text; save the file as UTF-8"
    for each in parse_stream(io.StringIO(text)):
        if each.error and "RECEIVER_" in each.original.string:  # left out by what reads the settings
            return f"{path}:{each.original.line}: cannot be read; write NAME=VALUE, and end a quote in its own line"
    return None
