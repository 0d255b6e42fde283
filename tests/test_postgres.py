"""The PostgreSQL server of the tests keeps committed rows, however it ends."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.postgres import Postgres


@pytest.mark.parametrize("end", [Postgres.stop, Postgres.kill])
def test_committed_rows_are_there_after_a_restart(postgres: Postgres, end: Callable[[Postgres], None]) -> None:
    url = postgres.create_database(f"restarted_by_{end.__name__}")
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS number")
    end(postgres)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)
    postgres.start()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT number FROM kept").fetchall() == [(1,)]
    connection.close()
    postgres.drop_database(f"restarted_by_{end.__name__}")


def test_version_is_the_same_everywhere(postgres: Postgres) -> None:
    with psycopg.connect(postgres.url()) as connection:
        assert connection.info.server_version // 10_000 == 18
