"""One POST to a receiver's URL: to a checked address, within a bounded time, with a bounded read of the answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpcore

from receiver.base.cached_property import cached_property
from receiver.events.dispatcher import Outcome, SinkGone, SinkSilent, SinkUnavailable
from storage.errors import FetchInterrupted
from storage.fetch import connection
from storage.fetch.addresses import AddressPolicy, Target, check_url
from storage.fetch.connection import KEEPALIVE_SECONDS, USER_AGENT
from storage.http.connection import GuardedStream, TransferDeadline
from storage.http_date import retry_after

# Standard Webhooks recommends 15 to 30 s. A receiver that works longer should answer first.
TIMEOUT_SECONDS = 15.0
# Enough for a name with several addresses of which some are dead.
CONNECT_SECONDS = 5.0
# The answer's body is not used. Reading a short one to its end allows the connection to be used again.
MAX_ANSWER_BYTES = 4_096
GONE = 410


@dataclass(frozen=True)
class Answer:
    """`after`: seconds that the receiver asks us to wait, capped (see `retry_after`)."""

    host: str
    status: int
    after: float | None

    def outcome(self) -> Outcome:
        """2xx: delivered. 410: never again. Everything else, redirects included: later."""
        if 200 <= self.status < 300:
            return None
        if self.status == GONE:
            return SinkGone(f"{self.host} answered 410")
        return SinkUnavailable(f"{self.host} answered {self.status}", after=self.after)


class Poster:
    """POSTs over connections that all threads share. No redirect is followed, no cookie kept.

    `connections`: at least the number of threads that post. `tunnel`: see `GuardedBackend`.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        *,
        connections: int,
        timeout_seconds: float = TIMEOUT_SECONDS,
        tunnel: connection.Tunnel | None = None,
    ) -> None:
        self._policy = policy
        self._backend = connection.GuardedBackend(policy, tunnel=tunnel)
        self._connections = connections
        self._timeout_seconds = timeout_seconds

    @cached_property
    def _pool(self) -> httpcore.ConnectionPool:
        """Made at first use, because reading the certificates takes time."""
        return httpcore.ConnectionPool(
            ssl_context=connection.tls_context(),
            max_connections=self._connections,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=self._backend,
        )

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Raises `FetchRefused` (the URL's form), `AddressRefused` (what its name resolves to), `SinkSilent`."""
        target = check_url(url, self._policy)
        seconds = self._timeout_seconds
        pace = TransferDeadline(seconds, head_seconds=seconds, min_bytes_per_second=0)
        with pace, _silences(target.host), self._request(target, body, headers) as response:
            _read_a_little(response)
            said = {name.decode("ascii").lower(): value.decode("latin-1") for name, value in response.headers}
        return Answer(target.host, response.status, retry_after(said.get("retry-after"), time.time()))

    def check(self, url: str) -> str:
        """Resolve and check where `url` leads, without connecting. Returns the host. Raises as `post` does."""
        target = check_url(url, self._policy)
        with _silences(target.host):
            self._backend.checked(target.host, target.port)
        return f"{target.authority} may be posted to"

    def close(self) -> None:
        if "_pool" in self.__dict__:
            self._pool.close()

    @contextmanager
    def _request(self, target: Target, body: bytes, headers: Mapping[str, str]) -> Iterator[httpcore.Response]:
        own = {"Host": target.authority, "User-Agent": USER_AGENT, "Accept": "*/*"}
        every = {**own, **headers, "Content-Length": str(len(body))}
        seconds = self._timeout_seconds
        timeouts = {"connect": min(CONNECT_SECONDS, seconds), "read": seconds, "write": seconds, "pool": seconds}
        url = httpcore.URL(
            scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path.encode()
        )
        request = httpcore.Request(
            "POST", url, headers=[*every.items()], content=body, extensions={"timeout": timeouts}
        )
        response = self._pool.handle_request(request)
        try:
            yield response
        finally:
            response.close()


def _read_a_little(response: httpcore.Response) -> None:
    """Read the answer to its end if the end is near, so that the connection can be used again.

    Errors here change nothing, because the status has arrived.
    """
    size = 0
    try:
        for block in response.iter_stream():
            size += len(block)
            if size > MAX_ANSWER_BYTES:
                return
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, FetchInterrupted):
        return
    stream = response.extensions["network_stream"]
    if isinstance(stream, GuardedStream) and stream.body_bytes == size:
        stream.reusable = True


@contextmanager
def _silences(host: str) -> Iterator[None]:
    """A protocol error's own text may contain a header, so it is not kept."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise SinkSilent(f"{host} timed out ({type(error).__name__})") from error
    except httpcore.NetworkError as error:
        raise SinkSilent(f"{host}: connection broke: {str(error)[:200]}") from error
    except (httpcore.ProtocolError, httpcore.UnsupportedProtocol):
        raise SinkSilent(f"{host}: the answer broke off or is not HTTP/1.1") from None
    except FetchInterrupted as error:
        raise SinkSilent(f"{host}: {error}") from error
