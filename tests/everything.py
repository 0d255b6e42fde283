"""Imported by the process that the command line tests fork from: all that a command may need."""

from importlib import import_module

for name in ("psycopg", "uvicorn", "receiver.app", "receiver.checks", "receiver.commands.operate", "receiver.process",
             "receiver.wiring", "storage.migrations"):  # fmt: skip
    import_module(name)
