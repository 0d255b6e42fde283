"""Imports all that a command may need. The processes of the command line tests are forked from the one that does so.

It also does once what each command would repeat: it reads botocore's descriptions of services and the roots of TLS,
configures the mapped classes, reads the signatures of all commands, and compiles the statements of `receiver status`
for SQLite. That saves half of the CPU of most commands, 0.06 s. The children are freed from collections over these
objects.
"""

import functools
import gc
import os
import tempfile
from importlib import import_module
from pathlib import Path

import typer.main
from sqlalchemy.orm import configure_mappers

from storage.archive import continuous_audit
from storage.database.sessions import Database
from storage.fetch import connection
from storage.operations.measures import measure
from storage.rows import migrations, tasks
from tests.statements import compile_once
from tests.store_clients import read_once

IMPORTED = (
    "alembic.command", "alembic.ddl.postgresql", "alembic.ddl.sqlite", "boto3.s3.inject", "encodings.idna",
    "mako.template", "psycopg", "receiver.app.checks", "receiver.app.process", "receiver.app.wiring",
    "receiver.cli.main", "receiver.cli.show", "receiver.gateway.gateway", "receiver.web.app", "rich._emoji_codes",
    "rich.console", "rich.progress", "rich.table", "storage.archive.repair", "uvicorn", "uvicorn.lifespan.on",
    "uvloop",
)  # fmt: skip


def read_signatures() -> None:
    typer.main.get_command = functools.cache(typer.main.get_command)
    for command in typer.main.get_command(import_module("receiver.cli.main").app).commands.values():
        for parameter in command.params:
            if hasattr(parameter, "get_runtime_param"):
                parameter.get_runtime_param()


def read_roots() -> None:
    """Read the roots that a process trusts unless a variable names others: 50 ms of CPU for each."""
    read, usual = connection.tls_context, connection.tls_context()
    read.cache_clear()  # a command with other roots reads its own
    variables = ("SSL_CERT_FILE", "SSL_CERT_DIR")
    connection.tls_context = lambda: read() if any(map(os.environ.get, variables)) else usual  # type: ignore[assignment]


def use_database() -> None:
    compile_once()
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{Path(folder, 'receiver.db')}")
        migrations.upgrade(database)
        with database.read() as session:
            tasks.newest(session, 1)
            measure(session, deadline_seconds=1)
            continuous_audit.standing(session)
        database.close()


for name in IMPORTED:
    import_module(name)
read_once()
import_module("boto3").Session(region_name="us-east-1").client("s3").close()
configure_mappers()
read_signatures()
read_roots()
use_database()
gc.collect()
tempfile.tempdir = None  # each command finds the folder of its own TMPDIR
gc.freeze()
