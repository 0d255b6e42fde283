"""The gateway's HTTP: Kling's paths, bodies and codes on our server, for clients that change their base URL.

    POST /kling/v1/images/omni-image            create; waits up to 20 s for the provider
    GET  /kling/v1/images/omni-image            list, newest first
    GET  /kling/v1/images/omni-image/{id}       one task, by our task_id or by external_task_id
    GET  /kling/tasks?task_ids=                 up to 20 tasks in Kling's new shape, or by external_task_ids
    GET  /kling/openapi.json                    the OpenAPI document; needs no key

401 no valid key (no body read, no query) · 404/1202 another path or method · 408 a slow body · 413 a long one
429/1302 more at once than the limits allow · 503/5001 the database is down and no row is known to be committed, its
disk has no room for a callback, or the server ends before a duplicate has the first's answer. Everything else as Kling
answers it.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import traceback
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import structlog
from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from receiver.gateway.answers import Refused, Reply, away, bad_parameter, success, too_fast
from receiver.gateway.api_keys import ApiKeys
from receiver.gateway.create_body import PIECE_BYTES, ArrivingBody
from receiver.gateway.creates import CreateRequest, Creates, DuplicateWait, StartedCreate
from receiver.gateway.queries import Queries
from receiver.tasks.create_outcome import CreateOutcome
from storage.errors import DatabaseUnavailable

log = structlog.get_logger()
T = TypeVar("T")

PREFIX = "/kling"
# A base URL that ends with a slash doubles it. Some clients end every path with a slash.
ENDPOINT = re.compile(f"/*{PREFIX}/+v1/+images/+omni-image(?:/(?P<name>.*))?", re.DOTALL)
TASKS = re.compile(f"/*{PREFIX}/+tasks/*")
# The path of a client whose base URL lacks our prefix.
LOST_PREFIX = "/v1/"
OPENAPI = f"{PREFIX}/openapi.json"
# KLING §2: up to 10 pictures of 10 MB in Base64 (4/3), and a mebibyte for the rest.
MAX_BODY_BYTES = 10 * 10 * 2**20 * 4 // 3 + 2**20
# All bodies together: one of the largest beside many ordinary ones. Reading the largest takes 2.3 times its size.
MAX_BODIES_BYTES = 2 * MAX_BODY_BYTES
# The bodies of one client: one of the largest and half of that in others.
CLIENT_BODIES_SHARE = 0.75
# A body has 10 s, like a callback, and one second more for each 256 KiB that arrived: 9 minutes for the largest.
BODY_SECONDS, SLOWEST_BYTES_PER_SECOND = 10.0, 256 * 1024
# How long a client waits for the provider's answer. A later answer is in the row.
PROVIDER_SECONDS = 20.0
# Simultaneous creates. Each waits in a thread of its own, with its row committed. Far above what 5 reads a second and a
# pack of slots allow, far below what a process can hold.
MAX_CREATES = 64
# A client has at most twice as many as are free ("dynamic threshold", Choudhury and Hahne 1998): 43 if it is alone, and
# the next client finds a place.
CLIENT_CREATES_PER_FREE = 2
# Threads for reads and short writes, so that waiting creates do not delay them.
SHORT_THREADS = 8
# Queries of one client at once. One that asked for its list 32 times at once kept all of those threads, and callbacks
# were answered after 95 ms instead of 4 (medians).
CLIENT_QUERIES = 2
# How late a create is refused for its body once PIECE_BYTES of it were read, so that repeating it at once costs little.
# A smaller one is refused at once. A client that waits for this many such refusals may send no further create.
REFUSAL_SECONDS, CLIENT_LATE_REFUSALS = 1.0, 64
POLL_INTERVAL_SECONDS = 0.1
# How long a duplicate waits for the first create's answer after the server began to end. Creates then answer and commit
# it.
TWIN_SECONDS = 2.0


class Gateway:
    """The ASGI application under `/kling`. `close` is called before the server ends.

    `document`: the OpenAPI document (see `receiver.gateway.openapi`).
    """

    def __init__(self, api_keys: ApiKeys, creates: Creates, queries: Queries, document: dict[str, Any]) -> None:
        self._api_keys = api_keys
        self._creates = creates
        self._queries = queries
        self._document = document
        self._short = CapacityLimiter(SHORT_THREADS)
        self._queries_of = defaultdict[str, CapacityLimiter](lambda: CapacityLimiter(CLIENT_QUERIES))
        self._long = CapacityLimiter(MAX_CREATES)
        # By client.
        self._creating, self._body_bytes, self._late_refusals = Counter[str](), Counter[str](), Counter[str]()
        self._sending: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._closes_at = math.inf

    def close(self) -> None:
        """Answer every waiting create, so that the server can end. Called in its event loop.

        The provider has 20 s and the server has 15 s to end. A create that waited longer would be cut off with a 500.
        """
        self._closes_at = time.monotonic() + TWIN_SECONDS
        self._closing.set()

    def join(self) -> None:
        """Wait for the creates that are still at the provider. Called after the server has ended."""
        self._creates.join()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = str(uuid.uuid4())
        reply = await self._reply(Request(scope, receive), request_id)
        headers = {"Retry-After": str(reply.after)} if reply.after else {}
        if reply.http_status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        await JSONResponse(reply.body, reply.http_status, headers)(scope, receive, send)

    async def _reply(self, request: Request, request_id: str) -> Reply:
        try:
            return await self._route(request, request_id)
        except Refused as refused:
            return refused.reply(request_id)
        except DatabaseUnavailable:  # The database has logged it once.
            return away().reply(request_id)
        except Exception:
            log.exception("gateway.request_failed")
            return Refused(500, 5000, "Server internal error").reply(request_id)

    async def _route(self, request: Request, request_id: str) -> Reply:
        path, method = request.scope["path"], request.method
        if (method, path) == ("GET", OPENAPI):
            return Reply(200, self._document)
        if re.match(f"/*{LOST_PREFIX}", path):
            raise Refused(404, 1202, f"The base URL ends with {PREFIX} here: use {PREFIX}{LOST_PREFIX}…")
        client = self._api_keys.client(request.headers.get("authorization", ""))
        sees = self._api_keys.sees(client)
        called = ENDPOINT.fullmatch(path)
        name = (called["name"] or "") if called else ""
        if called and method == "POST" and not name.strip("/"):
            return await self._create(request, client, request_id)
        if called and method == "GET" and not name.strip("/"):
            return success(await self._query(client, self._queries.page, dict(request.query_params), sees), request_id)
        if called and method == "GET":
            return success(await self._query(client, self._queries.one, name, sees), request_id)
        if method == "GET" and TASKS.fullmatch(path):
            asked = dict(request.query_params)
            return success(await self._query(client, self._queries.several, asked, sees), request_id)
        raise Refused(404, 1202, "The requested method is invalid")

    # -- create -------------------------------------------------------------------------------------------------------

    async def _create(self, request: Request, client: str, request_id: str) -> Reply:
        if request.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise Refused(400, 1200, "Request body is compressed: send it without Content-Encoding")
        words = set(request.headers.getlist("idempotency-key"))
        if len(words) > 1:  # A proxy added the second one. Choosing either could pay again if the order changes.
            raise bad_parameter("Idempotency-Key: was sent more than once, with other values; send one")
        if self._late_refusals[client] >= CLIENT_LATE_REFUSALS:
            raise too_fast("API request too fast: too many large requests were refused at once")
        is_large = False
        try:
            with self._room(client) as take:
                body = bytearray()
                try:
                    await _read_body(request, body, take)
                    with self._admitted(client):
                        ask = await self._briefly(self._creates.read, body, client, "".join(words))
                        body.clear()  # the body is as large as the parsed request
                        begun = await self._briefly(self._creates.begin, ask)
                        if not begun.first:
                            return await self._replay(ask, begun, request_id)
                        return await self._send(ask, begun, request_id)
                finally:
                    is_large = len(body) >= PIECE_BYTES
                    body.clear()  # The traceback of a refusal would keep it until the next garbage collection.
        except Refused as refused:
            if is_large:
                await self._wait_to_refuse(client, refused)
            raise

    async def _wait_to_refuse(self, client: str, refused: Refused) -> None:
        """Return after REFUSAL_SECONDS, or when the server ends. The request takes no memory meanwhile."""
        error: BaseException | None = refused
        while error is not None:  # they hold what was parsed
            traceback.clear_frames(error.__traceback__)
            earlier, error.__context__ = error.__context__, None
            error = earlier
        self._late_refusals[client] += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSAL_SECONDS):
                    await self._closing.wait()
        finally:
            self._late_refusals[client] -= 1

    @contextmanager
    def _admitted(self, client: str) -> Iterator[None]:
        """Counts a create once its body has arrived: a head and one byte occupy no place."""
        if self._creating[client] >= CLIENT_CREATES_PER_FREE * (MAX_CREATES - self._creating.total()):
            raise too_fast("API request too fast: too many creates are waiting for the provider")
        self._creating[client] += 1
        try:
            yield
        finally:
            self._creating[client] -= 1

    async def _send(self, ask: CreateRequest, begun: StartedCreate, request_id: str) -> Reply:
        """Wait for the provider, for a limited time or until the server ends. A later refusal changes only the row.

        The row is committed and a worker continues it. From here on an error must not make the client send again.
        """
        outcome_listener = CreateOutcome()
        sending = asyncio.create_task(
            to_thread.run_sync(self._creates.send, begun, outcome_listener, limiter=self._long)
        )
        self._sending.add(sending)
        sending.add_done_callback(self._sent)
        await self._first_of(sending, seconds=PROVIDER_SECONDS)
        if outcome_listener.leave():
            await asyncio.wait({sending})  # the refusal is final once the row has ended
        refusal = None if _failure(sending) else outcome_listener.refusal
        return await self._briefly(self._creates.conclude, ask, begun, refusal, request_id)

    async def _first_of(self, sending: asyncio.Task[None], *, seconds: float) -> None:
        """Return when the create was sent, the time is over, or the server ends."""
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({sending, closing}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()

    def _sent(self, sending: asyncio.Task[None]) -> None:
        self._sending.discard(sending)
        error = _failure(sending)
        if error and not isinstance(error, DatabaseUnavailable):
            log.error("gateway.send_failed", exc_info=error)

    async def _replay(self, ask: CreateRequest, begun: StartedCreate, request_id: str) -> Reply:
        """The first request's answer. If the server ends before there is one, the client may send it again, because its
        key is taken.
        """
        duplicate_wait = DuplicateWait(time.monotonic())
        while True:
            look = partial(self._creates.replay, ask, begun, request_id, duplicate_wait, now=time.monotonic())
            reply = await self._briefly(look)
            if reply is not None:
                return reply
            if time.monotonic() > self._closes_at:
                raise away()
            await asyncio.sleep(POLL_INTERVAL_SECONDS)

    @contextmanager
    def _room(self, client: str) -> Iterator[Callable[[int], None]]:
        """Counts a body's bytes from their arrival until its create is answered."""
        size = 0

        def take(count: int) -> None:
            nonlocal size
            all_bytes, clients_bytes = self._body_bytes.total() + count, self._body_bytes[client] + count
            if all_bytes > MAX_BODIES_BYTES or clients_bytes > MAX_BODIES_BYTES * CLIENT_BODIES_SHARE:
                raise too_fast("API request too fast: too many large requests are in progress")
            self._body_bytes[client] += count
            size += count

        try:
            yield take
        finally:
            self._body_bytes[client] -= size

    async def _query(self, client: str, work: Callable[..., T], *words: Any) -> T:
        async with self._queries_of[client]:
            return await self._briefly(work, *words)

    async def _briefly(self, work: Callable[..., T], *words: Any) -> T:
        return await to_thread.run_sync(work, *words, limiter=self._short)


def _failure(sending: asyncio.Task[None]) -> BaseException | None:
    """The error that ended the create before its row was settled; None if none did so far."""
    return sending.exception() if sending.done() and not sending.cancelled() else None


async def _read_body(request: Request, body: bytearray, take: Callable[[int], None]) -> None:
    """Fill `body` in place. `take` is called with each piece before it is kept. Raises `Refused`, for a body beyond the
    limits of a create's structure before the rest of it arrives.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:12]) > MAX_BODY_BYTES:
        raise _too_long()
    started, arriving = asyncio.get_running_loop().time(), ArrivingBody()
    try:
        async with asyncio.timeout(BODY_SECONDS) as limit:
            async for chunk in request.stream():
                if len(body) + len(chunk) > MAX_BODY_BYTES:
                    raise _too_long()
                take(len(chunk))
                body += chunk
                arriving.check(body)
                limit.reschedule(started + BODY_SECONDS + len(body) / SLOWEST_BYTES_PER_SECOND)
    except TimeoutError:
        raise Refused(408, 1200, "Request body came too slowly") from None
    except ClientDisconnect:
        raise Refused(400, 1200, "Request body ended early") from None


def _too_long() -> Refused:
    return Refused(413, 1201, f"Request body is longer than {MAX_BODY_BYTES} bytes")
