"""`receiver check` on PostgreSQL in users' setups."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from tests.command_line import CommandLine, variables
from tests.pgbouncer import NEEDED, PgBouncer
from tests.postgres import Postgres

pytestmark = pytest.mark.parametrize("database_kind", ["postgresql"])


@pytest.fixture
def receiver(database_url: str, bucket: Bucket, sandbox: Sandbox, tmp_path: object) -> CommandLine:
    return CommandLine(variables(database_url, bucket, sandbox), tmp_path)  # type: ignore[arg-type]


@pytest.fixture
def pooled_url(postgres: Postgres, database_url: str) -> Iterator[str]:
    with PgBouncer(postgres) as pooler:
        yield pooler.url(database_url)


def lines(receiver: CommandLine, **changes: str) -> tuple[int, str]:
    done = receiver("check", **changes)
    return done.code, "\n".join(line for line in done.out.splitlines() if "database" in line)


def test_check_says_that_workers_are_woken(receiver: CommandLine) -> None:
    code, said = lines(receiver)
    assert code == 0 and "direct; workers are woken" in said


@NEEDED
def test_check_finds_a_pooler_and_names_the_setting(receiver: CommandLine, pooled_url: str) -> None:
    code, said = lines(receiver, RECEIVER_DATABASE_URL=pooled_url)
    assert code == 0 and "a pooler stands before PostgreSQL" in said and "RECEIVER_DATABASE_DIRECT_URL" in said


@NEEDED
def test_check_names_a_default_that_loses_commits_behind_a_pooler(
    receiver: CommandLine, pooled_url: str, database_url: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        change = f'ALTER DATABASE "{connection.info.dbname}" {{}} synchronous_commit'
        connection.execute(f"{change.format('SET')} = off")
        code, said = lines(receiver, RECEIVER_DATABASE_URL=pooled_url)
        connection.execute(change.format("RESET"))
    assert code == 1 and "a crash loses accepted callbacks" in said
    assert "run ALTER ROLE postgres SET synchronous_commit = on" in said


@NEEDED
def test_check_tries_the_direct_url(receiver: CommandLine, pooled_url: str, database_url: str) -> None:
    code, said = lines(receiver, RECEIVER_DATABASE_URL=pooled_url, RECEIVER_DATABASE_DIRECT_URL=database_url)
    assert code == 0 and "through a pooler; workers are woken by 127.0.0.1:" in said


@NEEDED
def test_check_refuses_a_direct_url_that_wakes_nobody(
    receiver: CommandLine, pooled_url: str, database_url: str, postgres: Postgres
) -> None:
    wrong = {
        pooled_url: "it is a pooler",
        postgres.url(): "it is another database",
        f"{database_url}_not": "does not exist",
        "postgresql://u:hunter2@127.0.0.1:1/x": "refused",
    }
    for url, reason in wrong.items():
        code, said = lines(receiver, RECEIVER_DATABASE_URL=pooled_url, RECEIVER_DATABASE_DIRECT_URL=url)
        assert code == 1 and reason in said and "correct RECEIVER_DATABASE_DIRECT_URL" in said
        assert "hunter2" not in said


def test_check_says_that_the_database_is_read_only(
    receiver: CommandLine, postgres: Postgres, database_url: str
) -> None:
    with postgres.read_only(database_url.rpartition("/")[2]):
        code, said = lines(receiver)
    assert code == 1 and f"127.0.0.1:{postgres.port} cannot be used (cannot execute INSERT" in said


def test_direct_url_without_postgresql_is_refused(receiver: CommandLine, database_url: str) -> None:
    done = receiver("status", RECEIVER_DATABASE_URL="sqlite:///a.db", RECEIVER_DATABASE_DIRECT_URL=database_url)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert done.err.startswith("RECEIVER_DATABASE_DIRECT_URL: ")


SEARCH_PATH = "?options=-csearch_path%3Dpics"


def test_a_schema_that_does_not_exist_is_named_in_one_line(receiver: CommandLine, postgres: Postgres) -> None:
    with psycopg.connect(postgres.url(), autocommit=True) as server:
        server.execute("CREATE DATABASE bare")
    try:
        done = receiver("migrate", RECEIVER_DATABASE_URL=postgres.url("bare") + SEARCH_PATH)
    finally:
        postgres.drop_database("bare")
    assert (done.code, done.err.count("\n"), "run CREATE SCHEMA pics" in done.err) == (1, 1, True), done.err


@NEEDED
def test_options_that_a_pooler_refuses_are_named_with_its_setting(receiver: CommandLine, pooled_url: str) -> None:
    done = receiver("status", RECEIVER_DATABASE_URL=pooled_url + SEARCH_PATH)
    code, said = lines(receiver, RECEIVER_DATABASE_URL=pooled_url + SEARCH_PATH)
    assert (done.code, code, "can be reached" in said) == (1, 1, False)
    assert all("ignore_startup_parameters = options" in each for each in (done.err, said))


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_does_not_hold_every_text_is_refused(
    encoding: str, receiver: CommandLine, postgres: Postgres
) -> None:
    name = f"other_{encoding.lower()}"
    with psycopg.connect(postgres.url(), autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}'".encode())
    try:
        done = receiver("migrate", RECEIVER_DATABASE_URL=postgres.url(name))
        code, said = lines(receiver, RECEIVER_DATABASE_URL=postgres.url(name))
    finally:
        postgres.drop_database(name)
    advice = "make one that holds every text: createdb -T template0 -E UTF8 NAME"
    assert (done.code, done.err) == (
        1,
        f"RECEIVER_DATABASE_URL: the database has the encoding {encoding}; {advice}\n",
    )
    assert code == 1 and f"the database has the encoding {encoding}" in said
