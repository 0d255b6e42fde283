"""Outages: a database that is down or refuses us. Logs its own message, one line for each change of state."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import structlog
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from storage.database.turnstile import SQLITE_BUSY_SECONDS, who_holds_database

log = structlog.get_logger()

MAX_WORDS_CHARS = 300
# Faults that an administrator repairs or that pass, by the first characters of SQLSTATE (PostgreSQL, appendix A):
# authorization, names of a database and a schema, a statement prepared before a schema change (or one that another
# product lacks), privileges, read-only, a transaction that lasted too long (after a suspended machine), resources, an
# operator's intervention, system and internal errors. The driver's classes mix them with our own faults. A role without
# USAGE on the schema is told that the table does not exist (42P01).
AT_FAULT = ("28", "3D", "3F", "0A000", "42501", "42P01", "25006", "25P03", "25P04", "53", "57", "58", "XX")
NO_PRIVILEGE, NO_TABLE, LOCK_TIMEOUT, NO_SCHEMA = "42501", "42P01", "55P03", "3F000"
# PgBouncer's refusal of a URL with `options`.
NO_OPTIONS = "unsupported startup parameter"
SEARCH_PATH = re.compile(r"search_path ?= ?([^ ,]+)")
DENIED = re.compile(r"^permission denied for (table|sequence|schema) (\S+)$")
PRIVILEGES = {"table": "SELECT, INSERT, UPDATE, DELETE", "sequence": "USAGE, SELECT", "schema": "USAGE, CREATE"}
NOT_OPENED, LOCKED = "unable to open database file", "database is locked"  # messages of SQLite
# SQLite has 512 bytes for a path, and a disk 255 for a name. `-journal` is appended to both.
MAX_PATH_BYTES, MAX_NAME_BYTES = 504, 247
# psycopg's prefix before the message of the server or of the network.
CONNECTION_PREFIX = re.compile(r"^connection failed: |connection to server at [^\n]*?failed: (?:FATAL: +)?")
# If a name has several addresses, or the URL several hosts, psycopg lists their answers after the last one.
ATTEMPT = re.compile(r"^- host: (\S+), port: (\S+), hostaddr: \S+: (.*)$", re.MULTILINE)
# Lanes try again after 1 s, and a file that is nearly full accepts some rows and not others.
STEADY_SECONDS = 5.0


def words(url: URL, error: BaseException) -> str:
    """The database's own message in one line, without the password."""
    driver = error.orig if isinstance(error, DBAPIError) else error
    primary = getattr(getattr(driver, "diag", None), "message_primary", None)
    said = primary or _of_each_host(str(driver))
    said += _remedy(url, said, getattr(driver, "sqlstate", None))
    said = said.replace(str(url.password), "…") if url.password else said
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in said).split())
    return line if len(line) <= MAX_WORDS_CHARS else f"{line[: MAX_WORDS_CHARS - 1]}…"


def _of_each_host(said: str) -> str:
    """The answer of each host, or the common answer of all. The last one alone would hide that the others are
    read-only.
    """
    answers = {f"{host}:{port}".replace("'", ""): _unprefixed(answer) for host, port, answer in ATTEMPT.findall(said)}
    if len(set(answers.values())) > 1:
        return "; ".join(f"{host}: {answer}" for host, answer in answers.items())
    return _unprefixed(said.partition("\nMultiple connection attempts failed.")[0])


def _unprefixed(said: str) -> str:
    return CONNECTION_PREFIX.sub("", said)


def _remedy(url: URL, said: str, state: str | None) -> str:
    """What the owner has to do. PostgreSQL names the object and not the role that lacks the privilege, SQLite names no
    folder.
    """
    if said == LOCKED:
        return f" by another program for {SQLITE_BUSY_SECONDS} s; {who_holds_database(Path(f'{url.database}.lock'))}"
    if said == NOT_OPENED:
        file = Path(url.database or "").absolute()
        folder = file.parent
        if len(os.fsencode(file)) > MAX_PATH_BYTES or len(os.fsencode(file.name)) > MAX_NAME_BYTES:
            return f"; SQLite takes paths of at most {MAX_PATH_BYTES} bytes, and names of {MAX_NAME_BYTES}"
        return f"; check that this user may write in {folder}" if folder.is_dir() else f"; make the folder {folder}"
    if state == LOCK_TIMEOUT:
        return (
            "; another session holds the lock: pg_stat_activity and pg_blocking_pids() name it, wait for it or end it"
        )
    if state == NO_SCHEMA:
        named = SEARCH_PATH.search(str(url.query.get("options", "")))
        return f"; run CREATE SCHEMA {named[1] if named else '…'}, or correct the search_path"
    if NO_OPTIONS in said:
        return (
            "; let PgBouncer ignore it (ignore_startup_parameters = options) and set the search_path by "
            "ALTER ROLE … SET search_path, or leave `options` out of the URL"
        )
    role = '"{}"'.format((url.username or "ROLE").replace('"', '""'))
    if denied := DENIED.match(said):
        kind, name = denied.groups()
        return f" to {role}; let its owner run GRANT {PRIVILEGES[kind]} ON {kind.upper()} {name} TO {role}"
    if state == NO_TABLE:
        return f" for {role}; run `receiver migrate`, or let the owner run GRANT USAGE ON SCHEMA … TO {role}"
    return f" (role {role}); let the owner GRANT what is missing" if state == NO_PRIVILEGE else ""


class Outages:
    """Logs `database.lost` at the first failure, and `database.recovered` at a write 5 s after the last one.

    A successful read proves nothing, because a read-only server answers reads. Off until `is_on`, for the long-running
    processes: a command prints its error itself, and waits less for a lock.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._lock = threading.Lock()
        self._began_at: float | None = None
        self._failed_at = 0.0

    @property
    def lasts(self) -> bool:
        """Whether no write has ended the last outage yet."""
        return self._began_at is not None

    def failed(self, reason: str) -> None:
        with self._lock:
            self._failed_at = time.monotonic()
            is_first, self._began_at = self._began_at is None, self._began_at or self._failed_at
        if is_first and self.is_on:
            log.error("database.lost", error=reason)

    def wrote(self) -> None:
        with self._lock:
            if self._began_at is None or time.monotonic() < self._failed_at + STEADY_SECONDS:
                return
            lasted, self._began_at = self._failed_at - self._began_at, None
        if self.is_on:
            log.info("database.recovered", was_down_seconds=round(lasted, 1))
