"""The minimum speed of a reader of an answer. A reader that falls too far behind it is disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# 256 kbit/s. The kernel buffers up to 2.8 MB and takes more once a third is free, so a reader at this speed makes
# progress in steps of 29 s.
LEAST_BYTES_PER_SECOND = 32_000
# The most that a reader may be behind. nginx's `send_timeout`, without any progress, is as long.
GRACE_SECONDS = 60.0
# The most that a fast reader may be ahead, so that bytes which it read before it stopped do not count much later.
SAMPLE_SECONDS = 5.0


class ReaderSpeed:
    """How far the reader of a connection's answer is behind. Time counts while bytes wait for it, so an idle stream is
    not slow.

    `on_slow` is called once the reader is over GRACE_SECONDS behind.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, on_slow: Callable[[], None]):
        self._loop = loop
        self._transport = transport
        self._on_slow = on_slow
        self._behind_seconds = 0.0
        self._at = 0.0
        self._left = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Bytes wait from now on."""
        self.stop()
        self._at, self._left = self._loop.time(), self._transport.get_write_buffer_size()
        self._wait()

    def stop(self) -> None:
        """No bytes wait any more, or the connection is lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._measure()

    def close(self) -> None:
        """The connection is lost. Its owner is no longer referenced."""
        self.stop()
        self._on_slow = _nothing

    def _wait(self) -> None:
        seconds = min(SAMPLE_SECONDS, GRACE_SECONDS - self._behind_seconds)
        self._timer = self._loop.call_later(max(seconds, 0), self._check)

    def _check(self) -> None:
        self._measure()
        if self._behind_seconds < GRACE_SECONDS:
            self._wait()
        else:
            self._timer = None
            self._on_slow()

    def _measure(self) -> None:
        now, left = self._loop.time(), self._transport.get_write_buffer_size()
        lag = now - self._at - (self._left - left) / LEAST_BYTES_PER_SECOND
        self._behind_seconds = max(0.0, self._behind_seconds + lag)
        self._at, self._left = now, left


def _nothing() -> None:
    pass
