"""files that came unusable and are tried again: since when, and how often in a row"""

import sqlalchemy as sa
from alembic import op

from storage.database.clock import UtcTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("asset", sa.Column("unusable_since", UtcTime(), nullable=True))
    op.add_column("asset", sa.Column("unusable_tries", sa.Integer(), server_default="0", nullable=False))
    unusable = sa.text("unusable_since IS NOT NULL")
    op.create_index("asset_unusable", "asset", ["task_id"], postgresql_where=unusable, sqlite_where=unusable)
