"""What belongs to one task, seen from both sides: its rows, and the objects in its folder.

Rows come in pages by key, objects in the store's listing; both are cut into folders and walked side by side, so that
a million tasks take no more memory than one page. Each page is a moment of its own: whoever finds a difference looks
again at that one folder before saying so.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar
from urllib.parse import unquote

from sqlmodel import select

from storage.bucket.bucket import PROBE_FOLDER, Bucket, Listed
from storage.rows import tasks
from storage.rows.database import Database
from storage.rows.models import Asset, Task

# Rows and listings come in pages of a thousand: S3's own limit, and some 2 MB of rows.
PAGE_ROWS = 1_000
FOLDER = re.compile(r"(?:.*?/)?\d{4}/\d\d/\d\d/([^/]+)/", re.DOTALL)
FILE = re.compile(FOLDER.pattern + r"[a-z]+-\d+-[0-9a-f]{12}\.[a-z0-9]+", re.DOTALL)
MANIFEST = re.compile(r"manifest(?:\.([2-9]|[1-9][0-9]{1,3}))?\.json")

# Uploading the largest file takes hours on a slow line; what began a day ago has no owner.
ORPHAN_AFTER_SECONDS = 86_400.0

Item = TypeVar("Item")
Objects = Mapping[str, Listed]


@dataclass
class Rows:
    """The rows of one folder: those of its task that name a key in it."""

    task: Task | None = None
    assets: list[Asset] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.task is not None or bool(self.assets)


@dataclass(frozen=True)
class Folder:
    """One folder as two pages showed it; a side that showed nothing is empty."""

    name: str
    rows: Rows
    objects: Objects


def folder_of(key: str) -> str:
    """The task's folder that `key` lies in, at any depth; a key outside of all such folders is its own."""
    match = FOLDER.match(key)
    return match[0] if match else key


def external_id_of(folder: str) -> str | None:
    """The external id that a folder's name says; None when it is no task's folder."""
    match = FOLDER.fullmatch(folder)
    return unquote(match[1]) if match else None


def manifest_number(key: str) -> int | None:
    """1 for `manifest.json`, 2 for `manifest.2.json`, …; None for any other object."""
    match = MANIFEST.fullmatch(key.rpartition("/")[2])
    return int(match[1] or 1) if match else None


def sweep_uploads(bucket: Bucket, *, older_than_seconds: float = ORPHAN_AFTER_SECONDS) -> int:
    """Abort what crashes left of our multipart uploads: nobody sees them, and most stores bill them.

    Only keys under our prefix that look like ours: others may share the bucket. Who takes over a row aborts its upload
    at once (see `Archiver`); this finds the rest. Returns how many there were.
    """
    return bucket.abort_uploads(bucket.prefix, older_than_seconds=older_than_seconds, only=FILE.fullmatch)


def walk(database: Database, bucket: Bucket, after: str = "") -> Iterator[Folder]:
    """Every folder behind `after` that has rows or objects.

    A store that lists in another order than by bytes (SeaweedFS lists `a/` before `a-b/`) makes a folder come
    twice, once from each side.
    """
    of_rows, of_objects = row_folders(database, after), object_folders(bucket, after)
    row, listed = next(of_rows, None), next(of_objects, None)
    while row or listed:
        if row and (listed is None or row[0] <= listed[0]):
            both = listed is not None and listed[0] == row[0]
            yield Folder(row[0], row[1], listed[1] if listed and both else {})
            row = next(of_rows, None)
            listed = next(of_objects, None) if both else listed
        elif listed:
            yield Folder(listed[0], Rows(), listed[1])
            listed = next(of_objects, None)


def row_folders(database: Database, after: str) -> Iterator[tuple[str, Rows]]:
    """The rows that name a key, by folder, in the order of their keys' bytes."""
    keyed = heapq.merge(
        _pages(database, Asset, Asset.key, after), _pages(database, Task, Task.manifest_key, after), key=_first
    )
    for folder, group in groupby(keyed, key=lambda item: folder_of(item[0])):
        if folder == after:
            continue
        rows = Rows()
        for _, row in group:
            if isinstance(row, Task):
                rows.task = row
            else:
                rows.assets.append(row)
        yield folder, rows


def _pages(database: Database, model: Any, column: Any, after: str) -> Iterator[tuple[str, Task | Asset]]:
    while True:
        with database.read() as session:
            page = list(session.exec(select(model).where(column > after).order_by(column).limit(PAGE_ROWS)))
        for row in page:
            after = str(getattr(row, column.key))
            yield after, row
        if len(page) < PAGE_ROWS:
            return


def object_folders(bucket: Bucket, after: str = "") -> Iterator[tuple[str, dict[str, Listed]]]:
    """The objects under the bucket's prefix, by folder, as the store lists them; what a probe put there is left out."""
    probes = bucket.prefix + PROBE_FOLDER
    listed = (each for each in bucket.list(bucket.prefix, after=after) if not each.key.startswith(probes))
    for folder, group in groupby(listed, key=lambda each: folder_of(each.key)):
        if folder != after:
            yield folder, {each.key: each for each in group}


def look_again(database: Database, bucket: Bucket, folder: str) -> Folder:
    """One folder as it is now. Its rows are read after its objects: a row names its object before that is put."""
    objects = {each.key: each for each in bucket.list(folder) if folder_of(each.key) == folder}
    external_id = external_id_of(folder)
    if external_id is None:
        return Folder(folder, Rows(), objects)
    with database.read() as session:
        task = tasks.by_external_id(session, external_id)
        assets = tasks.assets_of(session, task.id) if task else []
    here = [asset for asset in assets if asset.key and folder_of(asset.key) == folder]
    if task and not here and not _is_in(task, folder):
        task = None
    return Folder(folder, Rows(task, here), objects)


def _is_in(task: Task, folder: str) -> bool:
    if task.manifest_key:
        return folder_of(task.manifest_key) == folder
    return f"{task.created_at:%Y/%m/%d}/" in folder and task.deleted_at is None


def _first(item: tuple[str, Item]) -> str:
    return item[0]


def in_batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of at most `size`."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
