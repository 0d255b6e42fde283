"""The database of a busy installation after a month: 1,000,000 tasks, 3 million files, 8 million events.

A quarter of the tasks is in 50 batches. A sink has a dispatch for each archived task; some wait, some are dead.

.venv/bin/python -m tests.bench.million sqlite:////tmp/million.db [--tasks 1000000]

Bulk SQL with the secondary indexes dropped and created again: 2 minutes on SQLite, 3 on PostgreSQL. The database must
be empty. Task `million-1` is the oldest; the tasks are spread evenly over the 30 days that end now.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection

from storage.database.sessions import Database
from storage.rows import migrations

TASKS, DAYS, FILES, EVENTS = 1_000_000, 30, 3, 8
# One task in this many: failed at the provider; brought no file; had a refused delivery; has a batch.
FAILED, INCOMPLETE, REJECTED, BATCHED = 50, 100, 100_000, 4
# Tasks of the last tenth that wait for their read, at most one in ten.
WAITING = 200
BATCHES = 50
# One in this many: of the tasks in the last tenth, the files are tried again (TRYING); of the archived tasks, the event
# is dead (DEAD) or still waits (OPEN).
TRYING, DEAD, OPEN = 1_000, 1_000, 500
KINDS = [f"task.{word}" for word in ("created", "submitted", "processing", "succeeded")]
KINDS += ["asset.archived"] * FILES + ["task.archived"]
REQUEST = """'{"model_name": "kling-image-o1", "prompt": "a boat on a lake at dawn, painted in oil", "n": 3}'"""
At = Callable[[float | str], str]
TABLES = ("task", "asset", "callback", "event", "dispatch")


@dataclass(frozen=True)
class Words:
    """Words that the two databases spell differently. `i`: a task's number, `k`: one of its files or events."""

    task_id: str
    file_id: str
    batch_id: str
    moment: str  # takes the seconds after the task's creation
    numbers: str
    parts: str
    blob: str = "zeroblob(700)"
    ordered: str = ""
    true: str = "1"
    false: str = "0"


SQLITE = Words(
    "printf('%08x%024x', (i * 2654435761) % 4294967296, i)",
    "printf('%08x%023x%x', (i * 2246822519 + k) % 4294967296, i, k)",
    "printf('%032x', {number})",
    "strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', (i - {tasks}) * {step} + {after} - 60))",
    "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {tasks}) SELECT i FROM n) AS n",
    "(WITH RECURSIVE n(k) AS (SELECT 0 UNION ALL SELECT k + 1 FROM n WHERE k < {last}) SELECT k FROM n) AS p",
)
POSTGRESQL = Words(
    "(lpad(to_hex((i::bigint * 2654435761) % 4294967296), 8, '0') || lpad(to_hex(i), 24, '0'))::uuid",
    "(lpad(to_hex((i::bigint * 2246822519 + k) % 4294967296), 8, '0') || lpad(to_hex(i), 23, '0') || k)::uuid",
    "lpad(to_hex({number}), 32, '0')::uuid",
    "now() + make_interval(secs => (i - {tasks}) * {step} + {after} - 60)",
    "generate_series(1, {tasks}) AS n(i)",
    "generate_series(0, {last}) AS p(k)",
    ordered=" ORDER BY i, k",
    blob="decode(repeat('00', 700), 'hex')",
    true="true",
    false="false",
)


def build(database: Database, tasks: int = TASKS) -> None:
    """Fill an empty database. On return its statistics are current and no write is pending."""
    migrations.upgrade(database)
    words = SQLITE if database.is_sqlite else POSTGRESQL
    with database.autocommit_writer() as connection:
        if database.is_sqlite:
            for pragma in ("synchronous=OFF", "cache_size=-400000", "temp_store=MEMORY", "foreign_keys=OFF"):
                connection.exec_driver_sql(f"PRAGMA {pragma}")
        indexes = _indexes(connection)
        for name in indexes:
            connection.exec_driver_sql(f"DROP INDEX {name}")
        cursor = connection.connection.cursor()
        for statement in _rows(words, tasks):
            cursor.execute(statement)  # the driver's own, which does not interpret a percent sign
        for made in indexes.values():
            connection.exec_driver_sql(made)
        if database.is_sqlite:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        else:
            connection.exec_driver_sql("VACUUM ANALYZE")
    database.writer.dispose()


def task_id(number: int) -> UUID:
    """The id of the task with this number, as the statements make it."""
    return UUID(f"{number * 2654435761 % 2**32:08x}{number:024x}")


def _indexes(connection: Connection) -> dict[str, str]:
    """The indexes of the filled tables that are no constraints, and the statements that make them."""
    if connection.dialect.name == "sqlite":
        found = "SELECT name, sql, tbl_name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    else:
        found = "SELECT indexname, indexdef, tablename FROM pg_indexes WHERE schemaname = 'public' AND "
        found += "indexname NOT IN (SELECT conname FROM pg_constraint)"
    return {name: made for name, made, table in connection.exec_driver_sql(found) if table in TABLES}


def _rows(words: Words, tasks: int) -> list[str]:
    """The statements that insert everything."""

    def at(seconds: float | str) -> str:
        return words.moment.format(tasks=tasks, step=DAYS * 86_400 / tasks, after=seconds)

    numbers = words.numbers.format(tasks=tasks)
    files, events = (f"{numbers}, {words.parts.format(last=count - 1)}" for count in (FILES, EVENTS))
    fails, lacks = f"i % {FAILED} = 7", f"i % {INCOMPLETE} = 8"
    one_in = max(10, tasks // 10 // WAITING)
    waits, tries = (f"(i % {each} AND i > {tasks} * 9 / 10)" for each in (f"{one_in} = 9", f"{TRYING} = 11"))
    batch = words.numbers.format(tasks=BATCHES)
    began = words.moment.format(tasks=BATCHES, step=DAYS * 86_400 / BATCHES, after=-DAYS * 86_400 / BATCHES)
    return [
        _insert(
            "batch", {"id": words.batch_id.format(number="i"), "name": "'batch-' || i", "created_at": began}, batch
        ),
        _insert("task", _task(words, at, fails, lacks, waits, tries) | _batched(words, tasks), numbers),
        _insert("asset", _asset(words, at, lacks, tries), f"{files} WHERE NOT ({waits} OR {fails})"),
        _insert("callback", _callback(words, at), numbers),
        _insert("event", _event(words, at, fails), events + words.ordered),
        _insert("dispatch", _dispatch(tasks), f"event WHERE seq % {EVENTS} = 0{words.ordered and ' ORDER BY id'}"),
        f"UPDATE counter SET value = {tasks * EVENTS} WHERE name = 'event'",
    ]


def _insert(table: str, columns: dict[str, str], source: str) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) SELECT {', '.join(columns.values())} FROM {source}"


def _batched(words: Words, tasks: int) -> dict[str, str]:
    within, number = f"CASE WHEN i % {BATCHED} = 1 THEN", f"CAST((i - 1) / ({tasks} / {BATCHES}) + 1 AS integer)"
    return {"batch_id": f"{within} {words.batch_id.format(number=number)} END", "batch_line": f"{within} i END"}


def _task(words: Words, at: At, fails: str, lacks: str, waits: str, tries: str) -> dict[str, str]:
    ended, archived = (
        f"CASE WHEN NOT {waits} THEN {at(40)} END",
        f"CASE WHEN NOT ({waits} OR {tries}) THEN {at(41)} END",
    )
    none, archive = f"{waits} OR {fails}", f"WHEN {lacks} THEN 'incomplete' WHEN {tries} THEN 'archiving'"
    archive += " ELSE 'archived' END"
    return {
        "id": words.task_id, "external_task_id": "'million-' || i", "provider": "'kling'",
        "provider_task_id": "'kling-' || i", "request": REQUEST, "request_hash": "''",
        "callback_url": "'https://receiver.test/callbacks/kling/x'", "adopt": words.false,
        "state": f"CASE WHEN {waits} THEN 'submitted' WHEN {fails} THEN 'failed' ELSE 'succeeded' END",
        "archive": f"CASE WHEN {none} THEN 'none' {archive}", "contradicted": words.false, "polls": "0",
        "completeness_reads": "0", "manifests": "1", "created_at": at(0), "submitted_at": at(1),
        "completed_at": ended, "end_called_back_at": ended, "archived_at": archived, "files_expire_at": at(30 * 86_400),
        "manifest_key": "'m/' || i", "step": f"CASE WHEN {waits} THEN 'read' END",
        "due_at": f"CASE WHEN {waits} THEN {at(DAYS * 86_400)} END", "attempts": "0", "losses": "0",
        "error": f"CASE WHEN {fails} THEN 'the provider refused the prompt' END", "model": "'kling-image-o1'",
    }  # fmt: skip


def _asset(words: Words, at: At, lacks: str, tries: str) -> dict[str, str]:
    return {
        "id": words.file_id, "task_id": words.task_id, "kind": "'image'", '"index"': "k", "original": "''",
        "source_url": "'https://cdn.test/' || i || '/' || k", "files_expire_at": at(30 * 86_400),
        "state": f"CASE WHEN {lacks} THEN 'failed' WHEN {tries} THEN 'due' ELSE 'archived' END",
        "key": "'k/' || i || '/' || k",
        "sha256": f"'{'0' * 64}'", "size": "1500000", "media_type": "'image/png'", "width": "1024", "height": "1024",
        "verified": words.true, "accept_unverified": words.false, "fetched": "'{}'", "superseded": "'[]'",
        "created_at": at(40), "archived_at": at(41), "attempts": "0", "losses": "0",
        "due_at": f"CASE WHEN {tries} THEN {at(DAYS * 86_400)} END",
        "error": f"CASE WHEN {lacks} OR {tries} THEN 'html instead of a picture' END",
    }  # fmt: skip


def _callback(words: Words, at: At) -> dict[str, str]:
    return {
        "delivery_key": "'million-' || i", "provider": "'kling'", "source": "'push'", "task_id": words.task_id,
        "headers": "'{}'", "body": words.blob, "received_at": at(40), "applied_at": at(40), "attempts": "1",
        "losses": "0",
        "state": f"CASE i % {REJECTED} WHEN 9 THEN 'rejected' WHEN 10 THEN 'unmatched' ELSE 'applied' END",
    }  # fmt: skip


def _event(words: Words, at: At, fails: str) -> dict[str, str]:
    usual = " ".join(f"WHEN k = {number} THEN '{name}'" for number, name in enumerate(KINDS))
    rare = f"WHEN k = 2 AND i % {REJECTED} = 9 THEN 'callback.rejected' WHEN k = 3 AND {fails} THEN 'task.failed'"
    return {
        "task_id": words.task_id, "name": f"CASE {rare} {usual} END", "at": at("k * 6"),
        "data": """'{"kind": "image", "index": 0, "key": "k/0/0", "size": 1500000}'""",
        "seq": f"(i - 1) * {EVENTS} + k + 1",
    }  # fmt: skip


def _dispatch(tasks: int) -> dict[str, str]:
    number = f"seq / {EVENTS}"
    is_dead, is_open = f"{number} % {DEAD} = 3", f"({number} % {OPEN} = 5 AND {number} > {tasks} * 9 / 10)"
    return {
        "sink": "'hook'", "event_id": "id", "task_id": "task_id", "tries": "1", "created_at": "at",
        "state": f"CASE WHEN {is_dead} THEN 'dead' WHEN {is_open} THEN 'due' ELSE 'delivered' END",
        "error": f"CASE WHEN {is_dead} OR {is_open} THEN '500 from the hook' END",
        "settled_at": f"CASE WHEN NOT {is_open} THEN at END", "attempts": "1", "losses": "0",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of an empty database")
    parser.add_argument("--tasks", type=int, default=TASKS)
    given = parser.parse_args()
    database = Database(given.url)
    build(database, given.tasks)
    database.close()


if __name__ == "__main__":
    main()
