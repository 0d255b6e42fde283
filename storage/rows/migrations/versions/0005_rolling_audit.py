"""the audit that goes on in the workers: where its round stands, and what it found"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from storage.database.clock import UtcTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

Json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "rolling_audit",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("due_at", UtcTime(), nullable=False),
        sa.Column("lease", sa.Uuid(), nullable=True),
        sa.Column("cursor", sa.Uuid(), nullable=True),
        sa.Column("round_started_at", UtcTime(), nullable=True),
        sa.Column("round_ended_at", UtcTime(), nullable=True),
        sa.Column("checked", Json, nullable=False),
        sa.Column("last", Json, nullable=True),
        sa.Column("findings", Json, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
