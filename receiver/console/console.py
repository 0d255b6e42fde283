"""The console as a whole: all pages and actions, and the application that serves them."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute
from starlette.types import Scope

from receiver.console.access import COOKIE, Access
from receiver.console.application import Guard, Policy, WithHeaders, build, cookie_of
from receiver.console.installation import Files, Installation
from receiver.console.live import Live
from receiver.console.needs import Needs
from receiver.console.pages.actions import Actions
from receiver.console.pages.ask import Ask
from receiver.console.pages.batches import MAX_UPLOAD_BYTES, BatchPages
from receiver.console.pages.deliveries import Deliveries
from receiver.console.pages.events import EventsOut
from receiver.console.pages.gallery import Gallery
from receiver.console.pages.overview import Overview
from receiver.console.pages.standing import StandingPages
from receiver.console.pages.tasks import Tasks
from storage.thumbnails.thumbnails import Thumbnails

# Uploaded pictures of one request. Reading the form takes three times as much memory.
MAX_PICTURES_BYTES = 32 * 2**20


class Console:
    """The console of one installation. Without keys it is off and not imported."""

    def __init__(self, of: Installation) -> None:
        self._of = of
        self._needs = Needs(of)
        self._live = Live(of.database)
        self._thumbnails = Thumbnails(of.bucket, of.thumbnail_folder, of.thumbnail_bytes)
        self._overview = Overview(of, self._needs)
        self._batches = BatchPages(of)
        access = Access(of.keys, database=of.database)
        self._guard = Guard(access, Policy(self._origin_of_links), self._needs, lambda: self._live.tick)

    def application(self, files: Files) -> WithHeaders:
        """Serves everything below `/console`. `files`: answers with an archived file's bytes or a redirect."""
        routes = [*self._looking(files), *self._acting()]
        return build(self._guard, routes, has_made_key=self._of.has_made_key, is_secure=self._of.is_secure)

    def has_session(self, scope: Scope) -> bool:
        """Whether a request has a session, as far as this process knows which ones have ended."""
        return self._guard.access.session(cookie_of(HTTPConnection(scope), COOKIE)) is not None

    def _origin_of_links(self) -> str | None:
        """The origin of presigned links; None if they do not work for readers."""
        if not self._of.bucket.is_reached_from_outside:
            return None
        parts = urlsplit(self._of.bucket.presigned_get("any", expires_seconds=60))
        return f"{parts.scheme}://{parts.netloc}"

    def close(self) -> None:
        """End the open streams and background threads, so that the server can end."""
        self._live.close()
        self._thumbnails.close()
        self._overview.close()
        self._batches.close()

    def _looking(self, files: Files) -> list[BaseRoute]:
        guard, of = self._guard, self._of
        gallery, standing = Gallery(of, files, self._thumbnails), StandingPages(of)
        tasks, deliveries, batches = Tasks(of), Deliveries(of), self._batches
        return [
            guard.page("/console", self._overview.show),
            guard.page("/console/tasks", tasks.table),
            guard.page("/console/tasks/{id:path}", tasks.show),
            guard.page("/console/gallery", gallery.show),
            guard.file("/console/gallery/zip", gallery.zip),
            guard.file("/console/files/{id}", gallery.file),
            guard.file("/console/thumbnails/{id}", gallery.thumbnail),
            guard.page("/console/deliveries", deliveries.table),
            guard.page("/console/deliveries/replay", deliveries.ask_replay),
            guard.page("/console/deliveries/{id}", deliveries.show),
            guard.file("/console/deliveries/{id}/body", deliveries.body),
            guard.page("/console/events", EventsOut(of, self._needs.now).show),
            guard.page("/console/batches", batches.table),
            guard.page("/console/batches/new", batches.form),
            guard.page("/console/batches/{id}", batches.show),
            guard.file("/console/batches/{id}/report.csv", batches.export),
            guard.page("/console/ask", Ask(of).form),
            guard.page("/console/archive", standing.archive),
            guard.page("/console/settings", standing.settings),
            guard.action("/console/act/audit", standing.sample),
            guard.action("/console/settings", standing.check),
            guard.file("/console/live", self._live.serve),
        ]

    def _acting(self) -> list[BaseRoute]:
        guard, of = self._guard, self._of
        deliveries, events, batches = Deliveries(of), EventsOut(of, self._needs.now), self._batches
        return [
            *Actions(of).routes(guard),
            guard.action("/console/act/replay", deliveries.replay),
            guard.action("/console/act/dismiss-deliveries", deliveries.dismiss),
            guard.action("/console/act/redeliver", events.redeliver),
            guard.action("/console/act/disable", events.disable),
            guard.action("/console/act/enable", events.enable),
            guard.action("/console/act/batch-retry", batches.retry),
            guard.action("/console/batches/new", batches.check, max_bytes=MAX_UPLOAD_BYTES),
            guard.action("/console/ask", Ask(of).send, max_bytes=MAX_PICTURES_BYTES),
        ]
