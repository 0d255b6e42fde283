"""The promises of every kind of sink: at least once, per task in order, stable ids, bounded time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime

import pytest
from sqlalchemy import update
from sqlmodel import col, select

from receiver.base.config import private_pairs
from receiver.events import sqs
from receiver.events.cloudevents import event_id
from receiver.events.dispatcher import Dispatcher, Message, NotTried, SinkSilent, SinkUnavailable
from receiver.events.http_post import MAX_ANSWER_BYTES, Poster
from receiver.events.sqs import Sqs
from receiver.events.webhook import Webhook
from storage import circuit as circuits
from storage.circuit import Circuit
from storage.database.sessions import Database
from storage.fetch.addresses import AddressPolicy
from storage.rows import claims
from storage.rows.models import Dispatch, Event, Task
from storage.states import DispatchState
from tests.harness import wait_until
from tests.rows import LONG_AGO
from tests.sink_pairs import (
    CASES,
    ENVELOPE,
    RETRY_SECONDS,
    STEPS,
    Case,
    dispatches,
    endless,
    ids,
    messages,
    of,
    record_steps,
    run,
    signer,
    silent,
    webhook_case,
)


@pytest.fixture
def database_kind() -> str:
    """Claims and queues are tested on both databases in test_outbox."""
    return "sqlite"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with CASES[request.param](request) as made:
        yield made


# -- every kind -------------------------------------------------------------------------------------------------------


def test_every_event_arrives_under_its_own_id_and_per_task_in_order(database: Database, case: Case) -> None:
    tasks = [record_steps(database, case, *STEPS) for _ in range(3)]
    run(database, case)
    arrived = case.arrived()
    assert [of(arrived, task) for task in tasks] == [list(map(str, STEPS))] * 3
    assert {key: name for key, _, name in arrived} == ids(database, case)
    assert {row.state for row in dispatches(database)} == {DispatchState.DELIVERED}


def test_failed_event_is_retried_and_not_overtaken(database: Database, case: Case) -> None:
    task = record_steps(database, case, *STEPS)
    case.fail()
    run(database, case)
    first = dispatches(database)[0]
    assert (first.state, first.tries, first.error is None) == (DispatchState.DUE, 1, False)
    case.heal()
    run(database, case)
    assert case.arrived() == []
    run(database, case, make_due_now=True)
    arrived = case.arrived()
    assert of(arrived, task) == list(map(str, STEPS))
    assert {key: name for key, _, name in arrived} == ids(database, case)


def test_event_sent_but_not_settled_is_sent_again_under_the_same_id(database: Database, case: Case) -> None:
    """Like after a crash between sending and settling."""
    record_steps(database, case, STEPS[0])
    with database.read() as session:
        [event] = session.exec(select(Event).where(Event.name == STEPS[0]))
        subject = session.get_one(Task, event.task_id).external_task_id
    message = Message(event_id(event), event, subject, ENVELOPE.encode(event, subject))
    assert case.sink.send([message]) == [None]
    run(database, case)
    arrived = case.arrived()
    assert len(arrived) == 2
    assert len(set(arrived)) == 1


def test_event_is_dead_after_the_schedule_and_the_next_is_sent(database: Database, case: Case) -> None:
    record_steps(database, case, *STEPS[:2])
    case.fail()

    def is_dead() -> bool:
        run(database, case, make_due_now=True)
        return dispatches(database)[0].state is DispatchState.DEAD

    wait_until(is_dead)
    first, second = dispatches(database)
    assert first.tries == len(RETRY_SECONDS) + 1
    assert (second.state, second.due_at is None) == (DispatchState.DUE, False)


def test_check_of_a_sink_delivers_nothing(case: Case) -> None:
    assert case.sink.check()
    assert case.arrived() == []


@pytest.mark.parametrize("case", ["file", "sqs"], indirect=True)
def test_check_of_a_sink_predicts_a_sending(case: Case) -> None:
    case.fail()
    with pytest.raises(SinkUnavailable):
        case.sink.check()


# -- silent sinks -----------------------------------------------------------------------------------------------------


def test_silent_sink_is_waited_for_once_and_briefly() -> None:
    with silent() as host:
        policy = AddressPolicy(private_hosts=private_pairs((host,)))
        started = time.monotonic()
        with closing(Webhook(f"http://{host}/", Poster(policy, connections=1, timeout_seconds=0.3), signer())) as sink:
            outcomes = sink.send(messages(8))
        assert time.monotonic() - started < 10
    assert [type(outcome) for outcome in outcomes] == [SinkSilent, *[NotTried] * 7]


@pytest.mark.usefixtures("queues")
def test_a_silent_queue_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqs, "READ_SECONDS", 0.3)
    with silent() as host:
        with closing(Sqs(f"http://{host}/1/q")) as sink:
            outcomes = sink.send(messages(12))
    assert [type(outcome) for outcome in outcomes] == [*[SinkSilent] * 10, *[NotTried] * 2]


@pytest.mark.parametrize(("size", "seconds"), [(MAX_ANSWER_BYTES + 1, 60), (0, 2.5)], ids=["long", "silent"])
def test_an_answer_without_end_is_not_read(size: int, seconds: float) -> None:
    """The first 4 KiB show no more than the status."""
    started = time.monotonic()
    with endless(size) as host:
        policy = AddressPolicy(private_hosts=private_pairs((host,)))
        poster = Poster(policy, connections=1, timeout_seconds=seconds)
        with closing(Webhook(f"http://{host}/", poster, signer())) as sink:
            assert sink.send(messages(1)) == [None]
    assert time.monotonic() - started < 30


def test_sink_outage_causes_few_tries_and_loses_no_event(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuits, "FIRST_PAUSE_SECONDS", 30)  # the circuit grants no trial meanwhile
    with webhook_case(None) as case:
        for _ in range(12):
            record_steps(database, case, STEPS[0])
        case.fail()
        circuit = Circuit()
        run(database, case, circuit=circuit)
        assert sum(row.tries for row in dispatches(database)) <= 8  # one batch, which opened the circuit
        run(database, case, make_due_now=True, circuit=circuit)
        case.heal()
        run(database, case, make_due_now=True)
        assert len(case.arrived()) == 12


# -- promises that all share ------------------------------------------------------------------------------------------


def test_dispatch_that_ends_its_workers_is_parked(database: Database) -> None:
    with webhook_case(None) as case:
        record_steps(database, case, *STEPS[:2])
        with database.write() as session:
            session.execute(update(Dispatch).where(col(Dispatch.id) == 1).values(losses=claims.PARK_LOSSES))
            [row] = claims.claim(session, Dispatch, limit=1, lease_seconds=60, alone=True)
        Dispatcher(database, "it", case.sink, ENVELOPE, retry_seconds=RETRY_SECONDS).work(row)
        run(database, case)
        assert [name for _, _, name in case.arrived()] == [STEPS[1]]
    assert "ended its worker" in str(dispatches(database)[0].error)


def test_event_ids_are_unique() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    one, same, later = (Event(id=1, name="task.failed", at=moment) for moment in (at, at, LONG_AGO))
    assert event_id(one) == event_id(same) != event_id(later)
