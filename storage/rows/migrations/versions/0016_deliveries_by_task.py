"""a delivery is found by its task and key in one index, where two indexes had an entry in a random place each"""

import re

import sqlalchemy as sa
from alembic import op

from storage.errors import UserError
from storage.rows.migrations import UNCHANGED

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

# A constraint within the table's own words.
_UNIQUE = re.compile(r",\s*UNIQUE \(delivery_key\)")


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _refuse_references()
        _rebuild_without_constraint()
    else:
        op.drop_constraint("callback_delivery_key_key", "callback", type_="unique")
    op.drop_index("callback_task", "callback")
    op.create_index("callback_delivery", "callback", ["task_id", "delivery_key"], unique=True)
    _create("callback_delivery_at_account", "task_id IS NULL", unique=True)
    _create("callback_unreadable", "state = 'unreadable'", unique=False)


def _refuse_references() -> None:
    """A reference to the column that loses its constraint would stop each later delete of a delivery."""
    columns = 'SELECT m.name, lower(f."table"), lower(f."to") FROM sqlite_master m, pragma_foreign_key_list(m.name) f'
    found = op.get_bind().execute(sa.text(columns))
    for name, *referenced in found:
        if referenced == ["callback", "delivery_key"]:
            raise UserError(f"{UNCHANGED}: let the table {name}, which is not the receiver's, reference callback(id) "
                            "instead of callback(delivery_key), and run `receiver migrate`")  # fmt: skip


def _rebuild_without_constraint() -> None:
    """SQLite drops no constraint. The rows move to a table of the same words without it, then its indexes are made.

    Foreign keys are off (see `Database.write_schema`): otherwise rows of an operator's own table that reference a
    delivery were deleted with the old table.
    """
    found = op.get_bind().execute(sa.text("SELECT name, sql FROM sqlite_master WHERE tbl_name = 'callback'"))
    words: dict[str, str] = {name: sql for name, sql in found if sql}  # the constraint's own index has none
    made, count = _UNIQUE.subn("", words.pop("callback"))
    assert count == 1, made
    op.execute(re.sub(r'^CREATE TABLE "?callback"?', "CREATE TABLE callback_rebuilt", made))
    op.execute("INSERT INTO callback_rebuilt SELECT * FROM callback")
    op.execute("DROP TABLE callback")
    op.execute("PRAGMA legacy_alter_table=ON")  # an operator's own view or trigger may name the table that is away
    op.execute("ALTER TABLE callback_rebuilt RENAME TO callback")
    op.execute("PRAGMA legacy_alter_table=OFF")
    for index in words.values():
        op.execute(index)


def _create(name: str, condition: str, *, unique: bool) -> None:
    where = sa.text(condition)
    op.create_index(name, "callback", ["delivery_key"], unique=unique, postgresql_where=where, sqlite_where=where)
