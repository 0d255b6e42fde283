"""The URL of a database: its accepted forms, psycopg's arguments, and the place that messages name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sqlalchemy import make_url
from sqlalchemy.dialects.postgresql.psycopg import dialect
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

from storage.url_parts import ENCODE

URL_FORMS = f"use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME, and {ENCODE}"
NO_OPTIONS = "an SQLite URL takes no options: write a ? that is part of the file's name as %3F, or leave it out"
# A healthy server answers in less. A delivery has 5 s from its body to its commit.
CONNECT_SECONDS = 4
# A host that vanishes (failover, a firewall that lost its state) is noticed after 10 s, while sending and while
# waiting. Linux's own limits are 15 minutes, or none. Options in the URL take precedence.
POSTGRESQL_OPTIONS = {
    "connect_timeout": CONNECT_SECONDS,
    "tcp_user_timeout": 10_000,  # milliseconds
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
# libpq's form, which SQLAlchemy does not read: postgresql://USER@HOST1:PORT1,HOST2:PORT2/NAME.
SEVERAL_HOSTS = re.compile(r"(\w[\w+]*://(?:[^:/@?]*(?::[^@]*)?@)?)([^/?@]+,[^/?@]+)((?:[/?].*)?)", re.DOTALL)


def normal_url(url: str) -> URL:
    """`postgresql://` means psycopg 3; SQLite needs a file. Raises ValueError with what to write."""
    parsed = _parse(url)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "postgresql+psycopg":
        # The end of a password with an @ in it: messages name host and database.
        if "@" in f"{parsed.host}{parsed.database}":
            raise ValueError(URL_FORMS)
        return parsed.set(host=unquote(parsed.host)) if parsed.host else parsed
    if parsed.drivername == "sqlite" and not parsed.host and parsed.database not in (None, "", ":memory:"):
        if "?" in url:  # SQLAlchemy would open another file, and ignore most options
            raise ValueError(NO_OPTIONS)
        return parsed
    raise ValueError(URL_FORMS)


def file_url(file: Path) -> str:
    """The URL of an SQLite file."""
    return f"sqlite:///{file.absolute()}".replace("%", "%25").replace("?", "%3F")


def _parse(url: str) -> URL:
    try:
        several = SEVERAL_HOSTS.fullmatch(url)
        if several is None:
            return make_url(url)
        parts = [re.fullmatch(r"\[?(.*?)\]?(?::(\d*))?", one) for one in several[2].split(",")]
        hosts, ports = zip(*(part.groups() for part in parts if part), strict=True)
        named = {"host": ",".join(map(unquote, hosts)), "port": ",".join(port or "5432" for port in ports)}
        return make_url(several[1] + several[3]).update_query_dict(named)
    except (ArgumentError, ValueError):  # an invalid port: the message would show a part of the password
        raise ValueError(URL_FORMS) from None


def psycopg_arguments(url: URL) -> dict[str, Any]:
    """The arguments of psycopg's connection. Of several hosts it takes the writable one, unless the URL asks for less.

    The encoding is set here, because a database may have a default that lacks the letters of a prompt.
    """
    named = _driver_names(url)
    several = {"target_session_attrs": "read-write"} if "," in str(named.get("host", "")) else {}
    return {**POSTGRESQL_OPTIONS, **several, **named, "client_encoding": "utf8"}


def place(url: URL) -> str:
    """Host and port, or the file, as the URL names them."""
    if url.get_backend_name() == "sqlite":
        return str(Path(url.database or "").absolute())
    named = _driver_names(url)
    hosts = str(named.get("host") or "the local socket").split(",")
    ports = str(named.get("port") or 5432).split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    return ",".join(f"{host}:{port or 5432}" for host, port in zip(hosts, ports, strict=False))


def _driver_names(url: URL) -> dict[str, Any]:
    """The URL's parts as libpq names them."""
    _, named = dialect().create_connect_args(url)  # type: ignore[no-untyped-call] # SQLAlchemy's own
    return dict(named)
