"""`/console/gallery`: archived pictures by day, newest first; the files, their thumbnails, and many as a zip."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import groupby

from anyio import CapacityLimiter, to_thread
from starlette.exceptions import HTTPException
from starlette.responses import Response

from receiver.console import words
from receiver.console.installation import Files, Installation, id_of
from receiver.console.pages.tasks import path_of
from receiver.console.shares import Shares
from receiver.console.visit import Visit
from receiver.tasks.task_view import prompt_of
from storage import filters
from storage.archive.zip_stream import zip_stream
from storage.errors import DatabaseUnavailable, StoreUnavailable
from storage.operations import lists
from storage.rows.models import Asset
from storage.states import ArchiveState, AssetState, TaskState
from storage.thumbnails.decode import SIDE_PIXELS
from storage.thumbnails.thumbnails import Thumbnails

# A page has less than 100 kB without its pictures.
TASKS_A_PAGE, FILES_A_PAGE = 30, 64
SIZES = ("s", "m", "l")
# Threads that wait for thumbnails, which two threads make. A browser requests six at once.
WAITING = 12
# A URL has at most 2 KiB, and each id takes 40 bytes.
MAX_ZIP_FILES, MAX_ZIPS = 45, 4
# A browser asks before it shows a kept picture again, because the session may have ended or the picture be deleted.
KEPT = "private, no-cache"
SANDBOX = "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; sandbox"


class Gallery:
    """The page and the endpoints of its pictures. `files`: answers with an archived file."""

    def __init__(self, of: Installation, files: Files, thumbnails: Thumbnails) -> None:
        self._of = of
        self._files = files
        self._thumbnails = thumbnails
        self._waiting = CapacityLimiter(WAITING)
        self._zips = Shares(MAX_ZIPS)

    def show(self, visit: Visit) -> Response:
        wanted = filters.read_filter(filters.TaskFilter, visit.query, provider=self._of.providers, size=SIZES)
        with self._of.database.read() as session:
            one, before = lists.exact(session, wanted.q, self._of.providers), visit.query.get("before")
            page = lists.Page([one]) if one else lists.newest_tasks(session, wanted, before, TASKS_A_PAGE, kept=True)
            kept = lists.kept_files_of(session, page.rows)
        page = lists.first_files(page, {task_id: len(each) for task_id, each in kept.items()}, FILES_A_PAGE)
        shown = [task for task in page.rows if kept[task.id]]
        days = [(day, list(group)) for day, group in groupby(shown, key=lambda task: task.created_at.date())]
        return visit.page(
            "gallery.html", wanted=wanted, rows=page, days=days, kept=kept, path_of=path_of, prompt_of=prompt_of,
            uri=self._of.bucket.uri, ratio=words.ratio_class, archives=list(ArchiveState), most=MAX_ZIP_FILES,
            providers=self._of.providers, states=list(TaskState), sizes=SIZES, size=visit.query.get("size") or "m",
        )  # fmt: skip

    async def file(self, visit: Visit) -> Response:
        """An archived file, or a redirect to it. `?download=1`: as a download."""
        try:
            download = bool(visit.query.get("download"))
            answer = await self._files(visit.request, id_of(visit.path("id")), download=download)
        except (DatabaseUnavailable, StoreUnavailable) as error:
            raise HTTPException(503, "database" if isinstance(error, DatabaseUnavailable) else "store") from None
        if answer.status_code != 302:  # the store's own answer has its own headers
            answer.headers["Content-Security-Policy"] = SANDBOX
            answer.headers["Cache-Control"] = KEPT
        return answer

    async def thumbnail(self, visit: Visit) -> Response:
        return await to_thread.run_sync(self._thumbnail, visit, limiter=self._waiting)

    def _thumbnail(self, visit: Visit) -> Response:
        """A small WebP; 404 if there is none. A browser that has it costs one row and no picture."""
        with self._of.database.read() as session:
            asset = session.get(Asset, id_of(visit.path("id")))
        if asset is None or asset.state is not AssetState.ARCHIVED:
            raise HTTPException(404)
        etag = f'"{asset.sha256}-{SIDE_PIXELS}"'
        headers = {"Cache-Control": KEPT, "Content-Security-Policy": SANDBOX, "ETag": etag}
        if etag in visit.request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if (content := self._thumbnails.get(asset)) is None:
            raise HTTPException(404)
        return Response(content, media_type="image/webp", headers=headers)

    def zip(self, visit: Visit) -> Response:
        """The chosen files in one archive, streamed and never held in memory."""
        chosen = visit.request.query_params.getlist("id")
        if not 0 < len(chosen) <= MAX_ZIP_FILES:
            raise HTTPException(413, "zip_many") if chosen else HTTPException(400, "zip_none")
        ids = [id_of(each) for each in chosen]
        with self._of.database.read() as session:
            assets, absent = lists.chosen_files(session, ids)
        if not assets:
            raise HTTPException(404)
        name = f"pictures-{datetime.now(UTC):%Y%m%d-%H%M%S}.zip"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        content = zip_stream(self._of.bucket, assets, absent)
        return self._zips.stream(visit, content, media_type="application/zip", headers=headers)
