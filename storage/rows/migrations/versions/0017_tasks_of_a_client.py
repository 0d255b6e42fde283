"""the list of a gateway client's own tasks is read in an index, where it walked the tasks of all clients"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    where = sa.text("client IS NOT NULL")
    op.create_index(
        "task_of_client", "task", ["client", "created_at", "id"], postgresql_where=where, sqlite_where=where
    )
