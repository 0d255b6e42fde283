"""Slots: the order of admission, and that held slots never exceed the limit."""

from __future__ import annotations

import random
import threading
import uuid
from collections import Counter, defaultdict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from sqlalchemy import update
from sqlmodel import Session, col, func, select

from receiver.app.wiring import Parts
from receiver.providers.base import RequestInvalid
from receiver.sandbox import Sandbox
from storage.accounts import slots
from storage.accounts.slots import Slots, Waiting, choose, limit_at
from storage.database.clock import db_now
from storage.database.sessions import Database
from storage.errors import LostClaim, NoSlots
from storage.rows import claims, reports, tasks
from storage.rows.models import Account, Task
from storage.states import Report, Step, TaskState
from tests.harness import wait_until
from tests.pipeline import deliver, make_due_now, run, task_of
from tests.rows import LONG_AGO, new_task, stored

REQUEST = {"model_name": "kling-v3-omni", "prompt": "a boat"}
A, B = uuid.UUID(int=1), uuid.UUID(int=2)
LIMIT = 6


# -- the order of admission -------------------------------------------------------------------------------------------


def waiting(*entries: tuple[uuid.UUID | None, int]) -> list[Waiting]:
    return [Waiting(uuid.UUID(int=number), queue, wanted, True) for number, (queue, wanted) in enumerate(entries)]


def chosen(given: list[Waiting], held: dict[uuid.UUID | None, int], limit: int | None) -> list[int]:
    return [each.int for each in choose(given, held, limit)]


def test_two_batches_take_turns_whichever_came_first() -> None:
    assert chosen(waiting((A, 1), (A, 1), (A, 1), (B, 1), (B, 1)), {}, 4) == [0, 3, 1, 4]


def test_batch_with_fewer_slots_is_next() -> None:
    assert chosen(waiting((A, 1), (A, 1), (B, 1), (None, 1)), {A: 3, B: 1}, 7) == [3, 2, 0]


def test_large_task_is_not_overtaken() -> None:
    assert chosen(waiting((A, 9), (B, 1)), {None: 15}, 20) == []
    assert chosen(waiting((A, 9), (B, 1)), {None: 11}, 20) == [0]


def test_task_larger_than_the_limit_is_admitted_alone() -> None:
    assert chosen(waiting((A, 9), (A, 1)), {}, 4) == [0]
    assert chosen(waiting((A, 9), (A, 1)), {B: 1}, 4) == []


def test_queue_backs_off_with_its_first_task() -> None:
    refused = Waiting(uuid.UUID(int=7), A, 1, False)
    assert chosen([refused, *waiting((A, 1), (B, 1))], {}, 20) == [1]


def test_without_a_limit_every_ready_task_is_chosen() -> None:
    assert sorted(chosen(waiting((A, 9), (B, 9), (None, 9)), {A: 100}, None)) == [0, 1, 2]


@given(
    some.lists(some.tuples(some.sampled_from([A, B, None]), some.integers(1, 9)), max_size=30),
    some.dictionaries(some.sampled_from([A, B, None]), some.integers(0, 9)),
    some.integers(1, 40),
)
def test_chosen_tasks_fit_the_limit_and_keep_their_order(
    entries: list[tuple[uuid.UUID | None, int]], held: dict[uuid.UUID | None, int], limit: int
) -> None:
    given_tasks = waiting(*entries)
    picked = choose(given_tasks, held, limit)
    by_id = {task.id: task for task in given_tasks}
    total = sum(held.values()) + sum(by_id[each].slots for each in picked)
    assert total <= max(limit, sum(held.values())) or (not sum(held.values()) and len(picked) == 1)
    for queue in (A, B, None):
        mine = [each for each in picked if by_id[each].queue == queue]
        assert mine == [task.id for task in given_tasks if task.queue == queue][: len(mine)]
    assert picked or not entries or sum(held.values())


def test_lowered_limit_rises_by_one_a_minute_up_to_the_setting() -> None:
    start = datetime(2026, 11, 23, tzinfo=UTC)
    after = {
        seconds: limit_at(20, 15, start, start + timedelta(seconds=seconds)) for seconds in (0, 59, 60, 239, 9_999)
    }
    assert after == {0: 15, 59: 15, 60: 16, 239: 18, 9_999: 20}
    assert limit_at(20, None, start, start) == 20
    assert limit_at(20, 15, start, start - timedelta(seconds=2)) == 15
    assert limit_at(20, 15, start, start - timedelta(hours=1)) == 20, "the clock was set back"


# -- rows -------------------------------------------------------------------------------------------------------------


def queue(session: Session, wanted: int, batch: uuid.UUID | None = None, line: int = 0) -> Task:
    later = LONG_AGO + timedelta(seconds=line)
    return new_task(
        session, due_at=None, slots=-wanted, queued_at=LONG_AGO, batch_id=batch, batch_line=line, created_at=later
    )


def held(database: Database) -> int:
    with database.read() as session:
        return sum(Slots("kling").held(session).values())


def test_admitted_tasks_hold_their_slots_and_are_due(database: Database) -> None:
    with database.write() as session:
        rows = [queue(session, 2, A, line) for line in range(4)]
    with database.write() as session:
        assert Slots("kling", 5).admit(session, 10) == 2
    assert [stored(database, row)["slots"] for row in rows] == [2, 2, -2, -2]
    with database.write() as session:
        assert {row.id for row in claims.claim(session, Task, limit=9, lease_seconds=9)} == {rows[0].id, rows[1].id}


def test_task_that_waits_until_a_time_is_not_admitted_before_unless_the_clock_was_ahead(database: Database) -> None:
    later = {"due_at": None, "slots": -1, "provider": "kling"}
    with database.write() as session:
        waits = new_task(session, queued_at=database.now() + timedelta(hours=1), batch_id=A, **later)
        ahead = new_task(session, queued_at=database.now() + timedelta(days=1), batch_id=B, **later)
    with database.write() as session:
        assert Slots("kling", 5).admit(session, 10) == 1
    assert [stored(database, row)["slots"] for row in (waits, ahead)] == [-1, 1]


def test_at_most_as_many_are_admitted_as_can_be_sent(database: Database) -> None:
    with database.write() as session:
        for line in range(4):
            queue(session, 1, A, line)
    with database.write() as session:
        assert Slots("kling", None).admit(session, 3) == 3


def test_no_lock_is_taken_if_no_task_can_be_admitted(database: Database) -> None:
    mine = Slots("kling", 2)
    with database.write() as session:
        new_task(session, slots=2, due_at=None)
        assert not mine.is_any_next(session)
        queue(session, 1)
        assert not mine.is_any_next(session)
        assert Slots("kling", 3).is_any_next(session)
        assert not Slots("other", 3).is_any_next(session)


def test_ended_task_gives_its_slots_back(database: Database) -> None:
    with database.write() as session:
        task = new_task(session, slots=3, state=TaskState.SUBMITTED, step=Step.READ)
    with database.write() as session:
        row = tasks.lock(session, task.id)
        assert row is not None
        report = Report(None, None, TaskState.FAILED)
        reports.apply(session, row, report, reports.Schedule(), now=tasks.now(session), pushed=True)
    assert held(database) == 0


def test_refusal_lowers_the_limit_below_the_slots_held(database: Database) -> None:
    mine = Slots("kling", 20)
    with database.write() as session:
        new_task(session, slots=12)
        assert mine.refused(session, 3) == 9
    with database.read() as session:
        assert mine.limit(session) == 9
    with database.write() as session:
        session.execute(update(Account).values(changed_at=db_now(-120)))
        assert mine.limit(session) == 11


def test_task_silent_for_a_day_gives_its_slots_back(database: Database) -> None:
    now = database.now()
    day = {"sent_at": now - timedelta(days=2), "step": Step.READ, "state": TaskState.SUBMITTED, "slots": 1}
    with database.write() as session:
        silent = new_task(session, **day)
        called = new_task(session, **day, called_back_at=now)
        doubtful = new_task(session, **{**day, "step": Step.CREATE})
    assert slots.give_back_silent(database) == 1
    assert [stored(database, row)["slots"] for row in (silent, called, doubtful)] == [0, 1, 1]
    assert stored(database, silent)["note"] == slots.SILENT


def silenced(parts: Parts) -> Task:
    """A task that was silent for a day and gave its slots back."""
    task = parts.submitter.submit(REQUEST).task
    with parts.database.write() as session:
        long_ago = {"sent_at": LONG_AGO, "due_at": LONG_AGO}
        session.execute(update(Task).where(col(Task.id) == task.id).values(**long_ago))
    assert slots.give_back_silent(parts.database) == 1
    return task


def test_silent_task_has_a_note_until_its_callback(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(processing_seconds=600)
    task = silenced(parts)
    assert run(parts, "reads")  # still in progress, so still silent
    assert task_of(parts, task.external_task_id).note == slots.SILENT
    sandbox.set(query_faults=["5001"])
    make_due_now(parts, Task)
    assert run(parts, "reads")
    note = task_of(parts, task.external_task_id).note or ""
    assert note.startswith(f"{slots.SILENT}; ") and "5001" in note
    deliver(parts, task, {"task_id": task.provider_task_id, "task_status": "processing"})
    row = task_of(parts, task.external_task_id)
    assert (row.state, row.note, row.slots) == (TaskState.PROCESSING, None, 0)


def test_silent_task_that_ends_loses_its_note(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(processing_seconds=600)
    task = silenced(parts)
    with parts.database.write() as session:
        row = tasks.lock(session, task.id)
        assert row is not None
        report = Report(None, None, TaskState.FAILED)
        reports.apply(session, row, report, reports.Schedule(), now=tasks.now(session), pushed=False)
    assert task_of(parts, task.external_task_id).note is None


# -- submitting -------------------------------------------------------------------------------------------------------

ONE_DATABASE = pytest.mark.parametrize("database_kind", ["sqlite"])  # the rows are the same on both
limited = pytest.mark.parametrize("changes", [{"kling_slots": 4}], ids=["four"])


@limited
def test_request_without_free_slots_is_queued_and_sent_by_a_worker(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(processing_seconds=60)
    first = parts.submitter.submit({**REQUEST, "n": 3}).task
    second = parts.submitter.submit({**REQUEST, "n": 2}).task
    assert (first.state, first.slots) == (TaskState.SUBMITTED, 3)
    assert (second.state, second.slots, second.due_at, second.lease) == (TaskState.CREATED, -2, None, None)
    assert run(parts, "creates") == 0
    with parts.database.write() as session:
        session.execute(update(Task).where(col(Task.id) == first.id).values(slots=0))
    assert run(parts, "creates") == 1
    assert task_of(parts, second.external_task_id).state is TaskState.SUBMITTED


@ONE_DATABASE
@limited
def test_gateway_request_without_free_slots_is_refused_and_not_stored(parts: Parts) -> None:
    parts.submitter.submit({**REQUEST, "n": 4})
    row = parts.submitter.row(_parsed(n=1), "beside")
    with pytest.raises(NoSlots), parts.database.write() as session:
        parts.submitter.insert(session, row)
    with parts.database.read() as session:
        assert tasks.by_external_id(session, "beside") is None


@ONE_DATABASE
@limited
def test_request_larger_than_the_setting_is_refused(parts: Parts) -> None:
    with pytest.raises(RequestInvalid, match="RECEIVER_KLING_SLOTS"):
        parts.submitter.submit({**REQUEST, "n": 5})


@limited
def test_full_account_lowers_the_limit_and_queues_the_task_again(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1303"])
    task = parts.submitter.submit({**REQUEST, "n": 2}).task
    assert (task.state, task.slots, task.sent_at) == (TaskState.CREATED, -2, None)
    assert task.queued_at is not None
    assert task.queued_at > parts.database.now()
    assert run(parts, "creates") == 0
    with parts.database.write() as session:
        session.execute(update(Task).values(queued_at=LONG_AGO))
    wait_until(lambda: run(parts, "creates") == 1)
    assert len(sandbox.ledger().tasks) == 1


@ONE_DATABASE
def test_full_account_is_retried_later_without_a_limit(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1303"])
    task = parts.submitter.submit(REQUEST).task
    assert (task.queued_at, task.slots) == (None, 1)
    make_due_now(parts, Task)
    assert run(parts, "creates") == 1
    assert len(sandbox.ledger().tasks) == 1


@ONE_DATABASE
@limited
def test_refused_create_gives_its_slots_back(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1301"])
    assert parts.submitter.submit({**REQUEST, "n": 4}).task.slots == 0
    assert parts.submitter.submit({**REQUEST, "n": 4}).task.state is TaskState.SUBMITTED


@ONE_DATABASE
@limited
def test_retry_does_not_overtake_the_queue(parts: Parts) -> None:
    from receiver.tasks.operate import Operator

    parts.submitter.submit({**REQUEST, "n": 4})
    waits = parts.submitter.submit({**REQUEST, "n": 4}, external_task_id="waits").task
    operator = Operator(parts.database, parts.providers, parts.schedule)
    assert "slots" in operator.retry("waits").left["waits"]
    assert operator.retry_failed(limit=10).counts.total() == 0
    assert task_of(parts, "waits").due_at is waits.due_at is None


@ONE_DATABASE
@limited
def test_dismissed_task_leaves_the_queue(parts: Parts) -> None:
    from receiver.tasks.operate import Operator

    parts.submitter.submit({**REQUEST, "n": 4})
    parts.submitter.submit(REQUEST, external_task_id="waits")
    assert Operator(parts.database, parts.providers, parts.schedule).dismiss("waits", "no more").is_good
    row = task_of(parts, "waits")
    assert (row.slots, row.queued_at, row.state) == (0, None, TaskState.FAILED)


def _parsed(**fields: Any) -> Any:
    from receiver.providers.kling.request import parse_request

    return parse_request({**REQUEST, **fields})


# -- under contention -------------------------------------------------------------------------------------------------


class Crowd:
    """Threads that submit, claim, end, are refused and die with a lease; another one checks the limit."""

    def __init__(self, database: Database, seed: int) -> None:
        self.database, self.seed, self.slots = database, seed, Slots("kling", LIMIT)
        self.most, self.done = 0, Counter[str]()
        self.errors: list[Exception] = []
        self.stop = threading.Event()

    def run(self, workers: int, steps: int) -> None:
        watcher = threading.Thread(target=self._guarded, args=(self._watch,))
        crowd = [threading.Thread(target=self._guarded, args=(self._act, n, steps)) for n in range(workers)]
        for each in (watcher, *crowd):
            each.start()
        for each in crowd:
            each.join(60)
        self.stop.set()
        watcher.join(10)
        assert not self.errors, self.errors

    def _guarded(self, target: Any, *arguments: Any) -> None:
        try:
            target(*arguments)
        except Exception as error:  # noqa: BLE001 - shown at the end
            self.errors.append(error)

    def _watch(self) -> None:
        while not self.stop.is_set():
            self.most = max(self.most, held(self.database))
            self.stop.wait(0.002)

    def _act(self, number: int, steps: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        for _ in range(steps):
            act = rng.choice([self._submit, self._submit, self._queue, self._work, self._work, self._die])
            act(rng)
            self.done[act.__name__] += 1

    def _submit(self, rng: random.Random) -> None:
        wanted = rng.randint(1, 4)
        with self.database.write() as session:
            if self.slots.reserve(session, wanted):
                new_task(session, slots=wanted)
            else:
                queue(session, wanted)

    def _queue(self, rng: random.Random) -> None:
        with self.database.write() as session:
            queue(session, rng.randint(1, 4), rng.choice([A, B]), rng.randint(1, 9))

    def _claim(self) -> list[Task]:
        with self.database.write() as session:
            self.slots.admit(session, 3)
            return claims.claim(session, Task, limit=2, lease_seconds=0.05)

    def _work(self, rng: random.Random) -> None:
        for row in self._claim():
            with suppress(LostClaim), self.database.write() as session:
                if rng.random() < 0.2:
                    self.slots.refused(session, row.slots)
                    values: dict[str, Any] = {"queued_at": db_now(), "slots": -row.slots}
                else:
                    values = {"slots": 0, "state": TaskState.SUCCEEDED}
                claims.settle(session, row, due_in=None, **values)

    def _die(self, _: random.Random) -> None:
        self._claim()


@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.databases("sqlite")), 2])
def test_slots_held_never_exceed_the_limit(database: Database, seed: int) -> None:
    crowd = Crowd(database, seed)
    crowd.run(workers=4, steps=12)
    assert 0 < crowd.most <= LIMIT

    def all_ended() -> bool:
        with database.write() as session:
            session.execute(update(Account).values(slot_limit=None))
            session.execute(update(Task).where(col(Task.due_at).is_not(None)).values(due_at=LONG_AGO, losses=0))
        crowd._work(random.Random(2))
        assert held(database) <= LIMIT
        with database.read() as session:
            return session.exec(select(func.count()).where(Task.slots != 0)).one() == 0

    wait_until(all_ended, seconds=30, every=0)


def test_two_batches_share_the_account(database: Database) -> None:
    with database.write() as session:
        for line in range(40):
            queue(session, 1, A, line)
        for line in range(4):
            queue(session, 1, B, 100 + line)
    mine, order = Slots("kling", 4), defaultdict[uuid.UUID | None, int](int)
    with database.write() as session:
        mine.admit(session, 10)
        for row in claims.claim(session, Task, limit=10, lease_seconds=60):
            order[row.batch_id] += 1
    assert order == {A: 2, B: 2}
