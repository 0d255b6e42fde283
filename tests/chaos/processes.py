"""Our programs, started again whenever they end, like by a host's supervisor."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.plan import WEB_KILLED, WORKER_KILLED
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 60.0  # 2 s on an idle machine
RESTART_SECONDS = 0.2
STOP_SECONDS = 15.0
MARKS = {WORKER_KILLED: b'"worker.started"', WEB_KILLED: b'"web.started"'}


class Kept:
    """One program. `kind`: the fault that a kill of it counts as; `exits`: how it ended when it was not killed."""

    def __init__(self, kind: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
        self.kind = kind
        self.log = folder / f"{'-'.join(arguments)}-{id(self)}.log"
        self.exits: Counter[int] = Counter()
        self._arguments = tuple(arguments)
        self._environment = environment
        self._folder = folder
        self._process: Forked | None = None
        self._log_start = 0
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # one fault at a time
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self._log_start = self.log.stat().st_size if self.log.exists() else 0
            self._process = Forked(self._arguments, self._environment, self._folder, out=self.log)
            code = self._process.wait()
            if code != -signal.SIGKILL and not self._stopping.is_set():
                self.exits[code] += 1
            self._stopping.wait(RESTART_SECONDS)

    @property
    def is_ready(self) -> bool:
        """Whether the running program has reported that it works."""
        if self._process is None or self._process.poll() is not None:
            return False
        if not self.log.exists():
            return False
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return MARKS[self.kind] in log.read()

    def wait_until_ready(self) -> bool:
        deadline = time.monotonic() + READY_SECONDS
        while not self.is_ready:
            if self._stopping.is_set() or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> bool:
        """`kill -9` once it works. Returns whether that was done."""
        with self._lock:
            return self.wait_until_ready() and self._signal(signal.SIGKILL)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[bool]:
        """Stop it with SIGSTOP, and continue it at the end. Yields whether that was done."""
        with self._lock:
            yield self.wait_until_ready() and self._signal(signal.SIGSTOP)
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> bool:
        process = self._process
        if process is None or process.poll() is not None:
            return False
        process.send_signal(number)
        return True

    def stop(self) -> None:
        """End it for good, in order if possible."""
        self._stopping.set()
        if not self._thread.ident:
            return
        deadline = time.monotonic() + STOP_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
            self._thread.join(1)
        self._signal(signal.SIGKILL)
        self._thread.join(5)

    def bugs(self) -> list[str]:
        """The lines of its log about unexpected errors."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [line for line in lines if '"worker.step_failed"' in line or '"exception"' in line]
