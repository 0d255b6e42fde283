"""indexes in the order of claims and of the queue for slots: a step beside a long queue reads only what it takes"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

# The column for which each claim of the table names a value.
LANES = {"task": ["step"], "callback": ["state"], "asset": [], "dispatch": ["sink"]}


def upgrade() -> None:
    for table, lane in LANES.items():
        op.drop_index(f"{table}_due", table)
        _create(f"{table}_due", table, [*lane, "due_at", "attempts"], "due_at IS NOT NULL")
        _create(f"{table}_suspect", table, [*lane, "due_at"], "due_at IS NOT NULL AND losses >= 2")
    for table in ("task", "asset"):
        _create(f"{table}_urgent", table, [*LANES[table], "files_expire_at", "due_at"], "due_at IS NOT NULL")
    op.drop_index("task_queued", "task")
    line = sa.text("(coalesce(CAST(batch_id AS TEXT), '') || ' ' || coalesce(model, ''))")
    _create("task_queue", "task", ["provider", line, "created_at", "batch_line", "id"], "queued_at IS NOT NULL")
    op.drop_index("task_slots", "task")
    _create("task_slots", "task", ["provider", "batch_id", "slots"], "slots > 0")


def _create(name: str, table: str, columns: list[Any], condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, columns, postgresql_where=where, sqlite_where=where)
