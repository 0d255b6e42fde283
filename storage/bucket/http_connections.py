"""HTTP/1.1 to one store for requests whose response has no body of interest, over connections that are kept.

The store is the operator's own, so this reads only what a store answers to HEAD and PUT. A connection is kept only
after a response that ends where its head says; everything else closes it. Each wait has a timeout, and a body as a
whole must be sent at MIN_BYTES_PER_SECOND.
"""

from __future__ import annotations

import itertools
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from botocore.exceptions import ConnectTimeoutError, ReadTimeoutError

# A TLS connection returns from a write only after all of it, within one timeout: 64 KiB in 5 s are 13 kB/s, which eight
# connections over an uplink of 10 Mbit/s have. A plain connection returns after any progress.
TLS_WRITE_BYTES = 64 * 1024
MIN_BYTES_PER_SECOND = 13_000
MAX_HEAD_BYTES = 64 * 1024
# 100 Continue, and what proxies add to it; the final response follows.
MAX_HEADS = 16
# A refusal's XML is below 1 kB. A longer body is not read; its connection is closed.
MAX_BODY_BYTES = 64 * 1024
READ_BYTES = 16 * 1024
LENGTH = re.compile(r"[0-9]{1,9}")
STATUS = re.compile(r"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?")
BODYLESS = frozenset({204, 304})


class UnexpectedResponse(Exception):
    """A response that is neither expected nor a timeout. The caller repeats the request with boto3."""


class ConnectionBroken(UnexpectedResponse):
    """The store closed the connection or answered something else than HTTP/1. The request may have been done. boto3
    connects again and names the fault.
    """


class Response(NamedTuple):
    """`headers`: names in lower case."""

    status: int
    headers: dict[str, str]


class HttpConnections:
    """Connections to one host. Thread-safe. `most`: of idle ones. `context`: for https, None = http.

    `connect_seconds` also bounds each wait to send, `read_seconds` the whole response.
    """

    def __init__(
        self,
        host: str,
        port: int | None,
        context: ssl.SSLContext | None,
        *,
        most: int,
        connect_seconds: float,
        read_seconds: float,
    ) -> None:
        self._host = host
        self._port = port or (443 if context else 80)
        name = f"[{host}]" if ":" in host else host
        self.authority = name if self._port == (443 if context else 80) else f"{name}:{port}"
        self._context = context
        self._most = most
        self._connect_seconds = connect_seconds
        self._read_seconds = read_seconds
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        weakref.finalize(self, _close_all, self._idle)

    def send(
        self, method: str, path: str, headers: Mapping[str, str], body: Callable[[], Iterable[memoryview]]
    ) -> Response:
        """Send a request, a second time if a kept connection turns out to be closed. `body`: its blocks from the start.

        Raises botocore's `ConnectTimeoutError` and `ReadTimeoutError`, and `ConnectionBroken`.
        """
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        head = f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("ascii")
        kept = self._kept()
        if kept is not None:
            with suppress(ConnectionBroken):  # the store closed it as idle at the moment of its use
                return self._exchange(kept, head, body(), has_body=method != "HEAD")
        return self._exchange(self._connect(), head, body(), has_body=method != "HEAD")

    def _kept(self) -> socket.socket | None:
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                try:  # on the socket itself, below TLS: bytes or an end mean that the store has ended the connection
                    connection.settimeout(0)
                    socket.socket.recv(connection, 1, socket.MSG_PEEK)
                except BlockingIOError:
                    return connection
                except OSError:
                    pass
                connection.close()
        return None

    def _connect(self) -> socket.socket:
        try:
            plain = socket.create_connection((self._host, self._port), self._connect_seconds)
        except TimeoutError as error:
            raise ConnectTimeoutError(endpoint_url=self.authority) from error
        except OSError as error:
            raise ConnectionBroken from error
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return self._context.wrap_socket(plain, server_hostname=self._host) if self._context else plain
        except OSError as error:
            plain.close()
            if isinstance(error, TimeoutError):
                raise ConnectTimeoutError(endpoint_url=self.authority) from error
            raise ConnectionBroken from error

    def _exchange(
        self, connection: socket.socket, head: bytes, body: Iterable[memoryview], *, has_body: bool
    ) -> Response:
        keep = False
        try:
            is_whole = self._send(connection, head, body)
            response, ends = _read_response(connection, time.monotonic() + self._read_seconds, has_body=has_body)
            keep = is_whole and ends
            return response
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=self.authority) from error
        except OSError as error:
            raise ConnectionBroken from error
        finally:
            with self._lock:
                if keep and len(self._idle) < self._most:
                    self._idle.append(connection)
                else:
                    connection.close()

    def _send(self, connection: socket.socket, head: bytes, body: Iterable[memoryview]) -> bool:
        """False: the store closed the connection before the end. One that refuses early answers before it closes."""
        started, sent = time.monotonic(), 0
        is_tls = isinstance(connection, ssl.SSLSocket)
        connection.settimeout(self._connect_seconds)
        for block in itertools.chain([memoryview(head)], body):
            while block:
                try:
                    count = connection.send(block[:TLS_WRITE_BYTES] if is_tls else block)
                except TimeoutError:
                    raise
                except OSError:
                    return False
                block, sent = block[count:], sent + count
                if time.monotonic() - started > self._connect_seconds + sent / MIN_BYTES_PER_SECOND:
                    raise TimeoutError
        return True


def _read_response(connection: socket.socket, ends: float, *, has_body: bool) -> tuple[Response, bool]:
    """The final response, and whether it ends where its head says, so that the connection may be kept."""
    rest = bytearray()
    for _ in range(MAX_HEADS):
        while b"\r\n\r\n" not in rest:
            block = _receive(connection, ends)
            rest += block
            if not block or len(rest) > MAX_HEAD_BYTES:
                raise ConnectionBroken
        head, _, rest = rest.partition(b"\r\n\r\n")
        response = _parsed(head)
        if response.status >= 200:
            break
    else:
        raise ConnectionBroken
    length = response.headers.get("content-length", "") if has_body and response.status not in BODYLESS else "0"
    if not LENGTH.fullmatch(length) or int(length) > MAX_BODY_BYTES or "transfer-encoding" in response.headers:
        return response, False
    left = int(length) - len(rest)
    while left > 0 and (block := _receive(connection, ends)):
        left -= len(block)
    return response, left == 0 and response.headers.get("connection", "").lower() != "close"


def _receive(connection: socket.socket, ends: float) -> bytes:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)
    return connection.recv(READ_BYTES)


def _parsed(head: bytearray) -> Response:
    first, *lines = head.decode("latin-1").split("\r\n")
    status = STATUS.fullmatch(first)
    if status is None:
        raise ConnectionBroken
    headers = {name.lower(): value.strip() for name, _, value in [line.partition(":") for line in lines]}
    if status[1] == "0":
        headers["connection"] = "close"
    return Response(int(status[2]), headers)


def _close_all(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()
