"""The front door: uvicorn's HTTP protocol with the deadlines and bounds that it leaves open.

uvicorn 0.54 waits for ever for a first byte and for the end of a header, and httptools reads a header of any size.
Here each connection has 10 s for a complete head, a head has 16 KiB, a URL 2 KiB; a body nobody reads ends its
connection; and above the connection limit the one whose client has kept us waiting for longest makes room.
A body has as many bytes as its head or its chunks announce, else its request is refused. A few requests may wait behind
the one in work, then nothing is read; and an answer of which its client takes nothing for a minute is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# First byte to end of head, and also the first byte itself. An honest client sends both in one packet.
HEAD_SECONDS = 10.0
# How long a kept connection may idle. Whoever reuses one in the moment we close it sees a reset instead of an answer,
# and neither Go's nor Java's client sends a POST again: so the other side has to hang up first. Idle connections are
# closed by the JDK's client after 30 s, by nginx and AWS's balancers after 60 s, by Traefik after 90 s. Apache's, which
# Kling uses, keeps them for as long as we do, but looks whether one is closed that has idled for two seconds.
KEEP_ALIVE_SECONDS = 120
# The recorded heads are under 1 kB; proxies add a few hundred bytes.
MAX_HEAD_BYTES = 16 * 1024
MAX_URL_BYTES = 2 * 1024
# A header of four bytes takes some 150 in memory. Apache allows as many.
MAX_HEADERS = 100
# All that surrounds a body (head, sizes of chunks and what is appended to them, trailers) may have as many bytes as a
# head and so many for each byte of the body. A chunk of one byte has five around it.
FRAMING_PER_BODY_BYTE = 8
# Requests that wait behind the one in work, each of them some 4 kB. No client that is known to us sends a second one
# before it has its answer; uvicorn keeps all that one read brings, 2,400, and reads again after each answer.
MAX_PIPELINED = 8
# An answer that makes no progress for so long is given up; nginx's `send_timeout` is as long. The kernel takes more
# from us when a third of its buffer is free, so that a slow line makes progress in steps.
WRITE_SECONDS = 60.0
# Of answers that nobody takes a connection keeps about so much. uvloop's own limit, 64 KiB, is 268 MB for all of them.
WRITE_BUFFER_BYTES = 16 * 1024
# Far above what a provider opens at once. With fewer file descriptors `max_connections` is lower.
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
    """Reads nothing while requests wait behind the one in work, and nothing more after `end_reading`."""

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline
        self._is_at_end = False

    def resume_reading(self) -> None:
        if not self._pipeline and not self._is_at_end:
            super().resume_reading()

    def end_reading(self) -> None:
        self._is_at_end = True
        self.pause_reading()


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. It stands in one of two queues, those without progress for longest first.

    `_waiting`: for their clients, that is for a head, for a body or for an answer to be taken. `_working`: the others.
    """

    _waiting: dict[BoundedHttpProtocol, None] = {}  # noqa: RUF012 - one for all connections of the process, on purpose
    _working: dict[BoundedHttpProtocol, None] = {}  # noqa: RUF012
    max_connections = MAX_CONNECTIONS  # of this process, for which there are descriptors
    flow: _Flow

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._framing_bytes = 0
        self._header_bytes = 0
        self._in_body = False
        self._refusal: int | None = None
        self._announced = self._delivered = 0
        self._keeps_alive = True

    def shutdown(self) -> None:
        self._keeps_alive = False  # else the end of a body under way would bring it back, and hold up our end
        super().shutdown()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self._await_head()
        if len(self.connections) > min(MAX_CONNECTIONS, self.max_connections):
            self._make_room()

    def _make_room(self) -> None:
        longest = next(iter(self._waiting))
        if longest is self and self._working:
            longest = next(iter(self._working))
        longest._leave_queues()
        longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_write()
        self._leave_queues()
        super().connection_lost(exc)

    def _leave_queues(self) -> None:
        self._waiting.pop(self, None)
        self._working.pop(self, None)

    def _has_moved(self) -> None:
        """To the end of its queue."""
        self._leave_queues()
        is_ours = self._is_at_work and not self._in_body and not self.flow.write_paused
        (self._working if is_ours else self._waiting)[self] = None

    @property
    def _is_at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        if self._head_timer is None and not self._in_body:
            self._await_head()  # the first bytes of the next request on a kept connection
        self._framing_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._refuse(cause.status if isinstance(cause, _Refused) else 400)
        except httptools.HttpParserError:
            self._refuse(400)
        else:
            if self._framing_bytes > MAX_HEAD_BYTES + FRAMING_PER_BODY_BYTE * self._delivered:
                self._refuse(400 if self._in_body else 431)

    def _parse(self, data: bytes) -> None:
        """Pass over offers to upgrade: Java's HttpClient and `curl --http2` offer h2c with each first request.

        llhttp ends the message at the head of an offer and takes its body for bytes of another protocol. The offer is
        known when its head ends, so a fresh parser reads that head again without the `Upgrade` field, then the rest.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                fields = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
                start = b"%s %s HTTP/%s\r\n" % (
                    self.parser.get_method(), self.url, self.parser.get_http_version().encode()
                )  # fmt: skip
                data = start + b"".join(fields) + b"\r\n" + data[offer.args[0] :]
                self._header_bytes = 0
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            else:
                return

    def on_url(self, url: bytes) -> None:
        if len(self.url) + len(url) > MAX_URL_BYTES:
            raise _Refused(414)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            raise _Refused(431)
        if not self._in_body:  # a trailer is no header: the handler may be at work on those
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _Refused(400)  # what follows is a tunnel's, whatever its length says
            return  # `_parse` comes back with this head
        self._end_head()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _Refused(429)
        self._announce()
        super().on_headers_complete()
        self._in_body = True
        if self.cycle is not None:  # an answer before the body's end says that it closes, and no client sends on
            self._keeps_alive, self.cycle.keep_alive = self.cycle.keep_alive, False
        self._has_moved()

    def _announce(self) -> None:
        """How long the body is going to be. -1: not known before its chunks end."""
        fields = dict(self.headers)
        self._announced = -1 if b"transfer-encoding" in fields else int(fields.get(b"content-length", 0))
        if self.parser.get_method() == b"POST" and not fields.keys() & {b"content-length", b"transfer-encoding"}:
            raise _Refused(411)  # without a length its body is empty (RFC 9112 section 6.3), whatever its sender meant

    def on_body(self, body: bytes) -> None:
        self._delivered += len(body)
        self._framing_bytes -= len(body)
        self._has_moved()
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        self._announced = self._delivered

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if self._delivered != self._announced:
            raise _Refused(400)  # llhttp has ended the body early: what is there must not be taken for all of it
        self._in_body = False
        self._framing_bytes = self._header_bytes = self._delivered = 0
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = self._keeps_alive
        super().on_message_complete()
        self._has_moved()

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        if is_last and self._refusal is not None:
            self._end_with(self._refusal)
        elif is_last and self.cycle is not None and self.cycle.more_body:
            self.transport.close()  # answered before its body ended: nobody will read the rest
        super().on_response_complete()
        if self.parser is None:
            return  # lost already: uvicorn tells only the newest of several requests
        if self.transport.is_closing():
            self._await_write()
        self._has_moved()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_write()
        self._has_moved()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_write()
        if self.transport.is_closing():
            self._await_write()  # for the rest
        self._has_moved()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_write()

    def _await_write(self) -> None:
        """Give the connection up if nothing more of what is to be sent has been taken when the time is over."""
        self._end_write()
        left = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._look_at_write, left)

    def _look_at_write(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._await_write()
        else:
            self.transport.abort()

    def _end_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._refuse, 408)
        self._has_moved()  # a kept one has waited for its first byte; now it waits for the rest

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int) -> None:
        """Answer so and close, once all requests before this one are answered."""
        self._end_head()
        if self.transport.is_closing():
            return
        if self._in_body and self.pipeline:
            self.pipeline.popleft()  # this request: its handler has not begun
        elif self._in_body or not self._is_at_work:
            self._end_with(status)
            return
        self._refusal = status
        self.flow.end_reading()

    def _end_with(self, status: int) -> None:
        if not self.transport.is_closing():
            if not (self._is_at_work and self.cycle.response_started):  # else it would be taken for a part of that
                self.transport.write(_ANSWERS[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()
            self._await_write()
