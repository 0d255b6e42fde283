"""an index of what came at the account's URL by the task that it is about"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    where = sa.text("task_id IS NULL")
    op.create_index("callback_at_account", "callback", ["external_task_id"], postgresql_where=where, sqlite_where=where)
