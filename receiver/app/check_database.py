"""The database checks of `receiver check`: the file, the schema, writes, and how workers are woken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import text

from receiver.app.findings import Result, Status
from receiver.app.wiring import Parts
from storage.database.outages import words
from storage.database.urls import place
from storage.database.wakers import POOLED_INTERVAL_SECONDS, PostgresWaker, WakeFault
from storage.operations import heartbeats
from storage.rows import migrations


def missing_file(parts: Parts) -> Result | None:
    """A SQLite file that does not exist yet. None if it exists, or for a server. Does not create it."""
    file = Path(parts.database.url.database or "")
    if not parts.database.is_sqlite or file.exists():
        return None
    if not os.access(file.parent, os.W_OK | os.X_OK):
        line = f"the folder {file.parent.absolute()} is not there or may not be written"
        return Result("database", Status.FAULT, line, "create it for this user, or correct RECEIVER_DATABASE_URL")
    return _no_schema(parts, f"{file} does not exist yet")


def variables(parts: Parts) -> Iterator[Result]:
    """Check for PostgreSQL's own variables, with which its library fills what the URL leaves out."""
    if parts.database.is_sqlite:
        return
    from psycopg import pq

    url = parts.database.url
    given = {"host": url.host, "port": url.port, "user": url.username, "password": url.password, "dbname": url.database}
    said = {*(name for name, value in given.items() if value), *url.query}
    unsaid = (option.envvar.decode() for option in pq.Conninfo.get_defaults()
              if option.envvar and option.keyword.decode() not in said)  # fmt: skip
    if names := sorted(name for name in unsaid if os.environ.get(name)):
        line = f"{', '.join(names)} of the environment: used, because RECEIVER_DATABASE_URL does not say it"
        yield Result("database: environment", Status.NOTE, line, "unset what is meant for another program")


def _no_schema(parts: Parts, line: str) -> Result:
    if parts.settings.migrates_on_start:
        return Result("database", Status.NOTE, line, "`receiver serve` makes it")
    return Result("database", Status.FAULT, line, "run `receiver migrate`")


def schema(parts: Parts) -> Result:
    current, wanted = migrations.current(parts.database), migrations.head()
    if encoding := migrations.wrong_encoding(parts.database):
        line = f"the database has the encoding {encoding}: a request, report or file name with other letters fails"
        return Result("database", Status.FAULT, line, migrations.MAKE_UTF8)
    if current == wanted:
        heartbeats.try_write(parts.database)
        return Result("database", Status.OK, f"takes writes, schema {current} is current")
    if current is None:
        return _no_schema(parts, f"the database has no schema yet, this version needs {wanted}")
    line = f"the database schema is {current}, this version needs {wanted}"
    advice = migrations.IF_NEWER if migrations.is_newer(current) else "run `receiver migrate`"
    return Result("database", Status.FAULT, line, advice)


def room(parts: Parts) -> Iterator[Result]:
    """Check that the disk has the room that deliveries need."""
    if shortage := parts.database.shortage():
        advice = "make room there; until then each callback is answered 503"
        yield Result("database: room", Status.FAULT, shortage, advice)


def durability(parts: Parts) -> Iterator[Result]:
    """Check that PostgreSQL writes a commit to its disk before it returns. Direct sessions demand that themselves."""
    if parts.database.is_sqlite:
        return
    with parts.database.read() as session:
        if session.execute(text("SHOW synchronous_commit")).scalar_one() != "off":
            return
        role = session.execute(text("SELECT quote_ident(current_user)")).scalar_one()
    line = "commits return before they are on the disk (synchronous_commit = off), so a crash loses accepted callbacks"
    advice = f"run ALTER ROLE {role} SET synchronous_commit = on, then RECONNECT in the pooler"
    yield Result("database: durability", Status.FAULT, line, advice)


def waking(parts: Parts) -> Iterator[Result]:
    """Check for a pooler in front of PostgreSQL, and whether a commit of another process wakes a worker."""
    database = parts.database
    waker = database.waker()
    if not isinstance(waker, PostgresWaker):
        return
    direct = database.direct_url
    try:
        waker.check()
    except WakeFault as fault:
        if direct is None and fault.is_pooler:
            line = f"a pooler stands before PostgreSQL; workers check for work every {POOLED_INTERVAL_SECONDS:g} s"
            advice = "set RECEIVER_DATABASE_DIRECT_URL to PostgreSQL's own address, so that they are woken"
            yield Result("database: pooler", Status.NOTE, line, advice)
            return
        setting = "RECEIVER_DATABASE_DIRECT_URL" if direct else "RECEIVER_DATABASE_URL"
        line = f"workers are not woken by {place(direct or database.url)} ({words(direct or database.url, fault)})"
        yield Result("database: waking", Status.FAULT, line, f"correct {setting}")
    else:
        how = f"through a pooler; workers are woken by {place(direct)}" if direct else "direct; workers are woken"
        yield Result("database: waking", Status.OK, how)
    finally:
        waker.close()
