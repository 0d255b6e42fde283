"""The supervisor of `receiver serve` in the tests, forked before that starts: saves 1.2 s of CPU a start.

A process that is about to become `receiver serve` forks a second one, which waits. The second one becomes
`receiver work --supervised` when the first would start that afresh. It has the environment, the process group, the
standard input and the parent that it would have then.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import SimpleNamespace

from receiver.workers import supervisor

COMMAND = [sys.executable, "-m", "receiver", "work", "--supervised"]


class Waiting(subprocess.Popen[bytes]):
    """The forked process, which ends when its parent does. `stdin` is the other end of its standard input."""

    def __init__(self) -> None:
        read, write = os.pipe()
        self._forked = os.fork()
        if not self._forked:
            os.close(write)
            _become_supervisor(read)
        os.close(read)
        super().__init__(COMMAND)
        self.stdin = open(write, "wb", buffering=0)  # noqa: SIM115 - the supervisor ends when it is closed

    def _execute_child(self, *_: object) -> None:
        """In place of the method that starts a process."""
        self.pid, self._child_created = self._forked, True

    def start(self, command: list[str], *, stdin: int, env: Mapping[str, str]) -> Waiting:
        """In place of `subprocess.Popen`."""
        assert ([word for word in command if word != "-P"], stdin) == (COMMAND, subprocess.PIPE)
        assert self.stdin is not None
        self.stdin.write(json.dumps(dict(env)).encode() + b"\n")
        return self


def prepare() -> None:
    """Fork the process that the only start of a supervisor in this process gets."""
    names = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired, "Popen": Waiting().start}
    supervisor.subprocess = SimpleNamespace(**names)  # type: ignore[assignment]


def _become_supervisor(read: int) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # a signal to the group is for `receiver serve`
        signal.signal(number, signal.SIG_IGN)
    given = b""
    while not given.endswith(b"\n"):
        if not (part := os.read(read, 65_536)):  # `receiver serve` has ended
            os._exit(0)
        given += part
    os.dup2(read, 0)
    os.close(read)
    os.environ.clear()
    os.environ.update(json.loads(given))
    sys.argv = COMMAND[2:]
    runpy.run_module("receiver", run_name="__main__", alter_sys=True)
