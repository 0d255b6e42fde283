"""The web application: the paths, the headers of every answer, and the lifespan of the group commit."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from receiver.base.tokens import Tokens
from receiver.providers.base import Provider
from receiver.web.assets import Assets
from receiver.web.callbacks import Callbacks
from receiver.web.event_stream import Stream
from receiver.web.headers import HEADER_PAIRS, SECURITY_HEADERS
from receiver.web.health import Health
from receiver.web.rate_limits import KEYLESS_STATUSES, KeylessAnswers
from storage.accounts.slots import Slots
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.operations import deadlines
from storage.rows.group_commit import GroupCommit
from storage.rows.reports import Schedule

if TYPE_CHECKING:
    from receiver.console.console import Console  # most installations have neither
    from receiver.gateway.gateway import Gateway


# Answered without a key.
KEYLESS_PATHS = ("/healthz", "/readyz", "/kling/openapi.json")
# The first part of every path that is answered.
PLACES = frozenset({"callbacks", "assets", "kling", "events", "console", "healthz", "readyz", "metrics"})


def build(
    database: Database,
    providers: Mapping[str, Provider],
    tokens: Tokens,
    schedule: Schedule,
    *,
    bucket: Bucket | None = None,
    assets: Assets | None = None,
    metrics_token: SecretStr | None = None,
    gateway: Gateway | None = None,
    stream: Stream | None = None,
    slots: Slots | None = None,
    sinks: Collection[str] | None = None,
    console: Console | None = None,
    path_prefix: str = "",
) -> Web:
    """The ASGI application. Its lifespan starts the group commit, and at the end commits and answers what waits.

    `bucket`: its state is part of `/readyz`. `slots`: their limit is part of `/metrics`. `sinks`: see `Health`.
    `assets` answers `/assets`, `gateway` `/kling`, `stream` `/events`, `console` `/console` (with `assets`); each None
    = 404. `path_prefix`: of the public URL, see `Web`. Call the application's `endings` before the server stops.
    """
    database.outages.is_on = True
    group_commit = GroupCommit(database)
    callbacks = Callbacks(database, group_commit, providers, tokens, schedule)
    lead = deadlines.lead_seconds(schedule.result_lifetime_seconds)
    health = Health(
        database, group_commit, callbacks, metrics_token, deadline_seconds=lead, bucket=bucket, slots=slots, sinks=sinks
    )

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        group_commit.start()
        try:
            yield
        finally:
            await group_commit.stop()
            callbacks.close()

    pages = _pages(health, assets, gateway, stream)
    people = None
    if console and assets:
        has_session = console.has_session
        people = _KeylessHeld(console.application(assets.answer), lambda scope, _: not has_session(scope))
    endings = [each.close for each in (gateway, stream, console) if each]
    return Web(callbacks, pages, lifespan, endings, people, path_prefix)


def _pages(health: Health, assets: Assets | None, gateway: Gateway | None, stream: Stream | None) -> ASGIApp:
    pages = Starlette(
        routes=[
            Route("/healthz", health.alive),
            Route("/readyz", health.ready),
            Route("/metrics", health.metrics),
            *([assets.route()] if assets else []),
            *([_mount("/kling", gateway), _mount("/v1", gateway)] if gateway else []),
            *([Route("/events", stream.serve)] if stream else []),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
    )
    pages.router.redirect_slashes = False
    pages.add_middleware(_SecurityHeaders)
    return _KeylessHeld(pages, _is_keyless)


def _is_keyless(scope: Scope, status: int) -> bool:
    return status in KEYLESS_STATUSES or scope["path"] in KEYLESS_PATHS or scope["method"] == "OPTIONS"


class Web(Router):
    """Routes callbacks and the console directly, and everything else through Starlette's middleware.

    Starlette's four layers and its router took a fourth of a callback's time, and a callback needs none of them.
    `endings`: to be called when the server stops, in its event loop. `console`: has headers and error pages of its own.
    `path_prefix`: the path of the public URL (`/pics`); a proxy may pass it on or strip it, and both are answered.
    """

    def __init__(
        self,
        callbacks: Callbacks,
        pages: ASGIApp,
        lifespan: Lifespan[Any],
        endings: list[Callable[[], None]],
        console: ASGIApp | None = None,
        path_prefix: str = "",
    ) -> None:
        route = Route("/callbacks/{provider}/{token}", callbacks)
        routes = [Route("/console", console), Route("/console/{rest:path}", console)] if console else []
        super().__init__([route, *routes], redirect_slashes=False, default=pages, lifespan=lifespan)
        self._callbacks, self._callback_path = callbacks, route.path_regex
        self.endings = endings
        self._prefix = path_prefix.rstrip("/")
        # Below a prefix like `/console` a page of ours may have the same path; a callback never does.
        is_ambiguous = f"{self._prefix}/".split("/")[1] in PLACES
        self._places = frozenset({"callbacks"}) if is_ambiguous else PLACES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._prefix and scope["type"] == "http" and scope["path"].startswith(f"{self._prefix}/"):
            rest = scope["path"][len(self._prefix) :]
            if rest.split("/")[1] in self._places:
                scope = {**scope, "path": rest}
        if scope["type"] == "http" and (named := self._callback_path.match(scope["path"].removesuffix("/"))):
            scope["path_params"] = named.groupdict()
            await self._callbacks(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _mount(path: str, app: ASGIApp) -> Mount:
    """A mount that also matches paths with line breaks, so that the application itself refuses those.

    It also matches a doubled slash before the path, which a base URL that ends with a slash makes.
    """
    mount = Mount(path, app)
    mount.path_regex = re.compile(f"^/*{path}/(?P<path>.*)$", re.DOTALL)
    return mount


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {401: "a token is needed", 404: "not found", 405: "method not allowed"}
    message = messages.get(error.status_code, "refused")
    return JSONResponse({"error": message}, status_code=error.status_code, headers=error.headers)


async def _internal_error(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "internal error"}, status_code=500, headers=SECURITY_HEADERS)


class _KeylessHeld:
    """Holds answers back while many of them need no key. `is_keyless`: of a request, and its answer's status."""

    def __init__(self, app: ASGIApp, is_keyless: Callable[[Scope, int], bool]) -> None:
        self._app, self._is_keyless, self._answers = app, is_keyless, KeylessAnswers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_hold(message: Message) -> None:
            if message["type"] == "http.response.start" and self._is_keyless(scope, message["status"]):
                await self._answers.wait(scope)
            await send(message)

        await self._app(scope, receive, send_or_hold)


class _SecurityHeaders:
    """Adds the security headers to every answer, except those that the endpoint sets itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                added = [pair for pair in HEADER_PAIRS if pair[0] not in own]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
