"""`GET /events`: events as they happen, as server-sent events (WHATWG HTML section 9.2), for holders of an API key.

    id: 42                                    continue after it with `Last-Event-ID: 42` or `?after=42`
    event: task.archived
    data: {"specversion":"1.0", …}            a CloudEvent

200 a stream without end, of new events or of those after that number · 400 invalid filter or number · 401 no API key.
`?types=task.*,asset.archived` selects events by name. Where no stream can be served now, the answer is a stream that
ends at once and says when to reconnect: a browser's EventSource never reconnects after a 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import structlog
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from receiver.base.sink_setting import names_matching
from receiver.events.cloudevents import Envelope
from receiver.gateway.answers import Refused
from receiver.gateway.api_keys import ApiKeys
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows import events
from storage.rows.models import Event

log = structlog.get_logger()

# A stream holds one connection and one page of events. Callbacks come first for file descriptors and threads.
MAX_STREAMS = 64
# Events that one query reads. They are dropped once the reader has them; some 100 kB.
PAGE = 100
# Threads that read pages for all streams, and so connections. 64 readers at once left no thread and no core for
# deliveries: acknowledgements took 5 s. Each page is bounded, so a stream waits only for the pages before its own.
THREADS = 4
# One query serves all streams of the process. The provider takes half a minute, so this delay is not noticeable.
POLL_INTERVAL_SECONDS = 0.25
# Proxies close connections that are silent for 30 to 60 s.
HEARTBEAT_SECONDS = 15.0
# No blank line follows these: httpx-sse makes an empty event of each blank line, and simple readers fail on it.
HEARTBEAT = b": still there\n"
RETRY = b"retry: %d\n"
RECONNECT_MILLISECONDS = 2_000
UNAVAILABLE_MILLISECONDS = 5_000
MAX_DIGITS = 18
MEDIA_TYPE = "text/event-stream"


class Stream:
    """The endpoint. Between two pages a reader holds no database connection; it never holds more than one page.

    Where there are several API keys, one key opens at most half of the streams.
    """

    def __init__(self, database: Database, envelope: Envelope, api_keys: ApiKeys) -> None:
        self._database = database
        self._envelope = envelope
        self._api_keys = api_keys
        self._open: list[str] = []  # the client of each open stream
        self._newest = 0
        self._news = asyncio.Event()
        self._polling: asyncio.Task[None] | None = None
        self._is_closing = False
        self._reading: dict[tuple[Any, ...], asyncio.Task[tuple[int, list[bytes]]]] = {}  # by the wanted events
        self._pages, self._looks = CapacityLimiter(THREADS), CapacityLimiter(1)

    async def serve(self, request: Request) -> Response:
        """Answer one GET or HEAD."""
        try:
            client = self._api_keys.client(request.headers.get("authorization", ""))
        except Refused as refused:
            words = f"an API key is needed: {refused.message}"
            return _refusal(401, words, {"WWW-Authenticate": "Bearer"})
        try:
            names = names_matching(_split(request.query_params.getlist("types")))
            asked = _number(request.headers.get("last-event-id") or request.query_params.get("after"))
            newest = await to_thread.run_sync(self._read_newest, limiter=self._looks)
        except ValueError as error:
            return _refusal(400, str(error))
        except DatabaseUnavailable:
            return _unavailable(b"the database is down")
        self._announce(newest)
        if asked is not None and asked > newest:
            return _refusal(400, f"no event has the number {asked} yet; the newest is {newest}")
        if request.method == "HEAD":
            return Response(media_type=MEDIA_TYPE)
        share = MAX_STREAMS // 2 if len(self._api_keys) > 1 else MAX_STREAMS
        if self._is_closing or len(self._open) >= MAX_STREAMS or self._open.count(client) >= share:
            return _unavailable(b"too many streams are open")
        messages = self._messages(newest if asked is None else asked, names, self._api_keys.sees(client))
        return _Response(self, client, messages)

    def close(self) -> None:
        """End every stream, so that the server can stop. Called in its event loop."""
        self._is_closing = True
        self._wake()

    async def _messages(
        self, after: int, names: frozenset[events.EventName], of_client: str | None
    ) -> AsyncIterator[bytes]:
        yield RETRY % RECONNECT_MILLISECONDS
        said_at = asyncio.get_running_loop().time()
        while not self._is_closing:
            news = self._news
            if self._newest <= after:
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await news.wait()
                except TimeoutError:
                    yield HEARTBEAT
                said_at = asyncio.get_running_loop().time()
                continue
            try:
                after, page = await self._page(after, names, of_client)
            except DatabaseUnavailable:
                return  # the reader reconnects where it stopped
            now = asyncio.get_running_loop().time()
            if not page and now >= said_at + HEARTBEAT_SECONDS:
                page = [HEARTBEAT]
            said_at = now if page else said_at
            if page:
                yield b"".join(page)

    async def _page(self, *asked: Any) -> tuple[int, list[bytes]]:
        """One read serves all streams that wait for the same page. Streams that follow live wake together: 32 separate
        reads took 66 ms of CPU per wake-up, one shared read takes 5 ms.
        """
        if asked not in self._reading:
            reading = asyncio.create_task(to_thread.run_sync(self._read_page, *asked, limiter=self._pages))
            self._reading[asked] = reading
            reading.add_done_callback(lambda _: self._reading.pop(asked))
        return await asyncio.shield(self._reading[asked])

    def _read_page(
        self, after: int, names: frozenset[events.EventName], of_client: str | None
    ) -> tuple[int, list[bytes]]:
        """The number of the last event that was read, and the events of these names as messages."""
        with self._database.read() as session:
            found = events.page(session, after, PAGE, names, of_client=of_client)
        return found.until, [self._message(event, subject) for event, subject in found.events]

    def _message(self, event: Event, subject: str | None) -> bytes:
        data = self._envelope.encode(event, subject).decode()
        return f"id: {event.seq}\nevent: {event.name}\ndata: {data}\n\n".encode()

    def _read_newest(self) -> int:
        with self._database.read() as session:
            return events.newest_seq(session)

    def begin(self, client: str) -> None:
        """Count a stream. The first one starts the query that serves all of them."""
        self._open.append(client)
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())

    def end(self, client: str) -> None:
        self._open.remove(client)
        if not self._open and self._polling is not None:
            self._polling.cancel()
            self._polling = None

    async def _poll(self) -> None:
        while not self._is_closing:
            await asyncio.sleep(POLL_INTERVAL_SECONDS)
            try:
                newest = await to_thread.run_sync(self._read_newest, limiter=self._looks)
            except DatabaseUnavailable as error:
                log.debug("stream.database_not_reached", error=str(error))
            except Exception:
                log.exception("stream.failed")
            else:
                self._announce(newest)

    def _announce(self, newest: int) -> None:
        """Wake all waiting streams. A new request may find new events before the poll does."""
        if newest != self._newest:
            self._newest = newest
            self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class _Response(StreamingResponse):
    """Counts as open while it runs."""

    def __init__(self, stream: Stream, client: str, messages: AsyncIterator[bytes]) -> None:
        super().__init__(messages, media_type=MEDIA_TYPE, headers={"X-Accel-Buffering": "no"})
        self._stream = stream
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stream.begin(self._client)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.end(self._client)


def _split(lists: list[str]) -> list[str]:
    return [name.strip() for each in lists for name in each.split(",") if name.strip()]


def _number(text: str | None) -> int | None:
    """An event's number, or its `sequence`, which has leading zeros."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or len(text.lstrip("0")) > MAX_DIGITS:
        raise ValueError("Last-Event-ID must be the number of an event")
    return int(text)


def _unavailable(reason: bytes) -> Response:
    return Response(b": " + reason + b"\n" + RETRY % UNAVAILABLE_MILLISECONDS, media_type=MEDIA_TYPE)


def _refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": reason}, status_code=status, headers=headers)
