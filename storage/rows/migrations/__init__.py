"""The schema as numbered steps. A released step is never edited; see `versions/`.

Alembic is imported only if there is something to do. A start reads the current number from the
database without it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

from storage.database.sessions import Database
from storage.errors import UserError

# Any constant will do: it names our migrations among PostgreSQL's advisory locks.
ADVISORY_LOCK = 7_236_101
FOLDER = Path(__file__).parent
# `initdb` and `pg_createcluster` take SQL_ASCII with the locale C or POSIX.
MAKE_UTF8 = "make one that holds every text: createdb -T template0 -E UTF8 NAME"
# A step of a large table takes minutes. The role may have limits, of which older servers do not know each.
NO_TIMEOUTS = """SELECT set_config(name, '0', true) FROM pg_settings
WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout')"""
# PostgreSQL's codes of a name that is taken, and of an object that others depend on. Its messages may be translated.
TAKEN = ("42P07", "42710", "42701", "2BP01")
TAKEN_IN_SQLITE = ("already exists", "there is already")
UNCHANGED = "the schema was not changed"
IF_NEWER = "run a receiver of the version that made it"


@cache
def head() -> str:
    """The schema that this code needs: the number of the last step."""
    return max(step.name.partition("_")[0] for step in (FOLDER / "versions").glob("[0-9]*.py"))


def current(database: Database) -> str | None:
    """The schema that the database has, None = none of ours yet. Raises `DatabaseUnavailable`."""
    with database.read() as session:
        if not inspect(session.connection()).has_table("alembic_version"):
            return None
        return session.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def is_newer(current: str | None) -> bool:
    """Whether a newer version of the program made this schema. The steps are numbered."""
    return current is not None and current > head()


def wrong_encoding(database: Database) -> str | None:
    """The encoding of a PostgreSQL database that does not hold every text, None if it is UTF8."""
    if database.is_sqlite:
        return None
    with database.read() as session:
        encoding = str(session.execute(text("SHOW server_encoding")).scalar_one())
    return None if encoding == "UTF8" else encoding


def upgrade(database: Database, revision: str = "head") -> None:
    """Bring the schema up to date in one transaction, under a lock: any number of processes may call it at once.

    Raises `UserError` for a new schema in a database whose encoding does not hold every text, and for an operator's own
    table or index that is in the way.
    """
    if revision == "head" and current(database) == head():
        return
    if current(database) is None and (encoding := wrong_encoding(database)):
        raise UserError(f"RECEIVER_DATABASE_URL: the database has the encoding {encoding}; {MAKE_UTF8}")
    from alembic import command
    from alembic.config import Config

    try:
        with database.write_schema() as session:
            if not database.is_sqlite:
                session.execute(text(NO_TIMEOUTS))
                session.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
            config = Config()
            config.set_main_option("script_location", str(FOLDER))
            config.set_main_option("path_separator", "os")
            config.attributes["connection"] = session.connection()
            command.upgrade(config, revision)
    except DBAPIError as error:
        if not _is_taken(error.orig):
            raise
        diagnosis = getattr(error.orig, "diag", None)
        said = [diagnosis.message_primary, diagnosis.message_detail] if diagnosis else [str(error.orig)]
        words = ". ".join(each for each in said if each)
        raise UserError(f"{UNCHANGED}, because something that is not the receiver's is in the way: {words}; "
                        "remove it, or give it another name, and run `receiver migrate`") from error  # fmt: skip


def _is_taken(error: BaseException | None) -> bool:
    state = getattr(error, "sqlstate", None)
    return state in TAKEN if state else any(each in str(error) for each in TAKEN_IN_SQLITE)
