"""The log lines of one callback's path, from the create to the manifest, name their task in the same way."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from tests.harness import wait_until
from tests.pipeline import deliver, run, task_of
from tests.unreported_tasks import REQUEST


@pytest.mark.parametrize("database_kind", ["sqlite"])  # log lines are the same on both
def test_every_line_of_one_callbacks_path_names_the_task_by_the_same_id(parts: Parts, sandbox: Sandbox) -> None:
    with capture_logs() as lines:
        task = parts.submitter.submit(REQUEST, external_task_id="order-1").task
        wait_until(lambda: sandbox.ledger().task("order-1").status == "succeed")
        record = parts.kling.read(provider_task_id=None, external_task_id="order-1")
        assert record is not None
        deliver(parts, task, record.body)
        run(parts, "callbacks", "reads", "assets", "finishes")
    assert task_of(parts, "order-1").archive == "archived"
    path = [line for line in lines if line["event"].split(".")[0] in ("task", "callback", "asset")]
    said = {line["event"] for line in path}
    assert said >= {"task.create_settled", "callback.settled", "asset.attempt_finished", "task.finished"}
    assert {line["task_id"] for line in path} == {str(task.id)}
    assert {line.get("task", "order-1") for line in path} == {"order-1"}
