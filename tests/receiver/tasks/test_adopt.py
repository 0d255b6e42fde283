"""Tasks made elsewhere: found, taken over once, archived like our own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks.adopt import Adopter
from storage.rows import events
from storage.states import ArchiveState, CallbackState, Step, TaskState
from tests.harness import wait_until
from tests.pipeline import assert_archived, callback_of, deliver, drain, insert_row, run, task_of
from tests.receiver.tasks.test_operate import ASKED, counted, everything
from tests.rows import LONG_AGO, event_names

DAY = timedelta(days=1)


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"public_url": None, "callback_secrets": "", "poll_after_seconds": 3_600}


@pytest.fixture
def adopter(parts: Parts) -> Adopter:
    return Adopter(parts.database, parts.providers, parts.schedule, parts.read_rate_limit)


def made_elsewhere(sandbox: Sandbox, external_task_id: str | None = None, *, until: str = "") -> dict[str, Any]:
    """A task that no receiver asked for, as the provider's ledger has it once it is `until`."""
    fields = {**ASKED, "n": 2} | ({"external_task_id": external_task_id} if external_task_id else {})
    answer = httpx.post(
        f"{sandbox.url}/v1/images/omni-image", json=fields, headers={"Authorization": f"Bearer {sandbox.api_key}"}
    )
    task: dict[str, Any] = answer.json()["data"]
    if until:
        wait_until(lambda: sandbox.ledger().task(external_task_id or task["task_id"]).status == until)
    return task


def test_a_task_is_taken_over_by_either_id_and_archived(parts: Parts, sandbox: Sandbox, adopter: Adopter) -> None:
    theirs = made_elsewhere(sandbox, "theirs", until="succeed")
    assert counted(adopter.take(["theirs"])) == {"adopted": 1, "files_due": 2}
    assert counted(adopter.take([theirs["task_id"], "theirs"])) == {"known": 2}
    task = drain(parts, "theirs")
    assert_archived(parts, sandbox, task)
    assert task.created_at == datetime.fromtimestamp(theirs["created_at"] / 1000, UTC)
    assert (task.provider_task_id, task.request, task.expected) == (theirs["task_id"], {}, None)
    assert event_names(parts.database, task)[:2] == ["task.created", "task.succeeded"]
    assert len(sandbox.ledger().creates) == 1


def test_adopted_task_without_our_id_gets_the_providers(parts: Parts, sandbox: Sandbox, adopter: Adopter) -> None:
    theirs = made_elsewhere(sandbox, until="succeed")
    adopter.take([theirs["task_id"]])
    assert drain(parts, theirs["task_id"]).archive is ArchiveState.ARCHIVED


def test_adopted_task_in_progress_is_read_until_it_ends(parts: Parts, sandbox: Sandbox, adopter: Adopter) -> None:
    sandbox.set(processing_seconds=600)
    made_elsewhere(sandbox, "theirs", until="processing")
    assert counted(adopter.take(["theirs"])) == {"adopted": 1}
    task = task_of(parts, "theirs")
    assert (task.state, task.step) == (TaskState.PROCESSING, Step.READ)
    assert task.due_at is not None


def test_listed_tasks_are_adopted_page_by_page(parts: Parts, sandbox: Sandbox, adopter: Adopter) -> None:
    for number in range(5):
        made_elsewhere(sandbox, f"theirs-{number}")
    insert_row(parts, external_task_id="theirs-3")
    assert counted(adopter.take_listed(DAY, page_size=2))["adopted"] == 4
    assert counted(adopter.take_listed(DAY, page_size=2)) == {"known": 5}
    assert {task_of(parts, f"theirs-{number}").provider for number in range(5)} == {"kling"}


@pytest.mark.databases("sqlite")
def test_older_tasks_are_not_adopted(parts: Parts, sandbox: Sandbox, adopter: Adopter) -> None:
    for number in range(5):
        made_elsewhere(sandbox, f"theirs-{number}")
    before = everything(parts.database)
    tally = adopter.take_listed(-DAY, page_size=2)
    assert counted(tally) == {"too_old": 2}, "later pages are older still"
    assert {**everything(parts.database), "counter": before["counter"]} == before


def test_rows_of_an_old_backup_get_no_number_that_readers_have_seen(
    parts: Parts, sandbox: Sandbox, adopter: Adopter
) -> None:
    """A reader of the lost rows has seen the numbers up to 77."""
    insert_row(parts)
    parts.sequence()
    adopter.take_listed(DAY)
    insert_row(parts)
    parts.sequence()
    with parts.database.read() as session:
        assert [event.name for event, _ in events.after(session, 77, 10)] == ["task.created"]


def test_a_queued_create_of_an_old_backup_is_looked_up_and_not_sent_again(
    parts: Parts, sandbox: Sandbox, adopter: Adopter
) -> None:
    """Not every gateway refuses an external id that was used."""
    created = {"step": Step.CREATE, "state": TaskState.CREATED, "due_at": LONG_AGO}
    insert_row(parts, external_task_id="sent-since", request=ASKED, **created)
    theirs = made_elsewhere(sandbox, "sent-since")
    assert counted(adopter.take_listed(DAY)) == {"known": 1}
    run(parts, "creates")
    assert task_of(parts, "sent-since").provider_task_id == theirs["task_id"]
    assert [name for name in sandbox.ledger().counts if name.startswith("create:")] == ["create:0"]


def test_dry_run_adopts_nothing(parts: Parts, sandbox: Sandbox) -> None:
    made_elsewhere(sandbox, "theirs", until="succeed")
    before = everything(parts.database)
    adopter = Adopter(parts.database, parts.providers, parts.schedule, parts.read_rate_limit, dry_run=True)
    assert counted(adopter.take(["theirs"])) == {"adopted": 1, "files_due": 2}
    assert counted(adopter.take_listed(DAY)) == {"adopted": 1, "files_due": 2}
    assert everything(parts.database) == before


def test_task_named_twice_is_adopted_once_and_a_dry_run_says_so(parts: Parts, sandbox: Sandbox) -> None:
    theirs = made_elsewhere(sandbox, "theirs", until="succeed")
    for dry_run in (True, False):
        adopter = Adopter(parts.database, parts.providers, parts.schedule, parts.read_rate_limit, dry_run=dry_run)
        tally = adopter.take(["theirs", theirs["task_id"], "theirs"])
        assert counted(tally) == {"adopted": 1, "files_due": 2, "known": 2}


@pytest.mark.databases("sqlite")
def test_task_unknown_to_the_provider_is_reported(parts: Parts, sandbox: Sandbox, adopter: Adopter) -> None:
    made_elsewhere(sandbox, "theirs")
    sandbox.set(query_faults=["5001"])
    tally = adopter.take(["nothing", "theirs"])
    assert tally.left == {"nothing": "the provider does not know it"}
    assert counted(tally)["adopted"] == 1


def test_a_create_that_failed_here_is_not_overwritten(parts: Parts, sandbox: Sandbox, adopter: Adopter) -> None:
    made_elsewhere(sandbox, "theirs")
    insert_row(parts, external_task_id="theirs", state=TaskState.FAILED, step=None, due_at=None)
    assert "--adopt" in adopter.take(["theirs"]).left["theirs"]
    assert counted(adopter.take_listed(DAY)) == {"known": 1}
    assert task_of(parts, "theirs").state is TaskState.FAILED


def test_a_delivery_that_had_no_task_finds_it(parts: Parts, sandbox: Sandbox, adopter: Adopter) -> None:
    theirs = made_elsewhere(sandbox, "theirs", until="succeed")
    body = {"task_id": theirs["task_id"], "task_status": "processing"}
    row = deliver(parts, None, body)
    assert row.state is CallbackState.UNMATCHED
    adopter.take(["theirs"])
    run(parts, "callbacks")
    assert callback_of(parts, row.delivery_key).state is CallbackState.APPLIED
