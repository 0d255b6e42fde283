"""Fetch one result file: only from where we may, only as much as we may, and only if it is what it claims.

`Fetcher.fetch` streams, hashes and counts in one pass; nothing of the file but one block is in memory. What came is
then looked into (`storage.fetch.media_types`) before anyone may call it an asset.
"""

from __future__ import annotations

import email.utils
import errno
import ssl
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urljoin

import httpcore

from storage.errors import (
    AssetDamaged,
    DiskFull,
    FetchExpired,
    FetchInterrupted,
    FetchRefused,
)
from storage.fetch import connection, media_types
from storage.fetch.addresses import AddressPolicy, Target, check_url, tidy
from storage.fetch.body import Body
from storage.fetch.media_types import Media

USER_AGENT = "kling-receiver"
# A CDN answers a connect within one round trip; 10 s rides out three lost SYNs (1 + 2 + 4 s).
CONNECT_TIMEOUT_SECONDS = 10.0
# Silence after which a sender is given up; object stores close idle transfers after 20 to 60 s themselves.
READ_TIMEOUT_SECONDS = 30.0
# A 3 MB picture below this takes longer than TOTAL_SECONDS anyway.
MIN_BYTES_PER_SECOND = 4_096.0
# The largest file allowed by default (256 MiB) at 450 kB/s; a worker thread is held no longer by one sender.
TOTAL_SECONDS = 600.0
# An idle connection is kept shorter than the 5 s after which common servers close theirs (uvicorn, Node, Apache).
KEEPALIVE_SECONDS = 4.0
MAX_REDIRECTS = 3
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What breaks a transfer on its way; a large file over a bad path goes on from there.
BROKEN = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError)
# Each must have brought something. A path that ends every connection after 13 MB still carries 256 MiB.
MAX_RESUMES = 20
# 404 and 410 as well: signed URLs of removed objects answer so.
EXPIRED = frozenset({401, 403, 404, 410})
# Longer waits are not honoured: resellers delete results after 24 hours.
MAX_RETRY_AFTER_SECONDS = 3_600.0
KEPT_HEADERS = ("content-length", "content-type", "etag", "last-modified")
MAX_HEADER_CHARACTERS = 256
# Nearly every picture (about 3 MB) is held in memory; eight threads then hold 32 MiB at most.
SPOOL_MEMORY_BYTES = 4 * 1024 * 1024
SPOOL_PREFIX = "receiver-spool-"
# Far longer than TOTAL_SECONDS and the put after it: a spool file this old has no owner.
SPOOL_STALE_HOURS = 24.0
# EDQUOT where the system has quotas (not on Windows).
NO_ROOM = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


@dataclass(frozen=True)
class Fetched:
    """What arrived. `size` in bytes, `sha256` as 64 hex digits, `host` the one that sent the bytes.

    `media_type`, `extension`, `width`, `height`: what the bytes themselves say. `verified` False: accepted although
    the structure is broken. `headers`: those of KEPT_HEADERS that came, as sent, to be shown and never trusted.
    `trailing_bytes`: how many follow the picture's end. `notes`: what was odd and did no harm.
    """

    size: int
    sha256: str
    media_type: str
    extension: str
    width: int | None
    height: int | None
    verified: bool
    headers: dict[str, str] = field(repr=False)
    host: str
    trailing_bytes: int = 0
    notes: tuple[str, ...] = ()


class Fetcher:
    """Fetches result files over a pool of connections that all threads share.

    `max_bytes`: cap on a file. `connections`: at least the number of threads that fetch. The timeouts are for one
    connection, one wait and one whole fetch, redirects included. `resolve`, `dial`, `ssl_context` are seams for
    tests; left out, the system's resolver, a TCP connection and the certificate store of certifi are used. The
    environment (proxies, .netrc, certificate paths) is not read, no cookie is kept, no referrer sent.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        *,
        max_bytes: int,
        connections: int = 16,
        user_agent: str = USER_AGENT,
        connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
        read_timeout_seconds: float = READ_TIMEOUT_SECONDS,
        min_bytes_per_second: float = MIN_BYTES_PER_SECOND,
        total_seconds: float = TOTAL_SECONDS,
        resolve: connection.Resolve = connection.resolve,
        dial: connection.Dial = connection.dial,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._user_agent = user_agent.encode("ascii")
        self._timeouts = {
            "connect": connect_timeout_seconds,
            "read": read_timeout_seconds,
            "write": read_timeout_seconds,
            "pool": connect_timeout_seconds,
        }
        self._min_bytes_per_second = min_bytes_per_second
        self._total_seconds = total_seconds
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context or connection.tls_context(),
            max_connections=connections,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=connection.GuardedBackend(policy, resolve=resolve, dial=dial),
        )

    def fetch(self, url: str, sink: BinaryIO, *, accept_unverified: bool = False) -> Fetched:
        """Stream `url` into `sink` and describe what arrived.

        Nothing in the URL is trusted: every connection goes to an address that was checked, at most 3 redirects are
        followed, each checked anew and none from https to http. `sink`: empty, readable, writable and seekable; on
        return it stands at its beginning. On any error it holds an unspecified prefix and the caller discards it.
        A transfer that breaks goes on from there, where its host offers ranges, within the same deadline.
        `accept_unverified`: keep a file whose structure is broken, with `verified` False.

        Raises `FetchRefused` (the form of `url` itself), `AddressRefused` (what its name resolves to), `FetchExpired`,
        `FetchInterrupted`, `FetchTooLarge`, `DiskFull`, `NotAnAsset`, `AssetDamaged`. Messages name hosts, never
        paths or queries.
        """
        target = check_url(url, self._policy)
        pace = connection.TransferDeadline(
            self._total_seconds,
            head_seconds=self._timeouts["connect"] + self._timeouts["read"],
            min_bytes_per_second=self._min_bytes_per_second,
        )
        with connection.with_deadline(pace), _decisions():
            target, body = self._follow(target, sink, pace)
            found = _look_into(sink, accept_unverified=accept_unverified)
            sink.seek(0)
        return Fetched(
            body.size,
            body.sha256,
            found.media_type,
            found.extension,
            found.width,
            found.height,
            found.verified,
            _kept(body.headers),
            target.host,
            found.trailing_bytes,
            tuple(dict.fromkeys((*body.notes, *found.notes))),
        )

    def close(self) -> None:
        """Close every connection; a fetch under way in another thread ends with an error."""
        self._pool.close()

    def _follow(self, target: Target, sink: BinaryIO, pace: connection.TransferDeadline) -> tuple[Target, Body]:
        """Through redirects to the file; where its connection breaks, and its host offers ranges, for the rest."""
        body, redirects, resumes = Body(sink, self._max_bytes), 0, 0
        while redirects <= MAX_REDIRECTS:
            before = body.size
            pace.expect_head()
            try:
                with self._request(target, body.request_headers()) as response:
                    headers = _headers(response)
                    if response.status not in REDIRECTS:
                        _check_status(response.status, headers, target.host)
                        pace.expect_body()
                        stream = response.extensions["network_stream"]
                        body.receive(response.status, headers, response.iter_stream(), stream)
                        return target, body
                    target, redirects = self._redirected(target, headers), redirects + 1
            except BROKEN:
                resumes += 1
                if not body.resumable or body.size <= before or resumes > MAX_RESUMES:
                    raise
        raise FetchInterrupted(f"more than {MAX_REDIRECTS} redirects, the last one to {target.host}")

    @contextmanager
    def _request(self, target: Target, more: list[tuple[bytes, bytes]]) -> Iterator[httpcore.Response]:
        response = self._pool.handle_request(
            httpcore.Request(
                "GET",
                httpcore.URL(
                    scheme=target.scheme.encode(),
                    host=target.host.encode(),
                    port=target.port,
                    target=target.path.encode(),
                ),
                headers=[
                    (b"Host", target.authority.encode()),
                    (b"User-Agent", self._user_agent),
                    (b"Accept", b"*/*"),
                    (b"Accept-Encoding", b"identity"),
                    *more,
                ],
                extensions={"timeout": self._timeouts},
            )
        )
        try:
            yield response
        finally:
            response.close()

    def _redirected(self, target: Target, headers: Mapping[str, str]) -> Target:
        """Where it leads, if we may go there. Where not, the link is asked again later: a redirect is the state its
        host is in (an edge that redirects to itself while it reloads), not the form of the link."""
        if "location" not in headers:
            raise FetchInterrupted(f"{target.host} redirected to nowhere")
        try:
            onward = check_url(urljoin(target.url, tidy(headers["location"])), self._policy)
        except ValueError:
            raise FetchInterrupted(f"redirect from {target.host} refused: not an absolute http(s) URL") from None
        except FetchRefused as error:
            raise FetchInterrupted(f"redirect from {target.host} refused: {error}") from None
        # Not even onto a host listed as private: who may name it can name it in the message itself.
        if target.scheme == "https" and onward.scheme != "https":
            raise FetchInterrupted(f"redirect from {target.host} refused: from https to http")
        return onward


def _look_into(sink: BinaryIO, *, accept_unverified: bool) -> Media:
    try:
        return media_types.inspect(sink)
    except AssetDamaged:
        if not accept_unverified:
            raise
    sink.seek(0)
    sniffed = media_types.sniff(sink.read(media_types.HEAD_BYTES))
    if sniffed is None:  # inspect() has said NotAnAsset then
        raise AssertionError("a damaged asset without a type")
    return Media(*sniffed, width=None, height=None, verified=False)


def _headers(response: httpcore.Response) -> dict[str, str]:
    """Lower-case names; of several values the last. UTF-8 where it is that, for a Location may be."""
    return {name.decode("ascii").lower(): value.decode("utf-8", errors="replace") for name, value in response.headers}


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name][:MAX_HEADER_CHARACTERS] for name in KEPT_HEADERS if name in headers}


def _check_status(status: int, headers: Mapping[str, str], host: str) -> None:
    if status in (200, 206):
        return
    if status in EXPIRED:
        raise FetchExpired(f"{host} answered {status}")
    after = retry_after(headers.get("retry-after", ""), datetime.now(UTC))
    raise FetchInterrupted(f"{host} answered {status}", after=after)


def retry_after(value: str, now: datetime) -> float | None:
    """Seconds that a Retry-After asks for, at most MAX_RETRY_AFTER_SECONDS; None when it asks for nothing readable.

    Both forms: seconds and an HTTP date (RFC 9110 §10.2.3). A time that has passed asks for nothing.
    """
    value = value.strip()
    if value.isascii() and value.isdigit():
        seconds = float(value[:9])
    else:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except (ValueError, TypeError, OverflowError):
            return None
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now.timestamp()
    return min(seconds, MAX_RETRY_AFTER_SECONDS) if seconds > 0 else None


@contextmanager
def _decisions() -> Iterator[None]:
    """Turn what broke into what to do. A protocol error's own text may quote a header, so it is not kept."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise FetchInterrupted(f"timed out ({type(error).__name__})") from error
    except httpcore.NetworkError as error:
        raise FetchInterrupted(f"connection broke: {str(error)[:200]}") from error
    except (httpcore.ProtocolError, httpcore.UnsupportedProtocol):
        raise FetchInterrupted("the answer broke off or is not HTTP/1.1") from None
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull("no room to spool the file") from error
        raise


def spool(directory: Path | None, *, memory_bytes: int = SPOOL_MEMORY_BYTES) -> BinaryIO:
    """Open a file to fetch into: memory up to `memory_bytes`, then disk, below `directory` (None: the system's).

    Closing it removes it. Where the system has nameless files (Linux) a crash leaves nothing behind; elsewhere
    `sweep` finds the name. Use it as a context manager.
    """
    return cast(
        BinaryIO,
        tempfile.SpooledTemporaryFile(
            max_size=memory_bytes, prefix=SPOOL_PREFIX, dir=str(directory) if directory else None
        ),
    )


def sweep(directory: Path | None, *, older_than_hours: float = SPOOL_STALE_HOURS) -> int:
    """Remove spool files that a crash left in `directory` (None: the system's). Returns how many."""
    before = time.time() - older_than_hours * 3_600
    removed = 0
    for path in Path(directory or tempfile.gettempdir()).glob(f"{SPOOL_PREFIX}*"):
        try:
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime < before:
                path.unlink()
                removed += 1
        except OSError:
            continue  # another process was faster, or it is not ours to remove
    return removed
