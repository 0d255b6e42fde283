"""Modules that commands may need, imported once by the process that command line tests fork from."""

from importlib import import_module

for name in ("psycopg", "uvicorn", "receiver.web.app", "receiver.app.checks", "receiver.cli.operate",
             "receiver.app.process",
             "receiver.app.wiring", "storage.rows.migrations"):  # fmt: skip
    import_module(name)
