"""SQLite's checkpoints, beside the commits instead of in them.

By itself SQLite copies its log into the database within whichever commit passes 1,000 pages, and everybody who waits
for the turnstile waits for that: one batch of acknowledgements in sixteen took 20 times as long as the others.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any

import structlog

from storage.background import background_thread
from storage.errors import DatabaseUnavailable
from storage.rows.database import Database

log = structlog.get_logger()

# Twice a second, if anybody has committed: at 4,000 deliveries a second that is 5,000 pages (20 MB) at a time.
CHECKPOINT_INTERVAL_SECONDS = 0.5


def beside(database: Database) -> AbstractContextManager[None]:
    """Make this database's checkpoints in a thread of their own meanwhile. PostgreSQL has a process for them."""
    if not database.is_sqlite:
        return nullcontext()
    return background_thread("checkpoints", partial(_keep_up, database))


def _keep_up(database: Database, stopping: threading.Event) -> None:
    with closing(database.reader.raw_connection()) as connection:
        cursor, seen = connection.cursor(), None
        while not stopping.wait(CHECKPOINT_INTERVAL_SECONDS):
            try:
                version = cursor.execute("PRAGMA data_version").fetchone()[0]
                if version != seen:
                    checkpoint(database, cursor)
                seen = version
            except (sqlite3.Error, DatabaseUnavailable) as error:  # commits meet it too, and say so to their callers
                log.warning("checkpoint.failed", error=str(error))


def checkpoint(database: Database, cursor: Any) -> None:
    """Copy the log twice: nearly all of it while others write, and what they wrote meanwhile while they wait.

    Only a log that is copied to its end is begun anew; without the second time it would grow as long as there is work.
    """
    cursor.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    with database.turnstile:
        cursor.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
