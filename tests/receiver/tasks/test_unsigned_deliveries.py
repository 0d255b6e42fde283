"""The effects of a sender with one callback URL and no signature on a task."""

from __future__ import annotations

import json
import unicodedata
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import update

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks import apply_deliveries
from receiver.tasks.operate import Operator
from storage.archive import manifest
from storage.rows import aliases, reports, tasks
from storage.rows.deliveries import Delivery, compare_again, store
from storage.rows.models import Asset, Callback, Task, TaskAlias
from storage.states import MAX_FILES, ArchiveState, AssetState, CallbackState, Step, TaskState
from tests.archived_tasks import REQUEST, work_off
from tests.harness import wait_until
from tests.pipeline import assets_of, callback_of, callbacks_of, deliver, drain, insert_row, kept, run, task_of
from tests.receiver.tasks.test_apply_deliveries import AWAITS_READ, OFFICIAL, body, info, is_read_now
from tests.rows import LONG_AGO, event_names
from tests.unreported_tasks import submit


@pytest.fixture
def changes() -> dict[str, Any]:
    """No poll becomes due while a test runs: only deliveries cause reads."""
    return {"poll_after_seconds": 3_600}


# Verdicts are made of values. Replaced rows, counted reads and their times are tested on both databases.
pytestmark = pytest.mark.databases("sqlite")
BOTH = pytest.mark.databases("sqlite", "postgresql")
# For what a body says: it becomes a verdict before any row is written.
ONE_DATABASE = pytest.mark.parametrize("database_kind", ["sqlite"])


def confirm(parts: Parts, task: Task, told: dict[str, Any]) -> None:
    """Apply this report as the answer to a read."""
    with parts.database.write() as session:
        row = tasks.lock(session, task.id)
        assert row is not None
        row.step = None
        report = parts.kling.parse(str(told).replace("'", '"').encode())
        reports.apply(session, row, report, parts.schedule, now=tasks.now(session), pushed=False)


def archived(parts: Parts, *, webhook_id: str | None = None, **values: Any) -> Task:
    """A task with one archived picture, by a delivery that was believed, unsigned or not."""
    task = insert_row(parts, **values)
    deliver(parts, task, body("succeed", 1), webhook_id=webhook_id)
    with parts.database.write() as session:
        session.execute(update(Asset).values(state=AssetState.ARCHIVED, due_at=None, key="a/key", sha256="0" * 64))
        session.execute(update(Task).values(archive=ArchiveState.ARCHIVED, step=None, due_at=None))
    return task


def test_a_delivery_that_awaits_a_due_poll_is_decided_when_a_report_comes_before_it(parts: Parts) -> None:
    """It caused no read of its own, because one was due already, and the report ends the task."""
    task = insert_row(parts, due_at=LONG_AGO)
    first = deliver(parts, task, body("succeed", 1, host="https://files.example.net"))
    assert first.reason == AWAITS_READ
    deliver(parts, task, body("succeed", 1), webhook_id="msg_1")
    assert not is_read_now(parts, task)
    assert callback_of(parts, first.delivery_key).reason == apply_deliveries.DECIDED


def test_a_delivery_that_an_earlier_release_left_waiting_is_decided(parts: Parts) -> None:
    """Its reason is stored in these words, which therefore never change."""
    task = insert_row(parts)
    with parts.database.write() as session:
        store(session, [Delivery("kling", "push", task.id, json.dumps(body("failed")).encode())])
        left = {"reason": "not believed yet: the task is read at the provider", "due_at": None}
        session.execute(update(Callback).values(state=CallbackState.APPLIED, **left))
    with parts.database.write() as session:
        row = tasks.lock(session, task.id)
        assert row is not None
        compare_again(session, row)
    run(parts, "callbacks")
    assert [row.reason for row in callbacks_of(parts)] == [apply_deliveries.OTHERWISE]


@pytest.mark.parametrize("is_in_doubt", [True, False], ids=["create in doubt", "submitted"])
def test_a_delivery_that_awaits_a_read_is_decided_when_the_task_is_dismissed(parts: Parts, is_in_doubt: bool) -> None:
    created = {"state": TaskState.CREATED, "step": Step.CREATE, "sent_at": LONG_AGO}
    task = insert_row(parts, **(created if is_in_doubt else {}))
    waiting = deliver(parts, task, body("failed"))
    assert waiting.reason == AWAITS_READ
    Operator(parts.database, parts.providers, parts.schedule).dismiss(task.external_task_id, "gone")
    run(parts, "callbacks", "reads", "creates")
    assert callback_of(parts, waiting.delivery_key).reason == apply_deliveries.DISMISSED
    assert task_of(parts, task.external_task_id).note == "dismissed: gone"


def test_more_pictures_than_asked_for_are_read_first(parts: Parts) -> None:
    task = insert_row(parts)
    for number in range(6):
        assert deliver(parts, task, body("succeed", 400 + number)).reason == AWAITS_READ
    assert assets_of(parts, task) == [] and is_read_now(parts, task)


@pytest.mark.parametrize("kind", ["videos", "audios"])
def test_film_or_sound_in_place_of_the_picture_is_read_first(parts: Parts, kind: str) -> None:
    task = insert_row(parts, expected=1)
    told = body("succeed")
    told["task_result"] = {kind: [{"index": 0, "url": f"{OFFICIAL}/0.mp4", "url_mp3": f"{OFFICIAL}/0.mp3"}]}
    assert deliver(parts, task, told).reason == AWAITS_READ
    assert assets_of(parts, task) == [] and is_read_now(parts, task)


def test_report_for_an_archived_task_is_read_before_it_adds_files(parts: Parts) -> None:
    task = archived(parts, expected=2, webhook_id="msg_1")
    assert deliver(parts, task, body("succeed", 2)).reason == AWAITS_READ
    assert task_of(parts, task.external_task_id).archive is ArchiveState.ARCHIVED
    assert len(assets_of(parts, task)) == 1 and is_read_now(parts, task)


@pytest.mark.parametrize(("expected", "most"), [(1, 2), (9, 18), (None, MAX_FILES)])
def test_the_files_of_a_task_are_capped_for_every_sender(parts: Parts, expected: int | None, most: int) -> None:
    task = insert_row(parts, expected=expected)
    for count in (400, 450):
        deliver(parts, task, body("succeed", count), webhook_id=f"msg_{count}")
    assert len(assets_of(parts, task)) == most


@pytest.mark.parametrize("odd", ['"\\ud800": 1', f'"x": {"[" * 400}{"]" * 400}', f'"x": {"[" * 700}{"]" * 700}'])
def test_a_body_that_no_manifest_can_hold_ends_the_archive_like_any_other(parts: Parts, odd: str) -> None:
    task = parts.submitter.submit(REQUEST).task
    assert deliver(parts, task, f'{{"task_id": "x", "task_status": "processing", {odd}}}'.encode()).state == "applied"
    work_off(parts)
    found = task_of(parts, task.external_task_id)
    assert found.archive is ArchiveState.ARCHIVED
    with parts.database.write() as session:  # the same where such a body is the newest
        session.execute(update(Callback).where(Callback.source == "poll").values(received_at=LONG_AGO))
        session.execute(update(Task).values(archive=ArchiveState.ARCHIVING, step=Step.FINISH, due_at=LONG_AGO))
    work_off(parts)
    found = task_of(parts, task.external_task_id)
    assert (found.archive, found.manifests) == (ArchiveState.ARCHIVED, 2)
    content = parts.bucket.read_bytes(str(found.manifest_key), 2**20)
    assert manifest.read(content)["delivery"]["body"] is None
    assert len(json.loads(content)["delivery"]["sha256"]) == 64


def test_the_price_in_an_unsigned_delivery_is_not_believed(parts: Parts) -> None:
    task = insert_row(parts)
    deliver(parts, task, body("succeed", 1, final_unit_deduction="999"))
    assert task_of(parts, task.external_task_id).units is None
    deliver(parts, task, body("succeed", 1, final_unit_deduction="8"), webhook_id="msg_1")
    assert task_of(parts, task.external_task_id).units == "8"


FORGED = "https://p9-fdl.klingai.com/forged"


@BOTH
def test_another_file_for_an_index_is_a_contradiction_and_read_once(parts: Parts) -> None:
    task = archived(parts)
    row = deliver(parts, task, body("succeed", 1, host=FORGED))
    found = task_of(parts, task.external_task_id)
    assert row.reason == found.note and "another file for image 0" in str(row.reason)
    assert found.contradicted and is_read_now(parts, task)
    assert event_names(parts.database, task).count("task.contradicted") == 1
    (asset,) = assets_of(parts, task)
    assert (asset.state, asset.source_url.startswith(OFFICIAL)) == (AssetState.ARCHIVED, True)


@BOTH
def test_the_providers_answer_replaces_a_forged_picture(parts: Parts) -> None:
    task = insert_row(parts)
    deliver(parts, task, body("succeed", 1, host=FORGED))
    with parts.database.write() as session:
        session.execute(update(Asset).values(state=AssetState.ARCHIVED, due_at=None, key="forged/key", sha256="0" * 64))
        session.execute(update(Task).values(archive=ArchiveState.ARCHIVED))
    confirm(parts, task, body("succeed", 1))
    (asset,), found = assets_of(parts, task), task_of(parts, task.external_task_id)
    assert (asset.state, asset.key, asset.superseded) == (AssetState.DUE, None, ["forged/key"])
    assert asset.source_url.startswith(OFFICIAL) and not asset.unconfirmed
    assert (found.archive, found.contradicted) == (ArchiveState.ARCHIVING, True)
    assert "another file for image 0" in (found.note or "")


def test_a_fresh_link_to_the_same_file_is_not_a_contradiction(parts: Parts) -> None:
    task = archived(parts)
    fresh = body("succeed", 1)
    fresh["task_result"]["images"][0]["url"] += "fresh"
    assert deliver(parts, task, fresh).reason is None
    confirm(parts, task, fresh)
    (asset,), found = assets_of(parts, task), task_of(parts, task.external_task_id)
    assert (asset.state, asset.unconfirmed, found.contradicted) == (AssetState.ARCHIVED, False, False)


@pytest.mark.parametrize("by", ["signed report", "read"])
def test_a_confirmed_link_is_not_replaced_by_an_unsigned_report(parts: Parts, by: str) -> None:
    """The same file with another signature: a wrong one would cost a refused download and a read."""
    task, told = insert_row(parts), body("succeed", 1)
    if by == "read":
        confirm(parts, task, told)
    else:
        deliver(parts, task, told, webhook_id="msg_1")
    for number in range(3):
        forged = body("succeed", 1)
        forged["task_result"]["images"][0]["url"] += f"orged{number}"
        assert deliver(parts, task, forged).reason is None
    (asset,) = assets_of(parts, task)
    assert (asset.state, asset.source_url, asset.unconfirmed) == (
        AssetState.DUE,
        f"{OFFICIAL}/0.png?Signature=s",
        False,
    )
    assert not task_of(parts, task.external_task_id).contradicted and not is_read_now(parts, task)


@pytest.mark.parametrize("host", [OFFICIAL.replace("https", "http"), f"{OFFICIAL}:8443"])
@ONE_DATABASE
def test_another_scheme_or_port_is_another_file(parts: Parts, host: str) -> None:
    task = insert_row(parts)
    deliver(parts, task, body("succeed", 1))
    assert "another file for image 0" in str(deliver(parts, task, body("succeed", 1, host=host)).reason)
    assert deliver(parts, task, body("succeed", 1, host=f"{OFFICIAL}:443")).reason is None


def test_a_forged_success_that_came_first_ends_with_the_paid_picture(parts: Parts, sandbox: Sandbox) -> None:
    (task,) = submit(parts, 1)
    wait_until(lambda: {each.status for each in sandbox.ledger().tasks} == {"succeed"})
    other = submit(parts, 1, prompt="what somebody else made")[0]
    wait_until(lambda: {each.status for each in sandbox.ledger().tasks} == {"succeed"})
    theirs = parts.kling.read(provider_task_id=None, external_task_id=other.external_task_id)
    assert theirs is not None
    forged = body("succeed", task_id=str(task.provider_task_id))
    forged["task_result"] = {"images": [{"index": 0, "url": theirs.report.outputs[0].url}]}
    assert deliver(parts, task, forged).reason is None
    run(parts, "assets")
    paid = parts.kling.read(provider_task_id=None, external_task_id=task.external_task_id)
    assert paid is not None
    deliver(parts, task, paid.body)
    drain(parts, task.external_task_id)
    (asset,) = assets_of(parts, task)
    assert asset.sha256 == sandbox.ledger().task(task.external_task_id).assets[0].sha256
    assert "task.contradicted" in event_names(parts.database, task)
    assert {asset.key, *asset.superseded} < set(kept(parts, task))


def test_an_unread_link_is_not_followed_out_of_the_trusted_hosts(parts: Parts, sandbox: Sandbox) -> None:
    (task,) = submit(parts, 1)
    wait_until(lambda: {each.status for each in sandbox.ledger().tasks} == {"succeed"})
    told = parts.kling.read(provider_task_id=None, external_task_id=task.external_task_id)
    assert told is not None
    sandbox.set(cdn_redirect_to="https://elsewhere.example/a.png")
    deliver(parts, task, told.body)
    run(parts, "assets")
    (asset,) = assets_of(parts, task)
    assert asset.unconfirmed and "the task is read first" in (asset.error or "")
    assert is_read_now(parts, task)
    run(parts, "reads")
    assert not assets_of(parts, task)[0].unconfirmed


@pytest.mark.parametrize("step", [Step.CREATE, Step.READ, None], ids=str)
@pytest.mark.parametrize("at_own_url", [True, False], ids=["own URL", "account URL"])
def test_no_unsigned_delivery_gives_a_task_an_id(parts: Parts, step: Step | None, at_own_url: bool) -> None:
    state = {Step.CREATE: TaskState.CREATED, Step.READ: TaskState.SUBMITTED, None: TaskState.FAILED}[step]
    task = insert_row(parts, external_task_id="ours", state=state, step=step)
    for status in ("submitted", "processing", "failed", "succeed"):
        deliver(parts, task if at_own_url else None, body(status, task_id="foreign", **info("ours")))
    with parts.database.read() as session:
        assert aliases.aliases_of(session, task.id) == []
    assert task_of(parts, "ours").provider_task_id is None


def test_an_unsigned_id_of_an_earlier_release_belongs_to_nobody(parts: Parts) -> None:
    """A process of that release may still write them during an upgrade. The owner's deliveries are not refused."""
    held, ours = insert_row(parts), insert_row(parts, external_task_id="ours")
    with parts.database.write() as session:
        values = {"provider": "kling", "provider_task_id": "902", "task_id": held.id, "unsigned": True}
        session.add(TaskAlias(**values))
    row = deliver(parts, ours, body("succeed", 1, task_id="902", **info("ours")))
    assert (row.state, row.reason) == (CallbackState.APPLIED, None)
    assert deliver(parts, None, body("succeed", 1, task_id="902")).state is CallbackState.UNMATCHED


def test_report_for_a_refused_create_is_read_first(parts: Parts) -> None:
    """The provider has nothing of such a task, so a picture in its name is another task's."""
    task = insert_row(parts, state=TaskState.FAILED, step=None, due_at=None)
    assert deliver(parts, task, body("succeed", 1)).reason == AWAITS_READ
    assert assets_of(parts, task) == [] and task_of(parts, task.external_task_id).state is TaskState.FAILED


@pytest.fixture
def three_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of a task that doubted deliveries may cause, instead of twenty."""
    monkeypatch.setattr(apply_deliveries, "MAX_READS_PER_TASK", 3)


@BOTH
@pytest.mark.usefixtures("three_reads")
def test_doubted_deliveries_cause_a_bounded_number_of_reads(parts: Parts) -> None:
    task = insert_row(parts)
    for number in range(10):
        deliver(parts, task, body("failed", n=number))
        confirm(parts, task, body("processing"))
    assert task_of(parts, task.external_task_id).callback_reads == 3
    assert [row.reason for row in callbacks_of(parts)].count(AWAITS_READ) == 3


def spend_reads(parts: Parts, task: Task) -> None:
    """Send as many doubted reports as may cause a read. The provider answers each time that the task is in progress."""
    for number in range(apply_deliveries.MAX_READS_PER_TASK):
        assert deliver(parts, task, body("failed", n=number)).reason == AWAITS_READ
        confirm(parts, task, body("processing"))
    assert not is_read_now(parts, task)


@pytest.mark.usefixtures("three_reads")
@BOTH
def test_reports_that_one_read_answers_use_up_one(parts: Parts) -> None:
    task = insert_row(parts)
    for number in range(apply_deliveries.MAX_READS_PER_TASK + 2):
        assert deliver(parts, task, body("failed", n=number)).reason == AWAITS_READ
    assert task_of(parts, task.external_task_id).callback_reads == 1


@pytest.mark.usefixtures("three_reads")
def test_no_unsigned_success_is_believed_once_the_reads_are_spent(parts: Parts) -> None:
    task = insert_row(parts)
    spend_reads(parts, task)
    for host in (FORGED, OFFICIAL):
        assert deliver(parts, task, body("succeed", 1, host=host)).reason == apply_deliveries.NOT_READ
    found = task_of(parts, task.external_task_id)
    assert assets_of(parts, task) == [] and found.state is TaskState.PROCESSING
    assert found.step is Step.READ and found.due_at is not None
    confirm(parts, task, body("succeed", 1))
    assert assets_of(parts, task)[0].source_url.startswith(OFFICIAL)


@pytest.mark.usefixtures("three_reads")
def test_the_first_contradiction_is_read_though_the_reads_are_spent(parts: Parts) -> None:
    task = insert_row(parts)
    deliver(parts, task, body("succeed", 1, host=FORGED))
    spend_reads(parts, task)
    row = deliver(parts, task, body("succeed", 1))
    assert "the task is read at the provider" in str(row.reason) and is_read_now(parts, task)
    assert task_of(parts, task.external_task_id).callback_reads == apply_deliveries.MAX_READS_PER_TASK
    confirm(parts, task, body("succeed", 1))
    assert assets_of(parts, task)[0].source_url.startswith(OFFICIAL)


@pytest.mark.usefixtures("three_reads")
def test_contradictions_are_read_at_the_pace_of_polls_once_the_reads_are_spent(parts: Parts) -> None:
    task = insert_row(parts)
    deliver(parts, task, body("succeed", 1, host=FORGED))
    for number in range(apply_deliveries.MAX_READS_PER_TASK + 1):
        deliver(parts, task, body("succeed", 1, host=f"{FORGED}/{number}"))
        assert is_read_now(parts, task)
        confirm(parts, task, body("processing"))
    before = parts.database.now()
    assert "the task is read at the provider" in str(deliver(parts, task, body("succeed", 1)).reason)
    found = task_of(parts, task.external_task_id)
    assert found.step is Step.READ and found.due_at is not None
    assert found.due_at >= before + timedelta(seconds=parts.schedule.poll_after_seconds)
    deliver(parts, task, body("succeed", 1, host=FORGED + "/next"))
    assert task_of(parts, task.external_task_id).due_at == found.due_at


@pytest.mark.parametrize("is_kept", [True, False], ids=["archived", "on its way"])
def test_the_forged_report_again_does_not_withdraw_the_read_that_would_expose_it(parts: Parts, is_kept: bool) -> None:
    task = archived(parts) if is_kept else insert_row(parts)
    deliver(parts, task, body("succeed", 1))
    deliver(parts, task, body("succeed", 1, host=FORGED))
    assert is_read_now(parts, task)
    deliver(parts, task, body("succeed", 1) | {"updated_at": 1722769559999})
    assert is_read_now(parts, task)


def test_further_files_for_an_index_cause_no_read_beside_one_that_is_due(parts: Parts) -> None:
    task = archived(parts)
    for number in range(5):
        deliver(parts, task, body("succeed", 1, host=f"{FORGED}/{number}"))
    assert task_of(parts, task.external_task_id).callback_reads == 0 and is_read_now(parts, task)


@pytest.mark.parametrize("webhook_id", ["msg_1", None])
def test_another_file_causes_no_read_once_the_provider_named_its_own(webhook_id: str | None, parts: Parts) -> None:
    task = archived(parts, webhook_id=webhook_id)
    confirm(parts, task, body("succeed", 1))
    for number in range(5):
        row = deliver(parts, task, body("succeed", 1, host=f"{FORGED}/{number}"))
        assert row.reason == apply_deliveries.DECIDED and not is_read_now(parts, task)
    found = task_of(parts, task.external_task_id)
    assert (found.callback_reads, found.contradicted) == (0, True)


@pytest.mark.parametrize("word", ["cancelled", "Canceled"])
@ONE_DATABASE
def test_other_providers_states_of_a_cancelled_task_mean_failed(word: str, parts: Parts) -> None:
    task = insert_row(parts)
    assert deliver(parts, task, body(word)).reason == AWAITS_READ
    deliver(parts, task, body(word), webhook_id="msg_1")
    assert task_of(parts, task.external_task_id).state is TaskState.FAILED


@pytest.mark.parametrize("word", ["SUCCESS", "completed", " Succeeded ", "done"])
@ONE_DATABASE
def test_other_providers_states_of_success_are_accepted(word: str, parts: Parts) -> None:
    task = insert_row(parts)
    assert deliver(parts, task, body(word, 1)).reason is None
    assert task_of(parts, task.external_task_id).state is TaskState.SUCCEEDED


def test_an_unknown_word_with_pictures_causes_one_read(parts: Parts) -> None:
    task = insert_row(parts)
    for _ in range(2):
        row = deliver(parts, task, body("resting", 1))
    assert row.reason == "unknown status 'resting'" and is_read_now(parts, task)
    assert task_of(parts, task.external_task_id).callback_reads == 1


@pytest.mark.parametrize("name", ["ORDER-é", " order-é ", unicodedata.normalize("NFD", "order-é")])
@ONE_DATABASE
def test_an_id_that_is_written_otherwise_causes_one_read(name: str, parts: Parts) -> None:
    task = insert_row(parts, external_task_id="order-é")
    row = deliver(parts, task, body("succeed", 1, **info(name)))
    assert (row.state, row.reason) == (CallbackState.APPLIED, "the body's external_task_id is written otherwise")
    assert is_read_now(parts, task)
