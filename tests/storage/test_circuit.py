"""The circuit opens after failures in a row, lets one trial through per pause, and closes by itself."""

from __future__ import annotations

from typing import Any

import pytest
from sqlmodel import func, select

from receiver.app.wiring import Parts
from receiver.app.worker import Lane, Worker
from receiver.events import sqs
from receiver.sandbox import Sandbox
from storage.circuit import DOUBT_SECONDS, FAILURES, FIRST_PAUSE_SECONDS, PAUSE_CAP_SECONDS, Circuit
from storage.errors import FetchExpired, LostClaim, ObjectConflict, ObjectForbidden, ObjectRefused, StoreUnavailable
from storage.rows import claims
from storage.rows.database import Database
from storage.rows.models import Asset, Task
from storage.states import DispatchState, TaskState
from tests import sink_pairs
from tests.pipeline import insert_row, make_due_now, run
from tests.rows import LONG_AGO, new_assets, new_task

PLAIN = {"model_name": "kling-image-o1", "prompt": "a boat"}
TASKS = 6
ONE_DATABASE = pytest.mark.parametrize("database_kind", ["sqlite"])  # rows play no part: a circuit is a process's own


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def opened(clock: Clock) -> Circuit:
    circuit = Circuit(clock)
    for _ in range(FAILURES):
        circuit.failed()
    return circuit


def test_few_failures_change_nothing() -> None:
    circuit = Circuit(Clock())
    for _ in range(FAILURES - 1):
        circuit.failed()
    assert circuit.grant(8).count == 8


def test_an_open_circuit_lets_one_trial_through_per_pause() -> None:
    clock = Clock()
    circuit = opened(clock)
    assert circuit.grant(8).count == 0
    clock.seconds += FIRST_PAUSE_SECONDS
    assert (circuit.grant(8).count, circuit.grant(8).count) == (1, 0)


def test_a_good_trial_closes_it() -> None:
    clock = Clock()
    circuit = opened(clock)
    circuit.succeeded()
    assert circuit.grant(8).count == 8


def test_the_pause_grows_to_its_cap_trial_by_trial() -> None:
    clock = Clock()
    circuit = opened(clock)
    for _ in range(20):
        clock.seconds += PAUSE_CAP_SECONDS
        assert circuit.grant(1).count == 1
        circuit.failed()
    clock.seconds += PAUSE_CAP_SECONDS - 0.001
    assert circuit.grant(1).count == 0
    clock.seconds += 0.001
    assert circuit.grant(1).count == 1


def test_what_was_under_way_when_it_opened_does_not_lengthen_the_pause() -> None:
    clock = Clock()
    circuit = opened(clock)
    for _ in range(20):
        circuit.failed()
    clock.seconds += FIRST_PAUSE_SECONDS
    assert circuit.grant(1).count == 1


def watch(circuit: Circuit, *errors: type[Exception]) -> None:
    for error in errors:
        with pytest.raises(error), circuit.watching(StoreUnavailable, ObjectConflict):
            raise error("no")


def test_an_answer_ends_the_row_of_failures_and_what_never_reached_the_store_does_not() -> None:
    outages = [StoreUnavailable] * (FAILURES - 1)
    circuit = Circuit(Clock())
    watch(circuit, *outages, ObjectConflict, *outages)
    assert not circuit.is_open
    watch(circuit, FetchExpired, LostClaim, StoreUnavailable)
    assert circuit.is_open


def test_a_trial_of_which_nothing_is_told_is_given_back() -> None:
    clock = Clock()
    circuit = opened(clock)
    clock.seconds += FIRST_PAUSE_SECONDS
    for _ in range(3):
        with circuit.grant(8) as trial:
            assert (trial.count, circuit.grant(8).count) == (1, 0)
    with circuit.grant(8):
        circuit.failed()
    assert circuit.grant(8).count == 0
    clock.seconds += 2 * FIRST_PAUSE_SECONDS
    with circuit.grant(8):
        circuit.succeeded()
    assert circuit.grant(8).count == 8


def test_a_trial_that_hangs_holds_up_no_other_and_gives_back_none_but_itself() -> None:
    clock = Clock()
    circuit = opened(clock)
    clock.seconds += FIRST_PAUSE_SECONDS
    hanging = circuit.grant(1)
    clock.seconds += FIRST_PAUSE_SECONDS
    with circuit.grant(1) as other:
        assert other.count == 1
        assert not hanging.give_back()
        assert circuit.grant(1).count == 0


def test_what_may_be_one_requests_own_counts_when_nothing_goes_well() -> None:
    clock = Clock()
    circuit = Circuit(clock)
    circuit.succeeded()
    watch(circuit, *[ObjectForbidden, ObjectRefused] * FAILURES)
    assert not circuit.is_open
    clock.seconds += DOUBT_SECONDS
    watch(circuit, *[ObjectForbidden] * FAILURES)
    assert circuit.is_open


# -- a lane's ---------------------------------------------------------------------------------------------------------


def worker(database: Database, circuit: Circuit) -> Worker:
    """Of one lane whose work ends before it reaches the store."""

    def work(row: Any) -> None:
        with database.write() as session:
            claims.settle(session, row, due_in=None)

    lane = Lane("assets", Asset, work, 1, circuit=circuit)
    return Worker(database, [lane], lease_seconds=60, grace_seconds=0)


def test_rows_that_never_reach_the_store_are_no_trials(database: Database) -> None:
    clock = Clock()
    circuit = opened(clock)
    new_assets(database, TASKS)
    assert worker(database, circuit).run_until_idle() == 0
    clock.seconds += FIRST_PAUSE_SECONDS
    assert worker(database, circuit).run_until_idle() == TASKS
    assert circuit.is_open


def test_a_claim_that_finds_nothing_is_no_trial(database: Database) -> None:
    clock = Clock()
    circuit = opened(clock)
    new_assets(database, 1, losses=claims.QUARANTINE_AFTER)  # due, and not for everybody
    clock.seconds += FIRST_PAUSE_SECONDS
    assert worker(database, circuit).run_until_idle() == 0
    assert circuit.grant(1).count == 1


# -- a sink's ---------------------------------------------------------------------------------------------------------


@ONE_DATABASE
def test_a_message_that_is_refused_before_it_is_sent_is_no_trial(
    database: Database, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqs, "MAX_BYTES", 1)
    clock = Clock()
    circuit = opened(clock)
    clock.seconds += FIRST_PAUSE_SECONDS
    with sink_pairs.sqs_case(request) as case:
        sink_pairs.tell(database, case, sink_pairs.STEPS[0])
        sink_pairs.run(database, case, circuit=circuit)
    assert [row.state for row in sink_pairs.dispatches(database)] == [DispatchState.DEAD]
    assert (circuit.is_open, circuit.grant(1).count) == (True, 1)


# -- the provider's own -----------------------------------------------------------------------------------------------


def unsent(parts: Parts) -> None:
    """Tasks that wait for their create."""
    with parts.database.write() as session:
        for _ in range(TASKS):
            new_task(session, request=PLAIN)


def submitted(parts: Parts) -> int:
    with parts.database.read() as session:
        return session.exec(select(func.count()).where(Task.state != TaskState.CREATED)).one()


@pytest.fixture
def clock(parts: Parts) -> Clock:
    """What the provider's circuit goes by; it stands still by itself."""
    made = Clock()
    parts.__dict__["provider_circuit"] = Circuit(made)  # where the cached property keeps it
    return made


@ONE_DATABASE
def test_a_provider_that_fails_is_asked_little_and_the_creates_resume(
    parts: Parts, sandbox: Sandbox, clock: Clock
) -> None:
    unsent(parts)
    sandbox.set(create_faults=["5002"] * 100)
    assert (run(parts, "creates"), run(parts, "creates")) == (FAILURES, 0)
    clock.seconds += FIRST_PAUSE_SECONDS
    assert (run(parts, "creates"), run(parts, "creates")) == (1, 0)  # the trial
    assert sandbox.ledger().counts["fault:create:5002"] == FAILURES + 1
    sandbox.set(create_faults=[])
    clock.seconds += PAUSE_CAP_SECONDS
    assert run(parts, "creates") >= TASKS - FAILURES - 1
    assert submitted(parts) >= TASKS - FAILURES - 1


@ONE_DATABASE
def test_a_provider_that_fails_is_asked_little_and_the_reads_resume(
    parts: Parts, sandbox: Sandbox, clock: Clock
) -> None:
    for _ in range(TASKS):
        insert_row(parts, due_at=LONG_AGO)
    sandbox.set(query_faults=["5001"] * 100)
    for _ in range(FAILURES):  # one call a batch: the rest of it is not tried
        run(parts, "reads")
        make_due_now(parts, Task)
    assert (run(parts, "reads"), run(parts, "unmatched")) == (0, 0)
    assert sandbox.ledger().counts["fault:query:5001"] == FAILURES
    sandbox.set(query_faults=[])
    clock.seconds += FIRST_PAUSE_SECONDS
    assert run(parts, "reads") > 1


@ONE_DATABASE
@pytest.mark.parametrize("fault", ["1303", "1201"])
def test_throttled_or_refused_is_an_answer(parts: Parts, sandbox: Sandbox, fault: str) -> None:
    unsent(parts)
    sandbox.set(create_faults=[fault] * TASKS)
    assert run(parts, "creates") == TASKS
