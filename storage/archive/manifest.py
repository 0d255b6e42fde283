"""A task's manifest: writes `manifest.json` beside the pictures, and ends the archive.

A manifest is made from rows alone, without a clock, so a second run after a crash makes the same bytes. It is created
only once. A later change writes `manifest.2.json`, … which names its predecessor's digest. The highest number counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

import rfc8785
import sqlalchemy
import structlog
from sqlalchemy import bindparam
from sqlmodel import Session

from storage import states
from storage.archive.delete import remove_late_objects
from storage.bucket.bucket import Bucket
from storage.circuit import Circuit
from storage.database.clock import db_now
from storage.database.prepared import execute
from storage.database.sessions import Database
from storage.errors import GiveUp, LostClaim, ObjectConflict, Retry, StoreUnavailable
from storage.keys import manifest_key
from storage.rows import aliases, claims, reports, tasks
from storage.rows.events import EventName, file_facts, record
from storage.rows.models import Asset, Callback, Task
from storage.rows.task_conditions import DISMISSED
from storage.states import ArchiveState, AssetState, CallbackState
from storage.url_parts import address_of, urls_without_queries, without_queries

log = structlog.get_logger()

SCHEMA = "kling-receiver/manifest/1"
MEDIA_TYPE = "application/json"
# Nine pictures with their copies take about 20 kB. A larger manifest was not written by us.
MAX_MANIFEST_BYTES = 8 * 2**20
# Each number is one change of the task's pictures. More changes than this mean that something else is wrong.
MAX_MANIFESTS = 100
# Numbers of RFC 8785 are doubles. A larger integer (an element id) is written as its decimal string.
MAX_EXACT_INTEGER = 2**53 - 1
# The note of an incomplete archive that may still become complete.
WAITING = "{} of {} files came as something unusable; they are still tried, see the next try of each"
# Members that are columns of the same name.
OF_TASK = (
    "id", "external_task_id", "provider", "provider_task_id", "request_hash", "adopt", "state", "series", "expected",
    "contradicted", "completeness_reads", "error", "units", "created_at", "sent_at", "submitted_at", "completed_at",
    "files_expire_at",
)  # fmt: skip
OF_ASSET = (
    "id", "kind", "index", "original", "state", "key", "sha256", "size", "media_type", "width", "height", "verified",
    "accept_unverified", "fetched", "superseded", "error", "created_at", "files_expire_at", "archived_at",
)  # fmt: skip
# Levels of a delivery's body. Deeper ones do not fit every reader's stack, and the sender of one would end no archive.
MAX_DEPTH = 100
_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))
# In what `_JSON` wrote: every number with a fraction or an exponent, and rarely a text.
FRACTION = re.compile(r'(?:":|[\[,])-?[0-9]+[.e]')
# Members of a file that the manifest contains only if they have a value.
ODD = ("trailing_bytes", "notes", "unusable_since", "unusable_tries", "unconfirmed")
# Columns with texts of others. Ids and keys, which `rebuild` compares, stay as they are.
FOREIGN = {"error", "notes", "fetched"}

NOW = db_now()
_CALLBACKS = Callback.__table__.c  # type: ignore[attr-defined]
_NEWEST_APPLIED = sqlalchemy.select(_CALLBACKS.source, _CALLBACKS.body, _CALLBACKS.received_at).where(
    _CALLBACKS.task_id == bindparam("of"), _CALLBACKS.state == CallbackState.APPLIED
)
_NEWEST_APPLIED = _NEWEST_APPLIED.order_by(_CALLBACKS.received_at.desc(), _CALLBACKS.id.desc()).limit(1)


class Finisher:
    """Works on claimed task rows in step `finish`: writes the manifest, then ends the archive with its key."""

    def __init__(
        self,
        database: Database,
        bucket: Bucket,
        schedule: reports.Schedule,
        *,
        version: str,
        circuit: Circuit | None = None,
    ) -> None:
        self._database = database
        self._bucket = bucket
        self._schedule = schedule
        self._version = version
        self._circuit = circuit or Circuit()

    def work(self, task: Task) -> None:
        """End one archive. The task becomes `archived` or `incomplete` in the transaction that records the key."""
        try:
            if task.losses >= claims.PARK_LOSSES:
                self._park(task)
                return
            with self._circuit.watching(StoreUnavailable, ObjectConflict):
                assets, written = self._write(task)
            archive, note = self._database.write_in_group(partial(self._end, task, assets, written), task_id=task.id)
        except LostClaim:
            remove_late_objects(self._database, self._bucket, task.id)
            return
        except (Retry, GiveUp) as error:
            self._later(task, error)
            return
        log.info("task.finished", **tasks.named(task), archive=archive, note=note)
        if archive is ArchiveState.INCOMPLETE:
            log.error("task.incomplete", **tasks.named(task), note=note)

    def _write(self, task: Task) -> tuple[list[Asset], dict[str, Any]]:
        """Put the manifest. Returns the files that it describes, and the columns that name it."""
        # Without a snapshot, because a change in between takes the claim away.
        with self._database.autocommit_reader() as connection:
            assets = tasks.assets_read(connection, task.id)
            names = aliases.aliases_of(connection, task.id)
            # The last delivery that was applied reported the end.
            delivery = next(iter(execute(connection, _NEWEST_APPLIED, {"of": task.id}).rows), None)
        predecessor, number = task.manifest_digest, task.manifests + 1
        while number <= MAX_MANIFESTS:
            content, digest = build(task, assets, names, delivery, self._version, predecessor)
            key = manifest_key(self._bucket.prefix, task.created_at, task.external_task_id, number, task.manifest_key)
            sha256, size, file = hashlib.sha256(content).hexdigest(), len(content), io.BytesIO(content)
            try:
                self._bucket.put_once(key, file, sha256=sha256, size=size, media_type=MEDIA_TYPE, metadata={})
                return assets, {"manifests": number, "manifest_key": key, "manifest_digest": digest}
            except ObjectConflict:  # a worker that died before its commit wrote this number from older rows
                predecessor = self._digest_of(key)
                self._pass_over(task, number, key, predecessor)
                number += 1
        raise GiveUp(f"this task's folder already holds {MAX_MANIFESTS} manifests")

    def _pass_over(self, task: Task, number: int, key: str, digest: str | None) -> None:
        """Store the number of an existing manifest in the row before the next number is put. A worker that lost its
        claim puts none.
        """
        there = {"manifests": number, "manifest_key": key, "manifest_digest": digest}
        self._database.write_in_group(lambda session: claims.update_claimed(session, task, **there))

    def _digest_of(self, key: str) -> str | None:
        try:
            return str(read_at(self._bucket, key)["digest"])
        except ManifestDamaged:
            return None

    def _end(
        self, task: Task, assets: Sequence[Asset], written: dict[str, Any], session: Session
    ) -> tuple[ArchiveState, str | None]:
        """End the archive as its manifest says. Returns the new state, and the note.

        A change of the task's files since takes the claim away (`reports.reschedule`), so nothing is settled then.
        """
        facts = tasks.facts(task, assets)
        archive = states.outcome(facts)
        is_archived = archive is ArchiveState.ARCHIVED
        waiting = [asset for asset in assets if asset.state is AssetState.DUE]
        fault = states.shortfall(facts) or (WAITING.format(len(waiting), len(assets)) if waiting else None)
        note = (None if is_archived else _dismissal(assets)) or fault or tasks.request_note(task)
        claims.settle(
            session, task, due_in=None, attempts=0, step=None, archive=archive, note=note, archived_at=NOW, **written
        )  # fmt: skip
        kept = [file_facts(asset) for asset in assets if asset.state is AssetState.ARCHIVED]
        fact = {"manifest": written["manifest_key"], "files": len(facts.assets), "note": fault, "assets": kept}
        if waiting:
            fact["waiting"] = [{"kind": each.kind, "index": each.index, "error": each.error} for each in waiting]
        record(session, EventName.TASK_ARCHIVED if is_archived else EventName.TASK_INCOMPLETE, task.id, fact)
        return archive, note

    def _park(self, task: Task) -> None:
        note = f"ending its archive ended its worker {task.losses} times; `receiver retry` tries again"
        with self._database.write() as session:
            claims.settle(session, task, due_in=None, note=note)
        log.error("task.parked", **tasks.named(task), note=note)

    def _later(self, task: Task, error: Exception) -> None:
        after = error.after if isinstance(error, Retry) else None
        due_in = max(after or 0, claims.backoff(task.attempts))
        try:
            with self._database.write() as session:
                claims.settle(session, task, due_in=due_in, note=str(error))
        except LostClaim:
            return
        log.warning("task.manifest_not_written", **tasks.named(task), error=str(error), seconds=round(due_in, 1))


def _dismissal(assets: Sequence[Asset]) -> str | None:
    """The note of a dismissed task whose manifest is written again: each of its files is archived or dismissed."""
    others = [asset for asset in assets if asset.state is not AssetState.ARCHIVED]
    errors = [asset.error or "" if asset.state is AssetState.FAILED else "" for asset in others]
    return errors[0] if errors and all(error.startswith(DISMISSED) for error in errors) else None


def build(
    task: Task, assets: Sequence[Asset], aliases: Sequence[str], delivery: Any, version: str, predecessor: str | None
) -> tuple[bytes, str]:
    """The manifest's bytes and its digest: SHA-256 of its RFC 8785 form without the member `digest`.

    Contains no secret and no signed URL (`storage.url_parts`). `aliases`: every id by which the provider has called the
    task. `delivery`: source, body and time of the last one that was applied. `predecessor`: digest of the manifest that
    this one replaces. `manifest.schema.json` beside this file describes the members.
    """
    facts = tasks.facts(task, assets)
    decided = {"archive": states.outcome(facts).value, "note": states.shortfall(facts)}
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "tool_version": version,
        "predecessor": predecessor,
        "task": {**_columns(task, OF_TASK), **decided, "aliases": without_signatures(aliases)},
        "request": without_signatures(task.request, urls_without_queries),
        "assets": [
            {
                **_columns(asset, OF_ASSET),
                **_columns(asset, ODD, only_set=True),
                "source": without_signatures(asset.source_url, without_queries),
            }
            for asset in assets
        ],
    }
    dumped = {name: _dump(value, is_ours=name != "request") for name, value in content.items()}
    dumped["delivery"] = _delivery(delivery) if delivery else b"null"
    digest = hashlib.sha256(_members(dumped)).hexdigest()
    return _members({**dumped, "digest": _dump(digest, is_ours=True)}), digest


def _dump(value: Any, *, is_ours: bool) -> bytes:
    """The RFC 8785 form, by `json` in a sixth of the CPU where it is the same. `is_ours`: ASCII names, no fraction."""
    text = _JSON.encode(value)
    return text.encode() if is_ours or (text.isascii() and not FRACTION.search(text)) else rfc8785.dumps(value)


def _members(dumped: Mapping[str, bytes]) -> bytes:
    """The object with these members, each in its RFC 8785 form. A second object with one member more then dumps only
    that.
    """
    return b"{%s}" % b",".join(b'"%s":%s' % (name.encode(), dumped[name]) for name in sorted(dumped))


class ManifestDamaged(ValueError):
    """These bytes are no manifest of ours, or were changed since. The message says which."""


def read_at(bucket: Bucket, key: str) -> dict[str, Any]:
    """`read` of the object with this key. Raises `NoSuchObject` too."""
    return read(bucket.read_bytes(key, MAX_MANIFEST_BYTES))


def read(content: bytes) -> dict[str, Any]:
    """A manifest's members, with the digest verified. Raises `ManifestDamaged`."""
    try:
        # RFC 8785 writes a float below 10^21 like an integer, and has no integer of 17 digits.
        found = json.loads(content, parse_int=lambda digits: int(digits) if len(digits) < 16 else float(digits))
        schema, claimed = found["schema"], found["digest"]
        actual = digest_of(found)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestDamaged("it is not a manifest") from error
    if schema != SCHEMA:
        raise ManifestDamaged(f"its schema is not {SCHEMA}")
    if claimed != actual:
        raise ManifestDamaged("its content has another digest; restore the original")
    return dict(found)


def digest_of(members: Mapping[str, Any]) -> str:
    """SHA-256, as hex, of the RFC 8785 form without the member `digest`."""
    rest = {name: value for name, value in members.items() if name != "digest"}
    return hashlib.sha256(rfc8785.dumps(rest)).hexdigest()


def _delivery(delivery: Any) -> bytes:
    """The member, with a body of null if RFC 8785 has no form for it, for instance a lone surrogate in a name."""
    sha256 = hashlib.sha256(delivery.body).hexdigest()
    member = {"source": delivery.source, "sha256": sha256, "received_at": delivery.received_at, "body": None}
    with suppress(ValueError, RecursionError):
        body = json.loads(delivery.body)
        if delivery.body.count(b"[") + delivery.body.count(b"{") <= MAX_DEPTH or not _is_deep(body):
            return _dump(without_signatures({**member, "body": body}, without_queries), is_ours=False)
    return _dump(without_signatures(member), is_ours=False)


def _is_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not levels or any(_is_deep(each, levels - 1) for each in inner)


def _columns(row: Task | Asset, names: Sequence[str], *, only_set: bool = False) -> dict[str, Any]:
    """The columns of a row that belongs to no session. Reading one through the model takes four times as long."""
    values = vars(row)
    return {
        name: without_signatures(values[name], without_queries if name in FOREIGN else str)
        for name in names
        if not only_set or values[name]
    }


def without_signatures(value: Any, cut: Callable[[str], str] = str) -> Any:
    """`value` in JSON's types, with every URL cut before `?`, and with numbers that RFC 8785 can carry.

    `cut`: of every other text and name, `str` leaves them as they are.
    """
    if isinstance(value, str):
        return cut(address_of(value.encode("utf-8", "replace").decode()))  # lone surrogates have no UTF-8 form
    if isinstance(value, int):
        return value if abs(value) <= MAX_EXACT_INTEGER else str(value)
    if isinstance(value, dict):
        return {cut(name): without_signatures(inner, cut) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_signatures(inner, cut) for inner in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
