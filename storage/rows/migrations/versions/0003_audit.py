"""what an audit needs: keys sorted by bytes, with indexes; when a task was deleted"""

import sqlalchemy as sa
from alembic import op

from storage.database.clock import UtcTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("task", sa.Column("deleted_at", UtcTime(), nullable=True))
    if op.get_bind().dialect.name == "postgresql":
        op.execute('ALTER TABLE asset ALTER COLUMN key TYPE text COLLATE "C"')
        op.execute('ALTER TABLE task ALTER COLUMN manifest_key TYPE text COLLATE "C"')
    op.create_index("asset_key", "asset", ["key"], unique=False)
    op.create_index("task_manifest_key", "task", ["manifest_key"], unique=False)
