"""The web application: callbacks in, health and metrics out, and the gateway. Below the handlers all is synchronous."""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import SecretStr
from sqlalchemy import delete, text
from sqlmodel import col
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp, Lifespan

from receiver.base import telemetry
from receiver.base.tokens import Tokens
from receiver.providers.base import Provider
from receiver.web.assets import Assets
from receiver.web.callbacks import Callbacks
from receiver.web.event_stream import Stream
from receiver.web.headers import HEADER_PAIRS, SECURITY_HEADERS
from receiver.web.readiness import Readiness
from storage.accounts.slots import Slots
from storage.archive import continuous_audit
from storage.bucket.availability import BucketAvailability
from storage.bucket.bucket import Bucket
from storage.errors import DatabaseUnavailable
from storage.operations import deadlines, heartbeats, measures, outbox
from storage.rows import migrations
from storage.rows.database import Database
from storage.rows.inbox import Delivery, Inbox, store
from storage.rows.models import Callback
from storage.rows.tasks import Schedule
from storage.states import CallbackState

if TYPE_CHECKING:
    from receiver.console.console import Console  # which, as the next, most installations do without
    from receiver.gateway.gateway import Gateway


class Health:
    """`/healthz`, `/readyz`, `/metrics`."""

    def __init__(
        self,
        database: Database,
        inbox: Inbox,
        callbacks: Callbacks,
        metrics_token: SecretStr | None,
        *,
        deadline_seconds: float,
        bucket: Bucket | None = None,
        slots: Slots | None = None,
    ) -> None:
        self._database = database
        self._bucket = BucketAvailability(bucket) if bucket else None
        self._deadline_seconds = deadline_seconds
        self._slots = slots
        self._inbox = inbox
        self._callbacks = callbacks
        self._readiness = Readiness(self._look)
        self._metrics_token = metrics_token

    async def alive(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while a delivery can be stored; bucket, workers, lateness and deadlines count only with `?strict=1`.

        What deliveries have just met decides before what was looked at: the look may go well where they fail.
        """
        checks = await self._readiness.checks()
        checks["intake"] = "full" if self._inbox.is_full else "ok"
        if self._callbacks.fault is not None:
            checks["database"] = f"the last delivery was not stored: {self._callbacks.fault}"
        fault = any(checks[name] != "ok" for name in ("database", "schema", "intake"))
        degraded = any(word != "ok" for word in checks.values())
        status = 503 if fault or (degraded and request.query_params.get("strict") == "1") else 200
        body: dict[str, Any] = {"status": "unavailable" if fault else "degraded" if degraded else "ok"}
        if self._is_permitted(request):
            body["checks"] = checks
        return JSONResponse(body, status_code=status)

    def _look(self) -> dict[str, str]:
        checks = {}
        if self._bucket is not None:
            checks["bucket"] = self._bucket.state()
        try:
            if (fault := self._callbacks.fault) is None:
                with self._database.write() as session:
                    session.execute(text("SELECT 1"))
            else:
                self._store_one()
                if self._callbacks.fault is fault:  # else another has come meanwhile
                    self._callbacks.fault = None
            behind = migrations.current(self._database) != migrations.head()
            checks |= {"database": "ok", "schema": "behind" if behind else "ok"}
            if not behind:
                checks["workers"] = "ok" if heartbeats.count_alive(self._database) else "none alive"
                checks |= self._lateness()
        except DatabaseUnavailable as error:
            checks |= {"database": str(error), "schema": "unknown"}
        return checks

    def _store_one(self) -> None:
        """Commit a delivery that nobody sent, and its end. A receiver that is not ready is sent none to try with."""
        ours = Delivery("readiness", "push", None, uuid.uuid4().bytes, state=CallbackState.REJECTED)
        with self._database.write() as session:
            store(session, [ours])
            session.execute(delete(Callback).where(col(Callback.delivery_key) == ours.key))

    def _lateness(self) -> dict[str, str]:
        with self._database.read() as session:
            overdue = measures.count_overdue(session)
            near = measures.count_deadline_near(session, self._deadline_seconds)
            dead, gone = measures.count_dead_events(session), outbox.disabled(session)
            faults = continuous_audit.standing(session).faults
        undelivered = [f"{dead} were given up"] if dead else []
        undelivered += [f"sink {name} is disabled" for name in gone]
        return {
            "events": ", ".join(undelivered) or "ok",
            "work": f"{overdue} rows are overdue" if overdue else "ok",
            "deadlines": f"{near} tasks are about to lose files" if near else "ok",
            "audit": f"{faults} faults, see receiver status" if faults else "ok",
        }

    async def metrics(self, request: Request) -> Response:
        if self._metrics_token is None:
            raise HTTPException(404)
        if not self._is_permitted(request):
            raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})
        return Response(await run_in_threadpool(self._metrics), media_type=CONTENT_TYPE_LATEST)

    def _metrics(self) -> bytes:
        try:
            with self._database.read() as session:
                found = measures.measure(session, deadline_seconds=self._deadline_seconds, slots=self._slots)
        except DatabaseUnavailable:
            found = None
        telemetry.update_work_gauges(found.as_dict() if found else None)
        return generate_latest(telemetry.REGISTRY)

    def _is_permitted(self, request: Request) -> bool:
        if self._metrics_token is None:
            return False
        given = request.headers.get("authorization", "").encode()
        return hmac.compare_digest(given, b"Bearer " + self._metrics_token.get_secret_value().encode())


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
    console: Console | None = None,
) -> Web:
    """The ASGI application. Its lifespan starts the inbox and, at the end, commits and answers what is in it.

    `bucket`: whose state `/readyz` shows. `assets`: answers `/assets`; `gateway`: `/kling`; `stream`: `/events`;
    `console`: `/console`, for which it needs `assets`; each None = 404. `slots`: of the account whose limit `/metrics`
    tells. Whoever ends the server calls the application's `endings` first.
    """
    inbox = Inbox(database)
    callbacks = Callbacks(database, inbox, providers, tokens, schedule)
    lead = deadlines.lead_seconds(schedule.result_lifetime_seconds)
    health = Health(database, inbox, callbacks, metrics_token, deadline_seconds=lead, bucket=bucket, slots=slots)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        inbox.start()
        try:
            yield
        finally:
            await run_in_threadpool(inbox.stop)

    pages = Starlette(
        routes=[
            Route("/healthz", health.alive),
            Route("/readyz", health.ready),
            Route("/metrics", health.metrics),
            *([assets.route()] if assets else []),
            *([_below("/kling", gateway), _below("/v1", gateway)] if gateway else []),
            *([Route("/events", stream.serve)] if stream else []),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _bug},
    )
    pages.router.redirect_slashes = False
    pages.add_middleware(_Headers)
    people = console.application(assets.answer) if console and assets else None
    return Web(callbacks, pages, lifespan, [each.close for each in (gateway, stream, console) if each], people)


class Web(Router):
    """Callbacks first, then all the rest: the four layers that Starlette puts around every page cost a callback a
    fifth of its time, and it needs none of them. `endings`: what has to be told that the server ends. `console`: has
    headers and error pages of its own."""

    def __init__(
        self,
        callbacks: Callbacks,
        pages: Starlette,
        lifespan: Lifespan[Any],
        endings: list[Callable[[], None]],
        console: Starlette | None = None,
    ) -> None:
        path = "/callbacks/{provider}/{token}"
        routes = [Route(path, callbacks), Route(path + "/", callbacks)]
        if console is not None:
            routes += [Route("/console", console), Route("/console/{rest:path}", console)]
        super().__init__(routes, redirect_slashes=False, default=pages, lifespan=lifespan)
        self.endings = endings


def _below(path: str, app: ASGIApp) -> Mount:
    """A mount that also takes paths with line breaks in them: what is wrong with those is the application's word."""
    mount = Mount(path, app)
    mount.path_regex = re.compile(f"^{path}/(?P<path>.*)$", re.DOTALL)
    return mount


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {401: "a token is needed", 404: "not found", 405: "method not allowed"}
    message = words.get(error.status_code, "refused")
    return JSONResponse({"error": message}, status_code=error.status_code, headers=error.headers)


async def _bug(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "internal error"}, status_code=500, headers=SECURITY_HEADERS)


class _Headers:
    """Adds the security headers to every answer, except those that the endpoint sets itself."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                added = [pair for pair in HEADER_PAIRS if pair[0] not in own]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
