"""How the work stands: what waits, what is late, which deadlines are near, how callbacks come."""

from __future__ import annotations

import threading
from datetime import timedelta

import httpx
import pytest
from sqlalchemy import text
from sqlmodel import col, select, update

from receiver import waiting
from receiver.sandbox import Sandbox
from receiver.telemetry import WORK
from receiver.wiring import Parts
from storage import deadlines
from storage.database import Database
from storage.measures import Measures, measure
from storage.models import Event, Task
from storage.pace import ReadLimit
from storage.states import ArchiveState, AssetState, TaskState
from tests.asking import OTHERS, REQUEST, states_of, submit
from tests.harness import wait_until
from tests.pipeline import Web, callbacks_of, deliver, drain, plant, run
from tests.rows import LONG_AGO, event_names, new_asset, stored


@pytest.fixture
def unpaced(parts: Parts) -> Parts:
    """Parts whose reads are not slowed down, for the tests that are not about their pace."""
    parts.__dict__["read_limit"] = ReadLimit(parts.database, per_second=10_000)
    return parts


def expiring(parts: Parts, hours: float, asset_state: AssetState = AssetState.DUE) -> Task:
    task = plant(parts, archive=ArchiveState.ARCHIVING, step=None, due_at=None)
    expires = parts.database.now() + timedelta(hours=hours)
    with parts.database.write() as session:
        new_asset(session, task, 0, state=asset_state)
        session.execute(update(Task).where(col(Task.id) == task.id).values(files_expire_at=expires))
    return task


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_a_deadline_is_announced_once_and_hours_before(parts: Parts) -> None:
    near, past, far = (expiring(parts, hours) for hours in (5, -1, 7))
    done = expiring(parts, 5, AssetState.ARCHIVED)
    lead = deadlines.lead_seconds(30 * 86_400)
    assert [deadlines.announce(parts.database, lead) for _ in range(3)] == [2, 0, 0]
    named = [event_names(parts.database, task).count("task.deadline_near") for task in (near, past, far, done)]
    assert named == [1, 1, 0, 0]
    assert stored(parts.database, near)["deadline_near_at"] is not None


def test_where_files_live_for_a_day_six_hours_are_early_enough() -> None:
    assert [deadlines.lead_seconds(days * 86_400) / 3_600 for days in (30, 1, 1 / 24)] == [6, 6, 0.25]


def test_workers_announce_deadlines(parts: Parts) -> None:
    task = expiring(parts, 1)
    worker = parts.worker([])
    thread = threading.Thread(target=worker.run)
    thread.start()
    wait_until(lambda: "task.deadline_near" in event_names(parts.database, task))
    worker.stop()
    thread.join(20)


def test_the_event_of_a_deadline_says_when(parts: Parts) -> None:
    task = expiring(parts, 1)
    deadlines.announce(parts.database, 6 * 3_600)
    with parts.database.read() as session:
        event = session.exec(select(Event).where(Event.name == "task.deadline_near")).one()
    assert event.data == {"files_expire_at": stored(parts.database, task)["files_expire_at"].isoformat()}


# -- numbers ----------------------------------------------------------------------------------------------------------


def measured(parts: Parts) -> Measures:
    with parts.database.read() as session:
        return measure(session, deadline_seconds=6 * 3_600)


def test_lost_and_late_callbacks_are_counted(web: Web, unpaced: Parts, sandbox: Sandbox) -> None:
    sandbox.set(callback_drop_rate=1)
    made = submit(unpaced, 3)
    assert states_of(unpaced, [drain(unpaced, task.external_task_id) for task in made]) == {TaskState.SUCCEEDED}
    sandbox.set(callback_drop_rate=0)
    heard = unpaced.submitter.submit(REQUEST).task
    wait_until(lambda: [each for each in callbacks_of(unpaced) if each.source == "push"])
    drain(unpaced, heard.external_task_id)
    late = unpaced.kling.read(provider_task_id=None, external_task_id=made[0].external_task_id)
    assert late is not None
    deliver(unpaced, made[0], late.body)
    assert measured(unpaced).callbacks_expected == 0  # they have five minutes to come
    age(unpaced, minutes=10)
    found = measured(unpaced)
    assert (found.callbacks_expected, found.callbacks_lost, found.callbacks_late) == (4, 2, 1)
    assert (found.callback_loss_rate, found.late_seconds > 0, found.archived_day) == (0.5, True, 4)


def age(parts: Parts, *, minutes: int) -> None:
    """As if everything had happened so much earlier."""
    earlier = timedelta(minutes=minutes)
    with parts.database.write() as session:
        for task in session.exec(select(Task)):
            assert task.completed_at is not None
            task.completed_at -= earlier
            task.end_called_back_at = task.end_called_back_at and task.end_called_back_at - earlier


def test_a_callback_that_was_not_believed_is_not_lost(unpaced: Parts, sandbox: Sandbox) -> None:
    (task,) = submit(unpaced, 1, prompt="[fail]")
    wait_until(lambda: sandbox.ledger().tasks[0].status == "failed")
    deliver(unpaced, task, {"task_id": task.provider_task_id, "task_status": "failed", "task_status_msg": "no"})
    run(unpaced, "reads")
    age(unpaced, minutes=10)
    found = measured(unpaced)
    assert (found.callbacks_expected, found.callbacks_lost, found.failed_day) == (1, 0, 1)


def test_the_work_that_waits_is_counted(parts: Parts) -> None:
    plant(parts, due_at=parts.database.now())
    plant(parts, due_at=parts.database.now() - timedelta(minutes=10))
    plant(parts)
    deliver(parts, None, OTHERS)
    expiring(parts, 1)
    found = measured(parts)
    assert (found.due, found.overdue, found.unmatched, found.deadline_near) == (3, 2, 1, 1)
    assert found.oldest_due_seconds >= 600


def test_every_measure_has_its_gauge(parts: Parts) -> None:
    assert WORK.keys() == measured(parts).as_dict().keys()


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_rare_states_are_found_by_their_partial_indexes(database: Database) -> None:
    plans = []
    with database.read() as session:
        for question in (
            "SELECT id FROM callback WHERE external_task_id = 'x' AND state = 'unmatched'",
            "SELECT id FROM task WHERE archive = 'archiving' AND files_expire_at < '2026'",
        ):
            plans += [row[3] for row in session.execute(text(f"EXPLAIN QUERY PLAN {question}"))]
    assert [plan.split("INDEX ")[1].split()[0] for plan in plans] == ["callback_unmatched_external", "task_deadline"]


def test_one_line_says_how_the_work_stands(parts: Parts) -> None:
    deliver(parts, None, OTHERS)
    line = waiting.summary(measured(parts))
    assert line == "0 due · 1 deliveries unmatched · last 24 h: 0 archived, 0 incomplete, 0 failed"


@pytest.mark.parametrize("changes", [{"metrics_token": "a-token"}])
def test_gauges_and_readiness_tell_what_is_late(web: Web, parts: Parts) -> None:
    plant(parts, due_at=LONG_AGO)
    expiring(parts, 1)
    permitted = {"Authorization": "Bearer a-token"}
    numbers = httpx.get(f"{web.url}/metrics", headers=permitted).text
    assert {"receiver_overdue 2.0", "receiver_deadline_near 1.0", "receiver_unmatched 0.0"} <= set(numbers.splitlines())
    ready = httpx.get(f"{web.url}/readyz", headers=permitted)
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    late = {name: ready.json()["checks"][name] for name in ("work", "deadlines")}
    assert late == {"work": "2 rows are overdue", "deadlines": "1 tasks are about to lose files"}
