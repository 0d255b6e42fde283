"""Imported by the process that the command line tests fork from: all that a command may need."""

import psycopg  # noqa: F401
import sqlmodel  # noqa: F401
import uvicorn  # noqa: F401

import receiver.app
import receiver.checks
import receiver.commands.operate
import receiver.process
import receiver.wiring
import storage.migrations  # noqa: F401
