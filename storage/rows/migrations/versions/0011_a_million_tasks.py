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


def upgrade() -> None:
    partial_index("event_rare", "event", "seq", condition=RARE_EVENT)


def partial_index(name: str, table: str, *columns: str, condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, list(columns), unique=False, postgresql_where=where, sqlite_where=where)
