"""The operator's commands on rows after accidents: what they restore, and what they do not change."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import select, update
from sqlmodel import SQLModel
from standardwebhooks.webhooks import Webhook

from receiver.app.read_now import read_now
from receiver.app.wiring import Parts
from receiver.providers.kling.client import Kling
from receiver.sandbox import Sandbox
from receiver.tasks.changes import Tally
from receiver.tasks.operate import Operator, Reads
from storage.database.sessions import Database
from storage.errors import LostClaim
from storage.rows import claims
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Asset, Callback, Task
from storage.states import SAID_AFTER_TRIES, ArchiveState, AssetState, CallbackState, Step, TaskState
from tests.harness import wait_until
from tests.pipeline import (
    Web,
    assert_archived,
    assets_of,
    callback_of,
    callbacks_of,
    deliver,
    drain,
    insert_row,
    make_due_now,
    run,
    task_of,
)
from tests.rows import LONG_AGO, event_names, new_asset, new_task, stored

ASKED = {"model_name": "kling-image-o1", "prompt": "a boat"}
LATER = datetime(2100, 1, 1, tzinfo=UTC)
SECRETS = ("whsec_b2xkb2xkb2xkb2xkb2xkb2xkb2xkb2xk", "whsec_bmV3bmV3bmV3bmV3bmV3bmV3bmV3bmV3")
OVER: dict[str, Any] = {"state": TaskState.SUCCEEDED, "archive": ArchiveState.INCOMPLETE, "step": None, "due_at": None}
GIVEN_UP = {"state": AssetState.FAILED, "due_at": None, "error": "the bytes are no picture"}


@pytest.fixture
def changes() -> dict[str, Any]:
    """Callbacks only from the test, and reads only when a test makes them due."""
    return {"public_url": None, "callback_secrets": "", "poll_after_seconds": 3_600}


@pytest.fixture
def operator(parts: Parts) -> Operator:
    return operating(parts.database, parts)


def operating(database: Database, parts: Parts, **options: Any) -> Operator:
    return Operator(database, parts.providers, parts.schedule, **options)


def counted(tally: Tally) -> dict[str, int]:
    return {name: count for name, count in tally.counts.items() if count}


def lost(database: Database, count: int = 1, **values: Any) -> tuple[Task, list[Asset]]:
    """A task whose files were given up."""
    with database.write() as session:
        task = new_task(session, **OVER | {"expected": count})
        return task, [new_asset(session, task, index, **GIVEN_UP | values) for index in range(count)]


def broken(parts: Parts, sandbox: Sandbox, **knobs: Any) -> Task:
    """A task that is reported incomplete, because `knobs`, which are reset now, made its only picture unusable."""
    task = parts.submitter.submit(ASKED).task
    wait_until(lambda: sandbox.ledger().task(task.external_task_id).status == "succeed")
    make_due_now(parts, Task)
    run(parts, "reads")
    sandbox.set(**knobs)
    for _ in range(SAID_AFTER_TRIES):
        make_due_now(parts, Asset)
        run(parts, "assets")
    run(parts, "finishes")
    sandbox.set(**dict.fromkeys(knobs, 0))
    assert task_of(parts, task.external_task_id).archive is ArchiveState.INCOMPLETE
    return task


def everything(database: Database) -> dict[str, list[Any]]:
    """Every row, except the rate limit of reads, which every read changes."""
    tables = [table for table in SQLModel.metadata.sorted_tables if table.name != "pace"]
    with database.read() as session:
        return {table.name: sorted(map(repr, session.execute(select(table)))) for table in tables}


# -- retry ------------------------------------------------------------------------------------------------------------


def test_retry_brings_a_task_back_to_its_archive(parts: Parts, sandbox: Sandbox, operator: Operator) -> None:
    task = broken(parts, sandbox, cdn_html_rate=1)
    assert counted(operator.retry(task.external_task_id)) == {"files_due": 1}
    after = drain(parts, task.external_task_id)
    assert after.archive is ArchiveState.ARCHIVED
    assert after.manifests == 2
    assert operator.retry(task.external_task_id).left == {task.external_task_id: "archived already"}


@pytest.mark.databases("sqlite")
def test_a_damaged_file_is_kept_when_it_is_accepted(parts: Parts, sandbox: Sandbox, operator: Operator) -> None:
    task = broken(parts, sandbox, cdn_truncated_silent_rate=1)
    sandbox.set(cdn_truncated_silent_rate=1)
    [asset] = assets_of(parts, task)
    assert operator.retry(task.external_task_id, accept_unverified=True).left
    assert counted(operator.retry(str(asset.id), accept_unverified=True)) == {"files_due": 1}
    assert drain(parts, task.external_task_id).archive is ArchiveState.ARCHIVED
    [asset] = assets_of(parts, task)
    assert (asset.state, asset.verified) == (AssetState.ARCHIVED, False)


def test_a_retried_file_starts_without_attempts_and_the_others_stay(parts: Parts, operator: Operator) -> None:
    task, [first, second] = lost(parts.database, 2, attempts=7, losses=6)
    operator.retry(str(second.id))
    row = stored(parts.database, second)
    assert (row["state"], row["attempts"], row["losses"], row["error"]) == (AssetState.DUE, 0, 0, None)
    assert row["due_at"] <= parts.database.now()
    assert stored(parts.database, first)["state"] is AssetState.FAILED
    assert stored(parts.database, task)["archive"] is ArchiveState.ARCHIVING


def test_a_file_in_work_is_left_to_its_worker(parts: Parts, operator: Operator) -> None:
    _, [asset] = lost(parts.database, state=AssetState.DUE, due_at=LATER, lease=uuid.uuid4())
    before = stored(parts.database, asset)
    assert operator.retry(str(asset.id)).left == {str(asset.id): "a worker holds it; try again when it has finished"}
    assert stored(parts.database, asset) == before


def test_unknown_name_is_reported(operator: Operator) -> None:
    assert list(operator.retry("nothing").left) == ["nothing"]
    assert list(operator.retry(str(uuid.uuid4())).left)
    assert list(operator.dismiss("nothing", "why").left) == ["nothing"]
    assert list(operator.reconcile(["nothing"])[0].left) == ["nothing"]


@pytest.mark.databases("sqlite")
def test_a_failed_create_is_never_sent_again(parts: Parts, operator: Operator, sandbox: Sandbox) -> None:
    task = insert_row(parts, state=TaskState.FAILED, step=None, due_at=None, error="content policy")
    before = stored(parts.database, task)
    assert "only `receiver submit` sends" in operator.retry(task.external_task_id).left[task.external_task_id]
    assert list(operator.reconcile([task.external_task_id])[0].left) == [task.external_task_id]
    run(parts, "creates", "reads")
    assert stored(parts.database, task) == before
    assert not sandbox.ledger().creates


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("verb", ["retry", "reconcile"])
def test_waiting_read_of_a_refused_task_is_made_due(verb: str, parts: Parts, operator: Operator) -> None:
    """A delivery says that the provider has it, so "only `receiver submit` sends" would be no advice."""
    task = insert_row(parts, state=TaskState.FAILED, step=Step.READ, due_at=LATER, error="content policy")
    name = task.external_task_id
    tally = operator.retry(name) if verb == "retry" else operator.reconcile([name])[0]
    assert (tally.left, tally.counts["reads_due"]) == ({}, 1)
    assert stored(parts.database, task)["due_at"] < LATER


@pytest.mark.databases("sqlite")
def test_retry_of_a_refused_task_names_the_delivery_that_waits(parts: Parts, operator: Operator) -> None:
    task = insert_row(parts, state=TaskState.FAILED, step=None, due_at=None, error="content policy")
    with parts.database.write() as session:
        store(session, [Delivery("kling", "push", task.id, b"{}")])
    assert "a delivery of it waits for a worker" in operator.retry(task.external_task_id).left[task.external_task_id]


def test_a_deleted_task_stays_deleted(parts: Parts, operator: Operator) -> None:
    task, _ = lost(parts.database)
    with parts.database.write() as session:
        session.execute(update(Task).values(deleted_at=LONG_AGO))
    before = everything(parts.database)
    assert not operator.retry(task.external_task_id).is_good
    assert not operator.dismiss(task.external_task_id, "why").is_good
    assert not operator.reconcile([task.external_task_id])[0].is_good
    assert not counted(operator.retry_failed(limit=10))
    assert everything(parts.database) == before


def silent(parts: Parts, sandbox: Sandbox, external_task_id: str = "mute") -> Task:
    """A task that we gave up and that the provider has finished nevertheless."""
    created = parts.kling.create(ASKED, external_task_id=external_task_id, callback_url=None)
    wait_until(lambda: sandbox.ledger().task(external_task_id).status == "succeed")
    values = {"state": TaskState.FAILED, "step": None, "due_at": None, "error": "never_reported"}
    return insert_row(
        parts, external_task_id=external_task_id, provider_task_id=created.report.provider_task_id, **values
    )


def test_silent_task_is_read_and_its_success_wins(parts: Parts, sandbox: Sandbox, operator: Operator) -> None:
    task = silent(parts, sandbox)
    assert counted(operator.retry_failed(limit=10)) == {"reads_due": 1}
    run(parts, "reads", "assets", "finishes")
    assert_archived(parts, sandbox, task_of(parts, task.external_task_id))


@pytest.mark.databases("sqlite")
def test_success_without_files_causes_a_read(parts: Parts, operator: Operator) -> None:
    with parts.database.write() as session:
        task = new_task(session, **OVER, completeness_reads=3)
    assert counted(operator.retry_failed(limit=10)) == {"reads_due": 1}
    row = stored(parts.database, task)
    assert (row["step"], row["archive"], row["completeness_reads"]) == (Step.READ, ArchiveState.ARCHIVING, 0)


def test_retry_all_failed_applies_its_filters(parts: Parts, operator: Operator) -> None:
    _, files = lost(parts.database, 2, error="HTTP 503")
    _, [odd] = lost(parts.database, error="100% odd")
    assert not counted(operator.retry_failed(error="0_%", limit=10))
    assert not counted(operator.retry_failed(since=LONG_AGO + timedelta(days=1), limit=10))
    assert counted(operator.retry_failed(error="http 5", limit=1)) == {"files_due": 1}
    assert counted(operator.retry_failed(since=LONG_AGO, error="HTTP 5", limit=10)) == {"files_due": 1}
    assert stored(parts.database, odd)["state"] is AssetState.FAILED
    assert {stored(parts.database, file)["state"] for file in files} == {AssetState.DUE}
    assert counted(operator.retry_failed(limit=10)) == {"files_due": 1}


@pytest.mark.parametrize(
    ("step", "counts"), [(Step.FINISH, {"files_due": 1}), (Step.READ, {"files_due": 1, "reads_due": 1})]
)
def test_a_file_of_a_parked_task_counts_once(
    parts: Parts, operator: Operator, step: Step, counts: dict[str, int]
) -> None:
    task, [asset] = lost(parts.database)
    with parts.database.write() as session:
        session.execute(update(Task).values(archive=ArchiveState.ARCHIVING, step=step, due_at=None))
    assert counted(operating(parts.database, parts, dry_run=True).retry_failed(limit=10)) == counts
    assert counted(operator.retry_failed(limit=10)) == counts
    assert stored(parts.database, asset)["state"] is AssetState.DUE
    assert (stored(parts.database, task)["due_at"] is not None) == (step is Step.READ)


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ({}, {"reads_due": 1}),
        ({"step": Step.CREATE, "state": TaskState.CREATED, "losses": 4}, {"creates_due": 1}),
        ({"due_at": None}, {"reads_due": 1}),
        ({"lease": uuid.UUID(int=1)}, {}),
    ],
)
def test_retry_makes_a_task_due_in_any_step(
    parts: Parts, operator: Operator, values: dict[str, Any], counts: dict[str, int]
) -> None:
    task = insert_row(parts, **values)
    tally = operator.retry(task.external_task_id)
    assert (counted(tally), tally.is_good) == (counts, bool(counts))
    row = stored(parts.database, task)
    assert (row["due_at"] <= parts.database.now(), row["losses"]) == (bool(counts), 0)


# -- replay -----------------------------------------------------------------------------------------------------------


def test_a_replayed_delivery_changes_nothing_it_changed_before(parts: Parts, operator: Operator) -> None:
    task = insert_row(parts, external_task_id="one")
    body = {"task_id": "7", "task_status": "processing", "task_info": {"external_task_id": "one"}}
    row = deliver(parts, task, body)
    names = event_names(parts.database, task)
    assert counted(operator.replay([row.id or 0])) == {"replayed": 1}
    assert callback_of(parts, row.delivery_key).state is CallbackState.RECEIVED
    run(parts, "callbacks")
    assert callback_of(parts, row.delivery_key).state is CallbackState.APPLIED
    assert event_names(parts.database, task) == names


def test_replay_of_a_time_range_selects_one_state(parts: Parts, operator: Operator) -> None:
    task = insert_row(parts)
    unreadable = deliver(parts, task, b"hello")
    applied = deliver(parts, task, {"task_id": "7", "task_status": "processing"})
    long_ago, soon = LONG_AGO, parts.database.now() + timedelta(hours=1)
    assert not counted(operator.replay(since=soon, until=None))
    assert not counted(operator.replay(since=long_ago, until=long_ago))
    tally = operator.replay(since=long_ago, until=soon, state=CallbackState.UNREADABLE)
    assert counted(tally) == {"replayed": 1}
    states = [callback_of(parts, row.delivery_key).state for row in (unreadable, applied)]
    assert states == [CallbackState.RECEIVED, CallbackState.APPLIED]


def test_delivery_that_cannot_be_replayed_has_a_reason(parts: Parts, operator: Operator) -> None:
    row = deliver(parts, insert_row(parts), {"task_id": "7", "task_status": "processing"})
    with parts.database.write() as session:
        session.execute(update(Callback).values(source="poll"))
    tally = operator.replay([row.id or 0, 99])
    assert tally.left["99"] == "no such delivery"
    assert "reconcile" in tally.left[str(row.id)]
    assert not tally.counts["replayed"]


def post_signed(web: Web, parts: Parts, task: Task, secret: str) -> int:
    body, now = '{"task_id": "7", "task_status": "processing"}', datetime.now(UTC)
    signature = Webhook(secret).sign("message-1", now, body)
    headers = {
        "webhook-id": "message-1", "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signature
    }  # fmt: skip
    url = f"{web.url}/callbacks/kling/{parts.tokens.sign('kling', task.id)}"
    return httpx.post(url, content=body, headers=headers).status_code


SIGNED = {"kling_webhook_secrets": SECRETS[0], "callback_secrets": "s" * 40, "poll_after_seconds": 3_600}


@pytest.mark.parametrize("changes", [SIGNED])
@pytest.mark.databases("sqlite")
def test_a_refused_delivery_counts_once_the_right_secret_is_set(parts: Parts, web: Web, operator: Operator) -> None:
    task = insert_row(parts)
    assert post_signed(web, parts, task, SECRETS[1]) == 401
    [row] = callbacks_of(parts)
    assert "does not verify" in operator.replay([row.id or 0]).left[str(row.id)]
    assert counted(operator.replay(since=LONG_AGO)) == {"left_alone": 1}
    assert callback_of(parts, row.delivery_key).state is CallbackState.REJECTED
    today = Kling(base_url="http://127.0.0.1:9", webhook_secrets=[SecretStr(secret) for secret in SECRETS])
    operator = Operator(parts.database, {"kling": today}, parts.schedule)
    assert counted(operator.replay(since=LONG_AGO)) == {"replayed": 1}
    run(parts, "callbacks")
    today.close()
    row = callback_of(parts, row.delivery_key)
    assert (row.state, row.webhook_id) == (CallbackState.APPLIED, "message-1")


@pytest.mark.parametrize("changes", [SIGNED])
@pytest.mark.databases("sqlite")
def test_signature_of_a_replayed_delivery_is_verified_as_of_its_arrival(
    parts: Parts, web: Web, operator: Operator
) -> None:
    assert post_signed(web, parts, insert_row(parts), SECRETS[1]) == 401
    with parts.database.write() as session:
        session.execute(update(Callback).values(received_at=LONG_AGO))
    today = Kling(base_url="http://127.0.0.1:9", webhook_secrets=[SecretStr(SECRETS[1])])
    operator = Operator(parts.database, {"kling": today}, parts.schedule)
    assert counted(operator.replay(since=LONG_AGO)) == {"left_alone": 1}
    today.close()


# -- reconcile --------------------------------------------------------------------------------------------------------


def test_every_unfinished_task_is_due_for_a_read(parts: Parts, operator: Operator) -> None:
    waiting = insert_row(parts, attempts=5)
    insert_row(parts, lease=uuid.uuid4())
    insert_row(parts, state=TaskState.CREATED, step=Step.CREATE)
    lost(parts.database)
    tally, reads = operator.reconcile()
    assert counted(tally) == {"reads_due": 1, "in_work": 1, "not_sent_yet": 1}
    assert len(reads.ids) == 2
    assert stored(parts.database, waiting)["due_at"] <= parts.database.now()


@pytest.mark.databases("sqlite")
def test_reconcile_with_wait_reads_in_its_own_process(parts: Parts, sandbox: Sandbox, operator: Operator) -> None:
    task = parts.submitter.submit(ASKED).task
    wait_until(lambda: sandbox.ledger().task(task.external_task_id).status == "succeed")
    sandbox.set(query_faults=["5001"])
    assert read(parts, operator.reconcile()[1]).counts == {"read": 1}
    assert task_of(parts, task.external_task_id).state is TaskState.SUCCEEDED
    tally, reads = operator.reconcile([task.external_task_id])
    assert counted(tally) == {"reads_due": 1}
    assert read(parts, reads).counts == {"read": 1}


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_a_provider_that_is_away_ends_the_wait(parts: Parts, sandbox: Sandbox, operator: Operator) -> None:
    task = insert_row(parts)
    sandbox.stop()
    tally = read(parts, operator.reconcile()[1])
    assert "no connection" in tally.left[task.external_task_id]
    assert not tally.counts["read"]


def read(parts: Parts, reads: Reads) -> Tally:
    [lane] = [lane for lane in parts.lanes() if lane.name == "reads"]
    return read_now(parts.database, lane, reads, lease_seconds=5)


# -- dismiss ----------------------------------------------------------------------------------------------------------


def test_a_dismissed_task_waits_for_nothing_and_says_why(parts: Parts, operator: Operator) -> None:
    task = insert_row(parts)
    assert counted(operator.dismiss(task.external_task_id, "the account\nis closed")) == {"dismissed": 1}
    row = stored(parts.database, task)
    assert (row["state"], row["archive"]) == (TaskState.FAILED, ArchiveState.INCOMPLETE)
    assert (row["step"], row["due_at"], row["note"]) == (None, None, "dismissed: the account is closed")
    assert event_names(parts.database, task)[-2:] == ["task.failed", "task.incomplete"]
    assert counted(operator.dismiss(task.external_task_id, "again")) == {"dismissed_before": 1}
    assert counted(operator.reconcile()[0]) == {}


def test_a_failed_task_stays_failed_when_it_is_dismissed(parts: Parts, operator: Operator) -> None:
    over = {"state": TaskState.FAILED, "archive": ArchiveState.NONE, "provider_task_id": "known-there"}
    task = insert_row(parts, **OVER | over)
    assert counted(operator.dismiss(task.external_task_id, "known")) == {"dismissed": 1}
    row = stored(parts.database, task)
    assert (row["state"], row["archive"], row["note"]) == (TaskState.FAILED, ArchiveState.NONE, "dismissed: known")
    assert "task.incomplete" not in event_names(parts.database, task)
    assert operator.retry(task.external_task_id).is_good
    assert (stored(parts.database, task)["note"], stored(parts.database, task)["step"]) == (None, Step.READ)


def test_dismissing_gives_waiting_files_up_and_their_worker_changes_nothing(parts: Parts, operator: Operator) -> None:
    task, files = lost(parts.database, 2, state=AssetState.DUE, due_at=LONG_AGO, error=None)
    with parts.database.write() as session:
        session.execute(update(Task).values(archive=ArchiveState.ARCHIVING))
        [held] = claims.claim(session, Asset, limit=1, lease_seconds=600)
    assert counted(operator.dismiss(task.external_task_id, "too large")) == {"dismissed": 1, "files_given_up": 2}
    with pytest.raises(LostClaim), parts.database.write() as session:
        claims.settle(session, held, due_in=None, state=AssetState.ARCHIVED)
    rows = [stored(parts.database, file) for file in files]
    assert [(row["state"], row["due_at"], row["error"]) for row in rows] == [
        (AssetState.FAILED, None, "dismissed: too large")
    ] * 2
    assert event_names(parts.database, task)[-3:] == ["asset.failed", "asset.failed", "task.incomplete"]


def test_retry_brings_a_dismissed_task_back_only_by_name(parts: Parts, sandbox: Sandbox, operator: Operator) -> None:
    task, mute = broken(parts, sandbox, cdn_html_rate=1), silent(parts, sandbox)
    for each in (task, mute):
        operator.dismiss(each.external_task_id, "not worth it")
    assert counted(operator.retry_failed(limit=10)) == {}
    for each in (task, mute):
        assert operator.retry(each.external_task_id).is_good
    run(parts, "reads", "assets", "finishes")
    for each in (task, mute):
        assert task_of(parts, each.external_task_id).archive is ArchiveState.ARCHIVED
        assert not (task_of(parts, each.external_task_id).note or "").startswith("dismissed")


@pytest.mark.databases("sqlite")
def test_a_success_after_a_dismissal_still_wins(parts: Parts, sandbox: Sandbox, operator: Operator) -> None:
    created = parts.kling.create(ASKED, external_task_id="late", callback_url=None)
    wait_until(lambda: sandbox.ledger().task("late").status == "succeed")
    task = insert_row(parts, external_task_id="late", provider_task_id=created.report.provider_task_id)
    operator.dismiss("late", "too late")
    record = parts.kling.read(provider_task_id=created.report.provider_task_id, external_task_id="late")
    assert record is not None
    deliver(parts, task, record.body)
    run(parts, "reads", "assets", "finishes")
    assert_archived(parts, sandbox, task_of(parts, "late"))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (OVER | {"archive": ArchiveState.ARCHIVED}, "nothing to dismiss"),
        ({"state": TaskState.CREATED, "step": Step.CREATE, "lease": uuid.UUID(int=1)}, "on its way"),
    ],
)
def test_task_that_needs_no_dismissal_is_left_alone(
    parts: Parts, operator: Operator, values: dict[str, Any], why: str
) -> None:
    task = insert_row(parts, **values)
    before = stored(parts.database, task)
    assert why in operator.dismiss(task.external_task_id, "why not").left[task.external_task_id]
    assert stored(parts.database, task) == before
