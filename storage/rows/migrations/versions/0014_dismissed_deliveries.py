"""an index of the deliveries that match no task and that nobody has dismissed"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    where = sa.text("state = 'unmatched' AND coalesce(substr(reason, 1, 11), '') <> 'dismissed: '")
    op.create_index("callback_unmatched_open", "callback", ["received_at"], postgresql_where=where, sqlite_where=where)
