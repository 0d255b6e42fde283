"""The circuit opens after failures in a row, lets one trial through per pause, and closes by itself."""

from __future__ import annotations

import pytest
from sqlmodel import func, select

from receiver.sandbox import Sandbox
from receiver.wiring import Parts
from storage.circuit import FAILURES, FIRST_PAUSE_SECONDS, PAUSE_CAP_SECONDS, Circuit
from storage.models import Task
from storage.states import TaskState
from tests.pipeline import hurry, plant, run
from tests.rows import LONG_AGO, new_task

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
    assert circuit.allowance(8) == 8


def test_an_open_circuit_lets_one_trial_through_per_pause() -> None:
    clock = Clock()
    circuit = opened(clock)
    assert circuit.allowance(8) == 0
    clock.seconds += FIRST_PAUSE_SECONDS
    assert (circuit.allowance(8), circuit.allowance(8)) == (1, 0)


def test_a_good_trial_closes_it() -> None:
    clock = Clock()
    circuit = opened(clock)
    circuit.succeeded()
    assert circuit.allowance(8) == 8


def test_the_pause_grows_to_its_cap_trial_by_trial() -> None:
    clock = Clock()
    circuit = opened(clock)
    for _ in range(20):
        clock.seconds += PAUSE_CAP_SECONDS
        assert circuit.allowance(1) == 1
        circuit.failed()
    clock.seconds += PAUSE_CAP_SECONDS - 0.001
    assert circuit.allowance(1) == 0
    clock.seconds += 0.001
    assert circuit.allowance(1) == 1


def test_what_was_under_way_when_it_opened_does_not_lengthen_the_pause() -> None:
    clock = Clock()
    circuit = opened(clock)
    for _ in range(20):
        circuit.failed()
    clock.seconds += FIRST_PAUSE_SECONDS
    assert circuit.allowance(1) == 1


def test_only_an_outage_counts_as_a_failure() -> None:
    circuit = Circuit(Clock())
    for error in [*[ConnectionError] * (FAILURES - 1), LookupError, *[ConnectionError] * (FAILURES - 1)]:
        with pytest.raises(error), circuit.watching(ConnectionError):
            raise error
    assert not circuit.is_open


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
        plant(parts, due_at=LONG_AGO)
    sandbox.set(query_faults=["5001"] * 100)
    for _ in range(FAILURES):  # one call a batch: the rest of it is not tried
        run(parts, "reads")
        hurry(parts, Task)
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
