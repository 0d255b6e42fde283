"""Alembic's entry. It runs on the connection that `storage.rows.migrations` passes to it, inside that transaction."""

from alembic import context
from sqlmodel import SQLModel

import storage.rows.models  # noqa: F401 - registers the tables

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=SQLModel.metadata,
    transactional_ddl=True,
)
context.run_migrations()
