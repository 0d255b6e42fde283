"""The sandbox's HTTP server: routes, damaged bodies, the clock that moves tasks, and start and stop.

Routes: POST and GET /v1/images/omni-image (also below /kling), GET /tasks, GET /cdn/…, and to control it GET and POST
/sandbox/knobs, GET /sandbox/ledger, POST /sandbox/reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from receiver.sandbox import cdn
from receiver.sandbox.access import is_loopback, is_own_request
from receiver.sandbox.answers import Answer
from receiver.sandbox.callbacks import Sender
from receiver.sandbox.http_protocol import FaultyHttp
from receiver.sandbox.knobs import Knobs, faults_of
from receiver.sandbox.ledger import Ledger
from receiver.sandbox.world import Download, World

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024 * 1024  # Base64 images
CHUNK_BYTES = 64 * 1024
IDLE_SECONDS = 0.25  # the clock's longest sleep, so that it notices knobs set by another thread
START_SECONDS = 10
STOP_SECONDS = 10
ERROR_PAGE = b"<!DOCTYPE html><html><head><title>Error</title></head><body>Something went wrong</body></html>"
DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>Access denied</Message></Error>'
)


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class Json(Response):
    media_type = "application/json; charset=utf-8"

    def render(self, content: Any) -> bytes:
        return to_json(content)


class Body(Response):
    """A body that may arrive slowly, cut off, or without a length.

    `promised`: the Content-Length, None = chunked. `seconds`: its duration. `cut`: the connection closes without the
    promised end. `done`: called once everything was sent, but not if the client left before.
    """

    def __init__(
        self,
        data: bytes,
        media_type: str,
        *,
        promised: int | None,
        seconds: float = 0,
        cut: bool = False,
        done: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(media_type=media_type)
        self.data, self.promised, self.seconds, self.cut, self.done = data, promised, seconds, cut, done
        self.more: dict[str, str] = {}  # headers besides type and length

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", (self.media_type or "").encode())]
        headers += [(name.encode(), value.encode()) for name, value in self.more.items()]
        if self.promised is not None:
            headers.append((b"content-length", str(self.promised).encode()))
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        request = Request(scope, receive)
        # Slow bodies are sent in at least 50 pieces, each after its share of the time.
        step = min(CHUNK_BYTES, len(self.data) // 50 + 1) if self.seconds else CHUNK_BYTES
        pieces = [self.data[start : start + step] for start in range(0, len(self.data), step)]
        for piece in pieces:
            await asyncio.sleep(self.seconds / len(pieces))
            if await request.is_disconnected():
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not self.cut:  # otherwise uvicorn sees an unfinished answer and closes the connection
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        if self.done:
            self.done()


class Api:
    """The routes. `wake` is set when something may have to be sent."""

    def __init__(self, world: World, wake: asyncio.Event, own_name: str) -> None:
        self.world, self.wake, self.own_name = world, wake, own_name

    def routes(self) -> Iterator[BaseRoute]:
        for prefix in ("", "/kling"):
            base = f"{prefix}/v1/images/omni-image"
            yield Route(base, self.create, methods=["POST"])
            yield Route(base, self.page, methods=["GET"])
            yield Route(base + "/{name:path}", self.one, methods=["GET"])
            yield Route(f"{prefix}/tasks", self.many, methods=["GET"])
        yield Route("/cdn/{file:path}", self.file, methods=["GET"])
        yield Route("/sandbox/knobs", self._own(self.knobs), methods=["GET", "POST"])
        yield Route("/sandbox/ledger", self._own(self.ledger), methods=["GET"])
        yield Route("/sandbox/reset", self._own(self.reset), methods=["POST"])

    def _own(self, control: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Serve a control route, which refuses pages of other sites."""

        async def guarded(request: Request) -> Response:
            headers = request.headers
            if not is_own_request(headers.get("host", ""), headers.get("origin"), self.own_name):
                words = "Host or Origin is not this sandbox's own: ask under the address it listens on"
                return Json({"errors": [{"msg": words}]}, status_code=403)
            return await control(request)

        return guarded

    async def create(self, request: Request) -> Response:
        raw = await request.body()
        origin = f"{request.url.scheme}://{request.url.netloc}"
        answer = await run_in_threadpool(self.world.create, raw, _authorization(request), origin, time.time())
        self.wake.set()
        return await self._answer(answer)

    async def one(self, request: Request) -> Response:
        name = request.path_params["name"]
        return await self._answer(self.world.query(name, _authorization(request), time.time()))

    async def page(self, request: Request) -> Response:
        page, size = request.query_params.get("pageNum", "1"), request.query_params.get("pageSize", "30")
        return await self._answer(self.world.query_page(page, size, _authorization(request), time.time()))

    async def many(self, request: Request) -> Response:
        answer = self.world.query_many(dict(request.query_params), _authorization(request), time.time())
        return await self._answer(answer)

    async def _answer(self, answer: Answer) -> Response:
        if answer.breakage == "html":
            return Response(ERROR_PAGE, media_type="text/html")
        if answer.breakage == "broken":
            data = to_json(answer.body)
            return Body(data[: len(data) // 2], "application/json", promised=len(data), cut=True)
        if answer.breakage == "hang":
            await asyncio.sleep(self.world.knobs.hang_seconds)
        return Json(answer.body, status_code=answer.http_status)

    async def file(self, request: Request) -> Response:
        query = dict(request.query_params)
        download = self.world.download(request.url.path, query, time.time())
        if download is None or download.fault == "403":
            return Response(DENIED, 403, media_type="application/xml")
        if download.redirect:
            # Not RedirectResponse, which would escape a space.
            return Response(status_code=302, headers={"location": download.redirect})
        if download.fault == "503":
            return Response(ERROR_PAGE, 503, media_type="text/html")
        if download.fault == "html":
            return Response(ERROR_PAGE, media_type="text/html")
        if download.fault == "empty":
            return Response(b"", media_type="image/png")
        return await self._picture(download, request.headers.get("range", ""))

    async def _picture(self, download: Download, wanted_range: str) -> Response:
        data = await run_in_threadpool(self.world.gallery.data, download.task, download.name)
        seconds = self.world.knobs.cdn_seconds
        if not download.fault:
            served = cdn.serve(data, self.world.knobs, wanted_range, download.seconds)
            body, promised = served.content[: served.cut], len(served.content)
            done = None if served.cut else partial(self.world.served, download)
            answer = Body(body, "image/png", promised=promised, seconds=seconds, cut=bool(served.cut), done=done)
            answer.status_code, answer.more = served.status, served.headers
            return answer
        half = data[: len(data) // 2]
        whole = len(data) if download.fault == "truncated" else None
        return Body(half, "image/png", promised=whole, seconds=seconds, cut=download.fault != "truncated_silent")

    async def knobs(self, request: Request) -> Response:
        if request.method == "GET":
            return Json(self.world.knobs.model_dump())
        try:
            changes = await request.json()
            return Json(self.world.set(changes, remote=True).model_dump())
        except ValidationError as error:
            return Json({"errors": faults_of(error)}, status_code=400)
        except (ValueError, RecursionError, TypeError, AttributeError, PermissionError) as error:
            return Json({"errors": [{"msg": str(error)}]}, status_code=400)

    async def ledger(self, request: Request) -> Response:
        return Json((await run_in_threadpool(self.world.ledger)).to_json())

    async def reset(self, request: Request) -> Response:
        self.world.reset()
        return Json({})


def _authorization(request: Request) -> str | None:
    return request.headers.get("authorization")


def build_app(world: World, own_name: str) -> Starlette:
    """The ASGI application of one world. Its lifespan runs the clock and sends the callbacks."""
    wake = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        clock = asyncio.create_task(run_clock(world, wake))
        yield
        clock.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await clock

    return Starlette(routes=list(Api(world, wake, own_name).routes()), lifespan=lifespan, max_body_size=MAX_BODY_BYTES)


async def run_clock(world: World, wake: asyncio.Event) -> None:
    """Move tasks at their times and send their reports, until cancelled."""
    sender = Sender()
    try:
        async with asyncio.TaskGroup() as sending:
            while True:
                wake.clear()
                due = await asyncio.to_thread(world.advance, time.time())
                for batch in world.take_callbacks():
                    sending.create_task(sender.send_all(batch, world.knobs))
                pause = IDLE_SECONDS if due is None else min(IDLE_SECONDS, max(0.0, due - time.time()))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), pause)
    except Exception:
        log.exception("sandbox.clock_stopped")  # from now on tasks do not change and no callback is sent
        raise
    finally:
        await sender.close()


class Sandbox:
    """The running server, in a thread of its own or, with `serve`, in the caller's.

    `host`: an address outside loopback is refused unless `knobs.allow_remote_host`. `port`: 0 = any free one, which is
    kept when the sandbox is started again. Its tasks survive stop and start, in memory.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, knobs: Knobs | None = None) -> None:
        self.world = World(knobs or Knobs())
        if not self.world.knobs.allow_remote_host and not is_loopback(host):
            raise ValueError(f"{host} is not a loopback address; allow_remote_host permits it")
        self.host, self.port = host, port
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Its address, known after the start."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def api_key(self) -> str:
        return self.world.knobs.api_keys[0]

    def start(self) -> Self:
        """Run in a daemon thread. Returns once it listens.

        Raises OSError (the port is taken), RuntimeError (it did not start).
        """
        listening = self._listen()
        self._server = self._make_server()
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, name="sandbox", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                listening.close()
                raise RuntimeError("the sandbox did not start")
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """Stop listening, end what is in progress, and wait for the thread. Does nothing if it does not run."""
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join(STOP_SECONDS)
        self._server = self._thread = None

    def serve(self) -> None:
        """Run in the calling thread until SIGINT or SIGTERM."""
        listening = self._listen()
        self._make_server().run(sockets=[listening])

    def set(self, **knobs: Any) -> Knobs:
        """Change knobs while it runs. Raises pydantic.ValidationError for an unknown name or a value out of range."""
        return self.world.set(knobs)

    def ledger(self) -> Ledger:
        """Everything it received and did so far."""
        return self.world.ledger()

    def reset(self) -> None:
        """Forget all tasks and start again from the seed."""
        self.world.reset()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self.host, self.port))
        except OSError:
            listening.close()
            raise
        self.port = int(listening.getsockname()[1])
        return listening

    def _make_server(self) -> uvicorn.Server:
        config = uvicorn.Config(
            build_app(self.world, self.host),
            http=FaultyHttp,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",  # otherwise answers that are cut off on purpose are logged as errors
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        return uvicorn.Server(config)
