"""Deliveries at the account's URL are shown with the task that they were applied to, and with no other."""

from __future__ import annotations

import re
from typing import Any

from sqlmodel import select

from receiver.app.wiring import Parts
from receiver.tasks.apply_deliveries import MAX_READS_PER_TASK, NOT_READ
from storage.filters import DeliveryFilter
from storage.operations import lists
from storage.operations.lists import newest_deliveries
from storage.rows.models import Callback, Task
from storage.states import CallbackState
from tests.console_reader import Reader
from tests.pipeline import deliver, insert_row
from tests.plans import plans, scans

LINKED = re.compile(r'<a class="mono" href="/console/tasks/([^"]+)">')


def about(name: str, status: str = "processing") -> dict[str, Any]:
    return {"task_status": status, "task_info": {"external_task_id": name}}


def numbers(parts: Parts, task: Task) -> list[int]:
    """The deliveries that the filter by this task finds."""
    with parts.database.read() as session:
        page = newest_deliveries(session, DeliveryFilter(task=task.external_task_id), None)
    return [row.id for row, *_ in page.rows]


def test_deliveries_at_both_urls_are_shown_with_their_task(parts: Parts, ann: Reader) -> None:
    task = insert_row(parts, external_task_id="ours")
    by_token = deliver(parts, task, {**about("ours"), "task_id": "901"})
    by_name = deliver(parts, None, about("ours", "succeed"))
    by_provider = deliver(parts, None, {"task_id": "901", "task_status": "processing"})
    rows = [by_provider, by_name, by_token]
    assert {row.state for row in rows} == {CallbackState.APPLIED} and by_name.task_id is None
    page = ann.page(f"/tasks/{task.external_task_id}")
    assert numbers(parts, task) == [row.id for row in rows]
    for row in rows:
        assert f'href="/console/deliveries/{row.id}"' in page
        assert "/console/tasks/ours" in ann.page(f"/deliveries/{row.id}")
    assert LINKED.findall(ann.page("/deliveries")) == [str(task.id)] * 3


def test_what_a_stranger_says_about_a_task_is_not_shown_as_the_tasks(parts: Parts, ann: Reader) -> None:
    task = insert_row(parts, external_task_id="ours", callback_reads=MAX_READS_PER_TASK)
    unread = deliver(parts, None, about("ours", "succeed"))
    other_provider, unmatched, waiting, refused = (
        deliver(parts, None, {**about("ours"), "task_status_msg": f"{number}"}).id for number in range(4)
    )
    with parts.database.write() as session:
        session.get_one(Callback, other_provider).provider = "another"
        for number, state in ((unmatched, "UNMATCHED"), (waiting, "RECEIVED"), (refused, "REJECTED")):
            session.get_one(Callback, number).state = CallbackState[state]
    assert unread.reason == NOT_READ
    page = ann.page("/tasks/ours")
    assert numbers(parts, task) == [] and LINKED.findall(ann.page("/deliveries")) == []
    for number in (unread.id, other_provider, unmatched, waiting, refused):
        shown = ann.page(f"/deliveries/{number}")
        assert f'href="/console/deliveries/{number}"' not in page
        assert "none here" in shown and "/console/tasks/ours" not in shown


def test_deliveries_of_a_task_are_found_by_an_index(parts: Parts) -> None:
    task = insert_row(parts, external_task_id="ours")
    deliver(parts, task, about("ours"))
    deliver(parts, None, about("ours", "succeed"))
    with parts.database.read() as session:
        ids = session.scalars(select(Callback.id)).all()
    for look in (
        lambda session: newest_deliveries(session, DeliveryFilter(task="ours"), None),
        lambda session: lists.deliveries_of(session, task, 60),
        lambda session: lists._deliveries(session, [number or 0 for number in ids]),
    ):
        assert not scans(parts.database, look)
        if parts.database.is_sqlite:  # PostgreSQL chooses by its statistics
            assert "callback_newest" not in plans(parts.database, look)
