"""The types of settings: how a variable's text is read and checked. A fault raises ValueError."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from storage.bucket.put_options import parse_tags
from storage.database.urls import URL_FORMS, normal_url
from storage.egress import EgressProxy
from storage.errors import FetchRefused
from storage.fetch.addresses import host_name
from storage.url_parts import split_url

# Timestamps are computed with these settings, and a later year than 9999 is an error. A hundred years are "never".
MAX_SECONDS = 100 * 365 * 86_400
DEFAULT_PORTS = {"http": 80, "https": 443}
HEADER = re.compile(r"[\x20-\x7e]+")
HOST_WITH_PORT = re.compile(r"(\[.*\]|[^:]*):\d*")
# As boto3 has it. An access point is named by its ARN.
BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:[!-~]+")
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


def check_text(value: str, *, is_path: bool) -> None:
    """Refuse a value in quotes, and bytes that are not UTF-8, except in a path. For settings of every type.

    No valid value begins and ends with the same quote. A secret may hold one at one end, or inside.
    """
    inside = value.strip()
    if len(inside) > 1 and inside[0] == inside[-1] and inside[0] in "\"'":
        raise ValueError("is in quotes, which count as a part of it; remove them (`docker run --env-file` keeps them)")
    try:
        value.encode()
    except UnicodeEncodeError:
        if not is_path:
            raise ValueError("is not UTF-8 text") from None


def _bare_host(value: str, form: str) -> str:
    """A host name or address in the spelling in which the hosts of URLs are compared with it."""
    faults = {
        "a scheme": "://" in value,
        "a path": "/" in value,
        "a user": "@" in value,
        "a wildcard": "*" in value,
        "a port": HOST_WITH_PORT.fullmatch(value) is not None,
    }
    if found := next((fault for fault, is_found in faults.items() if is_found), None):
        raise ValueError(f"an entry has {found}; write {form}")
    try:
        return host_name(value)
    except FetchRefused:
        raise ValueError(f"an entry is no host name or address; write {form}") from None


def _result_host(value: str) -> str:
    """The host of `HOST`, `.HOST` or `*.HOST`, which all mean the host and its subdomains."""
    return _bare_host(value.removeprefix("*").removeprefix("."), "HOST alone, as in cdn.example.com")


def _host_port(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError("write HOST:PORT")
    return _in_url(_bare_host(host, "HOST:PORT"), int(port))


def _in_url(host: str, port: int | None) -> str:
    place = f"[{host}]" if ":" in host else host
    return place if port is None else f"{place}:{port}"


def _trimmed_url(value: Any) -> Any:
    """A URL without the blanks around it. The parser would remove a line break inside it silently."""
    if not isinstance(value, str):
        return value
    if any(character <= " " or character == "\x7f" for character in value.strip()):
        raise ValueError("holds a blank or a control character")
    return value.strip()


def _http_url(value: str | None) -> str | None:
    if value is None:
        return None
    parts = split_url(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError("write a plain https:// address, without user, query or fragment")
    return value.rstrip("/")


def _origin(value: str) -> str:
    """An origin as browsers send it: in lower case, without the scheme's own port (RFC 6454 §6.2)."""
    if value == "*":
        return value
    form = "https://HOST or https://HOST:PORT without a path, or *"
    parts = split_url(value)
    if parts.scheme not in DEFAULT_PORTS or value != f"{value.partition(':')[0]}://{parts.netloc}" or "@" in value:
        raise ValueError(f"write {form}")
    own_port = parts.port in (None, DEFAULT_PORTS[parts.scheme])
    return f"{parts.scheme}://{_in_url(_bare_host(parts.hostname or '', form), None if own_port else parts.port)}"


def _header(value: str) -> str:
    """A value that is sent as a header, without the blanks around it."""
    trimmed = value.strip(" ")
    if not HEADER.fullmatch(trimmed):
        raise ValueError("is sent as a header: write printable ASCII, without line breaks")
    return trimmed


def _bucket(value: str) -> str:
    if not BUCKET.fullmatch(value):
        raise ValueError("write the bucket's name alone, without s3:// and without a folder")
    return value


def _printable(value: str) -> str:
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in value):
        raise ValueError("holds a control character")
    return value


def _proxy(value: Any) -> Any:
    return EgressProxy(_trimmed_url(value)) if isinstance(value, str) else value


def _tags(value: str) -> str:
    parse_tags(value)
    return value


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _database_url(value: SecretStr) -> SecretStr:
    try:
        url = normal_url(value.get_secret_value())
    except ValueError:
        raise
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


Seconds = Annotated[float, Field(le=MAX_SECONDS)]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(_result_host)], ...], NoDecode, BeforeValidator(_split)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]
Entries = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_at_spaces)]
Delays = Annotated[tuple[Annotated[float, Field(ge=0.1, le=604_800)], ...], NoDecode, BeforeValidator(_split)]
HostPorts = Annotated[tuple[Annotated[str, AfterValidator(_host_port)], ...], NoDecode, BeforeValidator(_split)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_split)]
OptionalProxy = Annotated[EgressProxy | None, NoDecode, BeforeValidator(_proxy)]
HttpUrl = Annotated[str, BeforeValidator(_trimmed_url), AfterValidator(_http_url)]
OptionalUrl = Annotated[str | None, BeforeValidator(_trimmed_url), AfterValidator(_http_url)]
Bucket = Annotated[str, AfterValidator(_bucket)]
Header = Annotated[str, AfterValidator(_header)]
Prefix = Annotated[str, AfterValidator(_printable)]
Tags = Annotated[str, AfterValidator(_printable), AfterValidator(_tags)]
DatabaseUrl = Annotated[SecretStr, BeforeValidator(_stripped), AfterValidator(_database_url)]
