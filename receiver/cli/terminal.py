"""All output of commands. Control characters of foreign text are escaped, so that the terminal never executes them."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from receiver.base.visible import visible
from storage.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType
    from rich.text import Text

    from receiver.tasks.changes import Tally

# rich assumes 80 columns for a pipe. This width fits the longest id, address and error in one row.
PIPE_COLUMNS = 4_000
# Items that are printed at most. `--json` has all.
MAX_SHOWN = 20


class OutputFailed(UserError):
    """Standard output, a file or a folder accepts nothing more, for example because the disk is full."""


@contextmanager
def writing_to(path: Path, advice: str = "") -> Iterator[None]:
    """Report a file or folder that cannot be written in one line, with the system's reason."""
    try:
        yield
    except BrokenPipeError:  # the reader of standard output has closed it
        raise
    except OSError as error:
        other = str(error.filename or "")
        place = f" ({other})" if other.startswith("/") and other != str(path.absolute()) else ""
        raise OutputFailed(f"{path} cannot be written: {error.strerror or error}{place}{advice}") from error


def say(*lines: str, err: bool = False) -> None:
    r"""Print each argument as one line. A line end or an escape sequence inside one shows as `\n` or `\x1b`."""
    write("".join(f"{visible(line)}\n" for line in lines), err=err)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Print `value` as JSON."""
    write(json_text(value, indent=indent) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON that is safe for a terminal."""
    return _without_delete(json.dumps(value, indent=indent))


def _without_delete(text: str) -> str:
    """json.dumps escapes everything outside ASCII, and all ASCII controls except DEL."""
    return text.replace("\x7f", "\\u007f")


def say_tally(tally: Tally, dry_run: bool, as_json: bool, nothing: str = "") -> None:
    """Print the result, and on standard error what was not done. Exit code 1 if a named item was not done.

    `nothing`: why there may have been nothing to do, and what to do instead.
    """
    if as_json:
        say_json({"ok": tally.is_good, "dry_run": dry_run, "counts": tally.counts, "left": tally.left})
    else:
        say_counts({name: count for name, count in tally.counts.items() if count}, dry_run)
        for name, why in list(tally.left.items())[:MAX_SHOWN]:
            say(f"{name}: {why}", err=True)
        if len(tally.left) > MAX_SHOWN:
            say(f"… and {len(tally.left) - MAX_SHOWN:,} more; --json shows all", err=True)
        if nothing and not tally.left and not any(tally.counts.values()):
            say(nothing, err=True)
    if not tally.is_good:
        raise typer.Exit(1)


def say_counts(counts: Mapping[str, int], dry_run: bool) -> None:
    words = ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in counts.items()) or "nothing to do"
    say(f"dry run, nothing was changed: {words}" if dry_run else words)


def show(table: RenderableType) -> None:
    """Print a rich object at the terminal's width. Nothing is wrapped in a pipe. `cell` makes its texts."""
    from rich.console import Console

    is_terminal, text = sys.stdout.isatty(), io.StringIO()
    console = Console(file=text, force_terminal=is_terminal, width=None if is_terminal else PIPE_COLUMNS)
    console.print(table)
    lines = text.getvalue().splitlines(keepends=True)
    write("".join(lines if is_terminal else [f"{line.rstrip()}\n" for line in lines]))


def cell(text: str, style: str = "") -> Text:
    """A text for rich, without markup and without terminal controls."""
    from rich.text import Text

    return Text(visible(text), style)


class CsvOutput:
    """Standard output as the file of a CSV writer, which writes one row with its line end at a time."""

    def write(self, row: str) -> None:
        ending = "\r\n" if row.endswith("\r\n") else ""
        write(visible(row.removesuffix(ending)) + ending)


class JsonOutput:
    """Standard output as the file of a JSON writer."""

    def write(self, text: str) -> None:
        write(_without_delete(text))


def write(text: str, *, err: bool = False) -> None:
    """Print a text that is ours or was escaped. Raises `OutputFailed`."""
    stream = sys.stderr if err else sys.stdout
    encoding = stream.encoding or "utf-8"
    try:
        # Escapes characters that the terminal's encoding lacks, and lone surrogates.
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:  # the reader has closed the pipe; click ends the process quietly
        raise
    except OSError as error:
        # The interpreter flushes once more when it exits, and would print an error of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise OutputFailed(f"standard output cannot be written: {error.strerror}") from None
