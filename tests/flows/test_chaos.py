"""The bounded chaos campaign, and sharper tests of the promises that it rests on and of the faults that it found.

`python -m tests.chaos` is the whole campaign, `python -m tests.chaos.mutations` shows that these tests can fail.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, event, text

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from storage.rows import claims
from storage.rows.models import Asset, Task
from storage.states import ArchiveState
from tests.chaos import campaign, plan
from tests.harness import wait_until
from tests.pipeline import (
    Web,
    Wired,
    assert_archived,
    assets_of,
    deliver,
    drain,
    insert_row,
    kept,
    make_due_now,
    run,
    task_of,
)
from tests.rows import event_names, stored

POSTGRESQL_ONLY = pytest.mark.parametrize("database_kind", ["postgresql"])  # SQLite writes one transaction at a time


@pytest.mark.campaign("postgresql")
def test_nothing_is_lost_or_doubled_when_processes_and_servers_die(database_kind: Any, postgres_data: Path) -> None:
    outcome = campaign.run(plan.bounded(database_kind, seed=1), postgres_data=postgres_data)
    assert not outcome.failures, campaign.report(outcome)


def test_a_worker_that_lost_its_claim_changes_nothing(parts: Parts, sandbox: Sandbox) -> None:
    task = with_due_pictures(parts, 1)
    frozen = claim(parts)
    make_due_now(parts, Asset)
    drain(parts, task.external_task_id)
    before, objects = stored(parts.database, frozen), kept(parts)
    archive(parts, frozen)
    assert (stored(parts.database, frozen), kept(parts)) == (before, objects)
    assert event_names(parts.database, task).count("asset.archived") == 1
    assert_archived(parts, sandbox, task_of(parts, task.external_task_id))


def test_a_finisher_that_lost_its_claim_leaves_no_second_manifest(parts: Parts) -> None:
    task = with_due_pictures(parts, 1)
    run(parts, "assets")
    frozen = claim(parts, Task)
    make_due_now(parts, Task)
    run(parts, "finishes")
    # From now on a second manifest would have other bytes.
    deliver(parts, task, {"task_id": "late", "task_status": "processing"})
    before = kept(parts)
    next(lane for lane in parts.lanes() if lane.name == "finishes").work(frozen)
    assert (kept(parts), task_of(parts, task.external_task_id).manifests) == (before, 1)


def test_no_delivery_is_answered_before_its_commit(parts: Parts, web: Web) -> None:
    task = insert_row(parts)
    url = f"{web.url}/callbacks/kling/{parts.tokens.sign('kling', task.id)}"
    with parts.database.write() as session:  # so that no other writer can commit a delivery
        if not parts.database.is_sqlite:
            session.execute(text("LOCK TABLE callback IN EXCLUSIVE MODE"))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json={"task_id": "1", "task_status": "processing"}, timeout=1)
    answer = httpx.post(url, json={"task_id": "1", "task_status": "processing"}, timeout=20)
    assert answer.status_code == 200


@pytest.mark.databases("sqlite")
def test_earlier_outage_does_not_count_as_a_try_of_a_damaged_download(parts: Parts, sandbox: Sandbox) -> None:
    task = with_due_pictures(parts, 1)
    sandbox.set(cdn_faults=["503"] * 4 + ["truncated_silent"])
    for _ in range(6):
        make_due_now(parts, Asset)
        run(parts, "assets")
    run(parts, "finishes")
    assert_archived(parts, sandbox, task_of(parts, task.external_task_id))


@POSTGRESQL_ONLY
def test_exactly_one_of_two_pictures_settled_at_once_is_the_last(parts: Parts, sandbox: Sandbox) -> None:
    task = with_due_pictures(parts, 2)
    other = Wired(parts.settings, bucket=parts.bucket)  # settles of one process never coincide
    with ThreadPoolExecutor(2) as workers, at_each_commit_that_archives(parts, other) as (at_commit, go_on):
        settling = [workers.submit(archive, each, claim(parts)) for each in (parts, other)]
        # Each has decided whether its picture is the last, or waits for the one that has.
        wait_until(lambda: at_commit and len(at_commit) + waiting_for_a_lock(parts) == 2)
        go_on.set()
        for each in settling:
            each.result(20)
    other.close()
    run(parts, "finishes")
    assert task_of(parts, task.external_task_id).archive is ArchiveState.ARCHIVED
    assert_archived(parts, sandbox, task_of(parts, task.external_task_id))


@contextmanager
def at_each_commit_that_archives(*processes: Parts) -> Iterator[tuple[list[Connection], threading.Event]]:
    """List the commits that archive a picture, and hold them until the event is set."""
    at_commit, go_on = list[Connection](), threading.Event()

    def stop(connection: Connection) -> None:
        if connection.scalar(text("SELECT count(*) FROM asset WHERE state = 'archived'")):
            at_commit.append(connection)
            go_on.wait(20)

    for each in processes:
        event.listen(each.database.writer, "commit", stop)
    yield at_commit, go_on
    for each in processes:
        event.remove(each.database.writer, "commit", stop)


def with_due_pictures(parts: Parts, count: int) -> Task:
    """A task whose pictures are known and of which none is archived."""
    request = {"model_name": "kling-image-o1", "prompt": "a boat", "n": count}
    name = parts.submitter.submit(request).task.external_task_id

    def known() -> bool:
        make_due_now(parts, Task)
        run(parts, "reads")
        return len(assets_of(parts, task_of(parts, name))) == count

    wait_until(known)
    return task_of(parts, name)


def claim(parts: Parts, model: Any = Asset) -> Any:
    with parts.database.write() as session:
        return claims.claim(session, model, limit=1, lease_seconds=60)[0]


def archive(parts: Parts, asset: Asset) -> None:
    """Archive a claimed picture like a worker."""
    next(lane for lane in parts.lanes() if lane.name == "assets").work(asset)


def waiting_for_a_lock(parts: Parts) -> int:
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name AND wait_event_type = 'Lock'")
    with parts.database.read() as session:
        return int(session.execute(waiting, {"name": parts.database.url.database}).scalar_one())
