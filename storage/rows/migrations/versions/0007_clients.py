"""which client a task is of, and no plain hash of an API key"""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("task", sa.Column("client", sa.Text(), nullable=True))
    connection = op.get_bind()
    for (digest,) in connection.execute(sa.text("SELECT DISTINCT client FROM idempotency")).all():
        # As receiver.gateway.api_keys.fingerprint does, so that an Idempotency-Key outlives the upgrade.
        slow = hashlib.scrypt(digest.encode(), salt=b"kling-receiver client", n=2**14, r=8, p=1, dklen=32).hex()
        renamed = sa.text("UPDATE idempotency SET client = :slow WHERE client = :digest")
        connection.execute(renamed, {"slow": slow, "digest": digest})
