"""The console's ASGI application: login, languages, static files, and the guard before every page.

request ─▶ session? ─▶ POST: may act? same site? CSRF token? bounded body ─▶ page function, in a thread ─▶ headers
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import mimetypes
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import structlog
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from receiver.base.forms import Upload, address_of, came_from, cookie, own_path, parse_form
from receiver.console import catalogue
from receiver.console.access import COOKIE, SESSION_SECONDS, Access, LoginThrottle, Session
from receiver.console.needs import Needs
from receiver.console.shared_pages import SharedPages
from receiver.console.visit import HERE, Notices, Visit, environment, render, versions
from storage.background import abort
from storage.errors import DatabaseUnavailable, StoreUnavailable
from storage.filters import FilterInvalid, given_twice

log = structlog.get_logger()

HOME, LOGIN = "/console", "/console/login"
LANGUAGE_COOKIE = "receiver_console_language"
YEAR_SECONDS = 365 * 86_400
MAX_FORM_BYTES = 64 * 1024
BODY_SECONDS = 60.0
# Strangers send these, so they are as short as a browser sends them.
MAX_LOGIN_BYTES, LOGIN_SECONDS = 4_096, 10.0
# Threads for pages alone, so that slow pages delay neither health nor assets nor the gateway.
THREADS = 8
# Fields of an address that a page says it does not understand.
SHOWN_FAULTS = 10
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
PageFunction = Callable[[Visit], Response]


class Policy:
    """The Content-Security-Policy: pages load only our own files and, if presigned links work for readers, pictures
    from the store. `origin_of_links` is determined once, because it needs the store's credentials.
    """

    def __init__(self, origin_of_links: Callable[[], str | None]) -> None:
        self._origin_of_links, self._is_known = origin_of_links, False
        self.header = _policy("'self'")

    def learn(self) -> None:
        if not self._is_known:
            try:
                origin = self._origin_of_links()
            except (DatabaseUnavailable, StoreUnavailable):  # pages are shown without its pictures, with a notice
                return
            self.header, self._is_known = _policy(f"'self' {origin}" if origin else "'self'"), True


def _policy(pictures: str) -> str:
    return (
        f"default-src 'none'; img-src {pictures}; media-src {pictures}; style-src 'self'; script-src 'self'; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )


class Guard:
    """Wraps page functions as endpoints that need a session. `tick`: grows with every change."""

    def __init__(self, access: Access, policy: Policy, needs: Needs, tick: Callable[[], int]) -> None:
        self.access, self.policy = access, policy
        self.templates = environment()
        self.notices = Notices()
        self._needs = needs
        self._shared = SharedPages(tick)
        self.threads = CapacityLimiter(THREADS)

    def page(self, path: str, function: PageFunction) -> Route:
        """A page of HTML. Consoles that update it share one rendering."""
        return Route(path, self._endpoint(function, max_bytes=0, is_shared=True), methods=["GET"])

    def file(self, path: str, function: Callable[[Visit], Response | Awaitable[Response]]) -> Route:
        return Route(path, self._endpoint(function, max_bytes=0), methods=["GET"])

    def action(self, path: str, function: PageFunction, *, max_bytes: int = MAX_FORM_BYTES) -> Route:
        return Route(path, self._endpoint(function, max_bytes=max_bytes), methods=["POST"])

    def _endpoint(
        self, function: Callable[[Visit], Any], *, max_bytes: int, is_shared: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        make = functools.partial(self._answer, function)

        async def endpoint(request: Request) -> Response:
            refuse_other_sites(request)
            session = await self.session_of(request)
            if session is None:
                return _to_login(request)
            visit = Visit(request, session, language_of(request), self.templates, self.notices)
            if request.method == "POST":
                await self._accept(visit, max_bytes)
                try:
                    return await to_thread.run_sync(make, visit, limiter=self.threads)
                finally:
                    self._needs.forget()
                    self._shared.forget()
            if is_shared and visit.is_live:
                return await self._shared.answer(visit, make)
            in_thread = functools.partial(to_thread.run_sync, make, limiter=self.threads)
            answer: Response = await (function if asyncio.iscoroutinefunction(function) else in_thread)(visit)
            if isinstance(answer, StreamingResponse):
                answer.body_iterator = self._while_logged_in(request, answer.body_iterator)
            return answer

        return endpoint

    async def session_of(self, request: Request) -> Session | None:
        """The session of a request, also with what other processes ended up to three seconds ago."""
        if self.access.used.is_behind:
            await to_thread.run_sync(self.access.used.catch_up, limiter=self.threads)
        return self.access.session(cookie_of(request, COOKIE))

    async def _while_logged_in(self, request: Request, parts: AsyncIterable[Any]) -> AsyncIterator[Any]:
        """The parts of a long answer. None is sent after the end of the session, which takes some 10 µs to check."""
        async for part in parts:
            if await self.session_of(request) is None:
                await abort(request.scope, request.receive)
                return
            yield part

    def _answer(self, function: PageFunction, visit: Visit) -> Response:
        try:
            self.policy.learn()
            if twice := given_twice(visit.request.query_params.multi_items()):
                raise FilterInvalid(*twice)
            visit.counts = self._needs.counts()
            return function(visit)
        except FilterInvalid as error:
            if visit.request.method == "POST":
                raise HTTPException(400) from None
            return visit.page("filter.html", status=400, faults=error.faults[:SHOWN_FAULTS])
        except (DatabaseUnavailable, StoreUnavailable) as error:
            log.warning("console.store_not_reached", error=str(error))
            raise HTTPException(503, "database" if isinstance(error, DatabaseUnavailable) else "store") from error

    async def _accept(self, visit: Visit, max_bytes: int) -> None:
        """Read a form. Raises HTTPException unless it was sent from one of our own pages."""
        if not visit.session.may_act:
            raise HTTPException(403, "reader")
        body = await read_body(visit.request, max_bytes)
        content_type = visit.request.headers.get("content-type", "")
        pairs, visit.uploads = await to_thread.run_sync(read_form, content_type, body, limiter=self.threads)
        visit.form, visit.chosen = dict(pairs), [value for name, value in pairs if name == "id"]
        if not hmac.compare_digest(visit.form.get("csrf", "").encode(), visit.session.csrf.encode()):
            raise HTTPException(403)


class Front:
    """The pages without a session: login, languages, static files."""

    def __init__(self, guard: Guard, *, has_made_key: bool, is_secure: bool) -> None:
        self._guard, self._is_secure = guard, is_secure
        self._help = "login.help_store" if has_made_key else "login.help"
        self._throttle = LoginThrottle()

    def routes(self) -> list[BaseRoute]:
        return [
            Route(f"{HOME}/", lambda _: RedirectResponse(HOME, status_code=303)),
            Route(LOGIN, self.login, methods=["GET", "POST"]),
            Route("/console/logout", self.log_out, methods=["POST"]),
            Route("/console/language/{language}", self.language, methods=["GET", "POST"]),
            Route("/console/static/{name}", static, methods=["GET"]),
        ]

    async def login(self, request: Request) -> Response:
        if request.method == "GET":
            return self._form(request, request.query_params.get("next"), once=request.query_params.get("once"))
        refuse_other_sites(request)
        address = request.client.host if request.client else ""
        body = await read_body(request, MAX_LOGIN_BYTES, LOGIN_SECONDS)
        form = read_fields(request, body)
        if wait := self._throttle.wait_seconds(address):
            return self._form(request, form.get("next"), problem="login.throttled", status=429, wait=wait)
        access = self._guard.access
        if "once" in form:
            token = await to_thread.run_sync(access.redeem, form["once"], limiter=self._guard.threads)
        else:
            token = access.log_in(form.get("key", ""))
        if token is None:
            self._throttle.failed(address)
            log.warning("console.login_refused", address=address)
            problem = "login.used" if "once" in form else "login.wrong"
            return self._form(request, form.get("next"), problem=problem, status=401)
        found = access.session(token)
        log.info("console.login_accepted", person=found.name if found else None)
        answer = RedirectResponse(own_path(form.get("next"), HOME), status_code=303)
        answer.set_cookie(
            COOKIE, token, max_age=SESSION_SECONDS, path="/console", httponly=True, samesite="strict",
            secure=self._is_secure,
        )  # fmt: skip
        return answer

    def _form(
        self, request: Request, following: str | None, *, problem: str = "", once: str | None = None, status: int = 200,
        wait: int = 0,
    ) -> Response:  # fmt: skip
        whose = self._guard.access.is_open(once)
        if once and whose is None:
            problem, once = "login.used", None
        following = own_path(following, HOME)
        page = render(
            self._guard.templates, "login.html", language_of(request), next=following, problem=problem, once=once,
            whose=whose, wait=wait, help=self._help, here=address_of(LOGIN, {"next": following, "once": once}),
        )  # fmt: skip
        return HTMLResponse(page, status, headers={"Retry-After": str(wait)} if wait else None)

    async def log_out(self, request: Request) -> Response:
        """Read-only keys may end their own session: nothing else changes. The browser forgets pictures."""
        refuse_other_sites(request)
        session = await self._guard.session_of(request)
        if session is not None:
            given = read_fields(request, await read_body(request, MAX_LOGIN_BYTES, LOGIN_SECONDS)).get("csrf", "")
            if not hmac.compare_digest(given.encode(), session.csrf.encode()):
                raise HTTPException(403)
            await to_thread.run_sync(self._guard.access.end, session, limiter=self._guard.threads)
        answer = RedirectResponse(LOGIN, 303, {"Clear-Site-Data": '"cache"'})
        answer.delete_cookie(COOKIE, path="/console", httponly=True, samesite="strict", secure=self._is_secure)
        return answer

    async def language(self, request: Request) -> Response:
        language = request.path_params["language"]
        if language not in catalogue.LANGUAGES:
            raise HTTPException(404)
        refuse_other_sites(request)
        status = 307 if request.method == "POST" else 303  # the browser sends the form again to the page that it is of
        answer = RedirectResponse(own_path(request.query_params.get("next"), HOME), status)
        answer.set_cookie(
            LANGUAGE_COOKIE, language, max_age=YEAR_SECONDS, path="/console", samesite="lax", secure=self._is_secure
        )
        return answer


def build(guard: Guard, routes: Sequence[BaseRoute], *, has_made_key: bool, is_secure: bool) -> WithHeaders:
    """The application. Each answer has the console's headers, except those that its page set."""
    front = Front(guard, has_made_key=has_made_key, is_secure=is_secure)
    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, Exception), functools.partial(_error_page, guard))
    made = Starlette(routes=[*front.routes(), *routes], exception_handlers=handlers)
    made.router.redirect_slashes = False
    return WithHeaders(made, guard.policy)


class WithHeaders:
    """Adds headers that the answer does not have yet."""

    def __init__(self, app: Starlette, policy: Policy) -> None:
        self.app = app
        self._policy = policy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                ours = {**HEADERS, "Content-Security-Policy": self._policy.header}
                pairs = [(name.lower().encode(), value.encode()) for name, value in ours.items()]
                message = {**message, "headers": [*message["headers"], *(pair for pair in pairs if pair[0] not in own)]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def cookie_of(request: HTTPConnection, name: str) -> str | None:
    return cookie("; ".join(request.headers.getlist("cookie")), name)


def read_form(content_type: str, body: bytes) -> tuple[list[tuple[str, str]], dict[str, Upload]]:
    """The fields and files of a form. Raises HTTPException 400."""
    try:
        return parse_form(content_type, body)
    except ValueError:
        raise HTTPException(400) from None


def read_fields(request: Request, body: bytes) -> dict[str, str]:
    """The fields of a form without files. Raises HTTPException 400."""
    content_type = request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/"):
        raise HTTPException(400)
    return dict(read_form(content_type, body)[0])


def language_of(request: Request) -> str:
    return catalogue.choose(cookie_of(request, LANGUAGE_COOKIE), request.headers.get("accept-language", ""))


def refuse_other_sites(request: Request) -> None:
    """Raises HTTPException 403 for a form that another site's page sent, by the headers that browsers set.

    Asked before the cookie, which such a form does not bring (SameSite=Strict), but which an answer could replace. A
    program without these headers passes; each form of a session has its CSRF token besides.
    """
    site, origin, host = (request.headers.get(name) for name in ("sec-fetch-site", "origin", "host"))
    ours = ("same-origin", "none") if site else (None, f"http://{host}", f"https://{host}")
    if request.method == "POST" and (site or origin) not in ours:
        raise HTTPException(403)


async def read_body(request: Request, max_bytes: int, seconds: float = BODY_SECONDS) -> bytes:
    """The whole body. Raises HTTPException 413, 408 or 400."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > max_bytes:
        raise HTTPException(413)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise HTTPException(413)
    except TimeoutError:
        raise HTTPException(408) from None
    except ClientDisconnect:
        raise HTTPException(400) from None
    return bytes(body)


def _to_login(request: Request) -> Response:
    if "x-live" in request.headers or request.method != "GET":
        raise HTTPException(401)
    path = address_of(request.scope["path"], dict(request.query_params))
    return RedirectResponse(address_of(LOGIN, {"next": path if path != HOME else None}), status_code=303)


@functools.cache
def _static_files() -> dict[str, bytes]:
    return {name: (Path(HERE) / "static" / name).read_bytes() for name in versions()}


async def static(request: Request) -> Response:
    """A static file. Its URL contains its version, so browsers may keep it."""
    name = request.path_params["name"]
    content = _static_files().get(name)
    if content is None:
        raise HTTPException(404)
    kept = request.query_params.get("v") == versions()[name]
    age = "public, max-age=31536000, immutable" if kept else "no-cache"
    return Response(content, media_type=mimetypes.guess_type(name)[0], headers={"Cache-Control": age})


async def _error_page(guard: Guard, request: Request, error: Exception) -> Response:
    """The page of a refusal, whose detail may name its texts, or of a bug. It needs no database."""
    known = error if isinstance(error, HTTPException) else HTTPException(500)
    came, here = came_from(request.headers), address_of(request.scope["path"], dict(request.query_params))
    shown = {"login": address_of(LOGIN, {"next": came}), "here": here if request.method == "GET" else came}
    shown |= {"detail": known.detail, "status": str(known.status_code)}
    page = render(guard.templates, "error.html", language_of(request), **shown)
    answer = HTMLResponse(page, known.status_code, known.headers)
    if known is not error:
        log.exception("console.request_failed", path=request.url.path)
    return answer
