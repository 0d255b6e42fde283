"""The outbox: numbers in commit order, one queue per sink, order per task, and the effect of failures."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import delete, insert, update
from sqlmodel import col, func, select

from receiver.app.wiring import Parts
from receiver.base.sink_setting import names_matching
from storage.database.sessions import Database
from storage.operations import lists, outbox
from storage.operations.outbox import Subscription
from storage.rows import claims, events
from storage.rows.events import EventName, record
from storage.rows.models import Counter, Dispatch, Event, Task
from storage.states import ArchiveState, DispatchState
from tests import event_delivery_run
from tests.harness import wait_until
from tests.pipeline import Web, working
from tests.rows import LONG_AGO, new_task, wait_until_blocked
from tests.storage.rows.test_claim_plans import rows_read_sqlite
from tests.webhook_receiver import SECRET, Hook

ALL = frozenset(map(str, EventName))
HOOK = Subscription("hook", ALL)


def tell(database: Database, task: Task | None, *names: EventName) -> None:
    """Record each event in its own transaction."""
    for name in names:
        with database.write() as session:
            record(session, name, task.id if task else None)


def task_in(database: Database, **values: Any) -> Task:
    """A task whose events have their numbers."""
    with database.write() as session:
        task = new_task(session, **values)
    outbox.sequence_all(database, [])
    return task


def claim(database: Database, sink: str = "hook", limit: int = 100) -> list[Dispatch]:
    with database.write() as session:
        return claims.claim(session, Dispatch, limit=limit, lease_seconds=60, where=(col(Dispatch.sink) == sink,))


def settle(database: Database, rows: list[Dispatch], how: Callable[..., None] = outbox.delivered, *words: Any) -> None:
    with database.write() as session:
        for row in rows:
            how(session, row, *words)


def names_of(database: Database, rows: list[Dispatch]) -> list[str]:
    with database.read() as session:
        return [session.get_one(Event, row.event_id).name for row in rows]


def queue(database: Database) -> list[Dispatch]:
    with database.read() as session:
        return list(session.exec(select(Dispatch).order_by(col(Dispatch.id))))


def seen(database: Database, after: int = 0) -> list[tuple[int, str]]:
    with database.read() as session:
        return [(event.seq or 0, event.name) for event, _ in events.after(session, after, 1_000)]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_events_are_numbered_without_gaps_in_the_order_of_their_commits(database: Database) -> None:
    tell(database, None, EventName.TASK_CREATED, EventName.TASK_SUBMITTED)
    assert outbox.sequence_all(database, []) == 2
    tell(database, None, EventName.TASK_FAILED)
    assert (outbox.sequence_all(database, []), outbox.sequence_all(database, [])) == (1, 0)
    assert seen(database) == [(1, "task.created"), (2, "task.submitted"), (3, "task.failed")]
    assert seen(database, after=2) == [(3, "task.failed")]


def test_numbers_continue_above_those_that_a_lost_copy_gave_away(database: Database) -> None:
    tell(database, None, EventName.TASK_CREATED)
    outbox.sequence_all(database, [])
    found, started = [1], int(database.now().timestamp() * 1_000)
    for _ in range(2):
        with database.write() as session:
            events.skip_numbers(session)
        tell(database, None, EventName.TASK_FAILED, EventName.TASK_FAILED)
        outbox.sequence_all(database, [])
        found += [seq for seq, _ in seen(database, after=found[-1])]
    assert started < found[1] and found == sorted(set(found)) and len(found) == 5


def test_more_than_a_batch_is_numbered_batch_by_batch(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(database, None, *[EventName.TASK_CREATED] * 5)
    with database.write() as session:
        assert outbox.sequence(database, session, [], limit=3) == 3
    assert outbox.sequence_all(database, []) == 2
    assert [seq for seq, _ in seen(database)] == [1, 2, 3, 4, 5]


def test_a_full_batch_is_followed_by_the_rest(database: Database) -> None:
    with database.write() as session:
        for _ in range(outbox.BATCH + 1):
            record(session, EventName.TASK_CREATED, None)
    assert outbox.sequence_all(database, []) == outbox.BATCH + 1


@pytest.mark.parametrize("pruned", [0, 2])
def test_numbers_continue_above_all_events_where_the_counter_is_behind(database: Database, pruned: int) -> None:
    """As after a dump that was restored into migrated tables: the counter's row is the migration's."""
    tell(database, None, *[EventName.TASK_CREATED] * 3)
    outbox.sequence_all(database, [])
    with database.write() as session:
        session.execute(update(Counter).where(col(Counter.name) == events.COUNTER).values(value=0))
        session.execute(delete(Event).where(col(Event.seq) <= pruned))
    tell(database, None, EventName.TASK_FAILED, EventName.TASK_FAILED)
    assert outbox.sequence_all(database, []) == 2
    assert seen(database, after=3) == [(4, "task.failed"), (5, "task.failed")]
    with database.read() as session:
        assert events.newest_seq(session) == 5


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_reader_misses_no_event_of_two_interleaved_transactions(database: Database) -> None:
    """The transaction with the smaller id commits last. SQLite has one writer, so nothing interleaves there."""
    with database.write() as slow:
        record(slow, EventName.TASK_CREATED, None)
        tell(database, None, EventName.TASK_FAILED)
        assert outbox.sequence_all(database, [HOOK]) == 1
        before = seen(database)
    outbox.sequence_all(database, [HOOK])
    with database.read() as session:
        ids = {name: number for number, name in session.execute(select(Event.id, Event.name)).all()}
    assert ids["task.created"] < ids["task.failed"]
    assert before == [(1, "task.failed")]
    assert seen(database, after=1) == [(2, "task.created")]
    assert names_of(database, queue(database)) == ["task.failed", "task.created"]


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_numbering_does_not_wait_for_another_process(database: Database) -> None:
    tell(database, None, EventName.TASK_CREATED)
    outbox.sequence_all(database, [])
    tell(database, None, EventName.TASK_CREATED, EventName.TASK_CREATED)
    with database.write() as first:
        assert outbox.sequence(database, first, [], limit=1) == 1
        assert outbox.sequence_all(database, []) == 0
    assert outbox.sequence_all(database, []) == 1


def wakes(database: Database, *subscriptions: Subscription, count: int = 1) -> bool:
    """Whether a group of writes that records that many events wakes workers."""
    with database.write() as session:
        for _ in range(count):
            record(session, EventName.ASSET_ARCHIVED, None)
        session.flush()
        outbox.sequence_recorded(database, session, subscriptions)
        return database.wakes(session)


def test_events_wake_workers_for_a_sink_that_wants_them(database: Database) -> None:
    assert not wakes(database)
    assert not wakes(database, Subscription("other", frozenset({"task.archived"})))
    assert wakes(database, HOOK)


def test_events_that_still_have_no_number_wake_workers(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "GROUP_BATCH", 2)
    assert wakes(database, count=3) and not wakes(database, count=0)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)  # SQLite has one writer at a time
def test_events_wake_workers_while_another_process_gives_numbers(database: Database) -> None:
    assert not wakes(database)
    with database.write() as other:
        record(other, EventName.TASK_CREATED, None)
        other.flush()
        assert outbox.sequence(database, other, []) == 1
        assert wakes(database)


# -- each sink's queue ------------------------------------------------------------------------------------------------


def test_each_sink_gets_the_events_it_subscribed_to(database: Database) -> None:
    archived = Subscription("archive", frozenset({"task.archived"}))
    tell(database, None, EventName.TASK_CREATED, EventName.TASK_ARCHIVED)
    outbox.sequence_all(database, [HOOK, archived])
    assert [row.sink for row in queue(database)] == ["hook", "hook", "archive"]
    assert names_of(database, claim(database, "archive")) == ["task.archived"]


def test_new_sink_gets_later_events_only(database: Database) -> None:
    tell(database, None, EventName.TASK_CREATED)
    outbox.sequence_all(database, [])
    tell(database, None, EventName.TASK_FAILED)
    outbox.sequence_all(database, [HOOK])
    assert names_of(database, queue(database)) == ["task.failed"]


def test_client_sink_gets_only_tasks_with_a_callback_url(database: Database) -> None:
    asked = task_in(database, client_callback_url="https://client.example.com/")
    silent = task_in(database)
    clients = Subscription("client", ALL, of_clients=True)
    for task in (asked, silent, None):
        tell(database, task, EventName.TASK_SUBMITTED)
    outbox.sequence_all(database, [clients])
    assert [row.task_id for row in queue(database)] == [asked.id]


def test_events_of_one_task_are_sent_in_order_and_of_others_in_parallel(database: Database) -> None:
    one, other = task_in(database), task_in(database)
    tell(database, one, EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING)
    tell(database, other, EventName.TASK_FAILED)
    tell(database, None, EventName.CALLBACK_UNMATCHED, EventName.CALLBACK_UNMATCHED)
    outbox.sequence_all(database, [HOOK])
    first = claim(database)
    assert names_of(database, first) == ["task.submitted", "task.failed", "callback.unmatched", "callback.unmatched"]
    tell(database, one, EventName.TASK_SUCCEEDED)
    outbox.sequence_all(database, [HOOK])
    assert claim(database) == []
    settle(database, first)
    second = claim(database)
    assert names_of(database, second) == ["task.processing"]
    settle(database, second)
    assert names_of(database, claim(database)) == ["task.succeeded"]


@pytest.mark.parametrize("how", [outbox.failed, outbox.put_off], ids=["failed", "put_off"])
def test_later_events_wait_behind_a_failed_one(database: Database, how: Callable[..., None]) -> None:
    task = task_in(database)
    tell(database, task, EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING)
    outbox.sequence_all(database, [HOOK])
    words = ("down", 600) if how is outbox.failed else (600,)
    settle(database, claim(database), how, *words)
    assert claim(database) == []
    assert [row.due_at is None for row in queue(database)] == [False, True]
    assert queue(database)[0].tries == (how is outbox.failed)


def test_later_events_continue_after_a_dead_one(database: Database) -> None:
    task = task_in(database)
    tell(database, task, EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING)
    outbox.sequence_all(database, [HOOK])
    settle(database, claim(database), outbox.dead, "never")
    assert names_of(database, claim(database)) == ["task.processing"]
    assert (queue(database)[0].state, queue(database)[0].error) == (DispatchState.DEAD, "never")


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_event_inserted_while_the_previous_one_is_settled_becomes_due(database: Database) -> None:
    """Neither sees the other's uncommitted rows, so the second must wait for the first."""
    task = task_in(database)
    tell(database, task, EventName.TASK_SUBMITTED)
    outbox.sequence_all(database, [HOOK])
    [held] = claim(database)
    tell(database, task, EventName.TASK_FAILED)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            outbox.delivered(session, held)
            other = pool.submit(outbox.sequence_all, database, [HOOK])
            wait_until_blocked(database, other)
        assert other.result(10) == 1
    assert names_of(database, claim(database)) == ["task.failed"]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_the_end_of_a_dispatch_does_not_read_those_that_were_sent_before(database: Database) -> None:
    """A sink that was sent 400,000 events held the only lock of SQLite for 0.3 s at each further one."""
    task = task_in(database)
    tell(database, task, EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING, EventName.TASK_FAILED)
    outbox.sequence_all(database, [HOOK])
    sent = {"sink": "hook", "state": DispatchState.DELIVERED, "attempts": 1, "losses": 0, "tries": 1}
    with database.write() as session:
        rows = [{**sent, "event_id": 100 + n, "task_id": uuid.uuid4(), "created_at": LONG_AGO} for n in range(3_000)]
        session.execute(insert(Dispatch), rows)
        outbox.disable(session, "hook", "by hand")
    [first] = claim(database)
    with database.write() as session:
        assert rows_read_sqlite(session, lambda: outbox.delivered(session, first)) < 100
    [second] = claim(database)
    settle(database, [second], outbox.dead, "never")
    with database.write() as session:
        assert rows_read_sqlite(session, lambda: outbox.redeliver(session, [second])) < 100
        assert rows_read_sqlite(session, lambda: outbox.enable(session, "hook")) < 100


# -- disabled sinks ---------------------------------------------------------------------------------------------------


def test_disabled_sink_gets_no_events_until_it_is_enabled(database: Database) -> None:
    task = task_in(database)
    tell(database, task, EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING)
    outbox.sequence_all(database, [HOOK])
    with database.write() as session:
        outbox.disable(session, "hook", "answered 410")
    assert (outbox.end_disabled(database), outbox.end_disabled(database)) == (2, 0)
    tell(database, task, EventName.TASK_SUCCEEDED)
    outbox.sequence_all(database, [HOOK])
    assert [row.state for row in queue(database)] == [DispatchState.DEAD] * 2
    with database.write() as session:
        assert outbox.disabled(session) == {"hook": "answered 410"}
        assert (outbox.enable(session, "hook"), outbox.enable(session, "hook")) == (True, False)
    tell(database, task, EventName.TASK_ARCHIVED)
    outbox.sequence_all(database, [HOOK])
    assert names_of(database, claim(database)) == ["task.archived"]


def disabled_with_events(database: Database) -> Task:
    """A task with two events for a sink that was disabled just now."""
    task = task_in(database)
    tell(database, task, EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING)
    outbox.sequence_all(database, [HOOK])
    with database.write() as session:
        outbox.disable(session, "hook", "answered 410")
    return task


def test_sink_that_is_enabled_before_all_its_events_are_given_up_gets_the_others(database: Database) -> None:
    disabled_with_events(database)
    with database.write() as session:  # a worker that died between two transactions of `end_disabled`
        first = update(Dispatch).where(col(Dispatch.id) == queue(database)[0].id)
        session.execute(first.values(state=DispatchState.DEAD, **claims.NOT_DUE))
    with database.write() as session:
        outbox.enable(session, "hook")
    assert names_of(database, claim(database)) == ["task.processing"]


def test_a_disabled_sink_without_open_events_takes_no_turn_of_writers(database: Database) -> None:
    """Each worker looks once in a while, and on SQLite the look takes long where another sink is far behind."""
    with database.write() as session:
        outbox.disable(session, "hook", "gone")
    with ThreadPoolExecutor(1) as threads, database.write():
        assert threads.submit(outbox.end_disabled, database).result(5) == 0


def test_events_of_a_sink_that_is_enabled_meanwhile_are_not_given_up(database: Database) -> None:
    disabled_with_events(database)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            outbox.enable(session, "hook")
            other = pool.submit(outbox.end_disabled, database)
            wait_until_blocked(database, other)
        assert other.result(10) == 0
    assert names_of(database, claim(database)) == ["task.submitted"]


def given_up(database: Database, *names: EventName) -> list[Dispatch]:
    """The dead dispatches of a task with these events."""
    tell(database, task_in(database), *names)
    outbox.sequence_all(database, [HOOK])
    while rows := claim(database):
        settle(database, rows, outbox.dead, "never")
    return queue(database)


def test_redelivered_events_keep_their_order(database: Database) -> None:
    given_up(database, EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING, EventName.TASK_FAILED)
    with database.write() as session:
        assert outbox.redeliver(session, queue(database)) == 3
    order = []
    while rows := claim(database):
        order += names_of(database, rows)
        settle(database, rows)
    assert order == ["task.submitted", "task.processing", "task.failed"]
    assert {row.state for row in queue(database)} == {DispatchState.DELIVERED}


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_event_redelivered_while_the_one_before_it_is_settled_becomes_due(database: Database) -> None:
    """A large redelivery is of several transactions, and workers send what the first ones made due meanwhile."""
    first, second = given_up(database, EventName.TASK_SUBMITTED, EventName.TASK_FAILED)
    with database.write() as session:
        outbox.redeliver(session, [first])
    held = claim(database)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            outbox.redeliver(session, [second])
            other = pool.submit(settle, database, held)
            wait_until_blocked(database, other)
        other.result(10)
    assert names_of(database, claim(database)) == ["task.failed"]


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_event_behind_two_that_are_settled_at_once_becomes_due(database: Database) -> None:
    task = task_in(database)
    tell(database, task, EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING, EventName.TASK_FAILED)
    outbox.sequence_all(database, [HOOK])
    settle(database, claim(database), outbox.dead, "never")
    second = claim(database)
    with database.write() as session:
        outbox.redeliver(session, queue(database)[:1])
    [first] = claim(database)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            outbox.delivered(session, first)
            other = pool.submit(settle, database, second)
            wait_until_blocked(database, other)
        other.result(10)
    assert names_of(database, claim(database)) == ["task.failed"]


def test_claimed_dispatch_is_not_redelivered(database: Database) -> None:
    tell(database, None, EventName.TASK_FAILED)
    outbox.sequence_all(database, [HOOK])
    held = claim(database)
    with database.write() as session:
        assert outbox.redeliver(session, queue(database)) == 0
    settle(database, held)
    assert queue(database)[0].state is DispatchState.DELIVERED


def test_lost_lease_settles_nothing(database: Database) -> None:
    tell(database, None, EventName.TASK_FAILED)
    outbox.sequence_all(database, [HOOK])
    [held] = claim(database)
    with database.write() as session:
        session.execute(update(Dispatch).values(lease=uuid.uuid4(), due_at=LONG_AGO))
    with pytest.raises(claims.LostClaim):
        settle(database, [held])
    assert queue(database)[0].state is DispatchState.DUE


# -- names ------------------------------------------------------------------------------------------------------------


def test_patterns_select_event_names() -> None:
    assert names_matching(["asset.*"]) == {EventName.ASSET_ARCHIVED, EventName.ASSET_FAILED}
    assert names_matching([]) == set(EventName)
    with pytest.raises(ValueError, match=r"no event is called 'task\.done'"):
        names_matching(["task.done"])
    with pytest.raises(ValueError, match="longer than 64 characters"):
        names_matching(["*a" * 40])
    with pytest.raises(ValueError, match="60 patterns"):
        names_matching("*" * count for count in range(1, 61))


# -- a whole run ------------------------------------------------------------------------------------------------------


TOLD_TASKS = 6


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook(event_delivery_run.Failing()) as running:
        yield running


@pytest.fixture
def changes(hook: Hook) -> dict[str, Any]:
    return {
        "event_sinks": f"hook={hook.url}",
        "event_secrets": SECRET,
        "private_event_hosts": hook.host,
        "event_retry_seconds": ",".join(["0.1"] * 20),
    }


@pytest.mark.campaign("postgresql")
def test_every_event_is_delivered_despite_receiver_faults(web: Web, parts: Parts, hook: Hook) -> None:
    """The short form of `python -m tests.event_delivery_run`: 30 % of requests fail, and the receiver is down once."""
    with working(parts):
        for _ in range(TOLD_TASKS):
            parts.submitter.submit({"model_name": "kling-image-o1", "prompt": "a boat"})
        wait_until(lambda: hook.taken)
        hook.down()
        wait_until(lambda: archived(parts.database) == TOLD_TASKS, seconds=60)
        hook.up()
        wait_until(lambda: not event_delivery_run.open_dispatches(parts.database), seconds=60)
    outcome = event_delivery_run.compare(parts.database, hook.got)
    assert outcome.faults == []
    assert outcome.figures["events"] >= TOLD_TASKS * 5
    assert outcome.figures["failed on purpose"] > 0


def archived(database: Database) -> int:
    with database.read() as session:
        return session.exec(select(func.count()).where(Task.archive == ArchiveState.ARCHIVED)).one()


def listed(database: Database, state: str, sink: str) -> list[tuple[str, str]]:
    """(sink, name) of all dispatches that pages of two show, in their order."""
    seen, cursor = list[tuple[str, str]](), None
    with database.read() as session:
        for _ in range(40):
            page = outbox.newest(session, state, sink, before=cursor, limit=2)
            seen += [(row.sink, event.name) for row, event, _ in page.rows]
            if page.further is None:
                return seen
            cursor = int(page.further)
    raise AssertionError("pages without an end")


@pytest.mark.parametrize("most", [3, 10_000])
def test_pages_of_dispatches_have_each_one_once_and_newest_first(
    database: Database, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(lists, "SCANNED", most)
    names = [EventName.TASK_CREATED, EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING, EventName.TASK_SUCCEEDED]
    tell(database, task_in(database), *names, EventName.TASK_ARCHIVED)
    outbox.sequence_all(database, [HOOK, Subscription("other", ALL)])
    with database.write() as session:
        rows = session.exec(select(Dispatch).where(Dispatch.sink == "hook").order_by(col(Dispatch.id))).all()
        rows[0].state = rows[2].state = DispatchState.DELIVERED
        rows[1].state = DispatchState.DEAD
    words = [str(name) for name in (*names, EventName.TASK_ARCHIVED)]
    assert listed(database, "", "hook") == [("hook", name) for name in reversed(words)]
    assert len(set(listed(database, "", ""))) == len(listed(database, "", "")) == 10
    assert listed(database, "delivered", "hook") == [("hook", words[2]), ("hook", words[0])]
    assert listed(database, "delivered", "") == [("hook", words[2]), ("hook", words[0])]
    assert listed(database, "dead", "") == listed(database, "dead", "hook") == [("hook", words[1])]
    assert listed(database, "due", "other") == [("other", name) for name in reversed(words)]
    assert listed(database, "dead", "other") == listed(database, "", "nobody") == []
