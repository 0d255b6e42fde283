"""HTTP/1.1 to one store for requests whose response has no body of interest, over connections that are kept."""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import httpcore

from storage.errors import FetchInterrupted
from storage.http.client import Connections, Origin, Request, Response
from storage.http.connection import GuardedStream, TransferDeadline

MIN_BYTES_PER_SECOND = 13_000
# Routers forget idle connections, many after four minutes, and tell neither side: the next request would wait
# `read_seconds` for nothing.
IDLE_SECONDS = 60.0


class UnexpectedResponse(Exception):
    """A response that is neither expected nor a timeout."""


# The store answered something else than expected or than HTTP/1, or closed the connection: the request may have been
# done. The caller repeats it with boto3, which connects again and names the fault.
UNEXPECTED = (UnexpectedResponse, httpcore.NetworkError, httpcore.ProtocolError)
TOO_SLOW = (httpcore.TimeoutException, FetchInterrupted)


class HttpConnections:
    """Connections to one host. Thread-safe. `most`: of idle ones. `context`: for https, None = http.

    `connect_seconds` also bounds each wait to send, `read_seconds` the whole response. A body must be sent at
    MIN_BYTES_PER_SECOND.
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
        usual_port = 443 if context else 80
        self._origin = "https" if context else "http", host, port or usual_port
        name = f"[{host}]" if ":" in host else host
        self.authority = name if self._origin[2] == usual_port else f"{name}:{port}"
        self._context = context
        self._connect_seconds = connect_seconds
        self._connections = Connections(
            self._connect, most=most, write_seconds=connect_seconds, idle_seconds=IDLE_SECONDS
        )
        self._deadline = partial(
            TransferDeadline, math.inf, head_seconds=read_seconds, min_bytes_per_second=MIN_BYTES_PER_SECOND
        )

    def send(
        self, method: str, path: str, headers: Mapping[str, str], body: Callable[[], Iterable[memoryview]] | None
    ) -> Response:
        """Send a request, a second time if a kept connection turns out to be closed. `body`: its blocks from the start.

        Raises those of UNEXPECTED and of TOO_SLOW.
        """
        request = Request(method, self._origin, path, headers, body)
        with self._deadline(), self._connections.get(request) as response:
            response.discard()
            return response

    def _connect(self, origin: Origin) -> GuardedStream:
        try:
            plain = socket.create_connection(origin[1:], self._connect_seconds)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout from error
        except OSError as error:
            raise httpcore.ConnectError from error
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream = GuardedStream(plain)
        return stream.start_tls(self._context, origin[1], self._connect_seconds) if self._context else stream
