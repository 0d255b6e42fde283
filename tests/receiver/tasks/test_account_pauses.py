"""An account that the provider refuses: creates pause, nothing fails, and everything continues by itself."""

from __future__ import annotations

import os
import re
import time
import uuid
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlmodel import col, select

from receiver.app import checks
from receiver.app.wiring import Parts
from receiver.batch.batch import Batches
from receiver.batch.batch_file import Line
from receiver.cli import show
from receiver.gateway.answers import passed_on
from receiver.sandbox import Sandbox
from receiver.tasks.operate import Operator
from storage.accounts import pauses, slots
from storage.accounts.batches import Counts
from storage.database.clock import db_now
from storage.errors import AccountRefused, NoSlots
from storage.rows.models import AccountPause, Event, Task
from storage.states import Step, TaskState
from tests.bench.claims import LATER, fill
from tests.harness import wait_until
from tests.pipeline import Web, run, task_of, working
from tests.receiver.batch.test_batch import Command
from tests.receiver.batch.test_batch import command as command  # a fixture
from tests.unreported_tasks import REQUEST, creates

ID = "order-4711"
# For the kinds of a refusal: the tests around write the same rows on both.
ONE_DATABASE = pytest.mark.parametrize("database_kind", ["sqlite"])
# The wait for the first trial; `WHOLE_PAUSES=1` makes it the whole minute.
WHOLE = os.environ.get("WHOLE_PAUSES") == "1"
TRIAL_SECONDS = pauses.TRIAL_SECONDS if WHOLE else 1.0
AWAY_SECONDS = 1.5 * TRIAL_SECONDS


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "TRIAL_SECONDS", TRIAL_SECONDS)


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"api_keys": "a-key-of-a-client-of-ours", "metrics_token": "a-metrics-token"}


def submit_request(parts: Parts, external_task_id: str = ID, **fields: Any) -> Task:
    return parts.submitter.submit({**REQUEST, **fields}, external_task_id=external_task_id).task


def stand(parts: Parts) -> list[AccountPause]:
    with parts.database.read() as session:
        return pauses.every(session)


def said(parts: Parts) -> list[tuple[str, Any]]:
    with parts.database.read() as session:
        found = session.exec(select(Event).order_by(Event.id)).all()  # type: ignore[arg-type]
    return [(event.name, event.data["code"]) for event in found if event.name.startswith("account.")]


def let_the_trial_come(parts: Parts) -> None:
    """End the minute of the pause by moving all times back."""
    rest = max(each.trial_at for each in stand(parts)) - parts.database.now()
    with parts.database.write() as session:
        for each in stand(parts):
            session.execute(
                update(AccountPause)
                .where(col(AccountPause.provider) == each.provider, col(AccountPause.model) == each.model)
                .values(trial_at=each.trial_at - rest, since=each.since - rest)
            )


def test_a_pause_from_a_clock_that_was_ahead_ends_in_time(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1102"])
    submit_request(parts)
    with parts.database.write() as session:
        session.execute(update(AccountPause).values(trial_at=db_now(86_400.0), since=db_now(86_400.0)))
    run(parts, "creates")
    assert task_of(parts, ID).state is TaskState.SUBMITTED


@pytest.mark.parametrize("code", ["1000", "1002", "1004", "1100", "1102", "1304"])
@ONE_DATABASE
def test_a_refused_account_pauses_and_fails_nothing(parts: Parts, sandbox: Sandbox, code: str) -> None:
    sandbox.set(create_faults=[code])
    task = submit_request(parts)
    assert (task.state, task.error, task.due_at, task.sent_at) == (TaskState.CREATED, None, None, None)
    assert submit_request(parts, "second").queued_at is not None
    run(parts, "creates")
    assert (len(creates(sandbox)), said(parts)) == (1, [("account.paused", int(code))])
    let_the_trial_come(parts)
    run(parts, "creates")
    assert {task_of(parts, name).state for name in (ID, "second")} == {TaskState.SUBMITTED}
    assert (stand(parts), said(parts)[1:]) == ([], [("account.resumed", int(code))])


def test_a_trial_that_is_refused_is_the_only_create_of_its_minute(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1102"] * 2)
    for number in range(10):
        submit_request(parts, f"order-{number}")
    let_the_trial_come(parts)
    run(parts, "creates")
    run(parts, "creates")
    assert len(creates(sandbox)) == 2
    assert said(parts) == [("account.paused", 1102)], "the same fault is told once"


@pytest.mark.databases("sqlite")
def test_model_without_permission_pauses_only_its_own_creates(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1103"])
    submit_request(parts, "refused")
    other = "kling-image-o1" if REQUEST["model_name"] != "kling-image-o1" else "kling-v3-omni"
    assert submit_request(parts, "other", model_name=other).state is TaskState.SUBMITTED
    assert submit_request(parts, "waits").queued_at is not None
    run(parts, "creates")
    assert [each.model for each in stand(parts)] == [REQUEST["model_name"]]
    assert len(creates(sandbox)) == 2
    let_the_trial_come(parts)
    run(parts, "creates")
    assert {task_of(parts, name).state for name in ("refused", "waits")} == {TaskState.SUBMITTED}


@pytest.mark.databases("sqlite")
def test_a_refused_request_proves_the_key_and_not_the_balance(parts: Parts, sandbox: Sandbox) -> None:
    for code, is_over in (("1002", True), ("1102", False)):
        sandbox.set(create_faults=[code, "1301"])
        submit_request(parts, code)
        let_the_trial_come(parts)
        run(parts, "creates")
        assert task_of(parts, code).state is TaskState.FAILED
        assert (stand(parts) == []) == is_over


@pytest.mark.databases("sqlite")
def test_trial_that_never_reached_the_provider_is_given_back(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1102"])
    submit_request(parts)
    let_the_trial_come(parts)
    sandbox.stop()
    run(parts, "creates")
    (paused,) = stand(parts)
    assert paused.trial_at <= parts.database.now()
    sandbox.start()


def create(web: Web, key: str, name: str) -> httpx.Response:
    headers = {"Authorization": "Bearer a-key-of-a-client-of-ours", "Idempotency-Key": key}
    body = {**REQUEST, "external_task_id": name}
    return httpx.post(f"{web.url}/kling/v1/images/omni-image", json=body, headers=headers, timeout=30)


@pytest.mark.parametrize(("code", "status"), [("1004", 401), ("1102", 429)])
@pytest.mark.databases("sqlite")
def test_client_gets_the_refusal_and_its_key_stays_usable(
    web: Web, parts: Parts, sandbox: Sandbox, code: str, status: int
) -> None:
    sandbox.set(create_faults=[code])
    for _ in range(3):
        answer = create(web, "try-1", ID)
        assert (answer.status_code, answer.json()["code"]) == (status, int(code))
        assert answer.json()["receiver"] == {"refused_by": "provider"}
    assert len(creates(sandbox)) == 1, "one trial a minute, for any number of tasks"
    let_the_trial_come(parts)
    assert create(web, "try-1", ID).status_code == 200
    assert (stand(parts), len(sandbox.ledger().tasks)) == ([], 1)


@pytest.mark.databases("sqlite")
def test_a_client_of_an_account_that_was_refused_lately_waits_in_the_queue(
    web: Web, parts: Parts, sandbox: Sandbox
) -> None:
    sandbox.set(create_faults=["1102"])
    submit_request(parts)
    let_the_trial_come(parts)
    run(parts, "creates")
    now = parts.database.now()
    fill(parts.database, Task, pauses.CAREFUL_CREATES, step=Step.CREATE, sent_at=now, due_at=LATER, lease=uuid.uuid4())
    assert create(web, "try-1", "order-2").status_code == 200
    assert submit_request(parts, "order-3").queued_at is not None and task_of(parts, "order-2").queued_at is not None
    assert run(parts, "creates") == 0
    with parts.database.write() as session:
        session.execute(update(Task).where(col(Task.due_at) == LATER).values(due_at=None, lease=None))
    run(parts, "creates")
    assert {task_of(parts, name).state for name in ("order-2", "order-3")} == {TaskState.SUBMITTED}


@pytest.mark.databases("sqlite")
def test_a_paused_account_is_shown_with_the_providers_message(
    web: Web, parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.set(create_faults=["1102"])
    submit_request(parts)
    words = "code 1102: Resource pack depleted or expired"
    bearer = {"Authorization": "Bearer a-metrics-token"}
    ready = httpx.get(f"{web.url}/readyz", headers=bearer)
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert words in ready.json()["checks"]["account"]
    assert 'receiver_account_paused{account="kling"} 1.0' in httpx.get(f"{web.url}/metrics", headers=bearer).text
    assert words in show.summary(show.measured(parts))
    assert "kling: 1 task waits in the queue" in show.summary(show.measured(parts)).split(" · ")
    assert words in show.pausing(parts, task_of(parts, ID))[0]
    assert words in Operator(parts.database, parts.providers, parts.schedule).retry(ID).left[ID]
    assert any(words in result.line for result in checks.database(parts))


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    ("code", "status", "advice"),
    [(None, 401, checks.SET_KEY), (1102, 429, checks.SETTLE), (402, 402, checks.SETTLE), (None, 403, checks.SETTLE)],
)
def test_check_does_not_blame_the_key_for_an_empty_balance(
    parts: Parts, code: int | None, status: int, advice: str
) -> None:
    """A gateway's own 402, or its 403 with `quota_not_enough`, had the advice to set the API key."""
    refusal = AccountRefused("refused", code=code, http_status=status, said="user quota is not enough")
    with parts.database.write() as session:
        pauses.pause(session, "kling", None, refusal)
    [found] = [each for each in checks.database(parts) if each.name == "account"]
    assert found.advice == f"{advice}; waiting tasks continue by themselves"
    assert passed_on(refusal).code == (1002 if status == 401 else code or 1102)


def batch_of(parts: Parts, count: int) -> Batches:
    batches = Batches(parts.database, parts.submitter, parts.schedule)
    request = parts.submitter.parse(REQUEST)
    hash_ = request.canonical_hash()
    lines = [Line(number, f"night-{number:03}", request, hash_) for number in range(1, count + 1)]
    batches.put(batches.plan("night", lines))
    return batches


@pytest.mark.databases("sqlite")
def test_batch_status_says_why_nothing_is_sent(parts: Parts, sandbox: Sandbox, command: Command) -> None:
    batch_of(parts, 2)
    sandbox.set(create_faults=["1102"])
    run(parts, "creates")
    told, listed = command("batch", "status", "night"), command("batch", "status", "night", "--json").json
    (line,) = [line for line in told.out.splitlines() if "paused" in line]
    assert (told.code, told.err) == (1, "")
    assert re.fullmatch(
        r"account kling is paused since [\d-]+ [\d:]+, next try at [\d:]+ UTC: code 1102: Resource pack .*", line
    )
    assert (listed["paused"], listed["failed"], listed["failures"]) == ([line], 0, [])


def refused(sandbox: Sandbox) -> list[float]:
    """When creates were refused because of the account, in ms of the sandbox's clock."""
    return [each.at_ms for each in sandbox.ledger().creates if each.code in (1002, 1102)]


@pytest.mark.campaign("postgresql")
@pytest.mark.usefixtures("short_pauses")
def test_a_batch_outlives_an_empty_account_and_a_wrong_key(parts: Parts, sandbox: Sandbox) -> None:
    count = 200 if WHOLE else 24
    batches = batch_of(parts, count)
    sandbox.set(submitted_seconds=0, processing_seconds=0, picture_bytes=2_000)
    with working(parts):
        wait_until(lambda: len(sandbox.ledger().tasks) >= count // 4, seconds=60)
        for code in (1102, 1002):
            sandbox.set(create_faults=[str(code)] * 1_000)
            time.sleep(AWAY_SECONDS)
            wait_until(lambda code=code: ("account.paused", code) in said(parts), seconds=60, every=0.1)  # type: ignore[misc]
        sandbox.set(create_faults=[])
        wait_until(lambda: batches.counts("night").over == count, seconds=120 + 2 * TRIAL_SECONDS, every=0.1)
    assert batches.counts("night") == Counts(archived=count)
    assert len({task.external_task_id for task in sandbox.ledger().tasks}) == len(sandbox.ledger().tasks) == count
    times = refused(sandbox)
    most = max(sum(1 for other in times if 0 <= other - at < TRIAL_SECONDS * 1_000) for at in times)
    assert most <= 5, f"{len(times)} creates refused, {most} of them in {TRIAL_SECONDS:g} s"
    assert said(parts) == [("account.paused", 1102), ("account.paused", 1002), ("account.resumed", 1002)]


@pytest.mark.parametrize("answer", ["1301", "1103"])
@pytest.mark.databases("sqlite")
def test_trial_refused_for_its_request_leaves_the_next_trial_to_another_task(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    sandbox.set(create_faults=["1102", answer])
    submit_request(parts, "waits", model_name="kling-image-o1")
    let_the_trial_come(parts)
    monkeypatch.setattr(pauses, "TRIAL_SECONDS", 60.0)
    submit_request(parts, "refused-for-its-own-sake", model_name="kling-v3-omni")
    run(parts, "creates")
    assert task_of(parts, "waits").state is TaskState.SUBMITTED
    assert [each.model for each in stand(parts)] == (["kling-v3-omni"] if answer == "1103" else [])


@pytest.mark.databases("sqlite")
def test_a_model_without_permission_proves_the_key(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1002", "1103"])
    submit_request(parts)
    let_the_trial_come(parts)
    run(parts, "creates")
    assert [each.model for each in stand(parts)] == [REQUEST["model_name"]]


def resumed_lately(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1102"])
    submit_request(parts)
    let_the_trial_come(parts)
    run(parts, "creates")


def inserted(parts: Parts, name: str, client: str | None = None) -> Task:
    task = parts.submitter.row(parts.submitter.parse(REQUEST), name)
    task.client = client
    with parts.database.write() as session:
        parts.submitter.insert(session, task)
    return task


def test_creates_at_once_of_an_account_that_was_refused_lately_do_not_hold_each_other_back(
    parts: Parts, sandbox: Sandbox
) -> None:
    resumed_lately(parts, sandbox)
    before = len(creates(sandbox))
    tasks = [inserted(parts, f"at-once-{number}") for number in range(2 * pauses.CAREFUL_CREATES)]
    for task in tasks:
        if task.queued_at is None:
            parts.submitter.create_step.send(task)
    assert len(creates(sandbox)) - before == pauses.CAREFUL_CREATES
    assert inserted(parts, "later").queued_at is not None, "it overtakes none that waits"
    run(parts, "creates")
    assert {task_of(parts, each.external_task_id).state for each in tasks} == {TaskState.SUBMITTED}


def test_a_client_cannot_fill_the_queue_of_an_account_that_was_refused_lately(parts: Parts, sandbox: Sandbox) -> None:
    resumed_lately(parts, sandbox)
    now, model = parts.database.now(), REQUEST["model_name"]
    waiting = {"step": Step.CREATE, "queued_at": now, "slots": -1, "model": model, "due_at": None}
    fill(parts.database, Task, slots.CLIENT_WAITS, client="a-client", **waiting)
    with pytest.raises(NoSlots):
        inserted(parts, "one-more", "a-client")
    assert inserted(parts, "of-another", "another-client").queued_at is not None
