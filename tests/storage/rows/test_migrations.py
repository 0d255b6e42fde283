"""The schema of the migrations equals that of the models, and any number of processes may make it."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import inspect, text
from sqlmodel import SQLModel, select

from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable, UserError
from storage.rows import deliveries, migrations
from storage.rows.deliveries import Delivery
from storage.rows.models import Callback, Task, TaskAlias
from storage.states import TaskState
from tests.forked import Forked
from tests.harness import ROOT, wait_until
from tests.rows import LONG_AGO, new_task


@pytest.fixture
def empty(empty_database_url: str) -> Iterator[Database]:
    opened = Database(empty_database_url)
    yield opened
    opened.close()


def tables(database: Database) -> set[str]:
    return set(inspect(database.reader).get_table_names())


# SQLAlchemy does not read indexes of expressions from SQLite, and PostgreSQL words the expression in its own way.
WITH_EXPRESSION = "task_queue"
skipped = pytest.mark.filterwarnings("ignore:.*kip.*expression-based index '?task_queue")


@skipped
def test_models_and_migrations_agree(database: Database) -> None:
    opts = {"compare_server_default": True, "include_name": lambda name, *_: name != WITH_EXPRESSION}
    opts["include_object"] = lambda _, name, *__: name != WITH_EXPRESSION
    with database.read() as session:
        context = MigrationContext.configure(session.connection(), opts=opts)
        assert compare_metadata(context, SQLModel.metadata) == []


def test_index_of_lines_matches_the_model(empty: Database) -> None:
    """The databases word it alike if it is made of the same words."""
    made = []
    for make in (migrations.upgrade, lambda database: SQLModel.metadata.create_all(database.writer)):
        make(empty)
        sql = "SELECT sql FROM sqlite_master WHERE name = :name"
        if not empty.is_sqlite:
            sql = "SELECT indexdef FROM pg_indexes WHERE indexname = :name"
        with empty.write() as session:
            made.append(session.execute(text(sql), {"name": WITH_EXPRESSION}).scalar_one())
        SQLModel.metadata.drop_all(empty.writer)
    assert made[0] == made[1]


@skipped
def test_the_due_indexes_hold_waiting_rows_only(database: Database) -> None:
    """A comparison of metadata ignores the condition of a partial index."""
    dialect = database.reader.dialect.name
    for table, lane in (("task", ["step"]), ("callback", ["state"]), ("asset", []), ("dispatch", ["sink"])):
        indexes = {str(one["name"]): one for one in inspect(database.reader).get_indexes(table)}
        found = {
            name.removeprefix(f"{table}_"): (index["column_names"], re.sub(r"[()]", "", condition))
            for name, index in indexes.items()
            if "due_at IS NOT NULL" in (condition := str(index.get("dialect_options", {}).get(f"{dialect}_where")))
        }
        waits = "due_at IS NOT NULL"
        wanted = {"due": ([*lane, "due_at", "attempts"], waits)}
        wanted["suspect"] = ([*lane, "due_at"], f"{waits} AND losses >= 2")
        if table in ("task", "asset"):
            wanted["urgent"] = ([*lane, "files_expire_at", "due_at"], waits)
        assert found == wanted


@pytest.mark.parametrize("database_kind", ["postgresql"])
def test_tables_that_change_leave_room_on_their_pages(database: Database) -> None:
    with database.read() as session:
        found = session.execute(text("SELECT relname FROM pg_class WHERE 'fillfactor=60' = ANY (reloptions)")).scalars()
        assert list(found) == ["task"]


def test_the_last_step_is_the_head_that_alembic_finds() -> None:
    assert ScriptDirectory(str(migrations.FOLDER)).get_heads() == [migrations.head()]


def test_an_empty_database_has_no_schema_until_it_is_upgraded(empty: Database) -> None:
    assert migrations.current(empty) is None
    migrations.upgrade(empty)
    assert migrations.current(empty) == migrations.head()
    assert tables(empty) == {*SQLModel.metadata.tables, "alembic_version"}


def test_upgrading_again_changes_nothing(database: Database) -> None:
    before = tables(database)
    migrations.upgrade(database)
    assert (migrations.current(database), tables(database)) == (migrations.head(), before)


def test_threads_may_upgrade_at_once(empty: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(migrations.upgrade, empty) for _ in range(4)]:
            done.result(60)
    assert migrations.current(empty) == migrations.head()


def test_processes_may_upgrade_at_once(empty_database_url: str, tmp_path: Path) -> None:
    outs, started = [tmp_path / "one", tmp_path / "other"], []
    with ExitStack() as inputs:
        for out in outs:
            out.touch()
            os.mkfifo(given := out.with_suffix(".given"))
            module = "tests.storage.rows.upgrading"
            started.append(
                Forked((empty_database_url,), os.environ, ROOT, out=out, given=given, module=module, strict=True)
            )
            inputs.enter_context(given.open("w"))
        wait_until(lambda: [out.read_text() for out in outs] == ["ready\n"] * 2)
    assert [process.wait(60) for process in started] == [0, 0]
    assert [out.read_text() for out in outs] == [f"ready\n{migrations.head()}\n"] * 2


def test_an_upgrade_that_fails_leaves_nothing(empty: Database) -> None:
    with empty.write() as session:
        session.execute(text("CREATE TABLE worker (id int)"))  # in the way of the first step
    with pytest.raises(Exception, match="worker"):
        migrations.upgrade(empty)
    assert tables(empty) == {"worker"}
    assert migrations.current(empty) is None


def test_ids_of_unsigned_deliveries_are_removed(empty: Database) -> None:
    migrations.upgrade(empty, "0014")
    with empty.write() as session:
        poisoned, ours = new_task(session, provider_task_id="foreign"), new_task(session, provider_task_id="901")
        refused = new_task(session, provider_task_id="901", state=TaskState.FAILED)  # its owner has taken the id over
        for task, name, unsigned in ((poisoned, "foreign", True), (ours, "901", False), (ours, "902", True)):
            values = {"provider": task.provider, "provider_task_id": name, "task_id": task.id, "unsigned": unsigned}
            session.add(TaskAlias(**values))
    migrations.upgrade(empty)
    with empty.read() as session:
        assert session.scalars(select(TaskAlias.provider_task_id)).all() == ["901"]
        kept = {task.id: task.provider_task_id for task in session.scalars(select(Task))}
    assert kept == {poisoned.id: None, refused.id: None, ours.id: "901"}


def test_deliveries_of_earlier_releases_stay_and_are_known(empty: Database) -> None:
    """Step 0016 moves them to a table without the old constraint on SQLite."""
    migrations.upgrade(empty, "0015")
    named = [Delivery("kling", "push", task_id, body, {"user-agent": "é"}, "w1")
             for task_id in (None, uuid.UUID(int=1), uuid.UUID(int=2)) for body in (b"{}", b"\xff\0")]  # fmt: skip
    every = "SELECT * FROM callback ORDER BY id"
    with empty.write() as session:
        session.execute(text("CREATE VIEW of_an_operator AS SELECT id FROM callback"))
        for one in named:
            row = Callback(delivery_key=one.key, provider="kling", source="push", task_id=one.task_id, body=one.body)
            session.add(row.sqlmodel_update({"headers": one.headers, "webhook_id": "w1", "received_at": LONG_AGO}))
        session.flush()
        before = session.execute(text(every)).all()
    migrations.upgrade(empty)
    with empty.write() as session:
        assert session.execute(text(every)).all() == before and len(before) == len(named)
        assert len(session.execute(text("SELECT id FROM of_an_operator")).all()) == len(named)
        assert deliveries.store(session, named) == set()
        assert deliveries.store(session, [replace(named[0], body=b"[]")])
        assert session.scalars(select(Callback.id).order_by(Callback.id)).all()[-1] > before[-1].id


@pytest.fixture
def referenced(empty: Database) -> Database:
    """The schema before step 0016, and a table of an operator whose one row references a delivery."""
    migrations.upgrade(empty, "0015")
    with empty.write() as session:
        row = Callback(delivery_key="k", provider="kling", source="push", body=b"{}", headers={}, received_at=LONG_AGO)
        session.add(row)
        session.flush()
        session.execute(text("CREATE TABLE note (of bigint REFERENCES callback (id) ON DELETE CASCADE)"))
        session.execute(text("INSERT INTO note VALUES (:id)"), {"id": row.id})
    return empty


def test_rows_of_an_operator_that_reference_a_delivery_stay(referenced: Database) -> None:
    migrations.upgrade(referenced)
    with referenced.write() as session:
        assert session.execute(text("SELECT count(*) FROM note")).scalar_one() == 1
        session.execute(text("DELETE FROM callback"))
        assert session.execute(text("SELECT count(*) FROM note")).scalar_one() == 0  # keys are in force again


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_what_is_in_the_way_is_named_in_the_servers_own_language(referenced: Database) -> None:
    said = "RAISE EXCEPTION USING ERRCODE = '42P07', MESSAGE = 'Relation »x« existiert bereits'"
    with referenced.write() as session:
        made = f"CREATE FUNCTION german() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN {said}; END $$"
        session.execute(text(made))
        session.execute(text("CREATE EVENT TRIGGER german ON ddl_command_start EXECUTE FUNCTION german()"))
    with pytest.raises(
        UserError, match=r"schema was not changed.*is in the way: Relation »x« existiert bereits; remove"
    ):
        migrations.upgrade(referenced)


def test_something_of_an_operator_that_is_in_the_way_is_named_and_nothing_is_changed(referenced: Database) -> None:
    with referenced.write() as session:
        session.execute(text("CREATE INDEX callback_delivery ON callback (state)"))
    with pytest.raises(UserError, match=r"schema was not changed.*callback_delivery.* already exists; remove it, or"):
        migrations.upgrade(referenced)
    assert migrations.current(referenced) == "0015"
    with referenced.write() as session:
        assert session.execute(text("SELECT count(*) FROM note")).scalar_one() == 1
        session.execute(text("DROP INDEX callback_delivery"))
    migrations.upgrade(referenced)


def test_reference_to_the_key_of_a_delivery_is_refused_before_anything_changes(referenced: Database) -> None:
    with referenced.write() as session:
        session.execute(text("CREATE TABLE by_key (of text REFERENCES callback (delivery_key))"))
    with pytest.raises(UserError, match=r"schema was not changed.*by_key"):
        migrations.upgrade(referenced)
    assert migrations.current(referenced) == "0015"


def test_a_schema_of_a_later_release_is_refused_and_left_alone(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(CommandError, match="9999"):
        migrations.upgrade(database)
    assert migrations.current(database) == "9999"


def test_an_unreachable_database_is_unavailable() -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    for ask in (migrations.current, migrations.upgrade):
        with pytest.raises(DatabaseUnavailable):
            ask(away)


@pytest.mark.parametrize("database_kind", ["postgresql"])
@pytest.mark.parametrize("limit", ["statement_timeout", "transaction_timeout"])
def test_a_limit_of_the_role_does_not_end_the_migration(limit: str, empty: Database, empty_database_url: str) -> None:
    limited = Database(f"{empty_database_url}?options=-c{limit}%3D500ms")
    with ThreadPoolExecutor(1) as threads:
        with empty.write() as session:
            session.execute(text(f"SELECT pg_advisory_xact_lock({migrations.ADVISORY_LOCK})"))
            migrated = threads.submit(migrations.upgrade, limited)
            session.execute(text("SELECT pg_sleep(1)"))
        migrated.result()
    limited.close()
    assert migrations.current(empty) == migrations.head()
