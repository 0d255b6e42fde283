"""The circuit opens after failures in a row, lets one trial through per pause, and closes by itself."""

from __future__ import annotations

from storage.circuit import FAILURES, FIRST_PAUSE_SECONDS, PAUSE_CAP_SECONDS, Circuit


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


def test_the_pause_grows_to_its_cap() -> None:
    clock = Clock()
    circuit = opened(clock)
    for _ in range(20):
        circuit.failed()
    clock.seconds += PAUSE_CAP_SECONDS - 0.001
    assert circuit.allowance(1) == 0
    clock.seconds += 0.001
    assert circuit.allowance(1) == 1
