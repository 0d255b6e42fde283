"""Pairs each task's rows with the objects in its folder.

Rows are read in pages sorted by key and objects in the store's listing. Both are grouped by folder and merged, so a
million tasks need the memory of one page. The pages are of different moments: before a caller reports a difference, it
reads the folder again with `current_folder`.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, TypeVar
from urllib.parse import unquote

from sqlmodel import select

from storage.archive.accepted_losses import Loss, accepted_of
from storage.bucket.bucket import PROBE_FOLDER, Bucket
from storage.bucket.stored import Listed
from storage.database.sessions import Database
from storage.keys import manifest_name
from storage.rows import tasks
from storage.rows.models import Asset, Task

# S3's limit for a page of a listing. A page of rows takes about 2 MB.
PAGE_ROWS = 1_000
# The last date of a key is our own: the prefix before it may hold another one.
FOLDER = re.compile(r"(?:.*/)?\d{4}/\d\d/\d\d/([^/]+)/", re.DOTALL)
FILE = re.compile(FOLDER.pattern + r"[a-z]+-\d+-[0-9a-f]{12}\.[a-z0-9]+", re.DOTALL)
MANIFEST = re.compile(r"manifest(?:\.([2-9]|[1-9][0-9]{1,3}))?\.json")

# The largest file takes hours on a slow line. An upload that began a day ago belongs to a crashed process.
ORPHAN_AFTER_SECONDS = 86_400.0

Item = TypeVar("Item")
Objects = Mapping[str, Listed]


@dataclass
class Rows:
    """The rows of one task that name a key in the folder. `elsewhere`: those that name one below another prefix.
    `losses`: accepted ones. Both only of a `current_folder`.
    """

    task: Task | None = None
    assets: list[Asset] = field(default_factory=list)
    elsewhere: list[Asset] = field(default_factory=list)
    losses: Mapping[str, Loss] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.task is not None or bool(self.assets)


@dataclass(frozen=True)
class Folder:
    """One folder, from two pages. Either side may be empty."""

    name: str
    rows: Rows
    objects: Objects


def folder_of(key: str) -> str:
    """The task folder that contains `key`, at any depth; the key itself if there is none."""
    match = FOLDER.match(key)
    return match[0] if match else key


def external_id_of(folder: str) -> str | None:
    """The external id in a folder's name; None if it is no task's folder. PostgreSQL takes no NUL, so no id has one."""
    match = FOLDER.fullmatch(folder)
    external_id = unquote(match[1]) if match else None
    return None if external_id and "\0" in external_id else external_id


def manifest_number(key: str) -> int | None:
    """1 for `manifest.json`, 2 for `manifest.2.json`, …; None for any other object."""
    match = MANIFEST.fullmatch(key.rpartition("/")[2])
    return int(match[1] or 1) if match else None


def manifest_beside(key: str, number: int) -> str:
    """The key of that manifest in the folder of this key."""
    return f"{key.rpartition('/')[0]}/{manifest_name(number)}"


def sweep_uploads(bucket: Bucket, *, older_than_seconds: float = ORPHAN_AFTER_SECONDS) -> int:
    """Abort old multipart uploads of crashed processes, which no listing shows and most stores bill. Returns how many.

    Only keys in our layout under our prefix, because others may share the bucket. A worker that takes over a row
    aborts its upload at once (see `Archiver`); this finds the rest.
    """
    return bucket.abort_uploads(bucket.prefix, older_than_seconds=older_than_seconds, only=FILE.fullmatch)


def walk(database: Database, bucket: Bucket, after: str = "") -> Iterator[Folder]:
    """Every folder after `after` that has rows or objects.

    If the store does not list in the order of bytes (SeaweedFS lists `a/` before `a-b/`), a folder may come twice, once
    with its rows and once with its objects.
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
        _pages(database, Asset, Asset.key, after),
        _pages(database, Task, Task.manifest_key, after),
        key=lambda item: item[0],
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
    """The objects under the bucket's prefix by folder, in the store's order, without those of a probe."""
    probes = bucket.prefix + PROBE_FOLDER
    listed = (each for each in bucket.list(bucket.prefix, after=after) if not each.key.startswith(probes))
    for folder, group in groupby(listed, key=lambda each: folder_of(each.key)):
        if folder != after:
            yield folder, {each.key: each for each in group}


def current_folder(database: Database, bucket: Bucket, folder: str) -> Folder:
    """One folder as it is now. Rows are read after objects, because a row names its object before the put."""
    objects = {each.key: each for each in bucket.list(folder) if folder_of(each.key) == folder}
    external_id = external_id_of(folder)
    if external_id is None:
        return Folder(folder, Rows(), objects)
    with database.read() as session:
        task = tasks.by_external_id(session, external_id)
        assets = tasks.assets_of(session, task.id) if task else []
        losses = accepted_of(session, task.id) if task else {}
    here = [asset for asset in assets if asset.key and folder_of(asset.key) == folder]
    if task and not here and not _is_in(task, folder):
        task = None
    elsewhere = [asset for asset in assets if asset.key and asset not in here]
    return Folder(folder, Rows(task, here, elsewhere, losses if task else {}), objects)


def _is_in(task: Task, folder: str) -> bool:
    if task.manifest_key:
        return folder_of(task.manifest_key) == folder
    return f"{task.created_at:%Y/%m/%d}/" in folder and task.deleted_at is None


def in_batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of at most `size`."""
    while batch := list(islice(items, size)):
        yield batch
