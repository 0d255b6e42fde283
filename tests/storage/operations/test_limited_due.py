"""A page counts a bounded number of due rows, the oldest of each lane."""

from __future__ import annotations

from datetime import timedelta

import pytest

from storage.database.sessions import Database
from storage.operations import measures
from storage.states import Step
from tests.rows import new_task


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("step", Step)
def test_limited_count_keeps_the_oldest(database: Database, monkeypatch: pytest.MonkeyPatch, step: Step) -> None:
    monkeypatch.setattr(measures, "MAX_DUE", 10)
    now = database.now()
    with database.write() as session:
        for other in Step:
            for number in range(20):
                new_task(session, external_task_id=f"{other}{number}", step=other, due_at=now - timedelta(seconds=1))
        for number in range(3):
            new_task(session, external_task_id=f"old{number}", step=step, due_at=now - timedelta(hours=2))
    with database.read() as session:
        found = measures.measure(session, deadline_seconds=1, day=False)
    assert (found.overdue, found.oldest_due_seconds >= 7_200) == (3, True)
