"""Worker processes that share their imports: one process imports everything once, and forks them.

    receiver serve ──starts and monitors──▶ supervisor ──forks, restarts──▶ workers

A worker with a start of its own took 1.9 s of CPU and 98 MB of memory. A forked one takes 0.3 s and 51 MB. The
supervisor has no thread, and makes no connection, client or engine that its children would share. It passes no settings
on: each worker starts like `receiver work` and reads its own.

The supervisor ends when its parent does, and a worker ends when the supervisor does, however that happened. Each sees
the end of a pipe that the other holds open.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import structlog

from storage.errors import UserError

log = structlog.get_logger()

# The restart delay of a worker that dies soon after its start: 1, 2, 4 … 30 s. A worker that lived longer than this
# starts again with the first delay. A worker that is killed once a minute is no crash loop: with 60 s here it was down
# up to 30 s each time.
RESTART_FIRST_SECONDS, RESTART_CAP_SECONDS = 1.0, 30.0
LIVED_SECONDS = 10.0
# Ctrl-C and systemd signal the whole group, so a child may end before our own handler has run.
SIGNAL_SECONDS = 0.2
# Beyond its grace time a worker gets this long to hand back its rows before it is killed.
KILL_AFTER_SECONDS = 5.0
# The supervisor gets longer, because it kills the workers.
SUPERVISOR_KILL_AFTER_SECONDS = 10.0
ENDING = (signal.SIGTERM, signal.SIGINT)


class SupervisorEnded(UserError):
    """The supervisor of the workers ended without a signal."""


@dataclass
class _Child:
    """One of the workers. `process_id` None: it has ended, and the next one starts at `starts_at` (monotonic)."""

    number: int
    process_id: int | None = None
    started_at: float = 0.0
    starts_at: float = 0.0
    delay: float = RESTART_FIRST_SECONDS


class Supervisor:
    """Keeps `count` forked worker processes alive. A dead one is started again with backoff."""

    def __init__(self, count: int, *, grace_seconds: float) -> None:
        self._children = [_Child(number, delay=RESTART_FIRST_SECONDS) for number in range(count)]
        self._grace_seconds = grace_seconds
        self._is_ending = False
        self._alive, self._held_open = os.pipe()  # workers read its end when this process has ended
        self._woken, self._wakes = os.pipe()  # receives a byte at each signal

    def run(self) -> bool:
        """Supervise until SIGTERM, SIGINT or the end of standard input, which the parent holds open.

        Returns False when all workers have ended. Returns True in each worker: its caller continues as `receiver work`,
        and its standard input ends when the supervisor does.
        """
        self._listen_to_signals()
        while not self._is_ending:
            if any(self._is_started_worker(child) for child in self._children if self._is_due(child)):
                return True
            readable, _, _ = select.select([self._woken, 0], [], [], self._pause())
            self._is_ending |= 0 in readable and not os.read(0, 1024)
            self._reap()
        self._stop()
        return False

    def _listen_to_signals(self) -> None:
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wakes, False)
        signal.set_wakeup_fd(self._wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes this process
        for number in ENDING:
            signal.signal(number, self._end)

    def _end(self, *_: object) -> None:
        self._is_ending = True

    @staticmethod
    def _is_due(child: _Child) -> bool:
        return child.process_id is None and child.starts_at <= time.monotonic()

    def _pause(self) -> float | None:
        """Seconds until a worker is due; None: all run."""
        due = [child.starts_at for child in self._children if child.process_id is None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _is_started_worker(self, child: _Child) -> bool:
        """Fork a worker. Returns whether this process is it."""
        child.started_at = time.monotonic()
        signals = (*ENDING, signal.SIGCHLD)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # blocked, so that no signal meets our handlers in the child
        try:
            child.process_id = os.fork()
            if not child.process_id:
                self._become_worker()
        except OSError as error:  # for example for lack of memory
            self._note_end(child, f"not started: {error.strerror}")
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return child.process_id == 0

    def _become_worker(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor ends the worker
        os.dup2(self._alive, 0)
        for descriptor in (self._alive, self._held_open, self._woken, self._wakes):
            os.close(descriptor)

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._woken, 1024)
        ended = [(child, code) for child in self._living() if (code := _exit_code(child.process_id)) is not None]
        if ended and not self._is_ending:
            time.sleep(SIGNAL_SECONDS)
        for child, code in ended:
            child.process_id = None
            self._note_end(child, code)

    def _living(self) -> list[_Child]:
        return [child for child in self._children if child.process_id is not None]

    def _note_end(self, child: _Child, code: int | str) -> None:
        """Note the end of a worker. `code`: its exit code, or the reason why it could not be started. A worker that got
        an ending signal has not died.
        """
        if self._is_ending:
            return
        if time.monotonic() - child.started_at > LIVED_SECONDS:
            child.delay = RESTART_FIRST_SECONDS
        if code == 0:  # another program sent it a SIGTERM
            log.info("worker.ended", number=child.number, restart_in=child.delay)
        else:
            log.error("worker.died", number=child.number, code=code, restart_in=child.delay)
        child.starts_at = time.monotonic() + child.delay
        child.delay = min(child.delay * 2, RESTART_CAP_SECONDS)

    def _stop(self) -> None:
        """Drain all workers. Those that exceed the grace time are killed, and their leases expire. None is left."""
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + self._grace_seconds + KILL_AFTER_SECONDS
        while self._living() and (left := deadline - time.monotonic()) > 0:
            select.select([self._woken], [], [], left)
            self._reap()
        self._send(signal.SIGKILL)
        while self._living():
            select.select([self._woken], [], [], SIGNAL_SECONDS)
            self._reap()

    def _send(self, number: signal.Signals) -> None:
        for child in self._living():
            assert child.process_id is not None
            os.kill(child.process_id, number)  # the process id stays valid until the child is reaped


def _exit_code(process_id: int | None) -> int | None:
    """The exit code of a child, or the negative signal that ended it. None: it lives."""
    assert process_id is not None
    ended, status = os.waitpid(process_id, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


class SupervisorProcess:
    """The supervisor as `receiver serve` sees it: a separate process that ends with this one, however this one ends."""

    def __init__(self, *, grace_seconds: float, environment: Mapping[str, str]) -> None:
        self._grace_seconds = grace_seconds
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None
        # Set by a signal's handler. An Event's lock could be held by the interrupted thread itself.
        self._is_ending = False
        self._gone: str | None = None

    def start(self, on_gone: Callable[[], object]) -> None:
        """Start it. `on_gone`: called when it has ended or could not be started; `raise_if_ended` gives the reason."""
        try:
            # -P: a storage.py of the current folder is not ours. `python -m receiver` may run from a folder of source.
            safe = [] if sys.modules["__main__"].__spec__ else ["-P"]
            command = [sys.executable, *safe, "-m", "receiver", "work", "--supervised"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=self._environment)  # noqa: S603 - our own words
        except OSError as error:
            self._gone = f"could not be started: {error.strerror}"
            on_gone()
        else:
            threading.Thread(target=self._await_end, args=(self._process, on_gone), daemon=True).start()

    def _await_end(self, process: subprocess.Popen[bytes], on_gone: Callable[[], object]) -> None:
        code = process.wait()
        time.sleep(SIGNAL_SECONDS)
        if not self._is_ending:
            self._gone = f"has ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
            on_gone()

    def announce_end(self) -> None:
        """Note that this process got an ending signal. The supervisor may have got it too, so its end is no fault from
        now on.
        """
        self._is_ending = True

    def stop(self) -> None:
        """Stop it and its workers. None is left, unless it was killed: then they drain by themselves."""
        self._is_ending = True
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(self._grace_seconds + SUPERVISOR_KILL_AFTER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def raise_if_ended(self) -> None:
        """Raises `SupervisorEnded`."""
        if self._gone is not None:
            raise SupervisorEnded(
                f"the supervisor of the workers {self._gone}; nothing would be archived, so this process ends"
            )
