"""`Idempotency-Key`: one create for any number of requests, and the first answer for all."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import Uuid, bindparam, event, text
from sqlmodel import select, update

from receiver.app.wiring import Parts
from receiver.gateway import creates as gateway_creates
from receiver.gateway import gateway
from receiver.gateway.answers import Refused, Reply
from receiver.gateway.api_keys import fingerprint
from receiver.gateway.creates import Creates, DuplicateWait
from receiver.sandbox import Sandbox
from receiver.tasks.create_outcome import CreateOutcome
from storage.accounts import idempotency
from storage.accounts.idempotency import ForwardSteps, Key
from storage.database.clock import UtcTime
from storage.database.sessions import Database
from storage.errors import ProviderThrottled
from storage.rows import migrations
from storage.rows.models import Idempotency
from storage.states import TaskState
from tests.harness import wait_until
from tests.pipeline import Web, drain
from tests.receiver.gateway.test_gateway import (
    CHANGES,
    ID,
    KEY,
    ON_POSTGRESQL,
    ON_SQLITE,
    OTHER_KEY,
    PATH,
    PLAIN,
    create,
    rows,
    status_and_code,
)
from tests.unreported_tasks import creates, unanswered

WORD = {"Idempotency-Key": "try-1"}


@pytest.fixture
def changes() -> dict[str, Any]:
    return dict(CHANGES)


def with_keys(web: Web, *words: str) -> httpx.Response:
    """A create with several Idempotency-Key headers."""
    headers = [("Authorization", f"Bearer {KEY}"), *(("Idempotency-Key", word) for word in words)]
    return httpx.post(web.url + PATH, headers=headers, json=PLAIN, timeout=30)


def keys(parts: Parts) -> list[Idempotency]:
    with parts.database.read() as session:
        return list(session.exec(select(Idempotency)))


def forget_the_answer(parts: Parts) -> None:
    """The state after a crash between the row and the answer."""
    with parts.database.write() as session:
        session.execute(update(Idempotency).values(status=None, answer=None))


def test_the_same_key_and_body_get_the_first_answer(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    first = create(web, {**PLAIN, "n": 1}, headers=WORD)
    drain(parts, rows(parts)[0].external_task_id)
    again = create(web, {"n": 1, **PLAIN}, headers=WORD)
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    assert len(creates(sandbox)) == len(rows(parts)) == 1


@ON_SQLITE
def test_another_body_is_409_and_another_client_has_keys_of_its_own(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    create(web, headers=WORD)
    for body in ({**PLAIN, "n": 2}, {**PLAIN, "external_task_id": ID}):
        answer = create(web, body, headers=WORD)
        assert status_and_code(answer) == (409, 1201)
        assert "Idempotency-Key" in answer.json()["message"]
    assert status_and_code(create(web, {**PLAIN, "n": 2}, headers=WORD, key=OTHER_KEY)) == (200, 0)
    assert len(creates(sandbox)) == 2


@ON_SQLITE
def test_the_database_holds_no_cheap_hash_of_a_key(web: Web, parts: Parts) -> None:
    create(web, headers=WORD)
    clients = {keys(parts)[0].client, rows(parts)[0].client}
    assert clients == {fingerprint(KEY)}
    cheap = [name for name in hashlib.algorithms_guaranteed if not name.startswith("shake")]
    assert not clients & {hashlib.new(name, KEY.encode()).hexdigest() for name in cheap}


@ON_SQLITE
def test_two_keys_of_one_request_are_refused_and_the_same_twice_is_one(web: Web, parts: Parts) -> None:
    for first, second in (("a", "b"), ("b", "a")):
        answer = with_keys(web, first, second)
        assert status_and_code(answer) == (400, 1201) and "more than once" in answer.json()["message"]
    assert rows(parts) == []
    assert status_and_code(with_keys(web, "a", "a")) == (200, 0)
    assert (len(keys(parts)), len(rows(parts))) == (1, 1)


@ON_SQLITE
def test_invalid_request_takes_no_key_and_a_long_key_is_refused(web: Web, parts: Parts) -> None:
    assert status_and_code(create(web, {**PLAIN, "n": 10}, headers=WORD)) == (400, 1201)
    assert status_and_code(create(web, headers={"Idempotency-Key": "k" * 256})) == (400, 1201)
    assert status_and_code(create(web, headers={"Idempotency-Key": ""})) == (200, 0)
    assert keys(parts) == []
    assert status_and_code(create(web, headers=WORD)) == (200, 0)


def test_a_refusal_is_the_first_answer_but_not_being_too_fast(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1303", "1301"])
    answers = [status_and_code(create(web, {**PLAIN, "external_task_id": ID}, headers=WORD)) for _ in range(3)]
    assert answers == [(429, 1303), (400, 1301), (400, 1301)]
    assert len(creates(sandbox)) == 2


def test_concurrent_duplicates_make_one_task_and_get_one_answer(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["hang:created"], hang_seconds=0.5)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: create(web, headers=WORD), range(8)))
    assert all(answer.json() == answers[0].json() for answer in answers)
    assert answers[0].json()["data"]["receiver"]["provider_task_id"] is not None
    assert len(creates(sandbox)) == len(rows(parts)) == 1


@ON_SQLITE
def test_duplicate_of_a_throttled_create_may_be_sent_again(parts: Parts) -> None:
    creates = Creates(parts.database, parts.submitter, parts.response_format, parts.settings.callback_policy)
    wanted = creates.read(json.dumps(PLAIN).encode(), "client", "try-1")
    first, twin = creates.begin(wanted), creates.begin(wanted)
    assert (first.first, twin.first, twin.task.id) == (True, False, first.task.id)
    duplicate_wait = DuplicateWait(0)
    assert creates.replay(wanted, twin, "request", duplicate_wait, now=0) is None
    assert (
        creates.conclude(wanted, first, ProviderThrottled("slow", code=1303, http_status=429), "request").http_status
        == 429
    )
    with pytest.raises(Refused, match="1302"):
        creates.replay(wanted, twin, "request", duplicate_wait, now=0)


@ON_SQLITE
def test_a_duplicate_answers_for_no_later_create_of_its_key(parts: Parts) -> None:
    """The first create was throttled and its client repeats it, before the duplicate looks again."""
    made = Creates(parts.database, parts.submitter, parts.response_format, parts.settings.callback_policy)
    wanted, slow = made.read(json.dumps(PLAIN).encode(), "client", "try-1"), ProviderThrottled("slow", code=1303)
    first, twin = made.begin(wanted), made.begin(wanted)
    made.conclude(wanted, first, slow, "first")
    second = made.begin(wanted)
    with pytest.raises(Refused, match="1302"):
        made.replay(wanted, twin, "twin", DuplicateWait(0), now=100)
    own = made.conclude(wanted, second, None, "second")
    assert (second.first, keys(parts)[0].answer) == (True, own.body)
    assert own.body["data"]["task_id"] == str(second.task.id)


@pytest.mark.parametrize("seconds", [2.5, 19.0, 20.5])
def test_duplicates_get_the_creates_own_answer_however_long_it_took(
    seconds: float, parts: Parts, sandbox: Sandbox
) -> None:
    """Duplicates that check between the row's end and the commit of its answer."""
    sandbox.set(create_faults=["1301"])
    made = Creates(parts.database, parts.submitter, parts.response_format, parts.settings.callback_policy)
    wanted, outcome_listener, duplicate_wait = (
        made.read(json.dumps(PLAIN).encode(), "client", "try-1"),
        CreateOutcome(),
        DuplicateWait(0),
    )
    first, twin = made.begin(wanted), made.begin(wanted)
    assert made.replay(wanted, twin, "twin", duplicate_wait, now=0) is None
    made.send(first, outcome_listener)
    assert made.replay(wanted, twin, "twin", duplicate_wait, now=seconds) is None
    own = made.conclude(wanted, first, outcome_listener.refusal, "first")
    assert (own.http_status, own.body["code"]) == (400, 1301)
    for now in (seconds + 0.1, seconds + gateway_creates.ANSWER_SECONDS, seconds + 60):
        assert made.replay(wanted, twin, "twin", duplicate_wait, now=now) == Reply(400, own.body)


def test_duplicate_waits_only_for_the_commit_once_the_create_has_ended() -> None:
    duplicate_wait = DuplicateWait(0)
    moments = {19.9: True, 20.0: False, 21.9: True, 22.0: True}
    ended = [duplicate_wait.is_over(is_under_way=under_way, now=now) for now, under_way in moments.items()]
    assert ended == [False, False, False, True]
    assert DuplicateWait(0).is_over(is_under_way=True, now=20)


@ON_POSTGRESQL
def test_key_that_is_given_back_during_its_lookup_is_taken(parts: Parts) -> None:
    """The key is given back between the insert that meets it and the read of its owner, because PostgreSQL lets other
    transactions commit in between.
    """
    made = Creates(parts.database, parts.submitter, parts.response_format, parts.settings.callback_policy)
    wanted = made.read(json.dumps(PLAIN).encode(), "client", "try-1")
    first = made.begin(wanted)
    waiting = [ProviderThrottled("slow", code=1302, http_status=429)]

    def give_back(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT idempotency") and waiting:
            made.conclude(wanted, first, waiting.pop(), "first")

    event.listen(parts.database.writer, "before_cursor_execute", give_back)
    second = made.begin(wanted)
    event.remove(parts.database.writer, "before_cursor_execute", give_back)
    assert waiting == []
    assert (second.first, [kept.task_id for kept in keys(parts)]) == (True, [second.task.id])


@pytest.mark.parametrize("case", ["accepted", "archived", "failed"])
def test_key_returns_the_rows_state_after_a_crash(
    case: str, web: Web, parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_creates, "ANSWER_SECONDS", 0)
    sandbox.set(create_faults=["1301"] if case == "failed" else [])
    create(web, {**PLAIN, "external_task_id": ID}, headers=WORD)
    if case == "archived":
        drain(parts, ID)
    forget_the_answer(parts)
    again = create(web, {**PLAIN, "external_task_id": ID}, headers=WORD)
    word = {"accepted": {"submitted", "processing"}, "archived": {"succeed"}, "failed": {"failed"}}[case]
    assert status_and_code(again) == (200, 0)
    assert again.json()["data"]["task_status"] in word
    assert create(web, {**PLAIN, "external_task_id": ID}, headers=WORD).json() == again.json()
    assert len(creates(sandbox)) == 1


@ON_SQLITE
def test_a_repeat_waits_for_a_create_that_crashed_before_it_was_sent(
    web: Web, parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "PROVIDER_SECONDS", 0.3)
    monkeypatch.setattr(gateway_creates, "UNDER_WAY_SECONDS", 0.3)
    with unanswered(sandbox):
        first = create(web, headers=WORD)
        forget_the_answer(parts)
        again = create(web, headers=WORD)
        assert (again.json()["data"]["task_id"], status_and_code(again)) == (first.json()["data"]["task_id"], (200, 0))
        assert rows(parts)[0].state is TaskState.CREATED
    wait_until(lambda: rows(parts)[0].state is TaskState.SUBMITTED)
    assert len(creates(sandbox)) == 1


@pytest.mark.parametrize("cleaned", [True, False])
def test_idempotency_key_is_valid_for_a_day(cleaned: bool, web: Web, parts: Parts, sandbox: Sandbox) -> None:
    first = create(web, headers=WORD).json()
    with parts.database.write() as session:
        day = timedelta(seconds=idempotency.KEPT_SECONDS)
        session.execute(update(Idempotency).values(created_at=parts.database.now() - day))
    if cleaned:
        assert (idempotency.prune_all(parts.database), keys(parts)) == (1, [])
    assert create(web, {**PLAIN, "n": 2}, headers=WORD).json() != first
    assert idempotency.prune_all(parts.database) == 0
    assert len(creates(sandbox)) == 2


@ON_SQLITE
def test_a_clock_that_is_set_a_day_ahead_ends_no_key(
    web: Web, parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = idempotency.KEPT_SECONDS
    clock = {"wall": 1_000_000_000.0, "monotonic": 0.0}
    steps = ForwardSteps(lambda: clock["wall"], lambda: clock["monotonic"])
    monkeypatch.setattr(idempotency, "steps", steps)
    first = create(web, headers=WORD).json()
    with parts.database.write() as session:
        session.execute(update(Idempotency).values(created_at=parts.database.now() - timedelta(seconds=day)))
    clock["wall"] += day
    assert idempotency.prune_all(parts.database) == 0
    assert create(web, headers=WORD).json() == first
    for name in clock:
        clock[name] += day + 1
    assert (steps.seconds(), idempotency.prune_all(parts.database)) == (0, 1)
    assert len(creates(sandbox)) == 1


def test_steps_of_the_clock_add_up_for_a_day_and_a_way_back_is_none() -> None:
    clock = {"wall": 1_000_000_000.0, "monotonic": 0.0}
    steps = ForwardSteps(lambda: clock["wall"], lambda: clock["monotonic"])
    seen = []
    for step, later in ((3_600, 0), (600, 43_200), (0, 43_201), (-7_200, 0), (0, 43_201), (0.5, 0)):
        clock["wall"] += step + later
        clock["monotonic"] += later
        seen.append(steps.seconds())
    assert seen == [3_600, 4_200, 600, 0, 0, 0]


def test_a_step_that_two_threads_see_at_once_is_not_forgotten() -> None:
    clock = {"wall": 1_000_000_000.0, "monotonic": 0.0}
    steps = ForwardSteps(lambda: clock["wall"], lambda: clock["monotonic"])
    other = threading.Thread(target=steps.seconds)

    class Interrupted(list[tuple[float, float]]):
        """Another thread sees a step while this list is read."""

        def __iter__(self) -> Iterator[tuple[float, float]]:
            seen = super().__iter__()
            if not other.ident:
                clock["wall"] += 3_600
                other.start()
                other.join(0.2)
            return iter(list(seen)[:0])

    steps._earlier = Interrupted()
    steps.seconds()
    other.join()
    assert steps.seconds() == 3_600


def test_a_key_outlives_the_upgrade_that_renames_its_client(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    migrations.upgrade(database, "0005")
    row = {"old": hashlib.sha256(KEY.encode()).hexdigest(), "task": uuid.uuid4(), "now": database.now()}
    columns = "(client, key, body_hash, task_id, created_at)"
    insert = text(f"INSERT INTO idempotency {columns} VALUES (:old, 'try-1', 'h', :task, :now)")
    with database.write() as session:
        session.execute(insert.bindparams(bindparam("task", type_=Uuid()), bindparam("now", type_=UtcTime())), row)
    migrations.upgrade(database)
    with database.read() as session:
        found = idempotency.find(session, Key(fingerprint(KEY), "try-1", "h"))
    database.close()
    assert found is not None
    assert found.task_id == row["task"]
