"""`GET /assets/{token}.{ext}`: a lasting link to one archived file. Whoever has it may read that one file, no more.

404 a token that is none (no query is made), a file that is not archived, another extension · 302 a fresh presigned
link, where readers outside reach the store · 200 the bytes, where they do not · 503 the store or the database is away.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterator
from itertools import chain

import structlog
from sqlmodel import Session
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from receiver.base.tokens import ASSET_PURPOSE, Tokens
from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.errors import DatabaseUnavailable, StoreUnavailable
from storage.keys import EXTENSIONS
from storage.rows.database import Database
from storage.rows.models import Asset
from storage.states import AssetState

log = structlog.get_logger()

# Long enough for a slow reader to begin, short enough that a link passed on is worth little.
LINK_SECONDS = 300
# Each holds one connection to the store and 1 MiB; intake must not feel them.
MAX_STREAMS = 32
RETRY_AFTER_SECONDS = 5
# Assets have no provider in their tokens: the id alone names one.
ANY_PROVIDER = ""
# What a browser shows without running anything; all else is saved.
SHOWN = ("image/", "video/", "audio/")


def asset_link(tokens: Tokens, public_url: str, asset: Asset) -> str:
    """The lasting link to an archived file; a secret, as long as the callback secret that signed it is listed.

    Raises ValueError when the file is not archived, IndexError without a secret.
    """
    if asset.state is not AssetState.ARCHIVED or not asset.key:
        raise ValueError(f"{asset.kind} {asset.index} is not archived")
    token = tokens.sign(ANY_PROVIDER, asset.id, purpose=ASSET_PURPOSE)
    return f"{public_url.rstrip('/')}/assets/{token}.{_extension(asset.key)}"


class Assets:
    """The endpoint."""

    def __init__(self, database: Database, bucket: Bucket, tokens: Tokens) -> None:
        self._database = database
        self._bucket = bucket
        self._tokens = tokens
        self._streams = 0

    async def serve(self, request: Request) -> Response:
        """Answer one GET or HEAD."""
        extension = request.path_params["extension"]
        named = self._tokens.read(ANY_PROVIDER, request.path_params["token"], purpose=ASSET_PURPOSE)
        if named is None or named.task_id is None or extension not in EXTENSIONS:
            raise HTTPException(404)
        try:
            return await self.answer(request, named.task_id, extension)
        except (DatabaseUnavailable, StoreUnavailable) as error:
            log.error("asset.not_served", asset=str(named.task_id), error=str(error))
            return _later()

    async def answer(self, request: Request, asset_id: uuid.UUID, extension: str | None = None) -> Response:
        """The file, for a reader who may have it. Raises HTTPException 404, `StoreUnavailable`."""
        asset = await run_in_threadpool(self._find, asset_id)
        if asset is None or asset.key is None or extension not in (None, _extension(asset.key)):
            raise HTTPException(404)
        if self._bucket.is_reached_from_outside:
            link = await run_in_threadpool(self._bucket.presigned_get, asset.key, expires_seconds=LINK_SECONDS)
            return RedirectResponse(link, status_code=302)
        headers = _headers(asset)
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(asset.size)})
        if self._streams >= MAX_STREAMS:
            return _later()
        return await self._stream(asset.key, headers)

    def _find(self, asset_id: uuid.UUID) -> Asset | None:
        with self._database.read() as session:
            return _archived(session, asset_id)

    async def _stream(self, key: str, headers: dict[str, str]) -> Response:
        """The first bytes are read before anything is answered: an object that is gone is a 404, not a broken 200."""
        chunks = self._bucket.read(key)
        self._streams += 1
        try:
            first = await run_in_threadpool(next, chunks, b"")
        except NoSuchObject:
            self._streams -= 1
            log.error("asset.object_missing", key=key)
            raise HTTPException(404) from None
        except BaseException:
            self._streams -= 1
            raise
        return _Stream(chain([first], chunks), headers, on_end=lambda: self._end(chunks))

    def _end(self, chunks: Iterator[bytes]) -> None:
        self._streams -= 1
        if isinstance(chunks, Generator):
            chunks.close()  # its connection to the store, when the reader left early


class _Stream(StreamingResponse):
    """Reads each chunk in a thread when the reader has taken the one before; says when it ended, however it did."""

    def __init__(self, chunks: Iterator[bytes], headers: dict[str, str], on_end: Callable[[], None]) -> None:
        super().__init__(chunks, headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _archived(session: Session, asset_id: uuid.UUID) -> Asset | None:
    asset = session.get(Asset, asset_id)
    return asset if asset and asset.state is AssetState.ARCHIVED else None


def _headers(asset: Asset) -> dict[str, str]:
    media_type = asset.media_type or "application/octet-stream"
    how = "inline" if media_type.startswith(SHOWN) else "attachment"
    name = str(asset.key).rpartition("/")[2]
    return {
        "Content-Type": media_type,
        "Content-Length": str(asset.size),
        "Content-Disposition": f'{how}; filename="{name}"',
        "ETag": f'"{asset.sha256}"',
    }


def _extension(key: str) -> str:
    return key.rpartition(".")[2]


def _later() -> Response:
    return Response(status_code=503, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
