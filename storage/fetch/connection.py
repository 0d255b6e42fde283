"""One connection: resolve once, check every address, dial exactly the checked addresses, keep the deadline.

Only `GuardedBackend` opens sockets, at every new connection, so redirects and further requests are checked too. A
connection is kept for the same scheme, host and port alone. SNI, certificate check and Host header use the original
name.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, partial
from itertools import count
from typing import Any

import httpcore

from storage.errors import AddressRefused, FetchInterrupted
from storage.fetch.addresses import Address, AddressPolicy
from storage.http.connection import LOOKUP_SECONDS, GuardedStream, current_deadline, message

USER_AGENT = "kling-receiver"
# Shorter than the 5 s after which common servers close an idle connection (uvicorn, Node, Apache).
KEEPALIVE_SECONDS = 4.0
# Addresses of a name that are tried: enough to skip a dead one, few enough for the connect timeout.
MAX_DIALS = 4
# Concurrent lookups, including those that timed out: four times the default number of fetching threads, plus sinks.
MAX_LOOKUPS = 64
_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)

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


def alternating(addresses: Sequence[Address]) -> list[Address]:
    """The first MAX_DIALS, IPv6 and IPv4 in turn: one of the two may lead nowhere (RFC 8305 §4)."""
    ranks = {4: count(), 6: count()}
    return sorted(addresses, key=lambda each: next(ranks[each.version]))[:MAX_DIALS]


class GuardedBackend(httpcore.NetworkBackend):
    """Opens connections for an httpcore pool, only to addresses that `policy` allows.

    `policy`: None = all, for a host that an operator chose. `resolve`, `dial`: seams for tests. `dial` sees every
    attempted connection. `tunnel`: through which every connection goes. A proxy resolves names itself, so only literal
    addresses are checked then.
    """

    def __init__(
        self,
        policy: AddressPolicy | None,
        *,
        resolve: Resolve = resolve,
        dial: Dial = dial,
        tunnel: Tunnel | None = None,
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
        dials = [partial(self._dial, host, str(each)) for each in alternating(self.checked(host, port, timeout))]
        if self._tunnel is not None:
            dials = [partial(self._tunnel, host)]
        failure: OSError = ConnectionError("no addresses")
        for connect in dials:
            share = None if timeout is None else timeout / len(dials)
            try:
                return GuardedStream(connect(port, current_deadline().allow(share)))
            except OSError as error:
                failure = error
            except FetchInterrupted as error:
                raise httpcore.ConnectTimeout(str(error)) from error
        raise httpcore.ConnectError(message(failure)) from failure

    def checked(self, host: str, port: int, timeout: float | None = None) -> list[Address]:
        """Resolve once, in at most `timeout` seconds, and check every address. With a tunnel names are not resolved."""
        with suppress(ValueError):
            ipaddress.ip_address(host)
            return [self._check(host, host, port)]
        if self._tunnel is not None:
            return []
        try:
            answers = _look_up(lambda: self._resolve(host, port), current_deadline().allow(timeout or LOOKUP_SECONDS))
        except OSError as error:
            raise httpcore.ConnectError(f"name not resolved: {message(error)}") from error
        return [self._check(answer, host, port) for answer in answers]

    def _check(self, answer: str, host: str, port: int) -> Address:
        try:
            address = ipaddress.ip_address(answer)
        except ValueError:
            raise AddressRefused(f"{host} resolves to a malformed address") from None
        reason = self._policy.refuses(address, host, port) if self._policy else None
        if reason:
            raise AddressRefused(f"{host} resolves to {address}, which may not be dialled: {reason}")
        return address
