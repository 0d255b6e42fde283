"""`RECEIVER_DATABASE_URL` and `RECEIVER_DATABASE_DIRECT_URL` in the forms that people and other tools write."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, SecretStr

from storage.database.urls import URL_FORMS, normal_url

# Options that other tools write into a URL, and their equivalents for PostgreSQL's own library.
INSTEAD_OF_OPTION = {
    "ssl": "write sslmode=require",
    "pgbouncer": "leave it out, a pooler is found out",
    "schema": "write options=-csearch_path%3DNAME",
    "currentSchema": "write options=-csearch_path%3DNAME",
}


def _unquoted(value: Any) -> Any:
    return value.strip(" \t\r\n\"'") if isinstance(value, str) else value


def _database_url(value: SecretStr) -> SecretStr:
    try:
        url = normal_url(value.get_secret_value())
    except Exception as error:  # the parser's own message may quote the password
        raise ValueError(URL_FORMS) from error
    if url.query and url.get_backend_name() == "postgresql":
        from psycopg.pq import Conninfo  # 50 ms of a start, needed only for the few URLs with options

        known = {option.keyword.decode() for option in Conninfo.get_defaults()}
        for name in sorted(set(url.query) - known):
            if any("@" in str(value) for value in url.query.values()):  # the name may be a part of the password
                raise ValueError(URL_FORMS)
            instead = INSTEAD_OF_OPTION.get(name, "leave it out")
            raise ValueError(f"PostgreSQL's library knows no option {name[:40]!r}: {instead}")
    return value


DatabaseUrl = Annotated[SecretStr, BeforeValidator(_unquoted), AfterValidator(_database_url)]
