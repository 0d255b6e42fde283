"""what was odd about a file that was kept: bytes behind its end, and notes"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

Json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("asset", sa.Column("trailing_bytes", sa.BigInteger(), nullable=True))
    op.add_column("asset", sa.Column("notes", Json, nullable=True))
