"""indexes for what verbs and pages ask of a large database, and room on PostgreSQL's pages for rows that change"""

import sqlalchemy as sa
from alembic import op

# 0010 is the claims' own; the two touch different indexes.
revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

RARE_EVENT = (
    "name NOT IN ('task.created', 'task.submitted', 'task.processing', 'task.succeeded', 'task.archived', "
    "'asset.archived')"
)

PARKED = "due_at IS NULL AND queued_at IS NULL AND (step IS NOT NULL OR state NOT IN ('failed', 'succeeded'))"


def upgrade() -> None:
    op.drop_index("task_newest", "task")
    op.create_index("task_newest", "task", ["created_at", "id"], unique=False)
    partial_index("task_parked", "task", "created_at", condition=PARKED)
    partial_index("task_failed", "task", "created_at", condition="state = 'failed'")
    partial_index("task_incomplete", "task", "created_at", condition="archive = 'incomplete'")
    op.drop_index("asset_failed", "asset")
    partial_index("asset_failed", "asset", "created_at", condition="state = 'failed'")
    partial_index("event_rare", "event", "seq", condition=RARE_EVENT)


def partial_index(name: str, table: str, *columns: str, condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, list(columns), unique=False, postgresql_where=where, sqlite_where=where)
