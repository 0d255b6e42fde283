"""One transfer: requests a file over a kept connection, checks part, coding and length, hashes and writes the body.

A plain head, as nearly every file has, is matched as a whole; httpcore parses and checks every other one. A body with a
Content-Length is then read from the guarded socket into the spool's memory, and into one buffer a thread if it does not
fit there. httpcore's pool and parser, and fresh memory for each read, made a GET of 3 MB with all its checks cost 8.4
ms of CPU. It costs 5.0 ms now (eight threads, medians of three interleaved rounds on a loaded machine). SHA-256 and
CRC-32 of 3 MB alone take 2.4 ms. A request and its head take 0.12 ms by httpcore and 0.03 plain.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import BinaryIO, NamedTuple

import httpcore

from storage import forks
from storage.errors import FetchTooLarge, FetchUnusable
from storage.fetch import connection, media_types
from storage.fetch.addresses import Target
from storage.gzip_members import decoded
from storage.http_date import http_date
from storage.spool import spool_with_room

# Registered content codings (IANA). Other values say nothing about the bytes: uploaders set `UTF-8` or `aws-chunked`,
# and stores return it.
CODINGS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd", "dcb", "dcz"})
GZIP = frozenset({"gzip", "x-gzip"})
Origin = tuple[str, str, int]
# Headers of every request, beside Host and User-Agent.
SAME = ((b"Accept", b"*/*"), (b"Accept-Encoding", b"identity"))
Block = bytes | memoryview
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", re.I)
# A head that says nothing unusual: few fields, none folded, one Content-Length and no other framing. httpcore would
# find the same in it.
FIELD = rb"(?!(?i:content-length|transfer-encoding):)[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n"
PLAIN_HEAD = re.compile(
    rb"HTTP/1\.1 200(?: [\t -~\x80-\xff]*)?\r\n"
    rb"((?:%b){0,63}(?i:content-length):[ \t]*[0-9]{1,15}[ \t]*\r\n(?:%b){0,63})\r\n" % (FIELD, FIELD)
)
CONNECTION = re.compile(rb"^connection:(.*)\r$", re.I | re.M)
# Any other request is left to httpcore, which refuses it.
PLAIN_REQUEST = re.compile(rb"GET [!-~]+ HTTP/1\.1\r\n(?:[A-Za-z-]+: [!-~]+(?: [!-~]+)*\r\n)+\r\n")


class Response(NamedTuple):
    """One response whose head has been read. `stream`: the connection that its body comes from.

    `headers`: names in lower case. Of several values the last counts. `ends_connection`: whether the host closes the
    connection after this response (RFC 9112 §9.3). `parsed`: by httpcore; None: it had a plain head.
    """

    status: int
    headers: Mapping[str, str]
    ends_connection: bool
    stream: connection.GuardedStream
    parsed: httpcore.Response | None

    def __repr__(self) -> str:
        return f"Response({self.status})"  # a Location may be signed

    def blocks(self, declared: int | None, room: Callable[[], memoryview]) -> Iterator[Block]:
        """The body as sent, each block valid until the next. `declared`: its Content-Length, None = other framing.

        A body with a length is read from the connection; httpcore's parser would copy it twice. `room`: memory for its
        next block, longer than the rest of the body or of READ_BYTES, so that a longer body shows.
        """
        if declared is None:
            assert self.parsed is not None  # a plain head has a length
            yield from self.parsed.iter_stream()
            return
        left = declared
        while left:
            block = self.stream.read_body(room()[: connection.READ_BYTES])
            if not block:
                raise httpcore.RemoteProtocolError("the connection ended before the body")
            yield block[:left]
            left -= min(left, len(block))


class Connections:
    """Connections of one `Fetcher`, each kept for the next request to its scheme, host and port. Thread-safe.

    `most`: of idle ones. Waits are bounded by a `connection.TransferDeadline`. Each head gets a parser of its own;
    httpcore's pool looks at all connections at every request.
    """

    def __init__(
        self,
        backend: connection.GuardedBackend,
        context: ssl.SSLContext,
        *,
        most: int,
        connect_seconds: float,
        user_agent: str,
    ) -> None:
        self._backend = backend
        self._context = context
        self._most = most
        self._connect_seconds = connect_seconds
        self._user_agent = user_agent.encode("ascii")
        self._closed = False
        self.begin_in_child()
        forks.renew_in_children(self)

    def begin_in_child(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Origin, connection.GuardedStream]] = []

    @contextmanager
    def get(self, target: Target, more: list[tuple[bytes, bytes]]) -> Iterator[Response]:
        """Request `target`. At the end the connection is kept if the body has made it `reusable`, else closed."""
        origin = target.scheme, target.host, target.port
        fields = [(b"Host", target.authority.encode()), (b"User-Agent", self._user_agent), *SAME, *more]
        stream, response = self._kept(origin), None
        try:
            if stream is not None:
                try:
                    response = _answer(stream, target, fields)
                except (httpcore.ReadError, httpcore.WriteError, httpcore.RemoteProtocolError):
                    stream.close()  # the host closed it while it was idle, or sent something that is no answer
            if response is None:
                stream = self._connect(target)
                response = _answer(stream, target, fields)
            yield response
        except httpcore.RemoteProtocolError:
            if stream is None or stream.ended:
                raise
            raise FetchUnusable(f"{target.host} sent a response that is not HTTP/1.1") from None
        finally:
            with self._lock:
                if stream and stream.reusable and len(self._idle) < self._most and not self._closed:
                    self._idle.append((time.monotonic() + connection.KEEPALIVE_SECONDS, origin, stream))
                elif stream:
                    stream.close()

    def close(self) -> None:
        """Close the kept connections. One in use is closed after its request."""
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.pop()[2].close()

    def _kept(self, origin: Origin) -> connection.GuardedStream | None:
        """The last kept connection to `origin` that the host has not closed. Those kept too long are closed."""
        with self._lock:
            while self._idle and self._idle[0][0] < time.monotonic():
                self._idle.pop(0)[2].close()
            for each in reversed(self._idle):
                if each[1] == origin:
                    self._idle.remove(each)
                    if not each[2].has_ended():
                        return each[2]
                    each[2].close()
        return None

    def _connect(self, target: Target) -> connection.GuardedStream:
        stream = self._backend.connect_tcp(target.host, target.port, self._connect_seconds)
        if target.scheme == "http":
            return stream
        self._context.set_alpn_protocols(["http/1.1"])
        return stream.start_tls(self._context, target.host, self._connect_seconds)


class _Replay(httpcore.NetworkStream):
    """For httpcore: a connection on which the request has been sent already, and the head was read."""

    def __init__(self, stream: connection.GuardedStream, head: bytes) -> None:
        self._stream = stream
        self._head: bytes | None = head

    def write(self, buffer: bytes, timeout: float | None = None) -> None: ...

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        head, self._head = self._head, None
        return self._stream.read(max_bytes, timeout) if head is None else head

    def close(self) -> None:
        self._stream.close()


def _answer(stream: connection.GuardedStream, target: Target, fields: list[tuple[bytes, bytes]]) -> Response:
    """Send the request and read the head: by ourselves if both are plain, else httpcore reads the same bytes."""
    lines = b"".join([b"%b: %b\r\n" % each for each in fields])
    request = b"GET %b HTTP/1.1\r\n%b\r\n" % (target.path.encode(), lines)
    if not PLAIN_REQUEST.fullmatch(request):
        return _answer_by_httpcore(stream, stream, target, fields)
    with suppress(httpcore.WriteError):  # as httpcore: a host that refuses early answers before it closes
        stream.write(request)
    head = stream.read(connection.HEAD_READ_BYTES)
    if len(head) <= connection.HEAD_READ_BYTES and (plain := PLAIN_HEAD.fullmatch(head)):
        return _response(200, plain[1], stream, None)
    return _answer_by_httpcore(stream, _Replay(stream, head), target, fields)


def _answer_by_httpcore(
    stream: connection.GuardedStream, through: httpcore.NetworkStream, target: Target, fields: list[tuple[bytes, bytes]]
) -> Response:
    scheme, host, path = target.scheme.encode(), target.host.encode(), target.path.encode()
    parser = httpcore.HTTP11Connection(httpcore.Origin(scheme, host, target.port), through)
    url = httpcore.URL(scheme=scheme, host=host, port=target.port, target=path)
    parsed = parser.handle_request(httpcore.Request(b"GET", url, headers=fields))
    return _response(parsed.status, b"".join([b"%b:%b\r\n" % each for each in parsed.headers]), stream, parsed)


def _response(
    status: int, fields: bytes, stream: connection.GuardedStream, parsed: httpcore.Response | None
) -> Response:
    """`fields`: the checked lines of the head. A Location may be UTF-8."""
    lines = fields.decode("utf-8", errors="replace").split("\r\n")[:-1]
    headers = {name.lower(): value.strip(" \t") for name, _, value in [line.partition(":") for line in lines]}
    said = {word.strip() for word in b",".join(CONNECTION.findall(fields)).lower().split(b",")}
    is_old = parsed is not None and parsed.extensions.get("http_version") == b"HTTP/1.0"
    ends_connection = b"close" in said or (is_old and b"keep-alive" not in said)
    return Response(status, headers, ends_connection, stream, parsed)


class Body:
    """One file, from one response, or from several if the connection breaks and the host supports ranges.

    `headers`: of the first response. `digest`: SHA-256 so far. `notes`: harmless irregularities.
    """

    def __init__(self, sink: BinaryIO, max_bytes: int) -> None:
        self._sink = sink
        self._max_bytes = max_bytes
        self._parts, self.size = 1, 0
        self._resumed_by: Mapping[str, str] = {}  # may hold a validator

    def _begin(self, headers: Mapping[str, str], total: int | None, *, is_resumable: bool) -> None:
        """Begin the file, or begin it again."""
        if self.size:
            self._sink.seek(0)
            self._sink.truncate()
        self.size, self._total = 0, total
        self.headers = headers
        self.notes: list[str] = []
        self.digest = hashlib.sha256()
        self._resumed_by = headers if is_resumable else {}

    @property
    def validator(self) -> str | None:
        """With which the rest of the file can be requested after a break; None: it cannot."""
        return _validator(self._resumed_by) if self.size else None

    def request_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that request the rest of the same file, or all of it if it has changed (RFC 9110 §13.1.5)."""
        validator = self.validator
        if validator is None:
            return []
        return [(b"Range", b"bytes=%d-" % self.size), (b"If-Range", validator.encode("latin-1"))]

    def receive(self, response: Response) -> None:
        """Write one response's body into the sink.

        Raises `FetchUnusable`, `FetchTooLarge` and the errors of reading a block.
        """
        headers = response.headers
        declared, coded = _declared_length(headers), bool(_codings(headers))
        if response.status == 206:
            self._begin_part(headers)
        else:  # After a break it is the whole file again, and this host's ranges are not used any more.
            self._begin(headers, declared, is_resumable=declared is not None and not coded and not self.size)
        if (self._total or 0) > self._max_bytes:
            raise FetchTooLarge(f"{self._total} bytes announced, {self._max_bytes} allowed")
        memory = None if "content-encoding" in headers else spool_with_room(self._sink, declared)
        room = connection.read_buffer if memory is None else lambda: memory.free
        blocks = response.blocks(declared, room)
        if "content-encoding" in headers:
            blocks = _decoded(blocks, headers, self.notes)
        for block in blocks:
            self.size += len(block)
            if self.size > self._max_bytes:
                raise FetchTooLarge(f"more than the {self._max_bytes} bytes allowed")
            self.digest.update(block)
            if memory is None:
                self._sink.write(block)
            else:
                memory.keep(len(block))
        if not coded and self._total not in (None, self.size):
            raise FetchUnusable(f"received {self.size} of {self._total} announced bytes")
        stream = response.stream
        if stream.junk_lines:
            self.notes.append(f"{stream.junk_lines} malformed header lines")
        # Otherwise (chunked, or until the end) bytes may remain on the connection, so it is not reused.
        if declared is not None:
            # Only the connection sees a longer body. httpcore refuses a shorter one.
            if stream.body_bytes != declared or stream.has_decrypted_bytes:
                raise FetchUnusable("sent more bytes than its Content-Length says")
            stream.reusable = not response.ends_connection
        if self._parts > 1:
            self.notes.append(f"received in {self._parts} parts")

    def _begin_part(self, headers: Mapping[str, str]) -> None:
        """Check that a 206 continues the file, or is the whole file."""
        part, validator = _part(headers), self.validator
        if validator is not None:
            # A host that ignores If-Range names no validator, or another one.
            same = validator in (headers.get("etag"), headers.get("last-modified"))
            if part is None or part != (self.size, self._total) or not same or _codings(headers):
                raise FetchUnusable("answered 206 with another part than requested")
            self._parts += 1
            return
        if part is None or part[0] != 0:
            raise FetchUnusable("answered 206 with a part that was not requested")
        self._begin(headers, part[1], is_resumable=False)
        self.notes.append("answered 206 with the whole file")


def _part(headers: Mapping[str, str]) -> tuple[int, int] | None:
    """(first byte, size of the whole file) if the part reaches the file's end, else None."""
    found = CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
    first, last, total = (int(number) for number in found.groups()) if found else (0, 0, 0)
    if found is None or last != total - 1 or first > last or _declared_length(headers) not in (None, total - first):
        return None
    return first, total


def _validator(headers: Mapping[str, str]) -> str | None:
    """The validator for resuming, if the host supports ranges: a strong ETag, or a Last-Modified at least one second
    before the Date (RFC 9110 §8.8.2.2)."""
    if headers.get("accept-ranges", "").strip().lower() != "bytes":
        return None
    etag = headers.get("etag", "")
    if etag.startswith('"') and etag.isascii():
        return etag
    modified, date = (http_date(headers.get(name, "")) for name in ("last-modified", "date"))
    if etag or modified is None or date is None:
        return None
    return headers["last-modified"] if date - modified >= 1 else None


def _codings(headers: Mapping[str, str]) -> list[str]:
    words = (word.strip().lower() for word in headers.get("content-encoding", "").split(","))
    return [word for word in words if word in CODINGS]


def _decoded(blocks: Iterator[Block], headers: Mapping[str, str], notes: list[str]) -> Iterator[Block]:
    """The body without its content coding, although none was requested.

    gzip is decoded. A body that begins as a picture is taken as not coded, whatever the header says. After a wrong
    guess the file fails `media_types.inspect`.
    """
    if headers.get("content-encoding", "").strip().lower() in ("", "identity"):
        yield from blocks
        return
    codings, head = _codings(headers), b""
    while codings and len(head) < media_types.HEAD_BYTES and (block := next(blocks, b"")):
        head += block
    blocks = itertools.chain([head], blocks)
    if not codings:
        notes.append("Content-Encoding names no coding")
        yield from blocks
    elif media_types.sniff(head):
        notes.append("coded only according to Content-Encoding")
        yield from blocks
    elif len(codings) == 1 and codings[0] in GZIP:
        notes.append("decoded from gzip")
        yield from decoded(blocks)
    else:
        raise FetchUnusable("sent with a Content-Encoding although none was requested")


def _declared_length(headers: Mapping[str, str]) -> int | None:
    """Content-Length, unless the body is chunked (RFC 9112 §6.3). httpcore has refused malformed values."""
    text = headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and "transfer-encoding" not in headers else None
