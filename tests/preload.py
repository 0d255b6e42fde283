"""Imports all that a command may need. The processes of the command line tests are forked from the one that does so.

It also reads botocore's descriptions of services once, and frees the children from collections over these objects.
"""

import functools
import gc
from importlib import import_module

from botocore.loaders import JSONFileLoader

IMPORTED = (
    "alembic.command", "alembic.ddl.postgresql", "alembic.ddl.sqlite", "boto3.s3.inject", "encodings.idna",
    "mako.template", "psycopg", "receiver.app.checks", "receiver.app.process", "receiver.app.wiring",
    "receiver.cli.main", "receiver.gateway.gateway", "receiver.web.app", "rich.console", "rich.progress", "rich.table",
    "storage.archive.repair", "storage.rows.migrations", "uvicorn", "uvicorn.lifespan.on", "uvloop",
)  # fmt: skip
for name in IMPORTED:
    import_module(name)
JSONFileLoader.load_file = staticmethod(functools.cache(JSONFileLoader().load_file))
import_module("boto3").Session(region_name="us-east-1").client("s3").close()
gc.freeze()
