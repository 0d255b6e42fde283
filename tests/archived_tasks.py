"""Helpers that make archived tasks with the sandbox and our worker."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from sqlmodel import col, exists, select

from receiver.app.wiring import Parts
from storage.database import prepared
from storage.rows.models import Asset, Task
from tests.pipeline import make_due_now

REQUEST = {"model_name": "kling-image-o1", "prompt": "a boat"}
WAITING = select(*(exists().where(col(model.due_at).is_not(None)).label(model.__name__) for model in (Task, Asset)))


def archive(parts: Parts, count: int, **fields: Any) -> list[Task]:
    """Submit this many tasks and do all work on them. Returns their rows."""
    submitted = [parts.submitter.submit({**REQUEST, **fields}).task.id for _ in range(count)]
    work_off(parts)
    with parts.database.read() as session:
        return list(session.exec(select(Task).where(col(Task.id).in_(submitted)).order_by(Task.external_task_id)))


def work_off(parts: Parts) -> None:
    """Do what is due, then what is due later, until nothing waits."""
    worker = parts.worker()
    for _ in range(20):
        worker.run_until_idle()
        with parts.database.autocommit_reader() as connection:
            (waiting,) = prepared.execute(connection, WAITING).rows
        if not any(waiting):
            return
        make_due_now(parts)
    raise AssertionError(f"still waiting: {waiting}")


def all_assets(parts: Parts) -> list[Asset]:
    with parts.database.read() as session:
        return list(session.exec(select(Asset).order_by(Asset.key)))


# Keys that a test has overwritten; they need not hold a manifest of ours.
BY_HAND: set[str] = set()


def put(parts: Parts, key: str, content: bytes) -> None:
    """Put an object like another program would, in place of the present one."""
    BY_HAND.add(key)
    parts.bucket.delete(key)
    sha256 = hashlib.sha256(content).hexdigest()
    file = io.BytesIO(content)
    parts.bucket.put_once(key, file, sha256=sha256, size=len(content), media_type="image/png", metadata={})


def flip(parts: Parts, key: str) -> None:
    """Flip one bit of the object."""
    content = bytearray(parts.bucket.read_bytes(key, 2**26))
    content[len(content) // 2] ^= 1
    put(parts, key, bytes(content))
