"""Faults of a database that refuses us or cannot be reached, in one line: setting, address, the database's message."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from storage.database.free_space import MIN_FREE_SHARE
from storage.database.outages import AT_FAULT, NO_OPTIONS, NO_PRIVILEGE, words
from storage.database.sessions import Database
from storage.database.urls import place
from storage.errors import DatabaseUnavailable, FileChanged, UserError

# The refusal of a connection has no SQLSTATE, so PostgreSQL's message text decides.
FOR_GOOD = re.compile(
    r"FATAL:.*(?:(?:role|database) \".*\" does not exist|password authentication failed|no pg_hba.conf entry"
    r"|permission denied for database|is not permitted to log in)|server does not support SSL|invalid \w+ value"
    rf"|{NO_OPTIONS}",
    re.DOTALL,
)

# PostgreSQL's message for a server that `target_session_attrs` skips, and the SQLSTATE of a write on such a server.
READ_ONLY, READ_ONLY_STATE = "session is read-only", "25006"
FULL_STATE = "53100"

# SQLite treats a file of one byte as empty and overwrites it. It refuses longer ones itself.
SQLITE_HEADER_BYTES = 100


class DatabaseRefused(UserError):
    """The database is reachable and refuses us. The message names the place and the reason."""


def check_file(database: Database) -> None:
    """Raises `DatabaseRefused` for a file that is too short to be a SQLite database and not empty. Opens nothing."""
    file = Path(database.url.database or "")
    if database.is_sqlite and file.is_file() and 0 < file.stat().st_size < SQLITE_HEADER_BYTES:
        raise DatabaseRefused(f"RECEIVER_DATABASE_URL: {place(database.url)}: file is not a database")


def reason(url: URL, error: BaseException) -> str:
    """The database's own message in one line, without the password."""
    is_named = isinstance(error, DatabaseUnavailable) and isinstance(error.__cause__, DBAPIError)
    return words(url, error.__cause__ if is_named and error.__cause__ else error).removeprefix("database: ")


def sentence(url: URL, error: BaseException) -> str:
    return f"RECEIVER_DATABASE_URL: {place(url)}: {reason(url, error)}"


def remedy(database: Database, error: BaseException) -> str:
    """What an administrator can do about the fault that `reason` describes."""
    if isinstance(error, FileChanged):  # the message has the advice
        return ""
    driver = _driver_error(error)
    state = getattr(driver, "sqlstate", None)
    if state == READ_ONLY_STATE or READ_ONLY in str(driver):
        return (
            "let it take writes, or name the server that does in RECEIVER_DATABASE_URL; several hosts are tried in turn"
        )
    code = getattr(driver, "sqlite_errorcode", 0) & 0xFF  # the message without its details
    is_short = code == sqlite3.SQLITE_IOERR and database.free_share() < MIN_FREE_SHARE
    if state == FULL_STATE or code == sqlite3.SQLITE_FULL or is_short:
        return "its disk is full: make room there"
    if isinstance(error, DatabaseUnavailable) and is_for_good(error):
        return "correct RECEIVER_DATABASE_URL, or let the server's owner make what it names"
    if state is None and not database.is_sqlite:
        return "check that it runs there and can be reached, or correct RECEIVER_DATABASE_URL"
    return "check that it runs, may be written and has room, or correct RECEIVER_DATABASE_URL"


def _driver_error(error: BaseException) -> BaseException | None:
    cause = error if isinstance(error, DBAPIError) else error.__cause__
    return cause.orig if isinstance(cause, DBAPIError) else None


def is_for_good(error: DatabaseUnavailable) -> bool:
    """Whether waiting does not help: a wrong role, password or database name, a missing privilege."""
    driver = _driver_error(error)
    is_denied = getattr(driver, "sqlstate", None) == NO_PRIVILEGE
    return is_denied or (driver is not None and bool(FOR_GOOD.search(str(driver))))


@contextmanager
def explained(database: Database) -> Iterator[None]:
    """Raises `DatabaseRefused` with `sentence` for a refusal by the database. A wrong statement stays a bug."""
    try:
        yield
    except DatabaseUnavailable as error:
        raise DatabaseUnavailable(sentence(database.url, error)) from error.__cause__
    except DBAPIError as error:
        if not _is_refusal(error):
            raise
        raise DatabaseRefused(sentence(database.url, error)) from error


def _is_refusal(error: DBAPIError) -> bool:
    driver = error.orig
    state = getattr(driver, "sqlstate", None)
    is_damaged = type(driver) is sqlite3.DatabaseError  # "file is not a database", "malformed"
    return is_damaged or (state or "").startswith(AT_FAULT)
