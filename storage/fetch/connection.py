"""One connection: resolve once, check every address, dial exactly the checked addresses, keep the deadline.

Only `GuardedBackend` opens sockets. httpcore calls it for every new connection, so redirects and further requests are
checked too. httpcore reuses a connection only for the same scheme, host and port. SNI, certificate check and Host
header use the original name.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import httpcore

from storage.errors import AddressRefused, FetchInterrupted
from storage.fetch.addresses import Address, AddressPolicy

USER_AGENT = "kling-receiver"
# Shorter than the 5 s after which common servers close an idle connection (uvicorn, Node, Apache).
KEEPALIVE_SECONDS = 4.0
# One read of a body. CPU to fetch 3 MB over loopback grew by half with 256 KiB, and did not shrink with 1 MiB.
READ_BYTES = 512 * 1024
# One read of a response head. It is short, because body bytes in it are copied twice more than the rest of the body.
HEAD_READ_BYTES = 8 * 1024
# Addresses of a name that are tried: enough to skip a dead one, few enough for the connect timeout.
MAX_DIALS = 4
# Used when the caller gives no timeout. glibc gives a silent name server up after 10 s (two tries of 5 s).
LOOKUP_SECONDS = 10.0
# Concurrent lookups, including those that timed out: four times the default number of fetching threads, plus sinks.
MAX_LOOKUPS = 64
_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)
# Speed is averaged over this time, so that one retransmission does not count as slow.
SPEED_WINDOW_SECONDS = 10.0

# At debug level httpcore logs response headers, and a Location may hold a signature. Independent of the root logger.
logging.getLogger("httpcore").setLevel(logging.INFO)

Resolve = Callable[[str, int], Sequence[str]]
Dial = Callable[[str, str, int, float | None], socket.socket]
# Connects to a host by its name, through a proxy (`storage.egress`).
Tunnel = Callable[[str, int, float | None], socket.socket]


@cache
def tls_context() -> ssl.SSLContext:
    """Verifies against certifi's and the host's roots (SSL_CERT_FILE). One per process: reading 140 takes 25 ms."""
    return httpcore.default_ssl_context()


def resolve(host: str, port: int) -> list[str]:
    """The addresses of `host` from the system's resolver, best first. Raises OSError (`socket.gaierror`)."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def _look_up(work: Callable[[], Sequence[str]], seconds: float) -> Sequence[str]:
    """The result of `work`, or OSError after `seconds`.

    The system's resolver takes no deadline; a silent name server holds it for 5 s per try and server (resolv.conf(5)).
    So it runs in a thread, which ends by itself after a timeout.
    """
    if not _lookups.acquire(blocking=False):
        raise OSError(errno.EAGAIN, f"{MAX_LOOKUPS} lookups are unanswered")
    done: Future[Sequence[str]] = Future()

    def look() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 - the thread that asked raises it
            done.set_exception(error)
        finally:
            _lookups.release()

    try:
        threading.Thread(target=look, name="lookup", daemon=True).start()
    except RuntimeError as error:  # the system has no thread left
        _lookups.release()
        raise OSError(errno.EAGAIN, str(error)) from error
    try:
        return done.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(errno.ETIMEDOUT, "no answer in time") from error


def dial(host: str, address: str, port: int, timeout: float | None) -> socket.socket:
    """Connect to the checked `address`. `host`: the name it was resolved from, recorded by tests."""
    connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect((address, port))
    except BaseException:
        connection.close()
        raise
    return connection


@dataclass
class TransferDeadline:
    """Time limits of one fetch: in total, for the response head, for each wait without a limit of its own, and a
    minimum speed for the body.

    Speed is bytes per second of *waiting* for them, so a slow local disk does not count against the sender. Used as a
    context, it applies to every wait of this thread's connections.
    """

    total_seconds: float
    head_seconds: float
    min_bytes_per_second: float
    wait_seconds: float = math.inf
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
        self._head_ends, self._waited, self._bytes = math.inf, 0.0, 0

    def allow(self, timeout: float | None) -> float:
        """Seconds that the next wait may take, at most `timeout`. Raises `FetchInterrupted` when no time is left."""
        now = self.clock()
        if now >= self._ends:
            raise FetchInterrupted(f"took longer than {self.total_seconds:g} s")
        if now >= self._head_ends:
            raise FetchInterrupted(f"no complete response head within {self.head_seconds:g} s")
        return min(self.wait_seconds if timeout is None else timeout, self._ends - now, self._head_ends - now)

    def received(self, size: int, waited: float) -> None:
        """Count one read. Raises `FetchInterrupted` if the last window was slower than the minimum."""
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


def _allow(timeout: float | None) -> float:
    return _transfer_deadline.get().allow(timeout)


class GuardedBackend(httpcore.NetworkBackend):
    """Opens connections for an httpcore pool, only to addresses that `policy` allows.

    `resolve`, `dial`: seams for tests. `dial` sees every attempted connection. `tunnel`: through which every connection
    goes. A proxy resolves names itself, so only literal addresses are checked then.
    """

    def __init__(
        self, policy: AddressPolicy, *, resolve: Resolve = resolve, dial: Dial = dial, tunnel: Tunnel | None = None
    ) -> None:
        self._policy = policy
        self._tunnel = tunnel
        self._resolve = resolve
        self._dial = dial

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> GuardedStream:
        """Raises `AddressRefused` if any address is refused: a name with public and private ones is not trusted."""
        dials = [partial(self._dial, host, str(each)) for each in self.checked(host, port, timeout)[:MAX_DIALS]]
        if self._tunnel is not None:
            dials = [partial(self._tunnel, host)]
        failure: OSError = ConnectionError("no addresses")
        for connect in dials:
            share = None if timeout is None else timeout / len(dials)
            try:
                return GuardedStream(connect(port, _allow(share)))
            except OSError as error:
                failure = error
        raise httpcore.ConnectError(_message(failure)) from failure

    def checked(self, host: str, port: int, timeout: float | None = None) -> list[Address]:
        """Resolve once, in at most `timeout` seconds, and check every address. With a tunnel names are not resolved."""
        with suppress(ValueError):
            ipaddress.ip_address(host)
            return [self._check(host, host, port)]
        if self._tunnel is not None:
            return []
        try:
            answers = _look_up(lambda: self._resolve(host, port), _allow(timeout or LOOKUP_SECONDS))
        except OSError as error:
            raise httpcore.ConnectError(f"name not resolved: {_message(error)}") from error
        return [self._check(answer, host, port) for answer in answers]

    def _check(self, answer: str, host: str, port: int) -> Address:
        try:
            address = ipaddress.ip_address(answer)
        except ValueError:
            raise AddressRefused(f"{host} resolves to a malformed address") from None
        reason = self._policy.refuses(address, host, port)
        if reason:
            raise AddressRefused(f"{host} resolves to {address}, which may not be dialled: {reason}")
        return address


def _message(error: OSError) -> str:
    return error.strerror or type(error).__name__


HEAD_END = re.compile(rb"\n\r?\n")
LINE = re.compile(rb"[^\n]*\n")
FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r?\n|\r?\n")
CLEAN_HEAD = re.compile(rb"[^\n]*\n(?:%b)+" % FIELD_LINE.pattern)  # nearly every head
# These headers frame the body. A malformed line that contains one is passed on, so that httpcore refuses it.
FRAMING = re.compile(rb"content-length|transfer-encoding", re.I)
# httpcore's own bound on a response head.
MAX_HEAD_BYTES = 100 * 1024


class GuardedStream(httpcore.NetworkStream):
    """A socket that reads in large blocks, keeps the deadline and counts the bytes after the response head.

    The count detects a body longer than its Content-Length, which httpcore would take for the beginning of the next
    response on this connection. Malformed lines in the head, which browsers ignore and httpcore refuses, are removed
    and counted in `junk_lines`. `ended`: whether the last read met the end of the connection.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._head, self._rest = bytearray(), b""
        self.body_bytes: int | None = None
        self.junk_lines, self.reusable, self.ended = 0, False, False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """The response's heads without any of the body, then the body. Body bytes after the heads stay in `_rest`."""
        heads = b""
        while self.body_bytes is None:
            data = self._receive(memoryview(bytearray(HEAD_READ_BYTES)), timeout)
            self._head += data
            while self.body_bytes is None and (end := HEAD_END.search(self._head)) is not None:
                head, rest = bytes(self._head[: end.end()]), self._head[end.end() :]
                heads += head if CLEAN_HEAD.fullmatch(head) else self._without_junk(head)
                if head[9:10] == b"1":  # "HTTP/1.1 103 Early Hints": the real head follows
                    self._head = rest
                else:
                    self.body_bytes, self._rest, self._head = len(rest), bytes(rest), bytearray()
            if heads:
                return heads
            if not data or len(self._head) > MAX_HEAD_BYTES:  # httpcore's parser raises the error
                unfinished, self._head = bytes(self._head), bytearray()
                return unfinished
        return bytes(self.read_body(read_buffer(), timeout))

    def read_body(self, buffer: memoryview, timeout: float | None = None) -> memoryview:
        """The next bytes after the head, in `buffer`; none at the end of the connection."""
        if self._rest:  # bytes that came with the head
            count = min(len(self._rest), len(buffer))
            buffer[:count], self._rest = self._rest[:count], self._rest[count:]
            return buffer[:count]
        data = self._receive(buffer, timeout)
        self.body_bytes = (self.body_bytes or 0) + len(data)
        return data

    def _receive(self, buffer: memoryview, timeout: float | None) -> memoryview:
        allowed = _allow(timeout)
        started = time.monotonic()
        try:
            self._socket.settimeout(allowed)
            count = self._socket.recv_into(buffer)
            if count and isinstance(self._socket, ssl.SSLSocket):
                count += self._more_records(buffer[count:])
        except TimeoutError as error:
            _allow(timeout)
            raise httpcore.ReadTimeout from error
        except OSError as error:
            raise httpcore.ReadError(_message(error)) from error
        self.ended = not count
        _transfer_deadline.get().received(count, time.monotonic() - started)
        return buffer[:count]

    @property
    def has_decrypted_bytes(self) -> bool:
        """Whether OpenSSL holds bytes of a record that was read in part. The socket does not show them."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def _more_records(self, buffer: memoryview) -> int:
        """Read the TLS records that have already arrived; OpenSSL returns one in a call."""
        count = 0
        self._socket.settimeout(0)
        try:
            while count < len(buffer) and (more := self._socket.recv_into(buffer[count:])):
                count += more
        except OSError:
            pass  # nothing more yet, or an error that the next read raises again
        return count

    def _without_junk(self, head: bytes) -> bytes:
        first, *lines = LINE.findall(head)
        kept, good = [first], False
        for line in lines:
            folded = good and line[:1] in b"\t "  # continues the previous line (RFC 9112 §5.2)
            good = folded or bool(FIELD_LINE.fullmatch(line) or FRAMING.search(line))
            kept += [line] * good
        self.junk_lines += len(lines) + 1 - len(kept)
        return b"".join(kept)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:
            return
        self._head, self._rest, self.body_bytes = bytearray(), b"", None
        self.junk_lines, self.reusable = 0, False
        try:
            self._socket.settimeout(_allow(timeout))
            self._socket.sendall(buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout from error
        except OSError as error:
            raise httpcore.WriteError(_message(error)) from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> GuardedStream:
        try:
            self._socket.settimeout(_allow(timeout))
            return GuardedStream(ssl_context.wrap_socket(self._socket, server_hostname=server_hostname))
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise httpcore.ConnectTimeout from error
            if isinstance(error, OSError):
                raise httpcore.ConnectError(f"TLS: {_message(error)}") from error
            raise

    def close(self) -> None:
        self._socket.close()

    def has_ended(self) -> bool:
        """Of an idle connection: whether the host has ended it, or it may not be used again."""
        try:  # on the socket itself, below TLS: bytes or an end mean that the host has ended the connection
            self._socket.settimeout(0)
            socket.socket.recv(self._socket, 1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return not self.reusable or self.has_decrypted_bytes
        except OSError:
            pass
        return True

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # True makes httpcore's pool drop an idle connection
            return self.has_ended()
        return self._socket if info == "ssl_object" and isinstance(self._socket, ssl.SSLSocket) else None


_thread = threading.local()


def read_buffer() -> memoryview:
    """READ_BYTES that this thread reads every body into. Fresh memory for each read costs page faults."""
    if not hasattr(_thread, "buffer"):
        _thread.buffer = memoryview(bytearray(READ_BYTES))
    found: memoryview = _thread.buffer
    return found
