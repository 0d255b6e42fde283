"""An HTTP API behind a base URL: each request within one deadline, each answer of a bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

import httpcore

from storage.egress import EgressProxy
from storage.errors import FetchTooLarge
from storage.fetch import connection
from storage.fetch.addresses import ASCII_PRINTABLE, DEFAULT_PORTS, host_name
from storage.gzip_members import without_codings
from storage.http.client import declared_length
from storage.http.connection import GuardedStream, TransferDeadline

MAX_CONNECTIONS = 100
MAX_IDLE_CONNECTIONS = 20
# GuardedStream copies nothing of a piece. OpenSSL and the socket take it in parts.
PIECE_BYTES = 256 * 1024
# Of a request's body. Eight creates at once over an uplink of 1 Mbit/s have it.
MIN_BYTES_PER_SECOND = 13_000


class Answer(NamedTuple):
    """`headers`: names in lower case. `body`: without its content coding."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpApi:
    """Sends requests over connections that are kept. Thread-safe. No redirect is followed, no cookie kept.

    `base_url`: its host may have any address, because an operator chose it. `timeout_seconds`: until a request's head
    is sent, without a body until the end of the answer; after a body, which must be sent at MIN_BYTES_PER_SECOND, as
    long again. `max_bytes`: of an answer's body. Proxies of the environment are not used.
    """

    def __init__(
        self, base_url: str, *, timeout_seconds: float, max_bytes: int, proxy: EgressProxy | None = None
    ) -> None:
        parts = urlsplit(base_url)
        self._scheme, self._host = parts.scheme, host_name(parts.hostname or "")
        self._port = parts.port or DEFAULT_PORTS[parts.scheme]
        self._path = quote(parts.path, safe=ASCII_PRINTABLE)
        name = f"[{self._host}]" if ":" in self._host else self._host
        authority = name if self._port == DEFAULT_PORTS[parts.scheme] else f"{name}:{self._port}"
        self._headers = {
            "Host": authority,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": connection.USER_AGENT,
        }
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        self._pool = httpcore.ConnectionPool(
            ssl_context=connection.tls_context(),
            proxy=_proxy(proxy) if proxy else None,
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=MAX_IDLE_CONNECTIONS,
            keepalive_expiry=connection.KEEPALIVE_SECONDS,
            network_backend=connection.GuardedBackend(None),
        )

    def send(
        self, method: str, path: str, headers: Mapping[str, str], content: Sequence[bytes] | None = None
    ) -> Answer:
        """Send one request, once. `path`: below the base URL, with its query. `content`: the body in parts.

        Raises httpcore's errors, `FetchInterrupted` (too slow), `FetchUnusable` (the answer's coding) and
        `FetchTooLarge`. After httpcore's ConnectError, ConnectTimeout, PoolTimeout and ProxyError nothing was sent.
        """
        seconds = self._timeout_seconds
        deadline = TransferDeadline(
            math.inf, seconds, MIN_BYTES_PER_SECOND, wait_seconds=seconds, awaited="answer"
        )  # fmt: skip
        length = {} if content is None else {"Content-Length": str(sum(map(len, content)))}
        request = httpcore.Request(
            method,
            httpcore.URL(scheme=self._scheme, host=self._host, port=self._port, target=self._path + path),
            headers=[*{**self._headers, **headers, **length}.items()],
            content=None if content is None else _pieces(content, deadline),
            extensions={"timeout": {"connect": seconds, "pool": seconds}},
        )
        with deadline:
            response = self._pool.handle_request(request)
            try:
                return self._answer(response)
            finally:
                response.close()

    def close(self) -> None:
        self._pool.close()

    def _answer(self, response: httpcore.Response) -> Answer:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        body = bytearray()
        for block in without_codings(response.iter_stream(), headers.get("content-encoding", "")):
            body += block
            if len(body) > self._max_bytes:
                raise FetchTooLarge(f"the answer is larger than {self._max_bytes} bytes")
        stream = response.extensions["network_stream"]
        assert isinstance(stream, GuardedStream)
        stream.reusable = declared_length(headers) in (None, stream.body_bytes)
        return Answer(response.status, headers, bytes(body))


def _pieces(content: Sequence[bytes], deadline: TransferDeadline) -> Iterator[bytes]:
    deadline.expect_body()
    for part in content:
        for at in range(0, len(part), PIECE_BYTES):
            yield part[at : at + PIECE_BYTES]
    deadline.expect_head()


def _proxy(proxy: EgressProxy) -> httpcore.Proxy:
    parts = urlsplit(proxy.url)
    user, password = (unquote(text or "").encode() for text in (parts.username, parts.password))
    return httpcore.Proxy(
        httpcore.URL(scheme="http", host=parts.hostname or "", port=parts.port, target="/"),
        auth=(user, password) if parts.username else None,
    )
