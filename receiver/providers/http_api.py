"""An HTTP API behind a base URL: each request within one deadline, each answer of a bounded size.

httpx applies its timeouts to each read alone, so a head that never ends held a thread for minutes. Its transport here
is a pool over our own connections, which hold a whole exchange to its deadline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import httpcore
import httpx

from storage.egress import EgressProxy
from storage.errors import FetchTooLarge
from storage.fetch import connection
from storage.gzip_members import without_codings
from storage.http.client import declared_length, in_few_pieces
from storage.http.connection import GuardedStream, TransferDeadline

MAX_CONNECTIONS = 100
MAX_IDLE_CONNECTIONS = 20
# GuardedStream copies nothing of a piece. OpenSSL and the socket take it in parts.
PIECE_BYTES = 256 * 1024
# Of a request's body. Eight creates at once over an uplink of 1 Mbit/s have it.
MIN_BYTES_PER_SECOND = 13_000


class Answer(NamedTuple):
    """`headers`: by name in any case. `body`: without its content coding."""

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
        self._base_url = base_url
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        pool = httpcore.ConnectionPool(
            ssl_context=connection.tls_context(),
            proxy=_proxy(proxy) if proxy else None,
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=MAX_IDLE_CONNECTIONS,
            keepalive_expiry=connection.KEEPALIVE_SECONDS,
            network_backend=connection.GuardedBackend(None),
        )
        self._client = httpx.Client(
            transport=_PoolTransport(pool),
            trust_env=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            timeout=httpx.Timeout(None, connect=timeout_seconds, pool=timeout_seconds),
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": connection.USER_AGENT,
            },
        )

    def send(
        self, method: str, path: str, headers: Mapping[str, str], content: Sequence[bytes] | None = None
    ) -> Answer:
        """Send one request, once. `path`: below the base URL, with its query. `content`: the body in parts.

        Raises httpcore's errors, `FetchInterrupted` (too slow), `FetchUnusable` (the answer's coding, or too many
        pieces) and `FetchTooLarge`. After httpcore's ConnectError, ConnectTimeout, PoolTimeout and ProxyError nothing
        was sent.
        """
        seconds = self._timeout_seconds
        deadline = TransferDeadline(
            math.inf, seconds, MIN_BYTES_PER_SECOND, wait_seconds=seconds, awaited="answer"
        )  # fmt: skip
        length = {} if content is None else {"Content-Length": str(sum(map(len, content)))}
        pieces = None if content is None else _pieces(content, deadline)
        with deadline:
            with self._client.stream(
                method, self._base_url + path, headers={**headers, **length}, content=pieces
            ) as response:
                return self._answer(response)

    def close(self) -> None:
        self._client.close()

    def _answer(self, response: httpx.Response) -> Answer:
        headers = response.headers
        body = bytearray()
        for block in in_few_pieces(without_codings(response.iter_raw(), headers.get("content-encoding", ""))):
            body += block
            if len(body) > self._max_bytes:
                raise FetchTooLarge(f"the answer is larger than {self._max_bytes} bytes")
        return Answer(response.status_code, headers, bytes(body))


class _PoolTransport(httpx.BaseTransport):
    """httpx over a pool of httpcore. Its errors stay those of httpcore, as everywhere in this tree."""

    def __init__(self, pool: httpcore.ConnectionPool) -> None:
        self._pool = pool

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        sent = httpcore.Request(
            request.method, target, headers=request.headers.raw, content=request.stream, extensions=request.extensions
        )
        answer = self._pool.handle_request(sent)
        stream = answer.extensions["network_stream"]
        assert isinstance(stream, GuardedStream)
        if stream.body_bytes is None:  # nothing was read since the request: this came behind the chunks of the last one
            answer.close()
            raise httpcore.RemoteProtocolError("an answer came before its request")
        # httpx parses a Location even where none is followed, and raises errors of its own for a malformed one.
        headers = [each for each in answer.headers if each[0].lower() != b"location"]
        body = _Body(answer, stream)
        return httpx.Response(answer.status, headers=headers, stream=body, extensions=answer.extensions)

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    """A body. Its connection is kept once all of it was read."""

    def __init__(self, answer: httpcore.Response, stream: GuardedStream) -> None:
        self._answer = answer
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.iter_stream()
        length = declared_length(httpx.Headers(self._answer.headers))
        self._stream.reusable = length in (None, self._stream.body_bytes)

    def close(self) -> None:
        self._answer.close()


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
