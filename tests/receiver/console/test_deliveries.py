"""Deliveries at the account's URL are shown with the task that they were applied to, and with no other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import func, text
from sqlmodel import col, select

from receiver.app.wiring import Parts
from receiver.tasks.apply_deliveries import MAX_READS_PER_TASK, NOT_READ
from receiver.tasks.changes import Tally
from receiver.tasks.operate import Operator
from storage.filters import DeliveryFilter
from storage.operations import lists
from storage.operations.lists import newest_deliveries
from storage.operations.measures import measure
from storage.rows.events import PERSON_ACTED, acts_of
from storage.rows.models import Callback, Event, Task
from storage.states import UNMATCHED, CallbackState
from tests.console_reader import HIDDEN, Reader
from tests.pipeline import callback_of, deliver, insert_row, make_due_now, run
from tests.plans import plans, scans

pytestmark = pytest.mark.databases("sqlite")  # forms and words
BOTH = pytest.mark.databases("sqlite", "postgresql")  # what queries and indexes find, and counts
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
    by_token = deliver(parts, task, {**about("ours", "failed"), "task_id": "901"}, webhook_id="msg_1")
    by_name = deliver(parts, None, about("ours", "failed"))
    by_provider = deliver(parts, None, {"task_id": "901", "task_status": "failed"})
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


@BOTH
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


def test_a_replay_says_what_it_changed_and_what_not(parts: Parts, ann: Reader) -> None:
    stays = deliver(parts, None, about("unknown"))
    task = insert_row(parts, external_task_id="ours")
    again = deliver(parts, task, about("ours"))
    comes = deliver(parts, None, about("later"))
    with parts.database.write() as session:  # as if the task's row had been there before
        session.get_one(Task, task.id).external_task_id = "later"
    shown = {row.id: ann.post("/act/replay", delivery=row.id) for row in (stays, comes)}
    assert all("1 delivery waits for a worker; it was unmatched" in answer.text for answer in shown.values())
    run(parts, "callbacks")
    after = {number: ann.http.get(answer.url).text for number, answer in shown.items()}
    assert "1 delivery was unmatched and still is. No task&#39;s state changed." in after[stays.id]
    assert "1 delivery was unmatched and is applied now." in after[comes.id]
    with parts.database.write() as session:
        session.get_one(Task, task.id).external_task_id = "ours"
    told = ann.post("/act/replay", delivery=again.id)
    run(parts, "callbacks")
    assert "1 delivery was applied before and was applied again" in ann.http.get(told.url).text
    assert "ann: replay" in ann.page("/tasks/ours")


def test_a_replay_of_many_stores_their_states_once(parts: Parts, ann: Reader) -> None:
    """Not in the row of each task, where 500 deliveries would be 250,000 entries."""
    tasks = [insert_row(parts) for _ in range(3)]
    numbers = {str(deliver(parts, task, b"no json").id) for task in tasks}
    assert "3 deliveries wait" in ann.post("/act/replay", state="unreadable").text
    with parts.database.read() as session:
        acts = [act for task in tasks for act in acts_of(session, task.id)]
    assert [act.data["action"] for act in acts] == ["replay"] * 3
    assert [set(act.data["before"]) for act in acts if "before" in act.data] == [numbers]


def unmatched(parts: Parts) -> int:
    with parts.database.read() as session:
        return measure(session, deadline_seconds=60, day=False).unmatched


@BOTH
def test_unmatched_deliveries_are_dismissed_with_a_reason_and_kept(parts: Parts, ann: Reader) -> None:
    first, *rest = (deliver(parts, None, about(f"unknown-{number}")) for number in range(3))
    assert (
        "Say why" in ann.post("/act/dismiss-deliveries", delivery=first.id, reason=" ").text and unmatched(parts) == 3
    )
    told = ann.post("/act/dismiss-deliveries", delivery=first.id, reason="of another installation")
    assert "1 delivery was dismissed" in told.text and "dismissed: of another installation" in told.text
    assert unmatched(parts) == 2
    page = ann.page("/deliveries?state=unmatched")
    form = dict(HIDDEN.findall(page.partition("/act/dismiss-deliveries")[2].partition("</form>")[0]))
    assert f'href="/console/deliveries/{first.id}"' not in page and form.pop("csrf") and form == {"state": "unmatched"}
    assert "2 deliveries were dismissed" in ann.post("/act/dismiss-deliveries", reason="all", **form).text
    assert unmatched(parts) == 0 and ann.post("/act/dismiss-deliveries", reason="all").status_code == 400
    listed = ann.page("/deliveries?state=dismissed")
    assert all(f'href="/console/deliveries/{row.id}"' in listed for row in (first, *rest))
    assert ann.get(f"/deliveries/{first.id}/body").content == first.body
    assert "ann: dismiss" in ann.page("/settings")
    ann.post("/act/replay", delivery=first.id)
    run(parts, "callbacks")
    assert unmatched(parts) == 1


def test_dismissed_delivery_is_applied_when_its_task_appears(parts: Parts, ann: Reader) -> None:
    row = deliver(parts, None, about("late"))
    ann.post("/act/dismiss-deliveries", delivery=row.id, reason="not ours")
    make_due_now(parts, Callback)
    run(parts, "unmatched")
    assert callback_of(parts, row.delivery_key).reason == "dismissed: not ours"
    insert_row(parts, external_task_id="late")
    run(parts, "callbacks")
    assert callback_of(parts, row.delivery_key).state is CallbackState.APPLIED


def test_only_unmatched_deliveries_are_dismissed(parts: Parts, ann: Reader) -> None:
    applied = deliver(parts, insert_row(parts, external_task_id="ours"), about("ours"))
    assert "0 deliveries were dismissed" in ann.post("/act/dismiss-deliveries", delivery=applied.id, reason="x").text
    assert callback_of(parts, applied.delivery_key).reason is None
    assert "/act/dismiss-deliveries" not in ann.page(f"/deliveries/{applied.id}")


def acts(parts: Parts) -> list[tuple[str, str, str | None]]:
    """Action, subject and task of each kept act."""
    with parts.database.read() as session:
        found = session.exec(select(Event).where(Event.name == PERSON_ACTED).order_by(col(Event.id)))
        return [(each.data["action"], each.data["subject"], str(each.task_id)) for each in found]


def test_what_was_not_dismissed_is_not_noted(parts: Parts, ann: Reader) -> None:
    task = insert_row(parts, external_task_id="ours")
    applied = deliver(parts, task, about("ours"))
    told = ann.post("/act/dismiss-deliveries", delivery=applied.id, reason="x")
    assert "no such delivery, or it has a task" in told.text and acts(parts) == []
    open_ones = [deliver(parts, None, about(f"unknown-{number}")) for number in range(2)]
    deliver(parts, task, about("ours", "succeed"))
    assert "2 deliveries were dismissed" in ann.post("/act/dismiss-deliveries", provider="kling", reason="x").text
    assert acts(parts) == [("dismiss", f"2 deliveries from {open_ones[0].id}", "None")]
    ann.post("/act/dismiss-deliveries", provider="kling", reason="x")
    assert len(acts(parts)) == 1 and "ann: dismiss" not in ann.page("/tasks/ours")


def test_what_was_not_replayed_is_not_noted(parts: Parts, ann: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    good, other = (deliver(parts, None, about(f"unknown-{number}")) for number in range(2))
    replay = Operator.replay

    def replay_all_but_one(self: Operator, ids: Sequence[int]) -> Tally:
        tally = replay(self, [number for number in ids if number != other.id])
        return Tally(tally.counts, {**tally.left, str(other.id): "its signature does not verify"})

    monkeypatch.setattr(Operator, "replay", replay_all_but_one)
    told = ann.post("/act/replay", state="unmatched")
    assert "1 delivery was put back" in told.text and "its signature does not verify" in told.text
    assert "1 delivery waits for a worker" in told.text
    assert "0 deliveries were put back" in ann.post("/act/replay", delivery=other.id).text
    assert acts(parts) == [("replay", f"1 delivery from {good.id}", "None")]


@pytest.mark.parametrize("path", ["/deliveries", "/deliveries/replay"])
def test_address_gives_a_form_no_field_beside_its_filter(parts: Parts, ann: Reader, path: str) -> None:
    deliver(parts, None, about("unknown"))
    assert ann.get(f"{path}?state=unmatched&csrf=zzz").status_code == 400
    page = ann.page(f"{path}?state=unmatched&before=2099-01-01T00:00:00Z~9")
    for form in page.split('method="post"')[1:]:
        names = re.findall('<input type="hidden" name="(\\w+)"', form.partition("</form>")[0])
        assert names in (["csrf"], ["csrf", "state"])


@BOTH
def test_open_and_dismissed_deliveries_are_found_by_an_index(parts: Parts) -> None:
    for number in range(2):
        deliver(parts, None, about(f"unknown-{number}"))
    for state in ("unmatched", "dismissed"):
        wanted = DeliveryFilter(state=state)
        assert not scans(parts.database, lambda session, wanted=wanted: newest_deliveries(session, wanted, None))
    counted = select(func.count()).select_from(Callback).where(text(UNMATCHED))
    assert "callback_unmatched_open" in plans(parts.database, lambda session: session.exec(counted).one())


def test_the_cause_of_a_delivery_stands_above_its_body(parts: Parts, ann: Reader) -> None:
    """On a phone the facts are below both bodies, some 1.4 screens away."""
    unknown = deliver(parts, None, {"task_id": "unknown", "task_status": "succeed"})
    page = ann.page(f"/deliveries/{unknown.id}")
    assert page.index("no task of ours has this id") < page.index('id="pretty"')
