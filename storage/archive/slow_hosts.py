"""The work of the archive's spare threads: files of other hosts, while slow files hold the archive's own threads.

A host that sends just above the minimum speed keeps a thread for ten minutes a file. The spare threads are idle while
files arrive quickly, so an archive with one host uses all of its own threads. On a spare thread a file has less time,
and a host that needs more is left to the archive's own threads for a while. Several slow hosts therefore cannot hold
the spare threads either.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, or_, select

from storage.archive.archiver import Archiver
from storage.database.clock import db_now_once
from storage.database.sessions import Database
from storage.rows import claims
from storage.rows.models import Asset

# Scheme, host and port end before this position of a URL. A host name has 253 characters at most.
MAX_START_CHARS = 300
# One search reads all due files of the slow hosts: 0.3 s for 100,000. Searches may use this share of the time.
LOOK_SHARE = 0.05
# The time of the largest file at 9 MB/s. A longer fetch is repeated by the archive's own threads.
SPARE_SECONDS = 30.0
# How long a slow host has no spare thread, and how many such hosts are remembered. A search has a condition for each.
SLOW_SECONDS, MAX_SLOW_HOSTS = 600.0, 20

_ASSETS = Asset.__table__.c  # type: ignore[attr-defined]


def spare_threads(threads: int) -> int:
    """The number of threads that no slow host can use. Every host may use the others."""
    return max(threads // 4, 1)


class OtherHosts:
    """Finds files for the spare threads of an archive that has `threads`. Used by one thread."""

    def __init__(self, database: Database, threads: int) -> None:
        self._database = database
        self._spare = spare_threads(threads)
        self._enough = max(threads - self._spare, 1)
        self._next_look_at = 0.0
        self._slow_until: dict[str, float] = {}

    def work(self, archiver: Archiver, asset: Asset) -> None:
        """Archive a claimed file on a spare thread. Called by any of them."""
        ends_at = time.monotonic() + SPARE_SECONDS
        try:
            archiver.work(asset, fetch_seconds=SPARE_SECONDS)
        finally:
            if time.monotonic() >= ends_at:
                for oldest in list(self._slow_until)[: 1 - MAX_SLOW_HOSTS]:
                    self._slow_until.pop(oldest, None)
                self._slow_until[_host(asset.source_url)] = ends_at + SLOW_SECONDS

    def conditions(self, lasting: Sequence[Asset]) -> Sequence[Any] | None:
        """Conditions for due files that may be claimed, by the files that have lasted long. None: no claim now.

        Also None while a quarter of the archive's threads is free of lasting files, because then they serve every host.
        """
        began = time.monotonic()
        if len(lasting) < self._enough or began < self._next_look_at:
            return None
        known = {host for host, until in list(self._slow_until.items()) if until > began}
        ids = self._due_elsewhere(sorted(known | {_host(asset.source_url) for asset in lasting}))
        ended = time.monotonic()
        self._next_look_at = ended + (ended - began) / LOOK_SHARE
        return (or_(*(_ASSETS.id == each for each in ids)),) if ids else None

    def _due_elsewhere(self, hosts: Sequence[str]) -> Sequence[Any]:
        """Read without a transaction, because a claim with these conditions would lock SQLite during the search."""
        due = select(_ASSETS.id).where(_ASSETS.due_at <= db_now_once(), *map(_is_elsewhere, hosts))
        sound = due.where(_ASSETS.losses < claims.QUARANTINE_AFTER - 1)
        with self._database.autocommit_reader() as connection:
            return connection.execute(sound.order_by(_ASSETS.due_at).limit(self._spare)).scalars().all()


def _host(url: str) -> str:
    """Host and port as written in a link. A link of another form is refused at once, so it never lasts."""
    place = re.split(r"[/?#\\\s]", url.partition("//")[2], maxsplit=1)[0]
    return place.lower().removesuffix(":443").rstrip(".")


def _is_elsewhere(host: str) -> Any:
    start = func.lower(func.substr(_ASSETS.source_url, 1, MAX_START_CHARS))
    return ~start.contains(f"//{host}", autoescape=True)
