"""The result of a batch with the keys of archived files: JSON with one line per task, or CSV with one row per file."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from receiver.batch.batch import Batches
from receiver.tasks.task_view import facts_of
from storage.database.sessions import Database
from storage.local_folder import LocalFolder
from storage.rows import tasks
from storage.rows.models import Asset
from storage.states import AssetState

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

TASK_COLUMNS = ("line", "external_task_id", "task_id", "provider_task_id", "state", "archive", "expected", "units")
FILE_COLUMNS = ("kind", "index", "key", "sha256", "size", "media_type")
# Tasks in a piece of a streamed report: some 100 kB.
CSV_PART = 500
# In these folders a name stands for an open file. `/dev/stdout` may be one on the disk.
DEVICES = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
# A spreadsheet treats a cell that begins with one of these as a formula. Error texts and ids come from outside.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def lines(database: Database, of: Batches, name: str) -> Iterator[dict[str, Any]]:
    """Every task of the batch in the order of its file. Raises `NoSuchBatch`."""
    for page in of.pages(name):
        with database.read() as session:
            files = tasks.assets_of_all(session, [task.id for task in page])
        for task in page:
            yield {"line": task.batch_line, **facts_of(task), "files": [_file(asset) for asset in files[task.id]]}


def _file(asset: Asset) -> dict[str, Any]:
    kept = asset.state is AssetState.ARCHIVED
    return {
        "kind": asset.kind,
        "index": asset.index,
        "state": asset.state,
        "key": asset.key if kept else None,
        "sha256": asset.sha256 if kept else None,
        "size": asset.size if kept else None,
        "media_type": asset.media_type if kept else None,
        "error": asset.error,
    }


def write_json(file: SupportsWrite[str], name: str, found: Iterable[dict[str, Any]]) -> None:
    """Write `{"batch": NAME, "tasks": [one a line]}` while the tasks are read."""
    file.write(f'{{"batch": {json.dumps(name)}, "tasks": [')
    for number, line in enumerate(found):
        file.write((",\n" if number else "\n") + json.dumps(line))
    file.write("\n]}\n")


def write_csv(file: SupportsWrite[str], found: Iterable[dict[str, Any]]) -> None:
    """Write one row for each file, and one for each task without files."""
    writer = csv.writer(file)
    writer.writerow((*TASK_COLUMNS, *FILE_COLUMNS, "error"))
    for line in found:
        for each in line["files"] or [{}]:
            error = each.get("error") or line["error"] or line["note"] or ""
            own = [each.get(column) for column in FILE_COLUMNS]
            writer.writerow(map(_harmless, [*(line[column] for column in TASK_COLUMNS), *own, error]))


def csv_parts(found: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The same in pieces, so that memory never holds the whole report."""
    is_first = True
    while part := list(islice(found, CSV_PART)):
        target = io.StringIO()
        write_csv(target, part)
        yield target.getvalue() if is_first else target.getvalue().partition("\r\n")[2]
        is_first = False


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def check(path: Path) -> None:
    """Raise the OSError of `write` that can be known before. Makes the folder."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not _is_device(path):
        LocalFolder(path.parent)  # tries a file in it


def write(path: Path, name: str, found: Iterable[dict[str, Any]]) -> None:
    """Write a report: CSV if the file's name ends in `.csv`, else JSON. A failed write leaves no file.

    A device or a pipe (`/dev/stdout`) is written to. Replaced like a file, it was gone for every other program.
    """
    check(path)
    with (
        path.open("wb") if _is_device(path) else LocalFolder(path.parent, folds_case=False).writing([path.name]) as raw
    ):
        with io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".csv":
                write_csv(file, found)
            else:
                write_json(file, name, found)
            file.flush()


def _is_device(path: Path) -> bool:
    """Whether it is a device or a pipe, of this user or of root. Another user's could take the report."""
    if path.absolute().parent in DEVICES:
        return True
    try:
        state = path.stat()
    except OSError:
        return False
    return not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)) and state.st_uid in (0, os.geteuid())
