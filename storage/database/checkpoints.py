"""SQLite's checkpoints in a thread of their own instead of within a commit.

SQLite itself copies its log into the database within the commit that passes 1,000 pages, while all other writers wait
at the turnstile: one group commit in sixteen took 20 times as long as the others. Here writers wait only once the log
is long.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any

import structlog

from storage.background import background_thread
from storage.database import turnstile
from storage.database.sessions import Database
from storage.database.turnstile import who_holds_database
from storage.errors import DatabaseUnavailable

log = structlog.get_logger()

# SQLite restarts the log only after a copy of all of it, for which writers have to wait. Its index of the log has
# segments of 4,096 pages (16 MB), and each further segment is one more search for every page that is read.
LONG_LOG_PAGES = 4_096
PAGE_BYTES = 4_096  # SQLite's own default, which our files have
# Commits wait for the disk while a checkpoint's pages are written. At 4,000 deliveries a second these are 20 MB for an
# interval of 0.5 s and 4 MB for 0.1 s. On a loaded machine the p99 of acknowledgements fell from 90 to 22, 129 to 17
# and 36 to 16 ms (three pairs of runs), on a quiet one it did not change. Without commits nothing is copied, and
# the log is checked less often.
CHECKPOINT_INTERVAL_SECONDS, IDLE_SECONDS = 0.1, 0.5
# What another program's long transaction keeps from being copied is reported from 64 MB on.
DELAYED_PAGES = 16_384


def beside(database: Database) -> AbstractContextManager[None]:
    """Make checkpoints in a thread during the block. Does nothing for PostgreSQL, which has a process for them."""
    if not database.is_sqlite:
        return nullcontext()
    return background_thread("checkpoints", partial(_run, database), join_seconds=turnstile.CLOSE_SECONDS)


def _run(database: Database, stopping: threading.Event) -> None:
    with closing(database.reader.raw_connection()) as connection:
        cursor, seen, interval, is_delayed = connection.cursor(), None, IDLE_SECONDS, False
        while not stopping.wait(interval):
            try:
                version = cursor.execute("PRAGMA data_version").fetchone()[0]
                if version != seen:
                    is_delayed = _reported(database, checkpoint(database, cursor), is_delayed)
                interval = IDLE_SECONDS if version == seen else CHECKPOINT_INTERVAL_SECONDS
                seen = version
            except (sqlite3.Error, DatabaseUnavailable) as error:  # commits fail in the same way and report it
                log.warning("checkpoint.failed", error=str(error))


def _reported(database: Database, left: int, is_delayed: bool) -> bool:
    """Log once that the log grows, because somebody reads an old state. Returns whether that goes on."""
    if left <= DELAYED_PAGES or is_delayed:
        return is_delayed and left > 0
    why = "a program keeps a transaction open that reads an old state of the database"
    remedy = who_holds_database(database.files["database.lock"])
    log.warning("checkpoint.delayed", log_bytes=left * PAGE_BYTES, error=f"{why}; {remedy}")
    return True


def checkpoint(database: Database, cursor: Any) -> int:
    """Copy the log while others write. Of a long log, also copy the rest while they wait, so that SQLite restarts it.

    Otherwise it would grow as long as there is work. Returns how many pages could not be copied.
    """
    _, pages, copied = cursor.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    if pages > LONG_LOG_PAGES:
        with database.turn():
            _, pages, copied = cursor.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return int(pages - copied)
