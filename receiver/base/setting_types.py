"""The types of settings: how a variable's text is read and checked. A fault raises ValueError."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from storage.bucket.put_options import parse_tags
from storage.database.urls import URL_FORMS, normal_url
from storage.egress import EgressProxy
from storage.url_parts import split_url

# Options that other tools write into a URL, and their equivalents for PostgreSQL's own library.
INSTEAD_OF_OPTION = {
    "ssl": "write sslmode=require",
    "pgbouncer": "leave it out, a pooler is found out",
    "schema": "write options=-csearch_path%3DNAME",
    "currentSchema": "write options=-csearch_path%3DNAME",
}


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_at_spaces(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


def _host_port(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ValueError("write HOST:PORT")
    return value


def _http_url(value: str | None) -> str | None:
    if value is None:
        return None
    parts = split_url(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError("write a plain https:// address, without user, query or fragment")
    return value.rstrip("/")


def _origin(value: str) -> str:
    parts = split_url(value)
    if value != "*" and (parts.scheme not in ("http", "https") or value != f"{parts.scheme}://{parts.netloc}"):
        raise ValueError("write https://HOST or https://HOST:PORT without a path, or *")
    return value


def _tags(value: str) -> str:
    parse_tags(value)
    return value


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


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]
Entries = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_at_spaces)]
Delays = Annotated[tuple[Annotated[float, Field(ge=0.1, le=604_800)], ...], NoDecode, BeforeValidator(_split)]
HostPorts = Annotated[tuple[Annotated[str, AfterValidator(_host_port)], ...], NoDecode, BeforeValidator(_split)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_split)]
Proxy = Annotated[EgressProxy, BeforeValidator(lambda value: EgressProxy(value) if isinstance(value, str) else value)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
OptionalUrl = Annotated[str | None, AfterValidator(_http_url)]
Tags = Annotated[str, AfterValidator(_tags)]
DatabaseUrl = Annotated[SecretStr, BeforeValidator(_unquoted), AfterValidator(_database_url)]
