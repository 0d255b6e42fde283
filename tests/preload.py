"""Imports all that a command may need. The processes of the command line tests are forked from the one that does so.

It also does once what each command would repeat: it reads botocore's descriptions of services, configures the mapped
classes and reads the signatures of all commands. Of the 0.17 s of CPU of a `receiver status` that saves 0.05. The
children are freed from collections over these objects.
"""

import functools
import gc
from importlib import import_module

import typer.main
from botocore.loaders import JSONFileLoader
from sqlalchemy.orm import configure_mappers

IMPORTED = (
    "alembic.command", "alembic.ddl.postgresql", "alembic.ddl.sqlite", "boto3.s3.inject", "encodings.idna",
    "mako.template", "psycopg", "receiver.app.checks", "receiver.app.process", "receiver.app.wiring",
    "receiver.cli.main", "receiver.cli.show", "receiver.gateway.gateway", "receiver.web.app", "rich.console",
    "rich.progress", "rich.table", "storage.archive.repair", "storage.rows.migrations", "uvicorn",
    "uvicorn.lifespan.on", "uvloop",
)  # fmt: skip
for name in IMPORTED:
    import_module(name)
JSONFileLoader.load_file = staticmethod(functools.cache(JSONFileLoader().load_file))
import_module("boto3").Session(region_name="us-east-1").client("s3").close()
configure_mappers()
typer.main.get_command = functools.cache(typer.main.get_command)
typer.main.get_command(import_module("receiver.cli.main").app)
gc.freeze()
