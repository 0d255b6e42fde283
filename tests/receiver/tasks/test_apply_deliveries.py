"""Deliveries become rows: their task, when they are believed, and the effect of contradictions and replays."""

from __future__ import annotations

import gzip
import json
import uuid
from typing import Any

import pytest
import structlog
from sqlalchemy import event, update
from sqlmodel import col, select

from receiver.app.wiring import Parts
from receiver.providers.kling.client import Kling
from receiver.tasks.apply_deliveries import Confirmation
from storage.database import group_writer
from storage.errors import DatabaseUnavailable
from storage.rows import claims, reports, tasks
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Callback, Task, TaskAlias
from storage.states import CallbackState, Output, Report, Step, TaskState
from tests.harness import PAYLOADS
from tests.pipeline import assets_of, callback_of, deliver, insert_row, make_due_now, run, task_of
from tests.rows import LONG_AGO, event_names

SUBMITTED, PROCESSING, SUCCEEDED, FAILED = (
    TaskState.SUBMITTED,
    TaskState.PROCESSING,
    TaskState.SUCCEEDED,
    TaskState.FAILED,
)
CONSOLE_TEST = (PAYLOADS / "console-test-callback.json").read_bytes()
OFFICIAL, TRUSTED, FOREIGN = "https://p1-fdl.klingai.com", "https://files.example", "https://files.example.net"
AWAITS_READ = "not believed yet: the task is read at the provider"


def body(status: str, pictures: int = 0, *, host: str = OFFICIAL, task_id: str = "901", **more: Any) -> dict[str, Any]:
    """A callback in the old shape."""
    images = [{"index": index, "url": f"{host}/{index}.png?Signature=s"} for index in range(pictures)]
    return {"task_id": task_id, "task_status": status, "task_result": {"images": images} if images else {}, **more}


def info(external_task_id: str) -> dict[str, Any]:
    return {"task_info": {"external_task_id": external_task_id}}


# -- when a delivery is believed: the table of RECEIVER_CONFIRM -----------------------------------------------------


def report(status: TaskState | None, pictures: int = 0, host: str = OFFICIAL) -> Report:
    outputs = tuple(Output("image", f"{host}/{index}.png", index) for index in range(pictures))
    return Report("901", None, status, outputs=outputs)


@pytest.mark.parametrize(
    ("mode", "told", "signed", "by_token", "believed"),
    [
        ("auto", report(SUCCEEDED, 2), False, True, True),
        ("auto", report(SUCCEEDED, 2, TRUSTED), False, True, True),
        ("auto", report(SUCCEEDED, 3), False, True, False),  # more than requested
        ("auto", report(SUCCEEDED, 1), False, True, False),  # fewer than requested
        ("auto", report(SUCCEEDED), False, True, False),
        ("auto", report(SUCCEEDED, 2, FOREIGN), False, True, False),
        ("auto", report(SUCCEEDED, 2, "https://klingai.com.example.net"), False, True, False),
        ("auto", report(SUCCEEDED, 2, "https://notklingai.com"), False, True, False),
        ("auto", report(SUCCEEDED, 2, "https://[broken"), False, True, False),
        ("auto", report(FAILED), False, True, False),
        ("auto", report(PROCESSING), False, True, True),
        ("auto", report(None), False, True, True),
        ("auto", report(SUCCEEDED, 1, FOREIGN), True, True, True),  # signed, so it is the provider's own
        ("auto", report(FAILED), True, True, True),
        ("auto", report(SUCCEEDED, 2), True, False, False),  # the account URL: always read
        ("auto", report(PROCESSING), False, False, False),
        ("always", report(SUCCEEDED, 2), True, True, False),
        ("always", report(FAILED), True, True, False),
        ("always", report(PROCESSING), False, True, True),
        ("never", report(SUCCEEDED, 1, FOREIGN), False, True, True),
        ("never", report(FAILED), False, True, True),
    ],
)
def test_delivery_is_believed_by_signature_contents_and_hosts(
    mode: Any, told: Report, signed: bool, by_token: bool, believed: bool
) -> None:
    rule = Confirmation(mode, ("klingai.com", "files.example"))
    task = Task(external_task_id="a", provider="kling", expected=2, series=False)
    assert rule.is_believed(told, task, signed=signed, by_token=by_token) is believed


def test_a_task_that_may_bring_any_number_is_read() -> None:
    task = Task(external_task_id="a", provider="kling", expected=None, series=True)
    assert not Confirmation("auto", ("klingai.com",)).is_believed(
        report(SUCCEEDED, 4), task, signed=False, by_token=True
    )


def is_read_now(parts: Parts, task: Task) -> bool:
    found = task_of(parts, task.external_task_id)
    return found.step is Step.READ and found.due_at is not None and found.due_at <= parts.database.now()


def test_a_believed_delivery_makes_the_assets_due(parts: Parts) -> None:
    task = insert_row(parts)
    row = deliver(parts, task, body("succeed", 1))
    assert (row.state, row.reason, row.due_at) == (CallbackState.APPLIED, None, None)
    (asset,) = assets_of(parts, task)
    assert asset.due_at is not None and not is_read_now(parts, task)


def test_a_doubted_delivery_writes_nothing_but_makes_the_task_due_for_a_read(parts: Parts) -> None:
    task = insert_row(parts)
    row = deliver(parts, task, body("succeed", 1, host=FOREIGN))
    assert (row.state, row.reason) == (CallbackState.APPLIED, AWAITS_READ)
    assert assets_of(parts, task) == [] and is_read_now(parts, task)
    assert task_of(parts, task.external_task_id).state is SUBMITTED


@pytest.mark.parametrize(
    "changes", [{"result_hosts": "files.example.net"}, {"private_result_hosts": "files.example.net:8000"}]
)
def test_hosts_of_the_settings_are_trusted(parts: Parts) -> None:
    task = insert_row(parts)
    assert deliver(parts, task, body("succeed", 1, host=FOREIGN)).reason is None
    assert len(assets_of(parts, task)) == 1


def test_a_signed_delivery_is_believed_with_any_content(parts: Parts) -> None:
    task = insert_row(parts)
    deliver(parts, task, body("failed", task_status_msg="no"), webhook_id="msg_1")
    found = task_of(parts, task.external_task_id)
    assert (found.state, found.error, found.due_at) == (FAILED, "no", None)


def test_a_late_report_does_not_put_off_a_read_that_was_asked_for(parts: Parts) -> None:
    task = insert_row(parts)
    deliver(parts, task, body("failed"))
    deliver(parts, task, body("processing"))
    assert task_of(parts, task.external_task_id).state is PROCESSING
    assert is_read_now(parts, task)


# -- the task of a delivery -----------------------------------------------------------------------------------------


def test_delivery_at_the_account_url_finds_its_task_by_our_id_and_causes_a_read(parts: Parts) -> None:
    task = insert_row(parts, external_task_id="ours")
    row = deliver(parts, None, body("succeed", 1, **info("ours")))
    assert (row.state, row.reason) == (CallbackState.APPLIED, AWAITS_READ)
    assert assets_of(parts, task) == [] and is_read_now(parts, task)


def test_delivery_at_the_account_url_finds_its_task_by_the_providers_id(parts: Parts) -> None:
    task = insert_row(parts)
    deliver(parts, task, body("processing", task_id="901"), webhook_id="msg_1")
    assert deliver(parts, None, body("succeed", 1, task_id="901")).reason == AWAITS_READ
    assert is_read_now(parts, task)


def test_delivery_at_the_account_url_with_an_unknown_id_is_unmatched(parts: Parts) -> None:
    task = insert_row(parts)
    row = deliver(parts, None, CONSOLE_TEST)
    assert (row.state, row.task_id) == (CallbackState.UNMATCHED, None)
    assert event_names(parts.database, task) == ["task.created"]


def test_an_unmatched_delivery_is_applied_when_its_task_appears(parts: Parts) -> None:
    row = deliver(parts, None, body("processing", **info("restored")))
    assert row.state is CallbackState.UNMATCHED
    task = insert_row(parts, external_task_id="restored")
    make_due_now(parts, Callback)
    run(parts, "callbacks")
    assert callback_of(parts, row.delivery_key).state is CallbackState.APPLIED
    assert is_read_now(parts, task)


def test_valid_token_of_a_task_without_a_row_leaves_the_delivery_unmatched(parts: Parts) -> None:
    gone = Task(external_task_id="gone", provider="kling")
    row = deliver(parts, gone, body("succeed", 1, **info("gone")))
    assert (row.state, row.task_id) == (CallbackState.UNMATCHED, gone.id)
    assert event_names(parts.database, gone) == ["callback.unmatched"]


def test_an_unknown_task_id_is_learnt_as_an_alias(parts: Parts) -> None:
    task = insert_row(parts, provider_task_id="gateway-1")
    deliver(parts, task, body("processing", task_id="901"), webhook_id="msg_1")
    with parts.database.read() as session:
        aliases = session.exec(select(TaskAlias.provider_task_id).where(TaskAlias.task_id == task.id)).all()
    assert (list(aliases), task_of(parts, task.external_task_id).provider_task_id) == (["901"], "gateway-1")


@pytest.mark.parametrize("told", [body("succeed", 1, **info("another")), body("succeed", 1, task_id="902")])
def test_a_body_that_names_another_task_is_rejected_and_touches_nothing(told: dict[str, Any], parts: Parts) -> None:
    other = insert_row(parts)
    deliver(parts, other, body("processing", task_id="902"), webhook_id="msg_1")
    task = insert_row(parts, external_task_id="mine")
    row = deliver(parts, task, told)
    assert row.state is CallbackState.REJECTED and row.reason
    found = task_of(parts, "mine")
    assert (found.state, found.due_at, assets_of(parts, task)) == (SUBMITTED, task.due_at, [])
    assert event_names(parts.database, task) == ["task.created", "callback.rejected"]


def test_the_genuine_delivery_after_a_contradicting_one_is_applied(parts: Parts) -> None:
    task = insert_row(parts, external_task_id="mine")
    deliver(parts, task, body("succeed", 1, **info("another")))
    assert deliver(parts, task, body("succeed", 1, **info("mine"))).state is CallbackState.APPLIED
    assert task_of(parts, "mine").state is SUCCEEDED


GZIP = gzip.compress(b"{}", mtime=0)  # the same bytes in every process


@pytest.mark.parametrize("database_kind", ["sqlite"])
@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"null", b'{"a": 1}', b"[" * 100_000, b"<html>", GZIP])
def test_unreadable_delivery_is_stored_and_causes_a_read(raw: bytes, parts: Parts) -> None:
    task = insert_row(parts)
    row = deliver(parts, task, raw)
    assert (row.state, row.body) == (CallbackState.UNREADABLE, raw) and row.reason
    assert is_read_now(parts, task)


def test_an_unknown_status_keeps_the_task_waiting(parts: Parts) -> None:
    task = insert_row(parts)
    row = deliver(parts, task, body("resting"))
    assert (row.state, row.reason) == (CallbackState.APPLIED, "unknown status 'resting'")
    assert task_of(parts, task.external_task_id).state is SUBMITTED and is_read_now(parts, task)


def test_unknown_statuses_are_logged_once_per_task(parts: Parts) -> None:
    mine, other = insert_row(parts), insert_row(parts)
    with structlog.testing.capture_logs() as logs:
        for task, word in ((mine, "resting"), (mine, "asleep"), (other, "resting"), (mine, "resting again")):
            assert deliver(parts, task, body(word)).reason == f"unknown status {word!r}"
    said = [line["status"] for line in logs if line["event"] == "callback.status_not_recognized"]
    assert said == ["resting", "resting"]


# -- many deliveries at once ------------------------------------------------------------------------------------------


def put_all(parts: Parts, told: list[tuple[Task, Any]]) -> None:
    rows = [Delivery("kling", "push", task.id, json.dumps(words).encode()) for task, words in told]
    with parts.database.write() as session:
        store(session, rows)


def states_of(parts: Parts) -> dict[uuid.UUID | None, CallbackState]:
    with parts.database.read() as session:
        return {row.task_id: row.state for row in session.exec(select(Callback))}


@pytest.mark.parametrize(("hold_seconds", "transactions"), [(60, [1, 2]), (0, [5])])
def test_transaction_of_many_deliveries_is_bounded_in_time(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, hold_seconds: float, transactions: list[int]
) -> None:
    monkeypatch.setattr(group_writer, "MAX_GROUP_SECONDS", hold_seconds)
    put_all(parts, [(insert_row(parts), body("succeed", 1, task_id=f"90{number}")) for number in range(5)])
    (lane,) = (lane for lane in parts.lanes() if lane.name == "callbacks")
    with parts.database.write() as session:
        rows = claims.claim(session, Callback, limit=5, lease_seconds=60)
    commits: list[object] = []
    event.listen(parts.database.writer, "commit", lambda connection: commits.append(connection))
    assert lane.work_many is not None
    lane.work_many(rows)
    assert len(commits) in transactions  # the first delivery may be committed before the others wait
    assert set(states_of(parts).values()) == {CallbackState.APPLIED}


def test_a_delivery_that_cannot_be_applied_holds_up_none_of_those_claimed_with_it(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = Kling.parse

    def fail(self: Kling, raw: bytes) -> Report:
        if b"902" in raw:
            raise RuntimeError
        return parse(self, raw)

    monkeypatch.setattr(Kling, "parse", fail)
    # in the order of their application
    planted = sorted((insert_row(parts) for _ in range(5)), key=lambda task: str(task.id))
    put_all(parts, [(task, body("succeed", 1, task_id=f"90{number}")) for number, task in enumerate(planted)])
    run(parts, "callbacks")
    applied, received = CallbackState.APPLIED, CallbackState.RECEIVED
    assert [states_of(parts)[task.id] for task in planted] == [applied, applied, received, applied, applied]
    with parts.database.read() as session:
        (row,) = session.exec(select(Callback).where(Callback.state == received)).all()
    assert row.lease is None and row.due_at is not None and row.attempts == 1


def test_errors_of_deliveries_are_logged_though_the_database_is_lost_afterwards(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, bug = Kling.parse, RuntimeError("a bug")

    def fail(self: Kling, raw: bytes) -> Report:
        if b"902" in raw:
            raise bug
        if b"904" in raw:
            raise DatabaseUnavailable("away")
        return parse(self, raw)

    monkeypatch.setattr(Kling, "parse", fail)
    planted = sorted((insert_row(parts) for _ in range(5)), key=lambda task: str(task.id))
    put_all(parts, [(task, body("succeed", 1, task_id=f"90{number}")) for number, task in enumerate(planted)])
    with structlog.testing.capture_logs() as logs:
        run(parts, "callbacks")
    (failed,) = (line["exc_info"] for line in logs if line["event"] == "worker.step_failed")
    assert bug in failed.exceptions
    assert [states_of(parts)[task.id] for task in planted].count(CallbackState.APPLIED) == 3


# -- repeated deliveries ----------------------------------------------------------------------------------------------


def replay(parts: Parts, row: Callback) -> Callback:
    with parts.database.write() as session:
        again = {"state": CallbackState.RECEIVED, "reason": None, "due_at": LONG_AGO}
        session.execute(update(Callback).where(col(Callback.id) == row.id).values(**again))
    run(parts, "callbacks")
    return callback_of(parts, row.delivery_key)


@pytest.mark.parametrize("changes", [{"confirm": "always"}])
def test_delivery_without_news_causes_no_read(parts: Parts) -> None:
    task = insert_row(parts)
    row = deliver(parts, task, body("succeed", 1))
    assert row.reason == AWAITS_READ and is_read_now(parts, task)
    with parts.database.write() as session:  # the read had the same answer
        found = tasks.lock(session, task.id)
        assert found is not None
        told = parts.kling.parse(row.body)
        reports.apply(session, found, told, parts.schedule, now=tasks.now(session), pushed=False)
    assert replay(parts, row).reason is None
    assert not is_read_now(parts, task) and len(assets_of(parts, task)) == 1


def test_a_replayed_delivery_changes_no_row_of_the_task(parts: Parts) -> None:
    task = insert_row(parts)
    row = deliver(parts, task, body("succeed", 1))
    before = task_of(parts, task.external_task_id), assets_of(parts, task)
    assert replay(parts, row).state is CallbackState.APPLIED
    after = task_of(parts, task.external_task_id), assets_of(parts, task)
    ignored = {"reported_at", "called_back_at"}
    assert after[0].model_dump(exclude=ignored) == before[0].model_dump(exclude=ignored)
    assert json.dumps([row.model_dump() for row in after[1]], default=str) == json.dumps(
        [row.model_dump() for row in before[1]], default=str
    )
    assert not is_read_now(parts, task)


def test_a_success_after_a_failure_wins_and_is_read_once(parts: Parts) -> None:
    task = insert_row(parts)
    deliver(parts, task, body("failed"), webhook_id="msg_1")
    deliver(parts, task, body("succeed", 1), webhook_id="msg_2")
    found = task_of(parts, task.external_task_id)
    assert (found.state, found.contradicted, found.error) == (SUCCEEDED, True, None)
    assert is_read_now(parts, task) and len(assets_of(parts, task)) == 1
    assert event_names(parts.database, task).count("task.contradicted") == 1
