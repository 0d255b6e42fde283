"""One connection: resolve once, check every answer, dial exactly what was checked, keep time.

`GuardedBackend` is the only place here that opens a socket. httpcore calls it for every new connection, so a
redirect or a second request cannot pass by it, and reuses a connection only for the scheme, host and port it was
checked for. The name stays the one asked for in SNI, in the certificate check and in the Host header.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpcore

from storage.errors import AddressRefused, FetchInterrupted
from storage.fetch.addresses import Address, AddressPolicy

# httpcore asks for 64 KiB. Measured over loopback, CPU to fetch 3 MB: 12.5 ms in blocks of 256 KiB, 8.3 of 512 KiB,
# no less of 1 MiB.
READ_BYTES = 512 * 1024
# The most that OpenSSL hands out in one call (RFC 8446 §5.1).
TLS_RECORD_BYTES = 16 * 1024
# Of the addresses a name has: enough to get past a dead one, few enough to end within the connect timeout.
MAX_DIALS = 4
# Seconds to look up a name where nothing else says; glibc gives one silent server up after 10 (two tries of 5 s).
LOOKUP_SECONDS = 10.0
# Names looked up at once, those given up included: four times the threads that fetch by default, and its sinks.
MAX_LOOKUPS = 64
_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)
# How long transfer speed is averaged over before it is judged: a pause for one retransmission is no drip.
SPEED_WINDOW_SECONDS = 10.0

# At debug level httpcore logs response headers, and a Location holds a signature. This holds whatever the root says.
logging.getLogger("httpcore").setLevel(logging.INFO)

Resolve = Callable[[str, int], Sequence[str]]
Dial = Callable[[str, str, int, float | None], socket.socket]


@cache
def tls_context() -> ssl.SSLContext:
    """Verifies against certifi's roots. One for the process: reading 140 roots takes 25 ms and half a megabyte."""
    return httpcore.default_ssl_context()


def resolve(host: str, port: int) -> list[str]:
    """Every address the system has for `host`, best first. Raises OSError (`socket.gaierror`) when there is none."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def _look_up(work: Callable[[], Sequence[str]], seconds: float | None) -> Sequence[str]:
    """The answers, or an OSError after `seconds`: the system's resolver takes no deadline, and a server that is silent
    holds it for 5 s a try and server (resolv.conf(5)). What is given up ends by itself, in a thread of its own."""
    if not _lookups.acquire(blocking=False):
        raise OSError(errno.EAGAIN, f"{MAX_LOOKUPS} lookups have no answer yet")
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
    except RuntimeError as error:  # no thread to be had
        _lookups.release()
        raise OSError(errno.EAGAIN, str(error)) from error
    try:
        return done.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(errno.ETIMEDOUT, "no answer in time") from error


def dial(host: str, address: str, port: int, timeout: float | None) -> socket.socket:
    """Connect to `address`, a literal that was checked; `host` is what it was resolved from (tests record it)."""
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
    """The time one fetch may take: a total, a head deadline, and a minimum speed once the body runs.

    Speed is bytes over the time spent *waiting* for them, so our own slow disk is never blamed on the sender.
    """

    total_seconds: float
    head_seconds: float
    min_bytes_per_second: float
    clock: Callable[[], float] = time.monotonic
    _ends: float = field(init=False)
    _head_ends: float | None = field(init=False)
    _waited: float = field(init=False, default=0.0)
    _bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._ends = self.clock() + self.total_seconds
        self.expect_head()

    def expect_head(self) -> None:
        """A request begins: its connection and response head share `head_seconds`."""
        self._head_ends = self.clock() + self.head_seconds

    def expect_body(self) -> None:
        self._head_ends, self._waited, self._bytes = None, 0.0, 0

    def allow(self, timeout: float | None) -> float:
        """Seconds the next wait may take, `timeout` at most. Raises `FetchInterrupted` when there are none left."""
        now = self.clock()
        if now >= self._ends:
            raise FetchInterrupted(f"took longer than {self.total_seconds:g} s")
        if self._head_ends is not None and now >= self._head_ends:
            raise FetchInterrupted(f"no complete response head within {self.head_seconds:g} s")
        ends = self._ends if self._head_ends is None else min(self._ends, self._head_ends)
        return ends - now if timeout is None else min(timeout, ends - now)

    def received(self, size: int, waited: float) -> None:
        """Count one read. Raises `FetchInterrupted` when the last window was slower than the minimum."""
        self._waited += waited
        self._bytes += size
        if self._head_ends is not None or self._waited < SPEED_WINDOW_SECONDS:
            return
        if self._bytes < self._waited * self.min_bytes_per_second:
            raise FetchInterrupted(f"slower than {self.min_bytes_per_second:g} bytes a second")
        self._waited, self._bytes = 0.0, 0


# httpcore's synchronous pool does a request's reading and writing in the thread that asked for it.
_transfer_deadline: ContextVar[TransferDeadline | None] = ContextVar("pace", default=None)


@contextmanager
def with_deadline(pace: TransferDeadline) -> Iterator[None]:
    """Hold every wait of this thread's connections to `pace`."""
    token = _transfer_deadline.set(pace)
    try:
        yield
    finally:
        _transfer_deadline.reset(token)


def _allow(timeout: float | None) -> float | None:
    pace = _transfer_deadline.get()
    return timeout if pace is None else pace.allow(timeout)


class GuardedBackend(httpcore.NetworkBackend):
    """Opens connections for an httpcore pool, only to addresses that `policy` does not refuse.

    `resolve`, `dial`: seams for tests; `dial` sees every connection that is attempted.
    """

    def __init__(self, policy: AddressPolicy, *, resolve: Resolve = resolve, dial: Dial = dial) -> None:
        self._policy = policy
        self._resolve = resolve
        self._dial = dial

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        """Raises `AddressRefused` when any answer is refused: a name that mixes public and private is not trusted."""
        addresses = self.checked(host, port, timeout)[:MAX_DIALS]
        failure: OSError = ConnectionError("no addresses")
        for address in addresses:
            share = None if timeout is None else timeout / len(addresses)
            try:
                return GuardedStream(self._dial(host, str(address), port, _allow(share)))
            except OSError as error:
                failure = error
        raise httpcore.ConnectError(_named(failure)) from failure

    def checked(self, host: str, port: int, timeout: float | None = None) -> list[Address]:
        """Resolve once, in `timeout` seconds at most, and check every answer."""
        if _is_literal(host):
            return [self._check(host, host, port)]
        try:
            answers = _look_up(lambda: self._resolve(host, port), _allow(timeout or LOOKUP_SECONDS))
        except OSError as error:
            raise httpcore.ConnectError(f"name not resolved: {_named(error)}") from error
        return [self._check(answer, host, port) for answer in answers]

    def _check(self, answer: str, host: str, port: int) -> Address:
        try:
            address = ipaddress.ip_address(answer)
        except ValueError:
            raise AddressRefused(f"{host} resolves to something that is no address") from None
        reason = self._policy.refuses(address, host, port)
        if reason:
            raise AddressRefused(f"{host} resolves to {address}, which may not be dialled: {reason}")
        return address


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _named(error: OSError) -> str:
    return error.strerror or type(error).__name__


HEAD_END = re.compile(rb"\n\r?\n")
LINE = re.compile(rb"[^\n]*\n")
FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r?\n|\r?\n")
# What frames the body: a line that speaks of it is never left out, so a malformed one is refused.
FRAMING = re.compile(rb"content-length|transfer-encoding", re.I)
# httpcore's own bound on an answer's head.
MAX_HEAD_BYTES = 100 * 1024


class GuardedStream(httpcore.NetworkStream):
    """A socket that reads in large blocks, keeps the pace and counts what came after the response head.

    The count is what tells a body longer than its Content-Length, which httpcore would leave in its buffer as the
    beginning of the next answer on this connection. Lines in the head that are no header fields, which browsers pass
    over and httpcore's parser refuses, are left out and counted in `junk_lines`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._head = bytearray()
        self.body_bytes: int | None = None
        self.junk_lines = 0
        self.reusable = False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while self.body_bytes is None:
            data = self._receive(timeout)
            self._head += data
            heads = self._whole_heads()
            if heads:
                return heads
            if not data or len(self._head) > MAX_HEAD_BYTES:  # what is wrong with it is the parser's to say
                unfinished, self._head = bytes(self._head), bytearray()
                return unfinished
        data = self._receive(timeout)
        self.body_bytes += len(data)
        return data

    def _receive(self, timeout: float | None) -> bytes:
        allowed = _allow(timeout)
        started = time.monotonic()
        try:
            self._socket.settimeout(allowed)
            data = self._records() if isinstance(self._socket, ssl.SSLSocket) else self._socket.recv(READ_BYTES)
        except TimeoutError as error:
            _allow(timeout)
            raise httpcore.ReadTimeout from error
        except OSError as error:
            raise httpcore.ReadError(_named(error)) from error
        pace = _transfer_deadline.get()
        if pace is not None:
            pace.received(len(data), time.monotonic() - started)
        return data

    def _records(self) -> bytes:
        """Wait for one TLS record, then add those that have already arrived."""
        blocks = [self._socket.recv(TLS_RECORD_BYTES)]
        self._socket.settimeout(0)
        try:
            while blocks[-1] and len(blocks) < READ_BYTES // TLS_RECORD_BYTES:
                blocks.append(self._socket.recv(TLS_RECORD_BYTES))
        except OSError:
            pass  # nothing more yet, or an error that the next read meets again
        return b"".join(blocks)

    def _whole_heads(self) -> bytes:
        """The heads that are complete, and after the last one what has come of the body."""
        heads = b""
        while self.body_bytes is None and (end := HEAD_END.search(self._head)) is not None:
            head, rest = bytes(self._head[: end.end()]), self._head[end.end() :]
            informational = head[9:10] == b"1"  # "HTTP/1.1 103 Early Hints": the real head follows
            heads += self._without_junk(head)
            if not informational:
                self.body_bytes = len(rest)
                heads += rest
            self._head = rest if informational else bytearray()
        return heads

    def _without_junk(self, head: bytes) -> bytes:
        first, *lines = LINE.findall(head)
        kept, good = [first], False
        for line in lines:
            folded = good and line[:1] in b"\t "  # goes on with the line before (RFC 9112 §5.2)
            good = folded or bool(FIELD_LINE.fullmatch(line) or FRAMING.search(line))
            kept += [line] * good
        self.junk_lines += len(lines) + 1 - len(kept)
        return b"".join(kept)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:
            return
        self._head, self.body_bytes, self.junk_lines, self.reusable = bytearray(), None, 0, False
        try:
            self._socket.settimeout(_allow(timeout))
            self._socket.sendall(buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout from error
        except OSError as error:
            raise httpcore.WriteError(_named(error)) from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            self._socket.settimeout(_allow(timeout))
            return GuardedStream(ssl_context.wrap_socket(self._socket, server_hostname=server_hostname))
        except TimeoutError as error:
            self.close()
            raise httpcore.ConnectTimeout from error
        except OSError as error:
            self.close()
            raise httpcore.ConnectError(f"TLS: {_named(error)}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        match info:
            case "is_readable":  # asked of an idle connection: True makes the pool drop it
                return not self.reusable or _readable(self._socket)
            case "ssl_object" if isinstance(self._socket, ssl.SSLSocket):
                return self._socket
            case "server_addr":
                return self._socket.getpeername()
        return None


def _readable(connection: socket.socket) -> bool:
    if connection.fileno() < 0:
        return True
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))
