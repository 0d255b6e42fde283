"""ids that only an unsigned delivery gave a task are removed, because another's task could be read with them"""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        "UPDATE task SET provider_task_id = NULL WHERE EXISTS (SELECT 1 FROM task_alias AS alias WHERE alias.unsigned "
        "AND alias.task_id = task.id AND alias.provider = task.provider "
        "AND alias.provider_task_id = task.provider_task_id)"
    )
    op.execute("DELETE FROM task_alias WHERE unsigned")
