"""A repeated unreadable delivery causes another read. On both databases."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import event, update
from sqlmodel import col

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from storage.rows import claims, deliveries, group_commit
from storage.rows.models import Callback, Task
from storage.states import CallbackState
from tests.pipeline import Web, callbacks_of, insert_row, make_due_now, run
from tests.rows import LONG_AGO

pytestmark = pytest.mark.parametrize("changes", [{"poll_after_seconds": 3_600}])
REQUEST = {"model_name": "kling-v3-omni", "prompt": "a cat"}


@pytest.fixture(autouse=True)
def loop_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop commits from the first delivery on, and leaves to the thread what it cannot."""
    monkeypatch.setattr(group_commit, "QUICK_COMMITS", 0)


def submitted(parts: Parts, sandbox: Sandbox) -> Task:
    """A task that stays in progress at the provider for the whole test, without callbacks."""
    sandbox.set(processing_seconds=600, callback_drop_rate=1)
    return parts.submitter.submit(REQUEST).task


def deliver(web: Web, parts: Parts, task: Task | None, body: bytes = b"") -> Callback:
    """Deliver like a proxy that drops bodies. Returns the newest row."""
    token = parts.tokens.sign("kling", task.id if task else None)
    assert httpx.post(f"{web.url}/callbacks/kling/{token}", content=body, timeout=10).status_code == 200
    return callbacks_of(parts)[-1]


def age(parts: Parts) -> None:
    """Move the time of the last application far back."""
    with parts.database.write() as session:
        session.execute(update(Callback).where(col(Callback.applied_at).is_not(None)).values(applied_at=LONG_AGO))


def reads(parts: Parts, sandbox: Sandbox) -> int:
    """Do all due work. Returns how many reads the provider has got."""
    run(parts, "callbacks", "reads")
    return sandbox.ledger().counts["query"]


def test_an_unreadable_delivery_that_comes_again_causes_a_read_again(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    task = submitted(parts, sandbox)
    before = reads(parts, sandbox)
    deliver(web, parts, task)
    assert reads(parts, sandbox) == before + 1
    age(parts)
    deliver(web, parts, task)
    assert reads(parts, sandbox) == before + 2
    assert [row.state for row in callbacks_of(parts) if row.source == "push"] == [CallbackState.UNREADABLE]


@pytest.mark.databases("sqlite")
def test_repeats_cause_no_more_reads_than_are_allowed(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    task = submitted(parts, sandbox)
    before = reads(parts, sandbox)
    for number in range(4 * deliveries.UNREADABLE_READS):
        deliver(web, parts, task, b"" if number % 2 else b"{")
        make_due_now(parts, Callback)
        reads(parts, sandbox)
    assert reads(parts, sandbox) == before + deliveries.UNREADABLE_READS


@pytest.mark.databases("sqlite")
def test_repeats_within_seconds_share_one_read(web: Web, parts: Parts) -> None:
    task = insert_row(parts)
    deliver(web, parts, task)
    run(parts, "callbacks")
    first = deliver(web, parts, task)
    assert first.due_at and timedelta(0) < first.due_at - parts.database.now() <= timedelta(
        seconds=deliveries.UNREADABLE_SECONDS
    )
    assert (first.state, deliver(web, parts, task).due_at) == (CallbackState.RECEIVED, first.due_at)
    assert run(parts, "callbacks") == 0


@pytest.mark.databases("sqlite")
def test_repeat_of_a_readable_delivery_writes_nothing(web: Web, parts: Parts) -> None:
    task, written = insert_row(parts), list[str]()
    body = b'{"task_id": "901", "task_status": "processing"}'
    deliver(web, parts, task, body)
    run(parts, "callbacks")

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        written.extend([statement] if statement.lstrip().startswith(("UPDATE", "WITH repeated")) else [])

    event.listen(parts.database.writer, "before_cursor_execute", note)
    assert deliver(web, parts, task, body).state is CallbackState.APPLIED
    assert written == []


@pytest.mark.parametrize("is_parked", [True, False])
def test_parked_or_unnamed_unreadable_delivery_does_not_change(is_parked: bool, web: Web, parts: Parts) -> None:
    task = insert_row(parts) if is_parked else None
    deliver(web, parts, task)
    if is_parked:  # one claim more than lost leases
        with parts.database.write() as session:
            session.execute(update(Callback).values(attempts=claims.PARK_LOSSES, losses=claims.PARK_LOSSES))
        parts.worker([lane for lane in parts.lanes() if lane.name == "callbacks"]).run_quarantined()
    run(parts, "callbacks")
    age(parts)
    assert deliver(web, parts, task).state is CallbackState.UNREADABLE
