"""One connection, and the time that it may take.

The socket never blocks: a read or a write is tried first, and waits only if there is nothing. CPython's own timeouts
make three system calls of each read or write, and at each of them another thread may take the interpreter lock.
"""

from __future__ import annotations

import math
import re
import select
import socket
import ssl
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import httpcore

from storage.errors import FetchInterrupted
from storage.http.thread_memory import thread_memory
from storage.http.tls import TlsSocket

# One read of a body. CPU to fetch 3 MB over loopback grew by half with 256 KiB, and did not shrink with 1 MiB.
READ_BYTES = 512 * 1024
# One read of a response head. It is short, because body bytes in it are copied twice more than the rest of the body.
HEAD_READ_BYTES = 8 * 1024
# OpenSSL returns from a write only after all of it: 64 KiB in 5 s are 13 kB/s, which eight connections over an uplink
# of 10 Mbit/s have.
TLS_WRITE_BYTES = 64 * 1024
# httpcore's own bound on a response head; here with those of status 1xx before it.
MAX_HEAD_BYTES = 100 * 1024
# Used when the caller gives no timeout. glibc gives a silent name server up after 10 s (two tries of 5 s).
LOOKUP_SECONDS = 10.0
# Speed is averaged over this time, so that one retransmission does not count as slow.
SPEED_WINDOW_SECONDS = 10.0


@dataclass
class TransferDeadline:
    """Time limits of one transfer: in total, for the response head, for each wait without a limit of its own, and a
    minimum speed for the body.

    Speed is bytes per second of *waiting* for them, so a slow local disk does not count against the other side. Used as
    a context, it applies to every wait of this thread's connections.
    """

    total_seconds: float
    head_seconds: float
    min_bytes_per_second: float
    wait_seconds: float = math.inf
    awaited: str = "response head"  # what `head_seconds` is for, in messages
    clock: Callable[[], float] = time.monotonic
    _ends: float = field(init=False)
    _head_ends: float = field(init=False)  # infinite during the body
    _waited: float = field(init=False, default=0.0)
    _bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._ends = self.clock() + self.total_seconds
        self.expect_head()

    def __enter__(self) -> None:
        self._token = _transfer_deadline.set(self)

    def __exit__(self, *_: object) -> None:
        _transfer_deadline.reset(self._token)

    def expect_head(self) -> None:
        """Start `head_seconds` for a request's connection and response head."""
        self._head_ends = self.clock() + self.head_seconds

    def expect_body(self) -> None:
        """Start the minimum speed, of a body in either direction."""
        self._head_ends, self._waited, self._bytes = math.inf, 0.0, 0

    def allow(self, timeout: float | None) -> float:
        """Seconds that the next wait may take, at most `timeout`. Raises `FetchInterrupted` when no time is left."""
        now = self.clock()
        if now >= self._ends:
            raise FetchInterrupted(f"took longer than {self.total_seconds:g} s")
        if now >= self._head_ends:
            raise FetchInterrupted(f"no complete {self.awaited} within {self.head_seconds:g} s")
        return min(self.wait_seconds if timeout is None else timeout, self._ends - now, self._head_ends - now)

    def moved(self, size: int, waited: float) -> None:
        """Count one read or write. Raises `FetchInterrupted` if the last window was slower than the minimum."""
        self._waited += waited
        self._bytes += size
        if self._head_ends < math.inf or self._waited < SPEED_WINDOW_SECONDS:
            return
        if self._bytes < self._waited * self.min_bytes_per_second:
            raise FetchInterrupted(f"slower than {self.min_bytes_per_second:g} bytes a second")
        self._waited, self._bytes = 0.0, 0


# Of lookups and waits outside of a transfer.
_NO_TRANSFER = TransferDeadline(math.inf, head_seconds=math.inf, min_bytes_per_second=0, wait_seconds=LOOKUP_SECONDS)
# A context variable, because httpcore passes no argument through to the connection. Its synchronous pool reads and
# writes in the thread of the request.
_transfer_deadline: ContextVar[TransferDeadline] = ContextVar("transfer_deadline", default=_NO_TRANSFER)


def current_deadline() -> TransferDeadline:
    return _transfer_deadline.get()


def message(error: OSError) -> str:
    return error.strerror or type(error).__name__


HEAD_END = re.compile(rb"\n\r?\n")
LINE = re.compile(rb"[^\n]*\n")
FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r?\n|\r?\n")
CLEAN_HEAD = re.compile(rb"[^\n]*\n(?:%b)+" % FIELD_LINE.pattern)  # nearly every head
# These headers frame the body. A malformed line that contains one is passed on, so that httpcore refuses it.
FRAMING = re.compile(rb"content-length|transfer-encoding", re.I)
READ, WRITE = select.POLLIN, select.POLLOUT
FAULTS: dict[int, tuple[type[Exception], type[Exception]]] = {
    READ: (httpcore.ReadTimeout, httpcore.ReadError),
    WRITE: (httpcore.WriteTimeout, httpcore.WriteError),
}


class GuardedStream(httpcore.NetworkStream):
    """A socket that reads in large blocks, keeps the deadline and counts the bytes after the response head.

    The count detects a body longer than its Content-Length, which httpcore would take for the beginning of the next
    response on this connection. Malformed lines in the head, which browsers ignore and httpcore refuses, are removed
    and counted in `junk_lines`. `ended`: whether the last read met the end of the connection.
    """

    def __init__(self, connection: socket.socket, tls: TlsSocket | None = None) -> None:
        connection.settimeout(0)
        self._socket, self._tls = connection, tls
        self._expect_head()
        self.ended = False

    def _expect_head(self) -> None:
        self._pending, self._head_bytes = bytearray(), 0  # received, and not yet read by the caller
        self.body_bytes: int | None = None
        self.junk_lines, self.reusable = 0, False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """A head of the response without any of the body; after the last one the body."""
        searched = 0
        while self.body_bytes is None:
            if (end := HEAD_END.search(self._pending, searched)) is not None:
                head, self._pending = bytes(self._pending[: end.end()]), self._pending[end.end() :]
                if head[9:10] != b"1":  # "HTTP/1.1 103 Early Hints": the real head follows
                    self.body_bytes = len(self._pending)
                return head if CLEAN_HEAD.fullmatch(head) else self._without_junk(head)
            data = self._in_time(READ, memoryview(bytearray(HEAD_READ_BYTES)), timeout)
            searched = max(0, len(self._pending) - 2)  # all of it again for each byte took 150 µs
            self._pending += data
            self._head_bytes += len(data)
            if not data or self._head_bytes > MAX_HEAD_BYTES:
                raise httpcore.RemoteProtocolError("the response has no head, or a head without an end")
        return bytes(self.read_body(read_buffer(), timeout))

    def read_body(self, buffer: memoryview, timeout: float | None = None) -> memoryview:
        """The next bytes after the head, in `buffer`; none at the end of the connection."""
        if self._pending:  # bytes that came with the head
            count = min(len(self._pending), len(buffer))
            buffer[:count], self._pending = self._pending[:count], self._pending[count:]
            return buffer[:count]
        data = self._in_time(READ, buffer, timeout)
        self.body_bytes = (self.body_bytes or 0) + len(data)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write a request's head, or all of it."""
        if buffer:
            self._expect_head()
            self.write_body(memoryview(buffer), timeout)

    def write_body(self, block: memoryview, timeout: float | None = None) -> None:
        while block:
            block = block[len(self._in_time(WRITE, block[:TLS_WRITE_BYTES] if self._tls else block, timeout)) :]

    def _in_time(self, direction: int, buffer: memoryview, timeout: float | None) -> memoryview:
        """Read into `buffer`, or write it, as much as goes at once; wait within the deadline until some does."""
        deadline, (timed_out, broke) = current_deadline(), FAULTS[direction]
        connection = self._tls or self._socket
        seconds, started = deadline.allow(timeout), time.monotonic()
        is_new = direction == READ and not self._head_bytes and (self._tls is None or self._tls.is_idle)
        wanted = READ if is_new else 0  # a response is never there at once, but for one behind a handshake
        while True:
            if wanted:
                left = started + seconds - time.monotonic()
                if left <= 0:
                    deadline.allow(timeout)
                    raise timed_out
                _wait(self._socket, wanted, left)
            try:
                count = connection.recv_into(buffer) if direction == READ else connection.send(buffer)
                break
            except BlockingIOError:
                wanted = direction
            except ssl.SSLWantReadError:
                wanted = READ
            except ssl.SSLWantWriteError:
                wanted = WRITE
            except OSError as error:
                raise broke(message(error)) from error
        if direction == READ:
            self.ended = not count
        deadline.moved(count, time.monotonic() - started)
        return buffer[:count]

    @property
    def has_decrypted_bytes(self) -> bool:
        """Whether OpenSSL holds bytes of a record that was read in part. The socket does not show them."""
        return self._tls is not None and self._tls.has_content

    def _without_junk(self, head: bytes) -> bytes:
        first, *lines = LINE.findall(head)
        kept, good = [first], False
        for line in lines:
            folded = good and line[:1] in b"\t "  # continues the previous line (RFC 9112 §5.2)
            good = folded or bool(FIELD_LINE.fullmatch(line) or FRAMING.search(line))
            kept += [line] * good
        self.junk_lines += len(lines) + 1 - len(kept)
        return b"".join(kept)

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> GuardedStream:
        try:
            ends = time.monotonic() + current_deadline().allow(timeout)
            tls = TlsSocket(self._socket, ssl_context, server_hostname)
            tls.shake_hands(lambda wanted: _wait(self._socket, wanted, ends - time.monotonic()))
            return GuardedStream(self._socket, tls)
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError | FetchInterrupted):
                raise httpcore.ConnectTimeout(str(error)) from error
            if isinstance(error, OSError):
                raise httpcore.ConnectError(f"TLS: {message(error)}") from error
            raise

    def close(self) -> None:
        self._socket.close()

    def has_ended(self) -> bool:
        """Of an idle connection: whether the host has ended it, or it may not be used again."""
        try:  # on the socket, below TLS: bytes or an end mean that the host has ended the connection
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not self.reusable or (self._tls is not None and not self._tls.is_idle)
        except OSError:
            pass
        return True

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # True makes httpcore's pool drop an idle connection
            return self.has_ended()
        return self._tls.object if info == "ssl_object" and self._tls else None


def _wait(connection: socket.socket, wanted: int, seconds: float) -> None:
    """Wait until the connection is readable or writable. Raises TimeoutError without a wait if no time is left."""
    if seconds <= 0:
        raise TimeoutError("timed out")
    ready = select.poll()
    ready.register(connection, wanted)
    ready.poll(seconds * 1_000)


# What every body is read into where its reader keeps no memory of its own.
read_buffer = thread_memory(READ_BYTES)
