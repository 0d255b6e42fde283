"""Fetches one result file: only from allowed addresses, only up to a size, and only if it is a whole picture or film.

`Fetcher.fetch` streams, hashes and counts in one pass with one block in memory. Then `storage.fetch.media_types`
checks the file's type and structure.
"""

from __future__ import annotations

import errno
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, NoReturn
from urllib.parse import urljoin

import httpcore

from storage.errors import (
    DiskFull,
    FetchCut,
    FetchExpired,
    FetchInterrupted,
    FetchRefused,
    FetchUnusable,
)
from storage.fetch import connection, media_types
from storage.fetch.addresses import AddressPolicy, Target, check_url, tidy
from storage.fetch.media_types import Media
from storage.fetch.transfer import Body
from storage.http.client import Connections, NotHttp, Origin, Request
from storage.http.connection import GuardedStream, TransferDeadline
from storage.http_date import retry_after

# A CDN accepts a connection within one round trip. 10 s covers three lost SYNs (1 + 2 + 4 s).
CONNECT_TIMEOUT_SECONDS = 10.0
# Object stores close idle transfers after 20 to 60 s.
READ_TIMEOUT_SECONDS = 30.0
# Below this rate a 3 MB picture takes longer than TOTAL_SECONDS anyway.
MIN_BYTES_PER_SECOND = 4_096.0
# The longest that one sender holds a worker thread: the default maximum of 256 MiB at 450 kB/s.
TOTAL_SECONDS = 600.0
MAX_REDIRECTS = 3
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Errors after which a transfer is resumed.
BROKEN = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError)
# Errors of httpcore and of the disk, which become ours.
FAULTS = (*BROKEN, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError)
# Each try must receive some bytes. A network that ends every connection after 13 MB still carries 256 MiB.
MAX_RESUMES = 20
# 404 and 410 too: hosts answer so for signed URLs of removed objects.
EXPIRED = frozenset({401, 403, 404, 410})
# Statuses that mean "later". Another 4xx is the same at every try.
LATER = frozenset({408, 425, 429})
KEPT_HEADERS = ("content-length", "content-type", "etag", "last-modified")
MAX_HEADER_CHARACTERS = 256
# Windows has no EDQUOT.
NO_ROOM = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


@dataclass(frozen=True, kw_only=True)
class Fetched(Media):
    """A fetched file, as its bytes describe it. `size` in bytes, `sha256` as 64 hex digits.

    `host`: the host that sent the bytes. `headers`: those of KEPT_HEADERS that were sent, for display, never trusted.
    `notes`: irregularities of the transfer too.
    """

    size: int
    sha256: str
    headers: dict[str, str] = field(repr=False)
    host: str


class Fetcher:
    """Fetches result files over one pool of connections. Thread-safe.

    `max_bytes`: cap on a file. `trusted_hosts`: where redirects of an unconfirmed link may lead, with their subdomains;
    empty = anywhere. `connections`: at least the number of threads that fetch. The timeouts are for one
    connect, one wait, and one whole fetch including redirects. `resolve`, `dial`, `ssl_context`: seams for tests; the
    defaults are the system's resolver, a TCP connection and `tls_context`. `tunnel`: through which every connection
    goes, see `GuardedBackend`. Proxies of the environment and .netrc are not read, no cookie is kept and no referrer
    sent.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        *,
        max_bytes: int,
        trusted_hosts: Sequence[str] = (),
        connections: int = 16,
        connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
        read_timeout_seconds: float = READ_TIMEOUT_SECONDS,
        min_bytes_per_second: float = MIN_BYTES_PER_SECOND,
        total_seconds: float = TOTAL_SECONDS,
        resolve: connection.Resolve = connection.resolve,
        dial: connection.Dial = connection.dial,
        tunnel: connection.Tunnel | None = None,
        user_agent: str = connection.USER_AGENT,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._trusted = AddressPolicy(result_hosts=tuple(trusted_hosts))
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds
        self._deadline = partial(
            TransferDeadline,
            head_seconds=connect_timeout_seconds + read_timeout_seconds,
            min_bytes_per_second=min_bytes_per_second,
            wait_seconds=read_timeout_seconds,
        )
        self._backend = connection.GuardedBackend(policy, resolve=resolve, dial=dial, tunnel=tunnel)
        self._context = ssl_context or connection.tls_context()
        self._connect_seconds = connect_timeout_seconds
        self._headers = {"User-Agent": user_agent, "Accept": "*/*", "Accept-Encoding": "identity"}
        self._connections = Connections(
            self._connect, most=connections, write_seconds=read_timeout_seconds,
            idle_seconds=connection.KEEPALIVE_SECONDS,
        )  # fmt: skip

    def fetch(
        self,
        url: str,
        sink: BinaryIO,
        *,
        accept_unverified: bool = False,
        trusted_only: bool = False,
        total_seconds: float | None = None,
    ) -> Fetched:
        """Stream `url` into `sink` and describe the file.

        Nothing in the URL is trusted: every connection goes to a checked address. At most 3 redirects are followed,
        each is checked, and none leads from https to http. A broken transfer is resumed within the same deadline if
        the host supports ranges. `sink`: empty, readable, writable, seekable. It is rewound on return; on any error it
        holds an unspecified prefix and the caller discards it. `accept_unverified`: accept a file with a broken
        structure, with `verified` False. `trusted_only`: a redirect to a host that is not trusted raises
        `FetchExpired`; a read of the task then says whether the link is the provider's. `total_seconds`: None, the
        fetcher's own.

        Raises `FetchRefused` (the form of `url`), `AddressRefused` (an address it resolves to), `FetchExpired`,
        `FetchInterrupted`, `FetchUnusable` (`NotAnAsset`, `AssetDamaged`: the bytes), `FetchTooLarge`,
        `SpoolUnavailable`. Messages name hosts, never paths or queries.
        """
        target = check_url(url, self._policy)
        deadline = self._deadline(total_seconds or self._total_seconds)
        try:
            with deadline:
                target, body = self._follow(target, sink, deadline, trusted_only=trusted_only)
            media = media_types.inspect(sink, accept_unverified=accept_unverified)
            sink.seek(0)
        except FAULTS as error:
            _raise_ours(error)
        return Fetched(
            **{**vars(media), "notes": tuple(dict.fromkeys((*body.notes, *media.notes)))},
            size=body.size,
            sha256=body.digest.hexdigest(),
            headers={name: body.headers[name][:MAX_HEADER_CHARACTERS] for name in KEPT_HEADERS if name in body.headers},
            host=target.host,
        )

    def close(self) -> None:
        """Close the kept connections. That of a fetch under way is closed after it."""
        self._connections.close()

    def _follow(
        self, target: Target, sink: BinaryIO, deadline: TransferDeadline, *, trusted_only: bool
    ) -> tuple[Target, Body]:
        """Follow redirects and receive the file; resume it after a broken connection if the host supports ranges."""
        body, redirects = Body(sink, self._max_bytes), 0
        while redirects <= MAX_REDIRECTS:
            before = body.size
            deadline.expect_head()
            try:
                headers = {"Host": target.authority, **self._headers, **body.request_headers()}
                request = Request("GET", (target.scheme, target.host, target.port), target.path, headers)
                with self._connections.get(request) as response:
                    if response.status not in REDIRECTS:
                        if response.status not in (200, 206):
                            raise _refusal(response.status, response.headers, target.host)
                        deadline.expect_body()
                        body.receive(response)
                        return target, body
                    target, redirects = self._redirected(target, response.headers), redirects + 1
                    if trusted_only and not self._trusted.allows(target.host):
                        raise FetchExpired("an unconfirmed link redirects to another host: the task is read first")
            except BROKEN as error:
                if body.validator and body.size > before and body.parts <= MAX_RESUMES:
                    continue
                if body.size and not isinstance(error, httpcore.TimeoutException):
                    raise FetchCut(f"the response broke off after {body.size} bytes") from error
                raise
        raise FetchUnusable(f"more than {MAX_REDIRECTS} redirects, the last one to {target.host}")

    def _connect(self, origin: Origin) -> GuardedStream:
        scheme, host, port = origin
        stream = self._backend.connect_tcp(host, port, self._connect_seconds)
        if scheme == "http":
            return stream
        self._context.set_alpn_protocols(["http/1.1"])
        return stream.start_tls(self._context, host, self._connect_seconds)

    def _redirected(self, target: Target, headers: Mapping[str, str]) -> Target:
        """The checked target of a redirect. A refused one raises `FetchUnusable`, so the link is tried again later: the
        host may be in a passing state (an edge that redirects to itself while it reloads).
        """
        if "location" not in headers:
            raise FetchUnusable(f"{target.host} redirected without a Location")
        try:
            onward = check_url(urljoin(target.url, tidy(headers["location"])), self._policy)
        except ValueError:
            raise FetchUnusable(f"redirect from {target.host} refused: not an absolute http(s) URL") from None
        except FetchRefused as error:
            raise FetchUnusable(f"redirect from {target.host} refused: {error}") from None
        if onward == target:
            raise FetchUnusable(f"{target.host} redirected to the same link")
        # Also refused for a private host, because a result URL can name that host directly.
        if target.scheme == "https" and onward.scheme != "https":
            raise FetchUnusable(f"redirect from {target.host} refused: from https to http")
        return onward


def _refusal(status: int, headers: Mapping[str, str], host: str) -> Exception:
    if status in EXPIRED:
        return FetchExpired(f"{host} answered {status}")
    after = retry_after(headers.get("retry-after"), time.time())
    error = FetchInterrupted if status in LATER or status >= 500 else FetchUnusable
    return error(f"{host} answered {status}", after=after)


def _raise_ours(error: Exception) -> NoReturn:
    """Translate one of FAULTS. The text of a protocol error may quote a header and is dropped."""
    if isinstance(error, httpcore.TimeoutException):
        raise FetchInterrupted(f"timed out ({type(error).__name__})") from error
    if isinstance(error, httpcore.NetworkError):
        raise FetchInterrupted(f"connection broke: {str(error)[:200]}") from error
    if isinstance(error, NotHttp):
        raise FetchUnusable(str(error)) from None
    if not isinstance(error, OSError):
        raise FetchInterrupted("the response broke off") from None
    if error.errno in NO_ROOM:
        raise DiskFull("the disk of the spool folder is full; free space there") from error
    raise error
