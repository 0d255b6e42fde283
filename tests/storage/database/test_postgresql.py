"""PostgreSQL in users' setups: poolers, demoted primaries, several hosts, other defaults."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager

import pytest
import sqlalchemy
from sqlalchemy import Connection, text
from sqlmodel import Session, select
from structlog.testing import capture_logs

from storage.database import outages, postgresql, prepared
from storage.database.clock import db_now
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows import loop_connections
from storage.rows.deliveries import Delivery
from storage.rows.group_commit import GroupCommit, Intake
from storage.rows.models import Callback, Task, Worker
from tests.harness import wait_until
from tests.pgbouncer import NEEDED, PgBouncer
from tests.postgres import Postgres, demoted_in_use
from tests.rows import new_task
from tests.storage.database.test_sessions import announce, count_workers, select_columns, waiting

pytestmark = pytest.mark.parametrize("database_kind", ["postgresql"])
STEADY_SECONDS = 0.5
GRANT = "GRANT ALL ON ALL {} IN SCHEMA public TO lesser"
PROCESS = text("SELECT pg_backend_pid()")


@pytest.fixture
def opened() -> Iterator[Callable[..., Database]]:
    with ExitStack() as stack:
        yield lambda url, **more: stack.enter_context(closing(Database(url, **more)))


@pytest.fixture
def pooled_url(postgres: Postgres, database_url: str) -> Iterator[str]:
    with PgBouncer(postgres, size=1) as pooler:
        yield pooler.url(database_url)


@pytest.fixture
def demoted(database: Database, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Pretend that all open sessions belong to a demoted server; new ones may write."""
    monkeypatch.setattr(postgresql, "BELIEVED_SECONDS", 0)
    with postgres.read_only(str(database.url.database)):
        database.now()
    return database


def commit(database: Database, number: int = 1) -> Intake:
    """One delivery, by the group commit."""

    async def run() -> Intake:
        group_commit = GroupCommit(database)
        group_commit.start()
        try:
            return await group_commit.commit(Delivery("kling", "push", None, b"%d" % number))
        finally:
            await group_commit.stop()

    return asyncio.run(run())


def test_write_on_a_session_that_stayed_read_only_is_done_on_a_new_one(demoted: Database) -> None:
    with demoted.write() as session:
        assert session.execute(text("DELETE FROM worker")).rowcount == 0
    assert commit(demoted) is Intake.NEW


def test_session_that_becomes_read_only_in_use_is_replaced_and_the_commit_repeated(database: Database) -> None:
    database.outages.is_on = True
    with demoted_in_use(database, "callback"), capture_logs() as logs:
        assert commit(database) is Intake.NEW
    assert logs == []
    with database.read() as session:
        assert len(session.exec(select(Callback)).all()) == 1


def test_group_of_writes_is_repeated_on_a_new_session(database: Database) -> None:
    database.write_in_group(lambda session: session.execute(PROCESS))  # the writer's session
    with demoted_in_use(database, "task"), capture_logs() as logs:
        task = database.write_in_group(lambda session: new_task(session))
    assert logs == []
    with database.read() as session:
        assert session.get_one(Task, task.id)


def test_group_of_prepared_writes_is_repeated_on_a_new_session(database: Database) -> None:
    times = {"started_at": db_now(), "seen_at": db_now()}
    insert = sqlalchemy.insert(Worker.__table__).values(id=uuid.uuid4(), host="here", pid=1, threads=1, **times)
    database.write_in_group(lambda session: session.execute(PROCESS))  # the writer's session
    with demoted_in_use(database, "worker"), capture_logs() as logs:
        assert database.write_in_group(lambda session: prepared.execute(session, insert)).changed == 1
    assert logs == []


def test_loop_connection_of_a_demoted_server_is_replaced(database: Database, postgres: Postgres) -> None:
    async def run() -> set[str]:
        connection = loop_connections.loop_connection(database)
        with postgres.read_only(str(database.url.database)):
            with pytest.raises(Exception, match="read-only"):
                await connection.insert([Delivery("kling", "push", None, b"1")])
        try:
            return await connection.insert([Delivery("kling", "push", None, b"1")])
        finally:
            await connection.close()

    assert len(asyncio.run(run())) == 1


def test_waker_of_a_demoted_server_listens_again(demoted: Database) -> None:
    with closing(demoted.waker()) as waker:
        waker.wait(0)
        before = waker._connection  # type: ignore[attr-defined]
        with demoted.write() as session:
            session.execute(PROCESS)
        waker.wait(0)
        assert waker._connection is not before  # type: ignore[attr-defined]
        woke = waiting(waker)
        wait_until(lambda: announce(demoted) or woke())


def test_read_only_server_is_logged_in_one_line_at_its_begin_and_one_at_its_end(
    database: Database, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "BELIEVED_SECONDS", STEADY_SECONDS)
    monkeypatch.setattr(outages, "STEADY_SECONDS", STEADY_SECONDS)
    database.outages.is_on = True
    with capture_logs() as logs:
        with postgres.read_only(str(database.url.database)):
            database.writer.dispose()
            for number in range(5):
                with pytest.raises(DatabaseUnavailable, match="read-only transaction"):
                    commit(database, number)
                assert select_columns(database, text("1")) == (1,)
        time.sleep(STEADY_SECONDS)
        assert commit(database) is Intake.NEW
    assert [line["event"] for line in logs] == ["database.lost", "database.recovered"]
    assert f"127.0.0.1:{postgres.port}: cannot execute" in logs[0]["error"]


def test_writable_one_of_several_hosts_is_used(
    database_url: str, postgres: Postgres, opened: Callable[..., Database]
) -> None:
    here = f"127.0.0.1:{postgres.port}"
    several = opened(database_url.replace(here, f"127.0.0.1:1,{here}") + "?connect_timeout=2")
    with several.write() as session:
        assert count_workers(session) == 0
    with postgres.read_only(str(several.url.database)):
        several.writer.dispose()
        with pytest.raises(DatabaseUnavailable, match="session is read-only") as caught:
            several.now()
        refused, read_only = "127.0.0.1:1: Connection refused", f"{here}: session is read-only"
        assert str(caught.value) == f"database: 127.0.0.1:1,{here}: {refused}; {read_only}"
        assert opened(f"{database_url}?target_session_attrs=any").now()
        with pytest.raises(DatabaseUnavailable, match="session is read-only"):
            opened(f"{database_url}?target_session_attrs=read-write").now()
    assert several.now()


def test_socket_path_as_a_host_works(database_url: str, postgres: Postgres, opened: Callable[..., Database]) -> None:
    folder, name = str(postgres._folder), database_url.rpartition("/")[2]
    for host in (folder.replace("/", "%2F"), folder.replace("/", "%2f")):
        database = opened(f"postgresql://postgres@{host}:{postgres.port}/{name}")
        assert database.now()
        with closing(database.waker()) as waker:
            waker.wait(0)
            assert waker._connection is not None  # type: ignore[attr-defined]
    with pytest.raises(DatabaseUnavailable, match=f"{folder}:1: "):
        opened(f"postgresql://postgres@{folder.replace('/', '%2F')}:1/{name}").now()


@contextmanager
def default_of(database: Database, name: str, value: str) -> Iterator[None]:
    """New sessions begin with this value unless they set their own."""
    with database.write() as session:
        session.execute(text(f"ALTER DATABASE \"{database.url.database}\" SET {name} = '{value}'"))
    database.writer.dispose()
    try:
        yield
    finally:
        with database.write() as session:
            session.execute(text(f'ALTER DATABASE "{database.url.database}" RESET {name}'))


@pytest.mark.parametrize(
    ("default", "value"),
    [("client_encoding", "latin1"), ("datestyle", "German"), ("default_transaction_isolation", "serializable")],
)
def test_defaults_of_the_database_change_nothing(default: str, value: str, database: Database) -> None:
    with default_of(database, default, value):
        with database.write() as session:
            assert session.execute(text("SELECT CAST(:word AS text)"), {"word": "帆船"}).scalar_one() == "帆船"
            assert session.execute(text("SHOW transaction_isolation")).scalar_one() == "read committed"
        assert database.now()
        assert commit(database) is Intake.NEW


def test_sessions_are_kept_where_the_database_ends_idle_ones(database: Database) -> None:
    shown = text("SELECT current_setting('idle_session_timeout')")
    with default_of(database, "idle_session_timeout", "1s"):
        with database.write() as session:
            assert session.execute(shown).scalar_one() == "0"
        assert asyncio.run(shown_in_the_loop(database, str(shown))) == "0"
        with closing(database.waker()) as waker:
            waker.wait(0)
            connection = waker._connection  # type: ignore[attr-defined]
            assert connection.execute(str(shown)).fetchone() == ("0",)


@pytest.mark.parametrize(("default", "used"), [("off", "on"), ("local", "local")])
def test_a_commit_is_on_the_disk_when_it_returns_whatever_the_default(
    default: str, used: str, database: Database
) -> None:
    shown = text("SHOW synchronous_commit")
    with default_of(database, "synchronous_commit", default):
        with database.write() as session:
            assert session.execute(shown).scalar_one() == used
        assert database.write_in_group(lambda session: session.execute(shown).scalar_one()) == used
        assert asyncio.run(shown_in_the_loop(database, str(shown))) == used


@pytest.mark.parametrize("limit", ["idle_in_transaction_session_timeout", "transaction_timeout"])
def test_a_transaction_that_the_server_ended_for_its_length_is_an_outage(
    limit: str, database_url: str, opened: Callable[..., Database]
) -> None:
    """A machine that was suspended goes on in the middle of a transaction."""
    database = opened(f"{database_url}?options=-c{limit}%3D200ms")
    for write in (database.write, database.group_write):
        with pytest.raises(DatabaseUnavailable, match="terminating connection due to"):
            write_slowly(write)
        with write() as session:
            assert session.execute(PROCESS).scalar_one()


def write_slowly(write: Callable[[], AbstractContextManager[Session]]) -> None:
    with write() as session:
        session.execute(PROCESS)
        time.sleep(0.5)


ISOLATION = text("SHOW transaction_isolation")


async def shown_in_the_loop(database: Database, statement: str = "SHOW transaction_isolation") -> str:
    connection = loop_connections.PostgresLoopConnection(database)
    await connection.unreadable([])
    assert connection._connection is not None
    shown = await (await connection._connection.execute(statement)).fetchone()
    await connection.close()
    return str(shown[0]) if shown else ""


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_every_write_is_read_committed_whatever_the_default(level: str, database: Database) -> None:
    change = f'ALTER DATABASE "{database.url.database}" {{}} default_transaction_isolation'
    with database.write() as session:
        session.execute(text(f"{change.format('SET')} = '{level}'"))
    database.writer.dispose()
    seen = [database.write_in_group(lambda session: session.execute(ISOLATION).scalar_one())]
    with database.autocommit_writer() as connection:
        seen.append(connection.execute(ISOLATION).scalar_one())
    seen.append(asyncio.run(shown_in_the_loop(database)))
    assert seen == ["read committed"] * 3
    with database.write() as session:
        session.execute(text(change.format("RESET")))


@NEEDED
def test_group_is_read_committed_behind_a_pooler_too(
    pooled_url: str, database: Database, opened: Callable[..., Database]
) -> None:
    change = f'ALTER DATABASE "{database.url.database}" {{}} default_transaction_isolation'
    with database.write() as session:
        session.execute(text(f"{change.format('SET')} = 'serializable'"))
    pooled = opened(pooled_url)
    assert pooled.write_in_group(lambda session: session.execute(ISOLATION).scalar_one()) == "read committed"
    with pooled.autocommit_reader() as connection:  # the pooler's session keeps the database's default for others
        assert connection.execute(ISOLATION).scalar_one() == "serializable"
    with database.write() as session:
        session.execute(text(change.format("RESET")))


@pytest.mark.parametrize(("option", "said"), [("sslmode=require", "server does not support SSL"), ("", "refused")])
def test_outage_names_place_and_reason(
    option: str, said: str, database_url: str, postgres: Postgres, opened: Callable[..., Database]
) -> None:
    port = postgres.port if option else 1
    url = database_url.replace(f"postgres@127.0.0.1:{postgres.port}", f"postgres:hunter2@127.0.0.1:{port}")
    with pytest.raises(DatabaseUnavailable, match=f"^database: 127.0.0.1:{port}: .*{said}") as caught:
        opened(f"{url}?{option}").now()
    assert "hunter2" not in str(caught.value)


@NEEDED
def test_many_threads_write_behind_a_pooler_without_prepared_statements(
    pooled_url: str, opened: Callable[..., Database]
) -> None:
    database = opened(pooled_url)

    def write(number: int) -> None:
        for _ in range(10):
            commit(database, number)
            announce(database)
            database.now()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(write, range(4))) == [None] * 4
    assert database.sessions.is_pooled
    with database.write() as session:
        assert session.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() == 0


@NEEDED
def test_sessions_of_a_demoted_server_that_a_pooler_keeps_are_ended(
    postgres: Postgres, database_url: str, opened: Callable[..., Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pooler's sessions were begun while the server was read-only, and stay so."""
    monkeypatch.setattr(postgresql, "BELIEVED_SECONDS", 0)
    name = database_url.rpartition("/")[2]
    with PgBouncer(postgres, size=4) as pooler:
        database = opened(pooler.url(database_url))
        with postgres.read_only(name), ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: select_columns(database, text("pg_sleep(0.2)")), range(4)))
            with pytest.raises(DatabaseUnavailable, match="read-only transaction"):
                commit(database)
        monkeypatch.setattr(postgresql, "OLD_SECONDS", 0)
        assert commit(database) is Intake.NEW
        with database.write() as session:
            assert count_workers(session) == 0


@NEEDED
def test_defaults_of_the_database_change_nothing_behind_a_pooler(
    pooled_url: str, database: Database, opened: Callable[..., Database]
) -> None:
    with database.write() as session:
        session.execute(text(f"ALTER DATABASE \"{database.url.database}\" SET datestyle = 'German'"))
        session.execute(text(f"ALTER DATABASE \"{database.url.database}\" SET client_encoding = 'latin1'"))
    first, second = opened(pooled_url), opened(pooled_url)
    for _ in range(3):
        for each in (first, second):
            assert each.now()
            with each.read() as session:
                assert session.execute(text("SELECT CAST(:word AS text)"), {"word": "帆船"}).scalar_one() == "帆船"
    with database.write() as session:
        session.execute(text(f'ALTER DATABASE "{database.url.database}" RESET ALL'))


@NEEDED
def test_the_direct_url_wakes_behind_a_pooler(
    pooled_url: str, database_url: str, opened: Callable[..., Database]
) -> None:
    database = opened(pooled_url, direct_url=database_url)
    with closing(database.waker()) as waker:
        waker.wait(0)
        woke = waiting(waker)
        assert not woke()
        announce(database)
        wait_until(woke)


@NEEDED
def test_wait_behind_a_pooler_without_a_direct_url_is_short(
    pooled_url: str, database: Database, opened: Callable[..., Database]
) -> None:
    with closing(opened(pooled_url).waker()) as waker:
        for _ in range(3):
            wait_until(waiting(waker))
    with database.read() as session:
        listening = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
        assert session.execute(listening).scalar_one() == 0


def test_direct_connection_is_not_a_pooler_and_prepares(database: Database) -> None:
    for _ in range(8):
        database.now()
    assert database.sessions.is_pooled is False


@pytest.fixture
def owner(database_url: str, opened: Callable[..., Database]) -> Database:
    return opened(database_url)


@pytest.fixture
def lesser(owner: Database, database_url: str, opened: Callable[..., Database]) -> Iterator[Database]:
    """The same database with a role that owns nothing."""
    with owner.write() as session:
        for statement in ("CREATE ROLE lesser LOGIN", GRANT.format("TABLES"), GRANT.format("SEQUENCES")):
            session.execute(text(statement))
    yield opened(database_url.replace("postgres@", "lesser:hunter2@"))
    with owner.write() as session:
        session.execute(text("DROP OWNED BY lesser"))
        session.execute(text("DROP ROLE lesser"))


@pytest.mark.parametrize(
    ("taken", "remedy"),
    [
        ("INSERT ON TABLE callback", "SELECT, INSERT, UPDATE, DELETE ON TABLE callback"),
        ("USAGE ON SCHEMA public", "USAGE ON SCHEMA"),
        ("USAGE, UPDATE ON SEQUENCE callback_id_seq", "USAGE, SELECT ON SEQUENCE callback_id_seq"),
    ],
)
def test_privilege_that_was_withdrawn_is_an_outage_that_names_the_remedy(
    taken: str, remedy: str, owner: Database, lesser: Database
) -> None:
    lesser.outages.is_on = True
    with owner.write() as session:
        session.execute(text(f"REVOKE {taken} FROM lesser, PUBLIC"))
    with (
        capture_logs() as logs,
        pytest.raises(DatabaseUnavailable, match=f"run GRANT {remedy}.* TO .lesser.") as refused,
    ):
        commit(lesser)
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["database.lost"]
    away = next(line["error"] for line in logs if line["event"] == "database.lost")
    assert "permission denied for" in away or "does not exist" in away
    assert "hunter2" not in str(refused.value)
    with owner.write() as session:
        session.execute(text(f"GRANT {taken} TO lesser, PUBLIC"))
    assert commit(lesser, 2) is Intake.NEW


@pytest.mark.parametrize("state", ["28000", "3D000", "53100", "57P03", "58030", "XX001", "42501", "42P01", "0A000"])
def test_fault_of_the_database_is_not_a_bug(state: str, database: Database) -> None:
    raising = text(f"DO $$ BEGIN RAISE EXCEPTION 'said' USING ERRCODE = '{state}'; END $$")
    with pytest.raises(DatabaseUnavailable, match="said"), database.write() as session:
        session.execute(raising)


def test_statement_prepared_before_a_schema_change_is_done_on_a_new_session(
    database: Database, opened: Callable[..., Database]
) -> None:
    def read(connection: Connection) -> object:
        return connection.execute(text("SELECT * FROM changing")).one_or_none()

    other = opened(database.url.render_as_string(hide_password=False))
    with other.autocommit_writer() as connection:
        connection.execute(text("CREATE TABLE changing (a int)"))
    with database.autocommit_reader() as reader:
        for _ in range(7):  # psycopg prepares at the sixth
            read(reader)
    with other.autocommit_writer() as connection:
        connection.execute(text("ALTER TABLE changing ADD COLUMN b int"))
    with pytest.raises(DatabaseUnavailable, match="cached plan"), database.autocommit_reader() as reader:
        read(reader)
    with database.autocommit_reader() as reader:
        assert read(reader) is None


def test_connection_that_is_lost_in_a_prepared_statement_is_dropped_without_a_traceback(
    database: Database, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    statement, name = sqlalchemy.select(Worker.__table__.c.id), str(database.url.database)

    def write() -> None:
        with database.write() as session:
            prepared.execute(session, statement)
            postgres.end_sessions(name)
            prepared.execute(session, statement)

    with pytest.raises(DatabaseUnavailable, match="terminating"), caplog.at_level("ERROR", "sqlalchemy"):
        write()
    assert caplog.records == []
    with database.write() as session:
        assert prepared.execute(session, statement).rows == []
