"""files that were given up are counted in an index, where each row of a failed file was read"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("asset_failed", "asset")
    where = sa.text("state = 'failed' AND coalesce(substr(error, 1, 11), '') <> 'dismissed: '")
    op.create_index("asset_given_up", "asset", ["created_at"], postgresql_where=where, sqlite_where=where)
