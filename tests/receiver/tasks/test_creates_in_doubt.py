"""A create whose answer was lost, and a callback that shows that it arrived: it is never sent again.

The provider does not know external ids, as some gateways: no query finds them, and a second create makes another task.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from datetime import timedelta
from itertools import product
from typing import Any, NamedTuple

import pytest
from sqlmodel import Session

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks import create_step, reconcile
from receiver.tasks.apply_deliveries import BY_READ, KNOWN, OTHERWISE
from receiver.tasks.operate import Operator
from storage.accounts.rate_limit import ReadRateLimit
from storage.rows import tasks
from storage.rows.deliveries import AWAITS_READ, Delivery, store
from storage.rows.models import Callback, Task
from storage.states import ArchiveState, CallbackState, Step, TaskState
from tests.pipeline import (
    Wired,
    assets_of,
    callback_of,
    callbacks_of,
    deliver,
    drain,
    make_due_now,
    run,
    task_of,
)
from tests.plans import plans, scans
from tests.receiver.tasks.test_apply_deliveries import body, info
from tests.receiver.tasks.test_submit import ID, go_on, submit_request
from tests.rows import LONG_AGO
from tests.unreported_tasks import REQUEST, creates

FOREIGN = "https://files.example.net"

# The points are the provider's words and the order of events. What asks for the deliveries is tested on both databases.
pytestmark = pytest.mark.databases("sqlite")
BOTH = pytest.mark.databases("sqlite", "postgresql")


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"poll_after_seconds": 3_600}


@pytest.fixture(autouse=True)
def gateway(sandbox: Sandbox) -> None:
    sandbox.set(external_ids=False, create_faults=["5000:created"], submitted_seconds=600, processing_seconds=600)


def provider_id(sandbox: Sandbox) -> str:
    return sandbox.ledger().task(ID).task_id


def record_of(parts: Parts, sandbox: Sandbox, *, ended: bool = False) -> dict[str, Any]:
    """The task as the provider describes it, which is the body of its callbacks."""
    if ended:
        sandbox.world.advance(time.time() + 10_000)
    record = parts.kling.read(provider_task_id=provider_id(sandbox), external_task_id=ID)
    assert record is not None
    found: dict[str, Any] = json.loads(record.body)
    return found


def commit_delivery(parts: Parts, task: Task | None, told: dict[str, Any], **values: Any) -> None:
    """Store one like the web server; no worker applies it."""
    with parts.database.write() as session:
        store(session, [Delivery("kling", "push", task.id if task else None, json.dumps(told).encode(), **values)])


def call_before(monkeypatch: pytest.MonkeyPatch, parts: Parts, act: Callable[[], Any]) -> None:
    """Do this while a create is under way, before the provider has it."""
    create = parts.kling.create

    def act_and_create(*given: Any, **more: Any) -> Any:
        act()
        return create(*given, **more)

    monkeypatch.setattr(parts.kling, "create", act_and_create)


def look_up_twice(parts: Parts) -> Task:
    """The provider is asked for our id twice and does not find it."""
    go_on(parts)
    return go_on(parts, missed_at=LONG_AGO)


@pytest.mark.parametrize("is_early", [True, False], ids=["before the query", "after it"])
@pytest.mark.parametrize("webhook_id", ["msg_1", None], ids=["signed", "unsigned"])
@pytest.mark.parametrize("status", ["processing", "succeed", "failed"])
def test_a_create_that_was_called_back_is_not_sent_again(
    parts: Parts, sandbox: Sandbox, is_early: bool, webhook_id: str | None, status: str
) -> None:
    task = submit_request(parts)
    if not is_early:
        go_on(parts)
    pictures = 1 if status == "succeed" else 0
    told = body(status, pictures, host=FOREIGN, task_id=provider_id(sandbox), **info(ID))
    deliver(parts, task, told, webhook_id=webhook_id)
    found = look_up_twice(parts)
    assert len(creates(sandbox)) == 1
    assert found.step is not Step.CREATE and found.state is not TaskState.CREATED
    assert (found.provider_task_id == provider_id(sandbox)) is (webhook_id is not None)


@pytest.mark.parametrize("state", [pytest.param(CallbackState.RECEIVED, marks=BOTH), CallbackState.REJECTED])
def test_a_delivery_that_waits_shows_that_the_create_arrived(
    parts: Parts, sandbox: Sandbox, state: CallbackState
) -> None:
    """No worker has applied it, or its signature was refused: its token came from our request in any case."""
    commit_delivery(parts, submit_request(parts), body("processing"), state=state)
    assert look_up_twice(parts).state is TaskState.SUBMITTED
    assert len(creates(sandbox)) == 1


@BOTH
@pytest.mark.parametrize("is_applied", [True, False])
def test_a_create_from_a_clock_that_was_ahead_is_not_sent_again(
    parts: Parts, sandbox: Sandbox, is_applied: bool
) -> None:
    """Its callback came after the clock was set back, so it seems older than the row."""
    task = submit_request(parts)
    go_on(parts, created_at=parts.database.now() + timedelta(hours=1))
    told = body("processing", **info(ID))
    deliver(parts, task, told, webhook_id="msg_1") if is_applied else commit_delivery(parts, task, told)
    assert look_up_twice(parts).state is not TaskState.CREATED
    assert len(creates(sandbox)) == 1


def test_a_create_that_waits_for_its_turn_is_not_sent_once_it_was_called_back(parts: Parts, sandbox: Sandbox) -> None:
    """The second create is throttled, which leaves no trace of the first in the row."""
    sandbox.set(create_faults=["5000:created", "1302"])
    task = submit_request(parts)
    assert look_up_twice(parts).sent_at is None
    commit_delivery(parts, task, body("processing"))
    assert go_on(parts).state is TaskState.SUBMITTED
    assert len(creates(sandbox)) == 2


def test_a_strangers_delivery_at_the_account_url_shows_nothing(parts: Parts, sandbox: Sandbox) -> None:
    submit_request(parts)
    deliver(parts, None, body("processing", **info(ID)))
    look_up_twice(parts)
    assert len(creates(sandbox)) == 2


@BOTH
def test_a_delivery_of_an_earlier_request_shows_nothing_of_this_one(parts: Parts, sandbox: Sandbox) -> None:
    """A refused id is used again, with the same row and token."""
    sandbox.set(create_faults=["1301", "5000"])
    task = submit_request(parts)
    deliver(parts, task, body("failed"))
    wanted = parts.submitter.row(parts.submitter.parse(task.request), ID)
    with parts.database.write() as session:
        again = parts.submitter.insert_again(session, wanted)
    assert again is not None
    parts.submitter.create_step.send(again)
    look_up_twice(parts)
    assert len(creates(sandbox)) == 3


def test_the_id_in_a_delivery_is_read_and_the_read_binds_it(parts: Parts, sandbox: Sandbox) -> None:
    task = submit_request(parts)
    deliver(parts, task, record_of(parts, sandbox))
    look_up_twice(parts)
    assert task_of(parts, ID).provider_task_id is None
    run(parts, "reads", "callbacks")
    found = task_of(parts, ID)
    assert (found.provider_task_id, found.note) == (provider_id(sandbox), None)
    sandbox.world.advance(time.time() + 10_000)
    make_due_now(parts, Task)
    assert drain(parts, ID).archive is ArchiveState.ARCHIVED
    assert len(creates(sandbox)) == 1


def test_no_read_binds_an_id_of_a_record_that_does_not_name_our_task(parts: Parts, sandbox: Sandbox) -> None:
    """Such a record may be another's task, whose id the sender chose."""
    sandbox.set(create_faults=[])
    other = parts.kling.create(
        {"model_name": "kling-v3-omni", "prompt": "theirs"}, external_task_id="theirs", callback_url=None
    )
    sandbox.set(create_faults=["5000:created"])
    task = submit_request(parts)
    deliver(parts, task, body("succeed", 1, host=FOREIGN, task_id=other.report.provider_task_id, **info(ID)))
    sandbox.set(task_info=False)
    deliver(parts, task, body("succeed", 2, host=FOREIGN, task_id=provider_id(sandbox)))
    look_up_twice(parts)
    run(parts, "reads", "callbacks")
    found = task_of(parts, ID)
    assert (found.provider_task_id, assets_of(parts, task), found.state) == (None, [], TaskState.SUBMITTED)
    assert str(found.note).startswith(tasks.NOT_FOUND)


def test_a_task_that_is_never_found_ends_with_the_result_lifetime(parts: Parts, sandbox: Sandbox) -> None:
    """Until then its note says why it is not sent, also after reads and failed reads."""
    sandbox.set(task_info=False)
    deliver(parts, submit_request(parts), body("processing", task_id="elsewhere"))
    look_up_twice(parts)
    for faults in ([], ["5001"]):
        sandbox.set(query_faults=faults)
        make_due_now(parts, Task)
        run(parts, "reads")
        assert str(task_of(parts, ID).note).startswith(tasks.NOT_FOUND)
    with parts.database.write() as session:
        row = tasks.lock(session, task_of(parts, ID).id)
        assert row is not None
        row.submitted_at = LONG_AGO
    make_due_now(parts, Task)
    run(parts, "reads")
    found = task_of(parts, ID)
    assert (found.state, found.error, found.step) == (TaskState.FAILED, "never_reported", None)
    assert len(creates(sandbox)) == 1


def test_a_task_that_was_called_back_stays_so_when_the_delivery_is_pruned(parts: Parts, sandbox: Sandbox) -> None:
    """Its signature was refused, so that nothing but the delivery showed that the create arrived."""
    commit_delivery(parts, submit_request(parts), body("processing"), state=CallbackState.REJECTED)
    look_up_twice(parts)
    operator = Operator(parts.database, parts.providers, parts.schedule)
    operator.dismiss(ID, "silent")
    assert operator.prune(timedelta(0)).counts["deliveries"] == 1
    submit_request(parts, adopt=True)
    assert go_on(parts, missed_at=LONG_AGO).state is TaskState.SUBMITTED
    assert len(creates(sandbox)) == 1


def test_a_retry_of_a_task_that_ended_in_doubt_reads_the_ids_in_its_deliveries(parts: Parts, sandbox: Sandbox) -> None:
    deliver(parts, submit_request(parts), record_of(parts, sandbox))
    look_up_twice(parts)
    operator = Operator(parts.database, parts.providers, parts.schedule)
    operator.dismiss(ID, "silent")
    sandbox.world.advance(time.time() + 10_000)
    assert operator.retry(ID).left == {}
    assert drain(parts, ID).archive is ArchiveState.ARCHIVED
    assert len(creates(sandbox)) == 1


def is_free(parts: Parts) -> bool:
    """Whether the gateway would send the id again, with another request."""
    wanted = parts.submitter.row(parts.submitter.parse({**REQUEST, "prompt": "another"}), ID)
    with parts.database.write() as session:
        is_sent = parts.submitter.insert_again(session, wanted) is not None
        session.rollback()
    return is_sent


@pytest.mark.parametrize("status", ["submitted", "processing"])
@pytest.mark.parametrize("has_arrived", [True, False])
def test_a_refused_create_that_was_called_back_is_read_before_its_id_is_free(
    parts: Parts, sandbox: Sandbox, status: str, has_arrived: bool
) -> None:
    """The provider's gateway may have refused what the provider accepted, or the callback is forged."""
    sandbox.set(create_faults=["1301:created" if has_arrived else "1301"])
    task = submit_request(parts)
    assert (task.state, is_free(parts)) == (TaskState.FAILED, True)
    told = body(status, task_id=provider_id(sandbox) if has_arrived else "foreign")
    commit_delivery(parts, task, told)
    assert not is_free(parts), "no worker has applied it yet"
    run(parts, "callbacks")
    assert (callbacks_of(parts)[0].reason, is_free(parts)) == (AWAITS_READ, False)
    run(parts, "reads", "callbacks")
    found = task_of(parts, ID)
    assert (found.provider_task_id is not None, is_free(parts)) == (has_arrived, not has_arrived)
    sandbox.world.advance(time.time() + 10_000)
    make_due_now(parts, Task)
    assert (drain(parts, ID).archive is ArchiveState.ARCHIVED) is has_arrived


def test_a_picture_of_a_create_that_was_sent_again_and_refused_is_kept(parts: Parts, sandbox: Sandbox) -> None:
    """The first create had arrived, and its callback comes after the refusal of the second."""
    sandbox.set(create_faults=["5000:created", "1301"])
    task = submit_request(parts)
    assert look_up_twice(parts).state is TaskState.FAILED
    deliver(parts, task, record_of(parts, sandbox, ended=True))
    wanted = parts.submitter.row(parts.submitter.parse({**REQUEST, "prompt": "another"}), ID)
    with parts.database.write() as session:
        assert parts.submitter.insert_again(session, wanted) is None, "a read may show that the id is taken"
    assert drain(parts, ID).archive is ArchiveState.ARCHIVED


def test_a_signed_success_ends_its_archive_though_no_query_is_answered(parts: Parts, sandbox: Sandbox) -> None:
    task = submit_request(parts)
    deliver(parts, task, record_of(parts, sandbox, ended=True), webhook_id="msg_1")
    sandbox.set(query_503_rate=1.0)
    make_due_now(parts, Task)
    parts.worker().run_until_idle()
    found = task_of(parts, ID)
    assert (found.archive, found.step, len(creates(sandbox))) == (ArchiveState.ARCHIVED, None, 1)


def test_already_exists_is_ours_once_it_was_called_back(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callback comes beside the second create, which is refused. No query finds the task."""
    sandbox.set(external_ids=True, query_lag_seconds=600)
    task = submit_request(parts)
    told = body("processing", task_id=provider_id(sandbox))
    call_before(monkeypatch, parts, lambda: deliver(parts, task, told))
    found = go_on(parts, attempts=create_step.UNREAD_TRIES - 1, missed_at=LONG_AGO)
    assert [create.code for create in sandbox.ledger().creates] == [5000, 1201]
    assert (found.state, found.error) == (TaskState.PROCESSING, None)


@pytest.mark.parametrize("changes", [{"poll_after_seconds": 3_600, "kling_slots": 1}])
@pytest.mark.parametrize("code", ["1303", "1102"], ids=["full", "no balance"])
def test_a_task_that_succeeds_while_its_second_create_is_refused_waits_for_no_slot(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """The first create had arrived. Its callback comes beside the second one, which the account has no room for."""
    sandbox.set(create_faults=["5000:created", code])
    task = submit_request(parts)
    told = record_of(parts, sandbox, ended=True)
    go_on(parts)
    call_before(monkeypatch, parts, lambda: deliver(parts, task, told, webhook_id="msg_1"))
    go_on(parts, missed_at=LONG_AGO)
    parts.worker().run_until_idle()
    found = task_of(parts, ID)
    assert (found.archive, found.queued_at, found.slots) == (ArchiveState.ARCHIVED, None, 0)
    assert len(creates(sandbox)) == 2


def test_the_id_in_a_signed_success_at_the_account_url_is_read(parts: Parts, sandbox: Sandbox) -> None:
    """Such a delivery is always confirmed by a read."""
    submit_request(parts)
    deliver(parts, None, record_of(parts, sandbox, ended=True), webhook_id="msg_1")
    make_due_now(parts, Task)
    assert drain(parts, ID).archive is ArchiveState.ARCHIVED
    assert len(creates(sandbox)) == 1


@pytest.mark.parametrize("status", ["succeed", "failed"])
@pytest.mark.parametrize("at_own_url", [True, False], ids=["own URL", "account URL"])
def test_a_delivery_before_a_refusal_is_decided_after_it(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, at_own_url: bool, status: str
) -> None:
    """It comes while the create is under way, and the provider refuses that."""
    sandbox.set(create_faults=["1301"])
    early = list[Callback]()
    told = body(status, int(status == "succeed"), host=FOREIGN, **info(ID))
    call_before(
        monkeypatch, parts, lambda: early.append(deliver(parts, task_of(parts, ID) if at_own_url else None, told))
    )
    assert submit_request(parts).state is TaskState.FAILED
    assert early[0].reason == AWAITS_READ
    run(parts, "callbacks", "reads")
    found = callback_of(parts, early[0].delivery_key)
    known = None if at_own_url else KNOWN
    assert (found.state, found.reason) == (CallbackState.APPLIED, OTHERWISE if status == "succeed" else known)
    assert task_of(parts, ID).step is None


def test_a_success_without_files_archives_nothing(parts: Parts, sandbox: Sandbox) -> None:
    """A read confirms that the task succeeded, not that anything was archived."""
    sandbox.set(create_faults=[], external_ids=True, deliver_fewer=9)
    task = submit_request(parts)
    told = record_of(parts, sandbox, ended=True)
    waiting = deliver(parts, task, {**told, "task_result": {}})
    for _ in range(4):
        make_due_now(parts, Task)
        parts.worker().run_until_idle()
    assert callback_of(parts, waiting.delivery_key).reason == BY_READ
    found = task_of(parts, ID)
    assert (found.state, found.archive) == (TaskState.SUCCEEDED, ArchiveState.INCOMPLETE)
    assert assets_of(parts, task) == []


@BOTH
def test_no_question_about_a_task_reads_all_deliveries(parts: Parts, sandbox: Sandbox) -> None:
    task = submit_request(parts)
    deliver(parts, task, body("processing"))

    def look(session: Session) -> None:
        assert create_step._is_called_back(session, task)
        assert len(reconcile.newest_bodies(session, task)) == 1

    found = plans(parts.database, look)
    assert scans(parts.database, look) == []
    assert found.count("callback_delivery ") >= 2 and "callback_at_account" in found


# -- all orders -------------------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """A create in doubt, by its first callback: whether it comes before the first query or after it, and whether it is
    applied. `is_known`: whether queries find the external id.
    """

    is_known: bool
    at_own_url: bool
    is_signed: bool
    comes: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def creates(self) -> int:
        """Only an unsigned delivery at the account URL shows nothing."""
        return 1 if self.is_known or self.at_own_url or self.is_signed else 2


EITHER = (True, False)
ORDERS = [Order(*each) for each in product(EITHER, EITHER, EITHER, ("early", "late"))]
ORDERS += [Order(is_known, True, is_signed, "unapplied") for is_known, is_signed in product(EITHER, EITHER)]


def call_back(parts: Parts, sandbox: Sandbox, orders: list[Order]) -> None:
    """The provider's callbacks of these tasks, as they are now."""
    for order in orders:
        made_id = sandbox.ledger().task(order.name).task_id
        record = parts.kling.read(provider_task_id=made_id, external_task_id=made_id)
        assert record is not None
        signed = f"{order.name}-{record.report.status}" if order.is_signed else None
        task = task_of(parts, order.name) if order.at_own_url else None
        commit_delivery(parts, task, json.loads(record.body), webhook_id=signed)


def look_up(parts: Parts) -> None:
    make_due_now(parts, Task)
    run(parts, "creates")


@pytest.mark.parametrize("is_restarted", [True, False] if "CI" in os.environ else [True])
def test_every_order_is_charged_once_and_ends_archived(parts: Parts, sandbox: Sandbox, is_restarted: bool) -> None:
    """The signed, or the believed unsigned, success archives a task also if no query ever finds it."""
    parts.__dict__["read_rate_limit"] = ReadRateLimit(parts.database, per_second=1_000)
    for order in ORDERS:
        sandbox.set(external_ids=order.is_known, create_faults=["5000:created"])
        parts.submitter.submit(REQUEST, external_task_id=order.name)
    call_back(parts, sandbox, [order for order in ORDERS if order.comes == "early"])
    run(parts, "callbacks")
    look_up(parts)
    call_back(parts, sandbox, [order for order in ORDERS if order.comes == "late"])
    run(parts, "callbacks")
    call_back(parts, sandbox, [order for order in ORDERS if order.comes == "unapplied"])
    with closing(Wired(parts.settings, bucket=parts.bucket)) if is_restarted else nullcontext(parts) as later:
        later.__dict__["read_rate_limit"] = parts.read_rate_limit
        look_up(later)
        look_up(later)
        later.worker().run_until_idle()
        sandbox.world.advance(time.time() + 10_000)
        call_back(later, sandbox, ORDERS)
        for _ in range(4):
            later.worker().run_until_idle()
            make_due_now(later, Task)
    sent = Counter(each["external_task_id"] for each in creates(sandbox))
    assert dict(sent) == {order.name: order.creates for order in ORDERS}
    found = {order: task_of(parts, order.name) for order in ORDERS}
    ends = {order: (each.state, each.archive, each.step) for order, each in found.items()}
    assert ends == dict.fromkeys(ORDERS, (TaskState.SUCCEEDED, ArchiveState.ARCHIVED, None))
    assert [row.reason for row in callbacks_of(parts) if row.state is not CallbackState.APPLIED] == []
    assert AWAITS_READ not in {row.reason for row in callbacks_of(parts)}
