"""ids that only an unsigned delivery gave a task are removed, because another's task could be read with them"""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


# `id IN` lets SQLite begin with the few unsigned ids, instead of looking each task up under the write lock.
_UNSIGNED = (
    "UPDATE task SET provider_task_id = NULL "
    "WHERE id IN (SELECT alias.task_id FROM task_alias AS alias WHERE alias.unsigned) "
    "AND EXISTS (SELECT 1 FROM task_alias AS alias WHERE alias.unsigned AND alias.task_id = task.id "
    "AND alias.provider = task.provider AND alias.provider_task_id = task.provider_task_id)"
)
# The id of a refused task may have become another task's since, or was one too many to be stored.
_OF_OTHERS = (
    "UPDATE task SET provider_task_id = NULL WHERE state = 'failed' AND provider_task_id IS NOT NULL "
    "AND NOT EXISTS (SELECT 1 FROM task_alias AS alias WHERE alias.task_id = task.id "
    "AND alias.provider = task.provider AND alias.provider_task_id = task.provider_task_id)"
)


def upgrade() -> None:
    op.execute(_UNSIGNED)
    op.execute(_OF_OTHERS)
    op.execute("DELETE FROM task_alias WHERE unsigned")
