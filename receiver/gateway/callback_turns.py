"""Turns of client callbacks: no host and no client uses more than its share of the threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from storage.circuit import PAUSE_CAP_SECONDS
from storage.http_date import MAX_RETRY_AFTER_SECONDS

# A host without an answer so far, or whose last answer took longer, gets one callback at a time.
QUICK_SECONDS = 1.0
FIRST_GUESS_SECONDS = 0.1
# Callbacks that wait for longer than this return one behind the other. A worker claims 80 a second: 20,000 to a host
# that was down, each of which returned after 30 s, kept every callback of other clients waiting for over four minutes.
LONG_SECONDS = PAUSE_CAP_SECONDS / 2
RETURNS_A_SECOND = 10
# Hosts and clients that are remembered. If a client invents more host names, only the speed of other hosts is
# forgotten.
MAX_LINES = 1_000


@dataclass
class _Line:
    """The calls to one host or of one client. `seconds`: the duration of the last. `free_at`: when the postponed ones
    are done. `back_at`: when the last of those with the longest wait returns.
    """

    calls: int = 0
    began_at: float = 0.0
    seconds: float | None = None
    free_at: float = 0.0
    back_at: float = 0.0

    @property
    def is_quick(self) -> bool:
        return self.seconds is not None and self.seconds < QUICK_SECONDS

    def begin(self, now: float) -> None:
        self.calls += 1
        self.began_at = now

    def end(self, now: float, seconds: float) -> None:
        self.calls -= 1
        self.seconds = seconds
        self.free_at = min(self.free_at, now + seconds)

    def put_off(self, now: float) -> float:
        """Seconds to wait. Each waits behind the one before it; if all returned at once, most would wait again."""
        step = max(self.seconds or FIRST_GUESS_SECONDS, now - self.began_at)
        self.free_at = min(max(self.free_at, now) + step, now + PAUSE_CAP_SECONDS)
        return self.free_at - now

    def put_off_longest(self, now: float) -> float:
        """Longer waits than an hour would count as set by a wrong clock (`receiver.workers.clock_steps`)."""
        behind = max(self.back_at, now + PAUSE_CAP_SECONDS) + 1 / RETURNS_A_SECOND
        self.back_at = min(behind, now + MAX_RETRY_AFTER_SECONDS)
        return self.back_at - now


class CallbackTurns:
    """Shares `threads` between hosts and clients. A slow host has one, a quick host and a client have half of them.

    Per process, in memory, thread-safe. `now`: monotonic seconds.
    """

    def __init__(self, threads: int, now: Callable[[], float] = time.monotonic) -> None:
        self._share = max(threads // 2, 1)
        self._now = now
        self._lock = threading.Lock()
        self._lines: dict[tuple[str, str], _Line] = {}

    def begin(self, host: str, client: str) -> float:
        """0: the call may start, and the caller calls `end` after it. Else the seconds after which to try again."""
        with self._lock:
            of_host, of_client = self._line("host", host), self._line("client", client)
            now = self._now()
            for line, share in ((of_host, self._share if of_host.is_quick else 1), (of_client, self._share)):
                if line.calls >= share:
                    wait = line.put_off(now)
                    return wait if wait < LONG_SECONDS else of_client.put_off_longest(now)
            of_host.begin(now)
            of_client.begin(now)
            return 0.0

    def end(self, host: str, client: str, seconds: float) -> None:
        """Note the end of a call and its duration."""
        with self._lock:
            for line in (self._line("host", host), self._line("client", client)):
                line.end(self._now(), seconds)

    def put_off_longest(self, client: str) -> float:
        """Seconds until a callback of this client, to a host that is down, is to be tried again.

        Those to its slow hosts do not wait behind it.
        """
        with self._lock:
            return self._line("down", client).put_off_longest(self._now())

    def _line(self, kind: str, name: str) -> _Line:
        while (kind, name) not in self._lines and len(self._lines) >= MAX_LINES:
            self._lines.pop(next(key for key, line in self._lines.items() if not line.calls))
        return self._lines.setdefault((kind, name), _Line())
