"""The supervisor keeps its workers alive, also those that cannot even be started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from receiver import process
from receiver.process import Supervisor
from tests.harness import wait_until


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
