"""uvicorn's HTTP protocol with the deadlines and bounds that it lacks.

uvicorn 0.54 waits for ever for a first byte and for the end of a head, and httptools accepts a head of any size. Here:

- A complete head arrives within 10 s, has at most 16 KiB, and its URL 2 KiB.
- A body has as many bytes as its head or its chunks announce, or its request is refused. A body that no handler reads
  ends its connection.
- A few requests may wait behind the one in progress. Nothing more is read then. A connection with more ends a second
  later.
- A reader of any answer that is 60 s behind the least speed, 32 kB/s, is disconnected.
- Above the connection limit, a connection makes room: first one whose answer is delayed, then the one without progress
  for longest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import httptools
import structlog
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from receiver.tasks.allowance import Allowance
from receiver.web.joined_writes import JoinedWrites, WholeAnswer
from receiver.web.rate_limits import KEYLESS_A_SECOND, MOST_KEYLESS
from receiver.web.reader_speed import ReaderSpeed
from storage.background import CONNECTION

log = structlog.get_logger()

# From connecting to the end of a head, and from a head's first byte to its end. Honest clients send one in one packet.
HEAD_SECONDS = 10.0
# How long an idle connection is kept. A client that sends at the moment we close sees a reset instead of an answer, and
# Go's and Java's clients do not repeat a POST. So the client has to close first: the JDK's client does after 30 s,
# nginx and AWS's load balancers after 60 s, Traefik after 90 s. Apache's, which Kling uses, keeps a connection as long
# as we do, but checks whether it was closed once it has idled for 2 s.
KEEP_ALIVE_SECONDS = 120
# The recorded heads are under 1 kB; proxies add a few hundred bytes.
MAX_HEAD_BYTES = 16 * 1024
MAX_URL_BYTES = 2 * 1024
# A header of four bytes takes some 150 bytes of memory. Apache allows as many headers.
MAX_HEADERS = 100
# Framing is head, chunk sizes, chunk extensions and trailers. It may have MAX_HEAD_BYTES, and this much for each byte
# of body. A chunk of one byte has five bytes of framing.
FRAMING_PER_BODY_BYTE = 8
# Requests that may wait behind the one in progress, each some 4 kB and 15 µs. No client we know pipelines. uvicorn
# keeps every request of one read, up to 2,400, and reads again after each answer.
MAX_PIPELINED = 4
# How long a connection with more requests is kept before it is answered and closed, and any other that is refused while
# there are many. Without this delay twenty senders that reconnect at once took 40 % of a processor.
TARPIT_SECONDS = 1.0
# Heads in the first bytes are counted before they are parsed. Counting them in 256 KiB takes as long as parsing five.
HEAD_END, FLOOD_BYTES = b"\r\n\r\n", 4 * 1024
# The limit of a connection's buffer for an answer that its client does not read. uvloop's own limit, 64 KiB, adds up to
# 268 MB.
WRITE_BUFFER_BYTES = 16 * 1024
# Far more than a provider opens at once. `max_connections` is lower if there are fewer file descriptors.
MAX_CONNECTIONS = 4_096

_ANSWERS = {
    400: b"HTTP/1.1 400 Bad Request\r\n",
    408: b"HTTP/1.1 408 Request Timeout\r\n",
    411: b"HTTP/1.1 411 Length Required\r\n",
    414: b"HTTP/1.1 414 URI Too Long\r\n",
    429: b"HTTP/1.1 429 Too Many Requests\r\n",
    431: b"HTTP/1.1 431 Request Header Fields Too Large\r\n",
}


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Flow(FlowControl):
    """Pauses reading while requests wait behind the one in progress, and for good after `end_reading`."""

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline
        self._has_ended = False

    def resume_reading(self) -> None:
        if not self._pipeline and not self._has_ended:
            super().resume_reading()

    def end_reading(self) -> None:
        self._has_ended = True
        self.pause_reading()


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. All connections of the process are in four queues, those without progress for longest first.

    `_refused`: it is to be answered and closed. `_held`: its answer is delayed. `_waiting`: we wait for the client, to
    send a head or body or to read an answer. `_working`: a handler is at work. They make room in this order.
    """

    _refused: dict[BoundedHttpProtocol, None] = {}  # noqa: RUF012 - shared by all connections on purpose
    _held: dict[BoundedHttpProtocol, None] = {}  # noqa: RUF012
    _waiting: dict[BoundedHttpProtocol, None] = {}  # noqa: RUF012
    _working: dict[BoundedHttpProtocol, None] = {}  # noqa: RUF012
    _prompt = Allowance(KEYLESS_A_SECOND, MOST_KEYLESS)  # refusals that are not delayed
    max_connections = MAX_CONNECTIONS  # for this process, derived from its file descriptors
    flow: _Flow
    _timer: asyncio.TimerHandle  # of a head, and of the delay of a refusal

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._queue: dict[BoundedHttpProtocol, None] | None = None  # the one that it is in
        self._framing_bytes = self._header_bytes = self._announced = self._delivered = 0
        self._in_body = False
        self._refusal: int | None = None
        self._keeps_alive = True
        self._speed: ReaderSpeed | None = None  # of the answers in progress, once bytes wait for their reader
        self._in_work: RequestResponseCycle | None = None
        self._not_begun: asyncio.Task[None] | None = None  # the handler of a request in the bytes that are being read
        self._extensions: dict[str, Any] = {CONNECTION: self}

    def shutdown(self) -> None:
        self._keeps_alive = False  # the end of a body under way would restore it and delay the shutdown
        super().shutdown()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = JoinedWrites(transport, self.loop)  # type: ignore[assignment]
        self.flow = _Flow(transport, self.pipeline)
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self._timer = self.loop.call_later(HEAD_SECONDS, self._refuse, 408)
        self._note_progress()
        if len(self.connections) > min(MAX_CONNECTIONS, self.max_connections):
            self._make_room()

    def _make_room(self) -> None:
        longest = next(iter(self._refused or self._held or self._waiting))
        if longest is self and self._working:
            longest = next(iter(self._working))
        longest._enter(None)
        longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if self._speed is not None:
            self._speed.close()
        self._enter(None)
        if self._in_work is not None and not self._in_work.response_complete:
            self._in_work.disconnected = True
            self._in_work.message_event.set()
        super().connection_lost(exc)
        # Without these references the object is freed at once. With a thousand lost connections a second,
        # collections held up the event loop for 40 ms.
        self._extensions.clear()
        if not self._has_request:
            self._in_work = self.cycle = None  # type: ignore[assignment]

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Remember the request whose answer is in progress. uvicorn informs only the newest request that the client has
        left, and keeps no handler by which to cancel one.
        """
        self._in_work = cycle
        cycle.scope["extensions"] = self._extensions
        self._not_begun = task = self.loop.create_task(cycle.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def take_body(self) -> tuple[bytes, bool]:
        """What has arrived of the body in progress, and whether to await more."""
        cycle = self._in_work
        assert cycle is not None
        body, cycle.body = bytes(cycle.body), bytearray()
        return body, cycle.more_body

    def send_whole(self, answer: WholeAnswer) -> bool:
        """Answer the request in progress. False: its client does not read, and `send` waits for it."""
        cycle = self._in_work
        assert cycle is not None and not cycle.response_started
        if self.flow.write_paused or cycle.disconnected:
            return False
        cycle.response_started = cycle.response_complete = True
        own = b"".join([b"%s: %s\r\n" % pair for pair in cycle.default_headers])
        end = b"" if cycle.keep_alive else b"connection: close\r\n"
        self.transport.writelines((answer.start, own, answer.fields, end, answer.body))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def abort(self) -> None:
        self.transport.abort()

    @contextmanager
    def hold(self) -> Iterator[None]:
        if self in self._waiting or self in self._working:  # it is neither lost nor refused
            self._enter(self._held)
        try:
            yield
        finally:
            if self in self._held:
                self._enter(None)
                self._note_progress()

    def _enter(self, queue: dict[BoundedHttpProtocol, None] | None) -> None:
        """Move to the end of a queue. None: leave all."""
        if self._queue is not None:
            del self._queue[self]
        self._queue = queue
        if queue is not None:
            queue[self] = None

    def _note_progress(self) -> None:
        """Move to the end of the queue for the connection's present state."""
        if self not in self._refused and self not in self._held:
            is_working = self._has_request and not self._in_body and not self.flow.write_paused
            self._enter(self._working if is_working else self._waiting)

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        begins, before = not self._in_body, self.cycle
        self._framing_bytes += len(data)
        self._not_begun = None
        self._unset_keepalive_if_required()
        if data.startswith(b"GET ") and not self._in_body and data.count(HEAD_END, 0, FLOOD_BYTES) > MAX_PIPELINED + 1:
            self._drop_waiting()  # to parse the first five took a third of such a connection's time
            self._refuse(429)
            return
        try:
            self._feed_parser(data)
        except httptools.HttpParserError as error:
            cause = error.__context__  # of an error in one of our methods
            self._refuse(cause.status if isinstance(cause, _Refused) else 400)
        else:
            if self._framing_bytes > MAX_HEAD_BYTES + FRAMING_PER_BODY_BYTE * self._delivered:
                self._refuse(400 if self._in_body else 431)
            elif self._timer.cancelled():
                self._note_progress()
                if begins and self.cycle is before:  # a part of the next head on a kept connection
                    self._timer = self.loop.call_later(HEAD_SECONDS, self._refuse, 408)

    def _feed_parser(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = self._head_without_offer() + data[offer.args[0] :]

    def _head_without_offer(self) -> bytes:
        """The head that offers to upgrade, for a fresh parser: Java's HttpClient and `curl --http2` offer h2c at first.

        llhttp ends the message after the head of an offer and treats the body as another protocol. So a fresh parser
        reads it again without its `Upgrade` field, then the rest.
        """
        fields = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        head = b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(fields))
        self._header_bytes = 0
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return head

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            raise _Refused(431)
        if not self._in_body:  # trailers are dropped: the handler may be reading the headers
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _Refused(400)  # the bytes after it belong to a tunnel, whatever its length says
            return  # `_feed_parser` feeds this head again
        self._timer.cancel()
        if len(self.url) > MAX_URL_BYTES:
            raise _Refused(414)
        if len(self.pipeline) >= MAX_PIPELINED:
            self._drop_waiting()
            raise _Refused(429)
        fields = dict(self.headers)
        if self.parser.get_method() == b"POST" and not fields.keys() & {b"content-length", b"transfer-encoding"}:
            raise _Refused(411)  # RFC 9112 section 6.3 would make its body empty, whatever was sent
        # -1: unknown until the last chunk.
        self._announced = -1 if b"transfer-encoding" in fields else int(fields.get(b"content-length", 0))
        if not self._has_request and not self.flow.write_paused:
            self._speed = None  # a new answer begins
        super().on_headers_complete()
        self._in_body = True
        # An answer before the body's end says `close`: the client stops sending.
        self._keeps_alive, self.cycle.keep_alive = self.cycle.keep_alive, False

    def _drop_waiting(self) -> None:
        """Begin none of the waiting requests, so that a sender above the limit costs less than one within it."""
        self.pipeline.clear()
        if self._not_begun is not None:
            self._not_begun.cancel()
            self.cycle = self._in_work = None  # type: ignore[assignment]
        elif self._in_work is not None:
            self.cycle = self._in_work

    def on_body(self, body: bytes) -> None:
        self._delivered += len(body)
        self._framing_bytes -= len(body)
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        self._announced = self._delivered

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if self._delivered != self._announced:
            raise _Refused(400)  # llhttp ended the body early; a part must not pass for the whole
        self._in_body = False
        self._framing_bytes = self._header_bytes = self._delivered = 0
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = self._keeps_alive
        super().on_message_complete()

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        if is_last and self._refusal is not None:
            self._close_with(self._refusal)
        elif is_last and self.cycle is not None and self.cycle.more_body:
            self.transport.close()  # answered before the body ended: no handler reads the rest
        super().on_response_complete()
        if self.parser is None:
            return  # already lost; uvicorn informs only the newest of several requests
        if self.transport.is_closing():
            self._measure_reader()
        self._note_progress()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._measure_reader()
        self._note_progress()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._speed is not None:
            self._speed.stop()
        if self.transport.is_closing():
            self._measure_reader()  # what is still buffered
        self._note_progress()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._measure_reader()

    def _measure_reader(self) -> None:
        """From now on bytes wait for the reader."""
        if self._speed is None:
            self._speed = ReaderSpeed(self.loop, self.transport, self._drop)
        self._speed.start()

    def _drop(self) -> None:
        log.info("web.reader_disconnected", client=self.client and self.client[0])
        self.transport.abort()

    def _refuse(self, status: int) -> None:
        """Answer with `status` and close, after the answers to all earlier requests."""
        self._timer.cancel()
        if self.transport.is_closing():
            return
        if self._in_body and self.pipeline:
            self.pipeline.popleft()  # this request; its handler has not started
        elif self._in_body or not self._has_request:
            self._close_with(status)
            return
        self._refusal = status
        self.flow.end_reading()
        self._note_progress()  # an earlier request in the same bytes is in work

    def _close_with(self, status: int) -> None:
        is_late = self in self._refused
        if not is_late and (status == 429 or self._prompt.is_spent):
            self.flow.end_reading()
            self._enter(self._refused)
            self._timer = self.loop.call_later(TARPIT_SECONDS, self._close_with, status)
        elif not self.transport.is_closing():
            if not is_late:
                self._prompt.spend(1)
            if not (self._has_request and self.cycle.response_started):  # it would seem to be a part of that answer
                self.transport.write(_ANSWERS[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()
            self._measure_reader()
