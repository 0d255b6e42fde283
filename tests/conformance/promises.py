"""Our promises on any store, whatever it lacks: tried with our own parts on top of it, with small and large files."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

from sqlalchemy import update

from receiver.app.wiring import Parts
from receiver.sandbox import Knobs, Sandbox
from storage.archive.archiver import Archiver
from storage.archive.audit import Audit
from storage.archive.delete import delete
from storage.archive.rebuild import Rebuild
from storage.bucket import bucket as objects
from storage.bucket import checksums
from storage.errors import ObjectConflict, StoreUnavailable
from storage.fetch.client import Fetched, Fetcher
from storage.rows import claims, migrations
from storage.rows.models import Asset
from storage.states import ArchiveState, AssetState
from tests.archived_tasks import archive, flip, work_off
from tests.conformance.stage import Broken, Case, Stage
from tests.pipeline import Wired, assets_of, kept, make_due_now, settings_for
from tests.rows import LONG_AGO

MIB = 2**20
RACERS = 16
SMALL_PARTS = 5 * MIB, 6 * MIB  # S3's least part, and a threshold above it


@contextmanager
def _world(stage: Stage, name: str) -> Iterator[tuple[Parts, Sandbox]]:
    """Our parts on this store, under a prefix of this case alone, with a provider that answers at once."""
    bucket = copy.copy(stage.bucket)
    bucket.prefix = stage.key(f"{name}/")
    with Sandbox(knobs=Knobs(picture_bytes=20_000, submitted_seconds=0, processing_seconds=0)) as sandbox:
        parts = _parts(stage.folder / f"{name}.db", bucket, sandbox)
        try:
            yield parts, sandbox
        finally:
            parts.close()


def _parts(file: Path, bucket: Any, sandbox: Sandbox) -> Wired:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    with mock.patch.dict(os.environ, variables, clear=True):
        settings = settings_for(f"sqlite:///{file}", bucket, sandbox, public_url="", lease_seconds=60)
    parts = Wired(settings, bucket=bucket)
    migrations.upgrade(parts.database)
    return parts


def archived(stage: Stage) -> str:
    """pictures are archived byte for byte, their manifest beside them"""
    with _world(stage, "archived") as (parts, sandbox):
        tasks = archive(parts, 2, n=3)
        made = sorted(asset.sha256 for task in sandbox.ledger().tasks for asset in task.assets)
        _same([task.archive for task in tasks], [ArchiveState.ARCHIVED] * 2)
        found = kept(parts)
        _same(sorted(digest for key, digest in found.items() if "/image-" in key), made)
        _same(len(found), 8)
    return "6 files, 2 manifests"


def created_once(stage: Stage) -> None:
    """a repeated put succeeds, other bytes conflict, nothing is overwritten"""
    _same([stage.put_once("once", b"one"), stage.put_once("once", b"one")], [True, False])
    _raises(ObjectConflict, lambda: stage.put_once("once", b"two"))
    _same(stage.get("once"), b"one")


def changed_on_the_way(stage: Stage) -> None:
    """bytes that changed on the way never count as stored"""
    _raises(StoreUnavailable, lambda: stage.put_once("changed", b"one", claimed=b"two"))
    _same(stage.is_there("changed"), False)
    _same(stage.put_once("changed", b"two"), True)


def big_file(stage: Stage) -> str:
    """a big file is whole, created once, and leaves no upload behind"""
    content = os.urandom(11 * MIB + 7)
    with _small_parts():
        _same([stage.put_once("big", content), stage.put_once("big", content)], [True, False])
        _raises(ObjectConflict, lambda: stage.put_once("big", content[::-1]))
        _raises(StoreUnavailable, lambda: stage.put_once("big-changed", content, claimed=b"other"))
    _same(stage.get("big"), content)
    _same((stage.is_there("big-changed"), stage.bucket.abort_uploads(stage.key("big"))), (False, 0))
    return "in parts" if stage.bucket.capabilities().multipart else "in one piece"


def raced(stage: Stage) -> str:
    """16 racing writers get true answers, and the object is whole and from one of them"""
    contents = [bytes([number]) * 1_000 for number in range(RACERS)]

    def attempt(content: bytes) -> Any:
        try:
            return stage.put_once("raced", content)
        except (ObjectConflict, StoreUnavailable) as error:
            return type(error).__name__

    with ThreadPoolExecutor(RACERS) as threads:
        told = list(threads.map(attempt, contents))
    stands = stage.get("raced")
    if stands not in contents:
        raise Broken("what stands is nobody's")
    _same(told[contents.index(stands)], True)
    return f"{told.count(True)} of {RACERS} were told that they created it"


class Tampering(Fetcher):
    """Flips one bit of a fetched file after it was hashed, like a faulty disk."""

    def fetch(self, url: str, sink: BinaryIO, **options: Any) -> Fetched:
        fetched = super().fetch(url, sink, **options)
        sink.seek(fetched.size // 2)
        byte = sink.read(1)
        sink.seek(fetched.size // 2)
        sink.write(bytes([byte[0] ^ 1]))
        sink.seek(0)
        return fetched


def tampered(stage: Stage) -> None:
    """the archiver counts no damaged picture as archived, and archives it once it is whole"""
    with _world(stage, "tampered") as (parts, sandbox):
        task = parts.submitter.submit({"model_name": "kling-image-o1", "prompt": "a boat"}).task
        _until_assets(parts, task)
        with closing(Tampering(parts.address_policy, max_bytes=10**6)) as bad:
            _work_one(parts, Archiver(parts.database, parts.bucket, bad, parts.schedule))
        (row,) = assets_of(parts, task)
        _same((row.state, _files(parts)), (AssetState.DUE, {}))
        _work_one(parts, Archiver(parts.database, parts.bucket, parts.fetcher, parts.schedule))
        (row,) = assets_of(parts, task)
        made = sandbox.ledger().tasks[0].assets[0].sha256
        _same((row.state, list(_files(parts).values())), (AssetState.ARCHIVED, [made]))


def taken_over(stage: Stage) -> None:
    """a worker that takes over after a crash finds the object and puts none"""
    with _world(stage, "taken") as (parts, sandbox):
        (task,) = archive(parts, 1)
        before = {each.key: each.modified_at for each in parts.bucket.list(parts.bucket.prefix)}
        with parts.database.write() as session:
            session.execute(update(Asset).values(state=AssetState.DUE, due_at=LONG_AGO, archived_at=None))
        work_off(parts)
        _same(assets_of(parts, task)[0].state, AssetState.ARCHIVED)
        _same([asset.hits for asset in sandbox.ledger().tasks[0].assets], [1])
        _same({each.key: each.modified_at for each in parts.bucket.list(parts.bucket.prefix)}, before)


def audited(stage: Stage) -> None:
    """an audit finds exactly the deleted, changed and added objects"""
    with _world(stage, "audited") as (parts, _):
        tasks = archive(parts, 4)
        _same(_faults(parts), [])
        keys = [str(assets_of(parts, task)[0].key) for task in tasks]
        parts.bucket.delete(keys[0])
        flip(parts, keys[1])
        stage.client.put_object(Bucket=parts.bucket.name, Key=keys[2] + ".bak", Body=b"a stranger's")
        expected = [("missing", keys[0]), ("checksum_differs", keys[1]), ("orphaned", keys[2] + ".bak")]
        _same(_faults(parts), sorted(expected))


def rebuilt(stage: Stage) -> None:
    """all rows come back from the bucket alone"""
    with _world(stage, "rebuilt") as (parts, sandbox):
        archive(parts, 3, n=2)
        with closing(_parts(stage.folder / "empty.db", parts.bucket, sandbox)) as empty:
            restored = list(Rebuild(empty.database, empty.bucket, deep=True).run())
            counts = sum((each.counts for each in restored), Counter())
            _same([problem for each in restored for problem in each.problems], [])
            _same((counts["tasks"], counts["assets"], _faults(empty)), (3, 6, []))


def deleted(stage: Stage) -> None:
    """a deleted task leaves nothing in the bucket"""
    with _world(stage, "deleted") as (parts, _):
        gone, stays = archive(parts, 2)
        delete(parts.database, parts.bucket, gone.external_task_id)
        _same({stays.external_task_id in key for key in kept(parts)}, {True})


@contextmanager
def _small_parts() -> Iterator[None]:
    part, threshold = SMALL_PARTS
    with mock.patch.object(checksums, "PART_BYTES", part):
        with mock.patch.object(objects, "MULTIPART_THRESHOLD_BYTES", threshold):
            yield


def _until_assets(parts: Parts, task: Any) -> None:
    """Do all work except that of the assets."""
    others = [lane for lane in parts.lanes() if lane.name in ("creates", "reads")]
    for _ in range(50):
        parts.worker(others).run_until_idle()
        if assets_of(parts, task):
            return
        make_due_now(parts)
    raise Broken("the task brought no picture")


def _work_one(parts: Parts, archiver: Archiver) -> None:
    make_due_now(parts, Asset)
    with parts.database.write() as session:
        (row,) = claims.claim(session, Asset, limit=1, lease_seconds=60)
    archiver.work(row)


def _files(parts: Parts) -> dict[str, str]:
    return {key: digest for key, digest in kept(parts).items() if "/manifest" not in key}


def _faults(parts: Parts) -> list[tuple[str, str]]:
    found = (each for batch in Audit(parts.database, parts.bucket, deep=True).run() for each in batch.findings)
    return sorted((each.kind.value, each.key) for each in found if each.is_fault)


def _same(found: object, expected: object) -> None:
    if found != expected:
        raise Broken(f"{_short(found)} instead of {_short(expected)}")


def _raises(expected: type[Exception], call: Any) -> None:
    try:
        found = call()
    except expected:
        return
    raise Broken(f"{found} instead of {expected.__name__}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()[:8]}"


CASES = tuple(
    Case(str(each.__doc__), True, each)
    for each in (
        archived, created_once, changed_on_the_way, big_file, raced, tampered, taken_over, audited, rebuilt, deleted,
    )
)  # fmt: skip
