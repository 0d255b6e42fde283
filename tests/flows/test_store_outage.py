"""The store is down under load: callbacks are acknowledged, nothing is given up, everything is archived afterwards.

`STORE_OUTAGE_SECONDS=60` is the long form, on both databases.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlmodel import func, select

from receiver.app.wiring import Parts
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from storage.circuit import FAILURES
from storage.database.sessions import Database
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState
from tests.harness import wait_until
from tests.receiver.app.test_shutdown import serving
from tests.receiver.app.test_shutdown import settings as settings  # a fixture
from tests.unreported_tasks import REQUEST

SECONDS = float(os.environ.get("STORE_OUTAGE_SECONDS", "6"))
DATABASES = ["sqlite", "postgresql"] if SECONDS > 10 else ["sqlite"]
TASKS_PER_SECOND = 4
METRICS_TOKEN = "m" * 32
WORKERS, THREADS = 2, 8
# Tries that may fail for lack of the store, per process: the rows in hand at its start, then one trial per pause (1, 2,
# 4 … 30 s).
TRIALS = WORKERS * (FAILURES + THREADS + 3 + 5 + SECONDS / 30)


@pytest.fixture
def settings_here(settings: dict[str, str], parts: Parts) -> dict[str, str]:
    """Separate workers, and a callback address that the tasks submitted here have, too."""
    parts.__dict__["settings"] = parts.settings.model_copy(update={"public_url": settings["RECEIVER_PUBLIC_URL"]})
    own = {"RECEIVER_WORKERS": str(WORKERS), "RECEIVER_METRICS_TOKEN": METRICS_TOKEN}
    return {**settings, **own, "RECEIVER_LOG_FORMAT": "json"}


def submit_for(seconds: float, parts: Parts, readiness: list[httpx.Response]) -> int:
    """Submit at a steady rate and check readiness meanwhile. Returns the number of tasks."""
    count, ends_at = 0, time.monotonic() + seconds
    with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {METRICS_TOKEN}"}) as client:
        while time.monotonic() < ends_at:
            parts.submitter.submit(REQUEST)
            count += 1
            readiness.append(client.get(f"{parts.settings.public_url}/readyz"))
            time.sleep(1 / TASKS_PER_SECOND)
    return count


def count(database: Database, *conditions: Any) -> int:
    with database.read() as session:
        return session.exec(select(func.count()).where(*conditions)).one()


@pytest.mark.parametrize("database_kind", DATABASES)
def test_store_outage_under_load_loses_nothing(
    settings_here: dict[str, str], parts: Parts, sandbox: Sandbox, seaweed: Seaweed, tmp_path: Path
) -> None:
    readiness: list[httpx.Response] = []
    with serving(settings_here, tmp_path):
        tasks = submit_for(1, parts, [])
        seaweed.stop()
        try:
            tasks += submit_for(SECONDS, parts, readiness)
        finally:
            seaweed.start()
        archived = Task.archive == ArchiveState.ARCHIVED
        wait_until(lambda: count(parts.database, archived) == tasks, seconds=120, every=0.2)
        assert count(parts.database, Asset.state == AssetState.ARCHIVED) == tasks
    assert {answer.status_code for answer in readiness} == {200}
    assert readiness[-1].json()["status"] == "degraded"
    assert "cannot be reached" in readiness[-1].json()["checks"]["bucket"]
    sent = [attempt for callback in sandbox.ledger().callbacks for attempt in callback.attempts]
    assert {attempt.http_status for attempt in sent} == {200}
    log = (tmp_path / "serve.log").read_text()
    assert '"asset.failed"' not in log
    retries = log.count('"asset.retry_scheduled"') + log.count('"task.manifest_not_written"')
    told = f"{tasks} tasks, {len(sent)} callbacks acknowledged, {retries} tries in vain"
    print(f"{SECONDS:.0f} s without a store: {told}")  # noqa: T201
    assert 0 < retries <= TRIALS
