"""`GET /assets/{token}.{ext}`: a lasting link to one archived file. It opens that file for everyone who has it.

200, 206 the bytes, where readers cannot reach the store or RECEIVER_STREAM_ASSETS is set · 302 a fresh presigned link
304 the reader has the file already · 404 no such token (decided without a query), file or extension
416 a range behind the end of the file · 503 too many readers, or the store or database is down. HEAD never redirects.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import chain

import structlog
from anyio import CapacityLimiter, to_thread
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from receiver.base.tokens import ASSET_PURPOSE, NO_TASK, Tokens
from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable, StoreUnavailable
from storage.keys import EXTENSIONS
from storage.rows.models import Asset
from storage.states import AssetState

log = structlog.get_logger()

# A slow reader can begin within this time, and a presigned link that is passed on soon expires.
LINK_SECONDS = 300
# A stream holds one connection to the store, 1 MiB, and a thread while it reads. Callbacks must not be delayed by them.
MAX_STREAMS = 40
# One link, however often it is shared, leaves room for other files. Browsers open up to six connections to a host.
MAX_STREAMS_OF_ASSET = 8
# One address leaves room for others. A TLS proxy is one address for all of its readers, so this is most of the room.
MAX_STREAMS_OF_ADDRESS = 32
# Threads that look files up or sign links. A holder of a link who sent 32 requests at once kept all threads and the
# event loop busy: callbacks were answered after 82 ms instead of 4 (medians).
THREADS = 4
# One write. The next write waits until the buffer is empty, so a slow reader leaves at most this much in it.
PIECE_BYTES = 64 * 1024
RETRY_AFTER_SECONDS = 5
# The bytes behind a link never change. Shared caches would keep a file after its link was revoked, hence private.
CACHE_CONTROL = "private, max-age=31536000, immutable"
# Asset tokens name no provider: the id alone identifies the file.
ANY_PROVIDER = ""
# Browsers show these without executing anything. Other types are downloaded.
SHOWN = ("image/", "video/", "audio/")
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def asset_link(tokens: Tokens, public_url: str, asset: Asset) -> str:
    """The lasting link to an archived file. It is a secret, and works while the callback secret behind it is listed.

    Raises ValueError if the file is not archived, IndexError without a secret.
    """
    if asset.state is not AssetState.ARCHIVED or not asset.key:
        raise ValueError(f"{asset.kind} {asset.index} is not archived")
    token = tokens.sign(ANY_PROVIDER, asset.id, purpose=ASSET_PURPOSE)
    return f"{public_url.rstrip('/')}/assets/{token}.{_extension(asset.key)}"


class Assets:
    """The endpoint. `streams`: never redirect to the store. `origins`: whose web pages may read the answers."""

    def __init__(
        self,
        database: Database,
        bucket: Bucket,
        tokens: Tokens,
        *,
        streams: bool = False,
        origins: Sequence[str] = (),
    ) -> None:
        self._database = database
        self._bucket = bucket
        self._tokens = tokens
        self._streams = streams
        self._origins = origins
        self._threads = CapacityLimiter(THREADS)
        self._readers: list[tuple[uuid.UUID, str]] = []  # asset and client address of each open stream

    def route(self) -> Route:
        """The route, with CORS (WHATWG Fetch) for the allowed origins."""
        cors = Middleware(
            CORSMiddleware,
            allow_origins=self._origins,
            allow_methods=("GET", "HEAD"),
            allow_headers=("Range", "If-None-Match", "If-Range"),
            expose_headers=("ETag", "Content-Length", "Content-Range", "Accept-Ranges", "Content-Disposition"),
        )
        path = "/assets/{token}.{extension}"
        if not self._origins:
            return Route(path, self.serve)
        return Route(path, self.serve, methods=["GET", "OPTIONS"], middleware=[cors])

    async def serve(self, request: Request) -> Response:
        """Answer one GET or HEAD. The CORS middleware answers preflights before."""
        if request.method == "OPTIONS":
            raise HTTPException(405)
        extension = request.path_params["extension"]
        named = self._tokens.read(ANY_PROVIDER, request.path_params["token"], purpose=ASSET_PURPOSE)
        if named is None or named == NO_TASK or extension not in EXTENSIONS:
            raise HTTPException(404)
        try:
            return await self.answer(request, named, extension)
        except (DatabaseUnavailable, StoreUnavailable) as error:
            log.error("asset.not_served", asset=str(named), error=str(error))
            return _unavailable()

    async def answer(
        self, request: Request, asset_id: uuid.UUID, extension: str | None = None, *, download: bool = False
    ) -> Response:
        """The file, for a reader who may have it. `download`: a browser saves it instead of showing it. Raises
        HTTPException 404, `StoreUnavailable`.
        """
        asset = await to_thread.run_sync(self._archived, asset_id, limiter=self._threads)
        if asset is None or asset.key is None or asset.size is None or extension not in (None, _extension(asset.key)):
            raise HTTPException(404)
        headers = _headers(asset, asset.key)
        if download:
            headers["Content-Disposition"] = headers["Content-Disposition"].replace("inline", "attachment", 1)
        if _is_known(request, headers["ETag"]):
            return Response(status_code=304, headers={name: headers[name] for name in ("ETag", "Cache-Control")})
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(asset.size)})
        if self._bucket.is_reached_from_outside and not self._streams:
            name = headers["Content-Disposition"] if download else None
            sign = partial(self._bucket.presigned_get, asset.key, expires_seconds=LINK_SECONDS, disposition=name)
            link = await to_thread.run_sync(sign, limiter=self._threads)
            return RedirectResponse(link, status_code=302)
        span = _span(request, headers["ETag"], asset.size)
        if span is not None and not span:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{asset.size}"})
        return await self._stream(request, asset, asset.key, span, headers)

    def _archived(self, asset_id: uuid.UUID) -> Asset | None:
        with self._database.read() as session:
            asset = session.get(Asset, asset_id)
            return asset if asset and asset.state is AssetState.ARCHIVED else None

    async def _stream(
        self, request: Request, asset: Asset, key: str, span: range | None, headers: dict[str, str]
    ) -> Response:
        """Read the first bytes before answering, so that a missing object is a 404 and not a broken 200."""
        reader = asset.id, request.client.host if request.client else ""
        of_asset, of_address = (sum(other[i] == reader[i] for other in self._readers) for i in (0, 1))
        if (
            len(self._readers) >= MAX_STREAMS
            or of_asset >= MAX_STREAMS_OF_ASSET
            or of_address >= MAX_STREAMS_OF_ADDRESS
        ):
            return _unavailable()
        chunks = self._bucket.read(key, span)
        self._readers.append(reader)

        def end() -> None:
            self._readers.remove(reader)
            if isinstance(chunks, Generator):
                chunks.close()  # closes its connection to the store if the reader left early

        try:
            first = await run_in_threadpool(next, chunks, b"")
        except NoSuchObject:
            end()
            log.error("asset.object_not_found", key=key)
            raise HTTPException(404) from None
        except BaseException:
            end()
            raise
        status = 200
        if span is not None:
            status, headers["Content-Range"] = 206, f"bytes {span.start}-{span.stop - 1}/{asset.size}"
        headers["Content-Length"] = str(asset.size if span is None else len(span))
        return _Stream(chain([first], chunks), status, headers, end)


class _Stream(StreamingResponse):
    """Reads a chunk in a thread once the reader has taken the one before. `on_end` is called however it ends."""

    def __init__(
        self, chunks: Iterator[bytes], status: int, headers: dict[str, str], on_end: Callable[[], None]
    ) -> None:
        super().__init__(_pieces(chunks), status_code=status, headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _pieces(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while chunk := await run_in_threadpool(next, chunks, b""):
        for start in range(0, len(chunk), PIECE_BYTES):
            yield chunk[start : start + PIECE_BYTES]


def _headers(asset: Asset, key: str) -> dict[str, str]:
    media_type = asset.media_type or "application/octet-stream"
    disposition = "inline" if media_type.startswith(SHOWN) else "attachment"
    return {
        "Content-Type": media_type,
        "Content-Disposition": f'{disposition}; filename="{key.rpartition("/")[2]}"',
        "ETag": f'"{asset.sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": CACHE_CONTROL,
    }


def _is_known(request: Request, etag: str) -> bool:
    """Whether `If-None-Match` holds this file's ETag (RFC 9110 section 13.1.2: weak comparison)."""
    given = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    return etag in given or "*" in given


def _span(request: Request, etag: str, size: int) -> range | None:
    """The bytes that `Range` asks for; empty = behind the end; None = all of them.

    Several ranges, other units and an `If-Range` of another file are ignored, as RFC 9110 sections 13.1.5 and 14.2 say.
    """
    asked = RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if asked is None or request.headers.get("if-range", etag) != etag:
        return None
    first, last = asked.groups()
    if first and last and int(last) < int(first):
        return None
    if first:
        return range(int(first), min(int(last) + 1 if last else size, size))
    return range(max(size - int(last), 0), size) if last else None


def _extension(key: str) -> str:
    return key.rpartition(".")[2]


def _unavailable() -> Response:
    return Response(status_code=503, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
