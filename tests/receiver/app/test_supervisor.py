"""The supervisor keeps its workers alive, also those that cannot even be started."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from receiver.app import process
from receiver.app.process import Supervisor
from tests.harness import wait_until


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Makes a worker of a shell's words, which are run when it is told to end. Returns where each leaves its id."""
    program, signs = tmp_path / "python", tmp_path / "signs"

    signs.mkdir()

    def make(at_the_end: str) -> Path:
        program.write_text(f"#!/bin/sh\ntrap '{at_the_end}' TERM\ntouch {signs}/$$\nwhile :; do sleep 0.05; done\n")
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))
        return signs

    yield make
    for process_id in living(signs):
        os.kill(process_id, signal.SIGKILL)


def living(signs: Path) -> list[int]:
    return [int(sign.name) for sign in signs.iterdir() if is_alive(int(sign.name))]


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_that_start_while_it_stops_are_awaited_too(workers: Callable[[str], Path]) -> None:
    signs = workers("sleep 0.3; exit")
    supervisor = Supervisor(24, grace_seconds=20)
    supervisor.start()
    wait_until(lambda: any(signs.iterdir()))
    supervisor.stop()
    assert living(signs) == []


def test_a_worker_that_outlives_its_grace_is_killed(
    workers: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "KILL_AFTER_SECONDS", 0.2)
    signs = workers("")
    supervisor = Supervisor(2, grace_seconds=0.2)
    supervisor.start()
    wait_until(lambda: len(living(signs)) == 2)
    supervisor.stop()
    assert living(signs) == []


def test_a_worker_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the kernel killed one for want of memory, and has none for the next either."""
    program, sign = tmp_path / "python", tmp_path / "started"
    monkeypatch.setattr(process, "RESTART_FIRST_SECONDS", 0.05)
    monkeypatch.setattr(sys, "executable", str(program))
    supervisor = Supervisor(1, grace_seconds=1)
    with capture_logs() as logs:
        supervisor.start()
        wait_until(lambda: logs)
        program.write_text(f"#!/bin/sh\ntouch {sign}\n")
        program.chmod(0o700)
        wait_until(sign.exists)
        supervisor.stop()
    assert (logs[0]["event"], logs[0]["code"]) == ("worker.died", "not started: No such file or directory")


def test_worker_that_is_killed_now_and_then_is_no_crash_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives longer than the limit each time, and is started again after the first pause each time."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nsleep 0.3\nexit 9\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(process, "RESTART_FIRST_SECONDS", 0.05)
    monkeypatch.setattr(process, "LIVED_SECONDS", process.LIVED_SECONDS / 50)
    supervisor = Supervisor(1, grace_seconds=1)
    with capture_logs() as logs:
        supervisor.start()
        wait_until(lambda: len(logs) >= 4)
        supervisor.stop()
    assert [each["restart_in"] for each in logs[:4]] == [0.05] * 4
