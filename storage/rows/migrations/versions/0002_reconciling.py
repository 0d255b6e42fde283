"""what reconciling needs: the pace of reads, the ids in unmatched deliveries, measures of callbacks and deadlines"""

import sqlalchemy as sa
from alembic import op

from storage.database.clock import UtcTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pace",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("next_free_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("account"),
    )
    op.add_column("callback", sa.Column("external_task_id", sa.Text(), nullable=True))
    op.add_column("callback", sa.Column("provider_task_id", sa.Text(), nullable=True))
    op.add_column("task", sa.Column("end_called_back_at", UtcTime(), nullable=True))
    op.add_column("task", sa.Column("deadline_near_at", UtcTime(), nullable=True))
    partial_index("callback_unmatched_external", "callback", "external_task_id", "state = 'unmatched'")
    partial_index("callback_unmatched_provider", "callback", "provider_task_id", "state = 'unmatched'")
    partial_index("task_deadline", "task", "files_expire_at", "archive = 'archiving'")
    partial_index("asset_failed", "asset", "task_id", "state = 'failed'")
    op.create_index("task_completed", "task", ["completed_at"], unique=False)


def partial_index(name: str, table: str, column: str, condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, [column], unique=False, postgresql_where=where, sqlite_where=where)
