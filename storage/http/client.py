"""Requests over kept connections, for result files and for the store.

A plain head, as nearly every response has, is matched as a whole; httpcore parses and checks every other one. A body
with a Content-Length is then read from the guarded socket into the caller's memory. httpcore's pool and parser, and
fresh memory for each read, made a GET of 3 MB with all its checks cost 8.4 ms of CPU. It costs 5.0 ms now (eight
threads, medians of three interleaved rounds on a loaded machine). SHA-256 and CRC-32 of 3 MB alone take 2.4 ms. A
request and its head take 0.12 ms by httpcore and 0.03 plain.
"""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import httpcore

from storage import forks
from storage.errors import FetchUnusable
from storage.http.connection import HEAD_READ_BYTES, READ_BYTES, GuardedStream, current_deadline, read_buffer

Origin = tuple[str, str, int]  # scheme, host, port
Block = bytes | memoryview
# A head that says nothing unusual: few fields, none folded, one Content-Length and no other framing. httpcore would
# find the same in it.
FIELD = rb"(?!(?i:content-length|transfer-encoding):)[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n"
PLAIN_HEAD = re.compile(
    rb"HTTP/1\.1 ([2-5][0-9]{2})(?: [\t -~\x80-\xff]*)?\r\n"
    rb"((?:%b){0,63}(?i:content-length):[ \t]*[0-9]{1,15}[ \t]*\r\n(?:%b){0,63})\r\n" % (FIELD, FIELD)
)
CONNECTION = re.compile(rb"^connection:(.*)\r$", re.I | re.M)
# Anything else could be read as another request than it is, as could a line more than there are headers.
PLAIN_REQUEST = re.compile(rb"[A-Z]+ [!-~]+ HTTP/1\.1\r\n(?:[0-9A-Za-z-]+: [ -~]*\r\n)+\r\n")
BODYLESS = frozenset({204, 304})
# A longer body of no interest is not read; its connection is closed. A store's XML is below 1 kB.
MAX_DISCARDED_BYTES = 64 * 1024
# A body arrives in at most this many pieces, and one more for each BYTES_PER_PIECE. A chunk takes httpcore's parser
# 8 µs: at 6 Mbit/s a body in chunks of a byte took all of a processor for as long as it came.
FREE_PIECES, BYTES_PER_PIECE = 1_000, 64


class NotHttp(httpcore.ProtocolError):
    """A response that is not HTTP/1.1. The message names the host."""


class Request(NamedTuple):
    """`headers`: with Host. `body`: makes its blocks, from the beginning at each call."""

    method: str
    origin: Origin
    path: str
    headers: Mapping[str, str]
    body: Callable[[], Iterable[memoryview]] | None = None


class Response(NamedTuple):
    """One response whose head has been read. `stream`: the connection that its body comes from.

    `headers`: names in lower case. Of several values the last counts. `length`: of the body, None = other framing than
    a Content-Length. `ends_connection`: whether the host closes the connection after this response (RFC 9112 §9.3).
    `parsed`: by httpcore; None: it had a plain head.
    """

    status: int
    headers: Mapping[str, str]
    length: int | None
    ends_connection: bool
    stream: GuardedStream
    parsed: httpcore.Response | None

    def __repr__(self) -> str:
        return f"Response({self.status})"  # a Location may be signed

    def blocks(self, room: Callable[[], memoryview] = read_buffer) -> Iterator[Block]:
        """The body as sent, each block valid until the next.

        A body with a length is read from the connection; httpcore's parser would copy it twice. `room`: memory for its
        next block, longer than the rest of the body or of READ_BYTES, so that a longer body shows.
        """
        if self.length is None:
            assert self.parsed is not None  # a plain head has a length
            yield from self.parsed.iter_stream()
            return
        left = self.length
        while left:
            block = self.stream.read_body(room()[:READ_BYTES])
            if not block:
                raise httpcore.RemoteProtocolError("the connection ended before the body")
            yield block[:left]
            left -= min(left, len(block))

    def finish(self) -> bool:
        """After the body: False if more bytes came than its Content-Length says, else the connection may be kept.

        Without a length (chunked, or until the end) bytes may remain on the connection, so it is not.
        """
        is_whole = self.length in (None, self.stream.body_bytes) and not self.stream.has_decrypted_bytes
        self.stream.reusable = is_whole and self.length is not None and not self.ends_connection
        return is_whole

    def discard(self) -> None:
        """Read a short body, so that the connection can be kept."""
        if self.length is not None and self.length <= MAX_DISCARDED_BYTES:
            for _ in self.blocks():
                pass
            self.finish()


class Connections:
    """Connections that are kept for the next request to their origin. Thread-safe.

    `connect`: opens one. `most`: of idle ones, each for at most `idle_seconds`. Waits are bounded by a
    `TransferDeadline`, those to write also by `write_seconds`. Each head gets a parser of its own; httpcore's pool
    looks at all connections at every request.
    """

    def __init__(
        self, connect: Callable[[Origin], GuardedStream], *, most: int, write_seconds: float, idle_seconds: float
    ) -> None:
        self._connect = connect
        self._most = most
        self._write_seconds = write_seconds
        self._idle_seconds = idle_seconds
        self._closed = False
        self.begin_in_child()
        forks.renew_in_children(self)

    def begin_in_child(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Origin, GuardedStream]] = []
        weakref.finalize(self, _close_all, self._idle)

    @contextmanager
    def get(self, request: Request) -> Iterator[Response]:
        """The response. At the end the connection is kept if the body has made it `reusable`, else closed.

        The request is sent a second time if a kept connection turns out to be closed. Raises httpcore's errors and
        `NotHttp`.
        """
        stream, response = self._kept(request.origin), None
        try:
            if stream is not None:
                try:
                    response = self._answer(stream, request)
                except (httpcore.ReadError, httpcore.WriteError, httpcore.RemoteProtocolError):
                    stream.close()  # the host closed it while it was idle, or sent something that is no answer
            if response is None:
                stream = self._connect(request.origin)
                response = self._answer(stream, request)
            yield response
        except httpcore.RemoteProtocolError:
            if stream is None or stream.ended:
                raise
            raise NotHttp(f"{request.origin[1]} sent a response that is not HTTP/1.1") from None
        finally:
            with self._lock:
                if stream and stream.reusable and len(self._idle) < self._most and not self._closed:
                    self._idle.append((time.monotonic() + self._idle_seconds, request.origin, stream))
                elif stream:
                    stream.close()

    def close(self) -> None:
        """Close the kept connections. One in use is closed after its request."""
        with self._lock:
            self._closed = True
            _close_all(self._idle)

    def _kept(self, origin: Origin) -> GuardedStream | None:
        """The last kept connection to `origin` that the host has not closed. Those kept too long are closed."""
        while True:
            with self._lock:
                while self._idle and self._idle[0][0] < time.monotonic():
                    self._idle.pop(0)[2].close()
                found = next((each for each in reversed(self._idle) if each[1] == origin), None)
                if found is None:
                    return None
                self._idle.remove(found)
            if not found[2].has_ended():  # a system call: within the lock, every other thread would wait for it
                return found[2]
            found[2].close()

    def _answer(self, stream: GuardedStream, request: Request) -> Response:
        """Send the request and read the head, by ourselves if it is plain, else httpcore reads the same bytes."""
        lines = "".join([f"{name}: {value}\r\n" for name, value in request.headers.items()])
        head = f"{request.method} {request.path} HTTP/1.1\r\n{lines}\r\n".encode()
        if not PLAIN_REQUEST.fullmatch(head) or head.count(b"\n") != len(request.headers) + 2:
            raise httpcore.LocalProtocolError("the request has a malformed header")
        with suppress(httpcore.WriteError):  # a host that refuses early answers before it closes
            stream.write(head, self._write_seconds)
            if request.body is not None:
                current_deadline().expect_body()
                for block in request.body():
                    stream.write_body(block, self._write_seconds)
        if request.body is not None:
            current_deadline().expect_head()
        answer = stream.read(HEAD_READ_BYTES)
        if len(answer) <= HEAD_READ_BYTES and (plain := PLAIN_HEAD.fullmatch(answer)):
            return _response(request, int(plain[1]), plain[2], stream, None)
        return _answer_by_httpcore(stream, answer, request)


class _Replay(httpcore.NetworkStream):
    """For httpcore: a connection on which the request has been sent already, and the head was read."""

    def __init__(self, stream: GuardedStream, head: bytes) -> None:
        self._stream = stream
        self._head: bytes | None = head

    def write(self, buffer: bytes, timeout: float | None = None) -> None: ...

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        head, self._head = self._head, None
        return self._stream.read(max_bytes, timeout) if head is None else head

    def close(self) -> None:
        self._stream.close()


def _answer_by_httpcore(stream: GuardedStream, head: bytes, request: Request) -> Response:
    scheme, host, port = request.origin[0].encode(), request.origin[1].encode(), request.origin[2]
    parser = httpcore.HTTP11Connection(httpcore.Origin(scheme, host, port), _Replay(stream, head))
    url = httpcore.URL(scheme=scheme, host=host, port=port, target=request.path.encode())
    parsed = parser.handle_request(httpcore.Request(request.method, url, headers=[("Host", host)]))
    return _response(request, parsed.status, b"".join([b"%b:%b\r\n" % each for each in parsed.headers]), stream, parsed)


def _response(
    request: Request, status: int, fields: bytes, stream: GuardedStream, parsed: httpcore.Response | None
) -> Response:
    """`fields`: the checked lines of the head. A Location may be UTF-8."""
    lines = fields.decode("utf-8", errors="replace").split("\r\n")[:-1]
    headers = {name.lower(): value.strip(" \t") for name, _, value in [line.partition(":") for line in lines]}
    said = {word.strip() for word in b",".join(CONNECTION.findall(fields)).lower().split(b",")}
    is_old = parsed is not None and parsed.extensions.get("http_version") == b"HTTP/1.0"
    ends_connection = b"close" in said or (is_old and b"keep-alive" not in said)
    length = 0 if request.method == "HEAD" or status in BODYLESS else declared_length(headers)
    return Response(status, headers, length, ends_connection, stream, parsed)


def declared_length(headers: Mapping[str, str]) -> int | None:
    """Content-Length, unless the body is chunked (RFC 9112 §6.3). httpcore has refused malformed values."""
    text = headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and "transfer-encoding" not in headers else None


def in_few_pieces(blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks of a body. Raises `FetchUnusable` once there are too many for their bytes."""
    size = 0
    for number, block in enumerate(blocks):
        size += len(block)
        if number > FREE_PIECES + size // BYTES_PER_PIECE:
            raise FetchUnusable("sent in too many pieces")
        yield block


def _close_all(idle: list[tuple[float, Origin, GuardedStream]]) -> None:
    while idle:
        idle.pop()[2].close()
