"""`GET /events`: facts as they come, as server-sent events (WHATWG HTML §9.2), to holders of an API key.

    id: 42                                    the number to go on from: `Last-Event-ID: 42`, or `?after=42`
    event: task.archived
    data: {"specversion":"1.0", …}            a CloudEvent

200 a stream without end, from now on or after that number · 400 a filter or number that is none · 401 no key of ours
503 as many streams as there may be, or the database is away. `?types=task.*,asset.archived` chooses events by name.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Sequence

import structlog
from pydantic import SecretStr
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from receiver.events.cloudevents import Envelope
from storage.errors import DatabaseUnavailable
from storage.rows import events
from storage.rows.database import Database
from storage.rows.models import Event

log = structlog.get_logger()

# Each holds one connection and one page; the file descriptors and the thread pool are intake's first of all.
MAX_STREAMS = 64
# Read at once and dropped when the reader has them: some 100 kB.
PAGE = 100
# One look-up for all streams of the process together; a delay nobody sees beside the provider's half a minute.
POLL_INTERVAL_SECONDS = 0.25
# Proxies close what is silent for 30 to 60 s.
HEARTBEAT_SECONDS = 15.0
HEARTBEAT = b": still there\n\n"
# How long a reader may leave what was sent to it unread; afterwards it may come back where it was.
SEND_SECONDS = 30.0
# What the reader's client waits before it comes back, in milliseconds.
HELLO = b"retry: 2000\n\n"
RETRY_AFTER_SECONDS = 5
MAX_DIGITS = 18


class Stream:
    """The endpoint. A reader holds no database connection and no more memory than one page while it reads."""

    def __init__(self, database: Database, envelope: Envelope, api_keys: Sequence[SecretStr]) -> None:
        self._database = database
        self._envelope = envelope
        self._keys = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in api_keys]
        self._open = 0
        self._newest = 0
        self._news = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._is_closing = False

    async def serve(self, request: Request) -> Response:
        """Answer one GET or HEAD."""
        if not self._is_permitted(request.headers.get("authorization", "")):
            return _refusal(401, "a key is needed", {"WWW-Authenticate": "Bearer"})
        try:
            names = events.names_matching(_words(request.query_params.get("types", "")))
            asked = _number(request.headers.get("last-event-id") or request.query_params.get("after"))
            newest = await run_in_threadpool(self._look)
            self._see(newest)
            if asked is not None and asked > newest:
                raise ValueError(f"no event has the number {asked} yet, the newest is {newest}")
        except ValueError as error:
            return _refusal(400, str(error))
        except DatabaseUnavailable:
            return _refusal(503, "the database is away", {"Retry-After": str(RETRY_AFTER_SECONDS)})
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if self._open >= MAX_STREAMS or self._is_closing:
            return _refusal(503, "too many streams", {"Retry-After": str(RETRY_AFTER_SECONDS)})
        return _Response(self, self._told(newest if asked is None else asked, names))

    def close(self) -> None:
        """End every stream, so that the server can. Called in its event loop."""
        self._is_closing = True
        self._announce()

    def _is_permitted(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        shown = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # A sum, not any(): how long it takes says nothing about which key matched.
        return scheme.lower() == "bearer" and sum(hmac.compare_digest(shown, known) for known in self._keys) > 0

    # -- the readers' side --------------------------------------------------------------------------------------------

    async def _told(self, after: int, names: frozenset[events.EventName]) -> AsyncIterator[bytes]:
        yield HELLO
        while not self._is_closing:
            news, newest = self._news, self._newest
            if newest <= after:
                if not await _comes(news, HEARTBEAT_SECONDS):
                    yield HEARTBEAT
                continue
            try:
                last, page = await run_in_threadpool(self._page, after, names)
            except DatabaseUnavailable:
                return  # the reader comes back, to a database that is there again or to a 503
            after = max(newest, last) if len(page) < PAGE else last
            for told in page:
                yield told

    def _page(self, after: int, names: frozenset[events.EventName]) -> tuple[int, list[bytes]]:
        """The next events as they are sent, and the number of the last."""
        with self._database.read() as session:
            found = events.after(session, after, PAGE, names)
        last = found[-1][0].seq if found else None
        return last or after, [self._lines(event, subject) for event, subject in found]

    def _lines(self, event: Event, subject: str | None) -> bytes:
        data = self._envelope.encode(event, subject).decode()
        return f"id: {event.seq}\nevent: {event.name}\ndata: {data}\n\n".encode()

    def _look(self) -> int:
        with self._database.read() as session:
            return events.newest_seq(session)

    # -- the one look-out of all readers ------------------------------------------------------------------------------

    def begin(self) -> None:
        self._open += 1
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    def end(self) -> None:
        self._open -= 1
        if self._open == 0 and self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def _watch(self) -> None:
        while not self._is_closing:
            await asyncio.sleep(POLL_INTERVAL_SECONDS)
            try:
                newest = await run_in_threadpool(self._look)
            except DatabaseUnavailable as error:
                log.warning("stream.database_away", error=str(error))
            except Exception:
                log.exception("stream.bug")
            else:
                self._see(newest)

    def _see(self, newest: int) -> None:
        """Whoever looked, all readers that wait are told."""
        if newest != self._newest:
            self._newest = newest
            self._announce()

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class _Response(StreamingResponse):
    """Counts itself, and lets go of a reader that does not read."""

    def __init__(self, stream: Stream, told: AsyncIterator[bytes]) -> None:
        super().__init__(told, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        self._stream.begin()
        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.info("stream.reader_stuck")
        finally:
            self._stream.end()


async def _comes(news: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await news.wait()
    except TimeoutError:
        return False


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _number(text: str | None) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > MAX_DIGITS:
        raise ValueError("Last-Event-ID is the number of an event")
    return int(text)


def _refusal(status: int, words: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": words}, status_code=status, headers=headers)
