"""The circuit breaker opens after failures in a row, grants one trial per pause, and closes after a success."""

from __future__ import annotations

from typing import Any

import pytest
from sqlmodel import func, select

from receiver.app.wiring import Parts
from receiver.events import sqs
from receiver.sandbox import Sandbox
from receiver.workers.lanes import Lane
from receiver.workers.worker import Worker
from storage.circuit import DOUBT_SECONDS, FAILURES, FIRST_PAUSE_SECONDS, PAUSE_CAP_SECONDS, Circuit
from storage.database.sessions import Database
from storage.errors import FetchExpired, LostClaim, ObjectConflict, ObjectForbidden, ObjectRefused, StoreUnavailable
from storage.rows import claims
from storage.rows.models import Asset, Task
from storage.states import DispatchState, TaskState
from tests import sink_pairs
from tests.pipeline import insert_row, make_due_now, run
from tests.rows import LONG_AGO, new_assets, new_task

PLAIN = {"model_name": "kling-image-o1", "prompt": "a boat"}
TASKS = 6
ONE_DATABASE = pytest.mark.parametrize("database_kind", ["sqlite"])  # a circuit is in memory


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


def test_circuit_stays_closed_below_three_failures() -> None:
    circuit = Circuit(Clock())
    for _ in range(FAILURES - 1):
        circuit.failed()
    assert circuit.grant(8).count == 8


def test_open_circuit_grants_one_trial_per_pause() -> None:
    clock = Clock()
    circuit = opened(clock)
    assert circuit.grant(8).count == 0
    clock.seconds += FIRST_PAUSE_SECONDS
    assert (circuit.grant(8).count, circuit.grant(8).count) == (1, 0)


def test_successful_trial_closes_the_circuit() -> None:
    clock = Clock()
    circuit = opened(clock)
    circuit.succeeded()
    assert circuit.grant(8).count == 8


def test_pause_doubles_with_each_failed_trial_up_to_its_cap() -> None:
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


def test_failures_of_earlier_tries_do_not_lengthen_the_pause() -> None:
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


def test_answer_resets_the_failures_and_an_unsent_request_does_not() -> None:
    outages = [StoreUnavailable] * (FAILURES - 1)
    circuit = Circuit(Clock())
    watch(circuit, *outages, ObjectConflict, *outages)
    assert not circuit.is_open
    watch(circuit, FetchExpired, LostClaim, StoreUnavailable)
    assert circuit.is_open


def test_trial_without_a_result_is_given_back() -> None:
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


def test_hanging_trial_does_not_hold_up_or_give_back_another() -> None:
    clock = Clock()
    circuit = opened(clock)
    clock.seconds += FIRST_PAUSE_SECONDS
    hanging = circuit.grant(1)
    clock.seconds += FIRST_PAUSE_SECONDS
    with circuit.grant(1) as other:
        assert other.count == 1
        assert not hanging.give_back()
        assert circuit.grant(1).count == 0


def test_doubtful_failures_count_only_without_successes() -> None:
    clock = Clock()
    circuit = Circuit(clock)
    circuit.succeeded()
    watch(circuit, *[ObjectForbidden, ObjectRefused] * FAILURES)
    assert not circuit.is_open
    clock.seconds += DOUBT_SECONDS
    watch(circuit, *[ObjectForbidden] * FAILURES)
    assert circuit.is_open


# -- circuits of lanes ------------------------------------------------------------------------------------------------


def worker(database: Database, circuit: Circuit) -> Worker:
    """A worker of one lane whose work ends before it reaches the store."""

    def work(row: Any) -> None:
        with database.write() as session:
            claims.settle(session, row, due_in=None)

    lane = Lane("assets", Asset, work, 1, circuit=circuit)
    return Worker(database, [lane], lease_seconds=60, grace_seconds=0)


def test_row_that_never_reaches_the_store_is_not_a_trial(database: Database) -> None:
    clock = Clock()
    circuit = opened(clock)
    new_assets(database, TASKS)
    assert worker(database, circuit).run_until_idle() == 0
    clock.seconds += FIRST_PAUSE_SECONDS
    assert worker(database, circuit).run_until_idle() == TASKS
    assert circuit.is_open


def test_empty_claim_does_not_count_as_a_trial(database: Database) -> None:
    clock = Clock()
    circuit = opened(clock)
    new_assets(database, 1, losses=claims.QUARANTINE_AFTER)  # due, but quarantined
    clock.seconds += FIRST_PAUSE_SECONDS
    assert worker(database, circuit).run_until_idle() == 0
    assert circuit.grant(1).count == 1


# -- circuits of sinks ------------------------------------------------------------------------------------------------


@ONE_DATABASE
def test_message_refused_before_sending_is_not_a_trial(
    database: Database, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqs, "MAX_BYTES", 1)
    clock = Clock()
    circuit = opened(clock)
    clock.seconds += FIRST_PAUSE_SECONDS
    with sink_pairs.sqs_case(request) as case:
        sink_pairs.record_steps(database, case, sink_pairs.STEPS[0])
        sink_pairs.run(database, case, circuit=circuit)
    assert [row.state for row in sink_pairs.dispatches(database)] == [DispatchState.DEAD]
    assert (circuit.is_open, circuit.grant(1).count) == (True, 1)


# -- the circuit of the provider --------------------------------------------------------------------------------------


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
    """The clock of the provider's circuit. Only tests advance it."""
    made = Clock()
    parts.__dict__["provider_circuit"] = Circuit(made)  # the place of the cached property
    return made


@ONE_DATABASE
def test_creates_pause_while_the_provider_fails_and_resume(parts: Parts, sandbox: Sandbox, clock: Clock) -> None:
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
def test_reads_pause_while_the_provider_fails_and_resume(parts: Parts, sandbox: Sandbox, clock: Clock) -> None:
    for _ in range(TASKS):
        insert_row(parts, due_at=LONG_AGO)
    sandbox.set(query_faults=["5001"] * 100)
    for _ in range(FAILURES):  # one call per batch; the rest of a batch is not tried
        run(parts, "reads")
        make_due_now(parts, Task)
    assert (run(parts, "reads"), run(parts, "unmatched")) == (0, 0)
    assert sandbox.ledger().counts["fault:query:5001"] == FAILURES
    sandbox.set(query_faults=[])
    clock.seconds += FIRST_PAUSE_SECONDS
    assert run(parts, "reads") > 1


@ONE_DATABASE
@pytest.mark.parametrize("fault", ["1303", "1201"])
def test_throttling_and_refusal_keep_the_circuit_closed(parts: Parts, sandbox: Sandbox, fault: str) -> None:
    unsent(parts)
    sandbox.set(create_faults=[fault] * TASKS)
    assert run(parts, "creates") >= TASKS  # on a busy machine the first are due again meanwhile
