"""paused accounts and models, a task's model, and what only unsigned deliveries have said"""

import sqlalchemy as sa
from alembic import op

from storage.database.clock import UtcTime

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("task", sa.Column("model", sa.Text(), nullable=True))
    op.add_column("task", sa.Column("callback_reads", sa.Integer(), server_default="0", nullable=False))
    op.add_column("asset", sa.Column("unconfirmed", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("task_alias", sa.Column("unsigned", sa.Boolean(), server_default=sa.false(), nullable=False))
    of_nobody = sa.text("task_id IS NULL AND state <> 'applied'")
    op.create_index(
        "callback_of_nobody", "callback", ["received_at"], postgresql_where=of_nobody, sqlite_where=of_nobody
    )
    op.create_table(
        "account_pause",
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("code", sa.Integer(), nullable=True),
        sa.Column("http_status", sa.Integer(), nullable=True),
        sa.Column("said", sa.Text(), nullable=False),
        sa.Column("since", UtcTime(), nullable=False),
        sa.Column("trial_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("provider", "model"),
    )
