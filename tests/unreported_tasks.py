"""Tasks without callbacks, and the reads that the provider got: shared by the tests of reconciling."""

from __future__ import annotations

import base64
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from sqlmodel import select

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks.reconcile import Reader
from storage.rows.models import Asset, Task
from storage.states import TaskState
from tests.pipeline import make_due_now, task_of

REQUEST = {"model_name": "kling-v3-omni", "prompt": "a boat"}
# A delivery of a task that has no row here.
OTHERS = {"task_id": "777", "task_status": "processing", "task_info": {"external_task_id": "late"}}


def submit(parts: Parts, count: int, **fields: Any) -> list[Task]:
    """Tasks that are due for a read. Their callbacks are lost, because no web server runs."""
    made = [parts.submitter.submit({**REQUEST, **fields}).task for _ in range(count)]
    make_due_now(parts, Task)
    return made


def states_of(parts: Parts, made: list[Task]) -> set[TaskState]:
    return {task_of(parts, task.external_task_id).state for task in made}


def queries(sandbox: Sandbox) -> int:
    return sandbox.ledger().counts["query"]


def reader(parts: Parts) -> Reader:
    return Reader(parts.database, parts.providers, parts.schedule, parts.read_rate_limit)


def all_assets(parts: Parts) -> list[Asset]:
    with parts.database.read() as session:
        return list(session.exec(select(Asset)))


def creates(sandbox: Sandbox) -> list[Any]:
    """The bodies of the create requests that reached the provider."""
    return [create.body for create in sandbox.ledger().creates]


def go_on_after(sandbox: Sandbox, told: int) -> None:
    """Let the provider continue an hour later, once this many tasks have had an answer."""
    sandbox.world.advance(time.time() + 3_600 * told + 60)


def unanswered(sandbox: Sandbox, *, but: int = 0) -> AbstractContextManager[None]:
    """Creates reach the provider, and its answers arrive when the block ends, `but` the first."""
    return _late(sandbox.world, "create", but)


def undelivered(sandbox: Sandbox, *, but: int = 0) -> AbstractContextManager[None]:
    """Pictures are requested, and arrive when the block ends, `but` the first."""
    return _late(sandbox.world.gallery, "data", but)


@contextmanager
def _late(part: Any, name: str, but: int = 0) -> Iterator[None]:
    """A fault of the provider: answers with this text are delayed during the block."""
    ask, ended, numbers = getattr(part, name), threading.Event(), itertools.count()

    def held_back(*words: Any) -> Any:
        answer = ask(*words)
        if next(numbers) >= but:
            ended.wait()
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, name, held_back)
        try:
            yield
        finally:
            ended.set()


def drawn(width: int, height: int) -> bytes:
    """A PNG file of that size."""
    file = BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()
