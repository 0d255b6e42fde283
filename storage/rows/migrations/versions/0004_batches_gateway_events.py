"""what pipelines need: slots and batches, a gateway's clients, events in a sequence that readers can trust"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from storage.database.clock import UtcTime
from storage.rows.models import BigId

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    _slots_and_batches()
    _gateway()
    _events()


def _slots_and_batches() -> None:
    op.create_table(
        "batch",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "account",
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("slot_limit", sa.Integer(), nullable=True),
        sa.Column("changed_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("provider"),
    )
    op.add_column("task", sa.Column("slots", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("task", sa.Column("queued_at", UtcTime(), nullable=True))
    op.add_column("task", sa.Column("batch_id", sa.Uuid(), nullable=True))
    op.add_column("task", sa.Column("batch_line", sa.Integer(), nullable=True))
    op.create_index("task_batch", "task", ["batch_id"], unique=False)
    partial_index("task_queued", "task", "queued_at", condition="queued_at IS NOT NULL")
    partial_index("task_slots", "task", "provider", condition="slots > 0")


def _gateway() -> None:
    op.add_column("task", sa.Column("client_callback_url", sa.Text(), nullable=True))
    op.create_table(
        "idempotency",
        sa.Column("client", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("body_hash", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("answer", Json, nullable=True),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("client", "key"),
    )
    op.create_index("idempotency_newest", "idempotency", ["created_at"], unique=False)


def _events() -> None:
    op.drop_column("event", "xact")
    op.add_column("event", sa.Column("seq", sa.BigInteger(), nullable=True))
    op.create_index("event_seq", "event", ["seq"], unique=True)
    partial_index("event_unsequenced", "event", "id", condition="seq IS NULL")
    op.create_table(
        "counter",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    # What was true before there were sinks is told to none of them.
    op.execute("UPDATE event SET seq = id")
    op.execute("INSERT INTO counter (name, value) SELECT 'event', coalesce(max(id), 0) FROM event")
    op.create_table(
        "sink",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("disabled_at", UtcTime(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "dispatch",
        sa.Column("due_at", UtcTime(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("lease", sa.Uuid(), nullable=True),
        sa.Column("id", BigId, nullable=False),
        sa.Column("sink", sa.Text(), nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("settled_at", UtcTime(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("sink", "event_id", name="dispatch_once"),
    )
    partial_index("dispatch_due", "dispatch", "sink", "due_at", condition="due_at IS NOT NULL")
    partial_index("dispatch_dead", "dispatch", "sink", condition="state = 'dead'")
    partial_index("dispatch_open", "dispatch", "task_id", condition="state = 'due'")
    op.create_index("dispatch_event", "dispatch", ["event_id"], unique=False)


def partial_index(name: str, table: str, *columns: str, condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, list(columns), unique=False, postgresql_where=where, sqlite_where=where)
