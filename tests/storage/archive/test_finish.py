"""The end of an archive: a finish that keeps ending its worker is parked, logged, and restored by `receiver retry`."""

from __future__ import annotations

import uuid
from contextlib import closing
from datetime import datetime

import pytest
from sqlmodel import select, update

from receiver.app.wiring import Parts
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from receiver.tasks.operate import Operator
from storage.archive.delete import delete
from storage.bucket.bucket import Bucket
from storage.rows import claims, reports, tasks
from storage.rows.events import EventName
from storage.rows.models import Asset, Event, Task
from storage.states import ArchiveState, AssetState, Step
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.harness import wait_until
from tests.pipeline import Wired, assert_archived, kept, make_due_now, run, task_of
from tests.unreported_tasks import REQUEST


def before_its_finish(parts: Parts) -> str:
    """A task whose files are all archived, without a manifest."""
    name = parts.submitter.submit(REQUEST).task.external_task_id

    def is_next() -> bool:
        make_due_now(parts, Task)
        run(parts, "reads", "assets")
        return task_of(parts, name).step is Step.FINISH

    wait_until(is_next)
    return name


def test_a_finish_that_keeps_ending_its_workers_is_parked_until_it_is_retried(
    parts: Parts, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    name = before_its_finish(parts)
    objects = kept(parts)
    with parts.database.write() as session:
        session.execute(update(Task).values(losses=claims.PARK_LOSSES - 1, lease=uuid.uuid4()))
    with parts.database.write() as session:
        (claimed,) = claims.claim(session, Task, limit=1, lease_seconds=60, alone=True)
    next(lane for lane in parts.lanes() if lane.name == "finishes").work(claimed)
    parked = task_of(parts, name)
    assert (parked.step, parked.due_at, parked.lease, parked.archive) == (
        Step.FINISH, None, None, ArchiveState.ARCHIVING
    )  # fmt: skip
    assert "ended its worker 6 times; `receiver retry`" in str(parked.note)
    assert "task.parked" in capsys.readouterr().out
    assert kept(parts) == objects
    Operator(parts.database, parts.providers, parts.schedule).retry(name)
    run(parts, "finishes")
    assert_archived(parts, sandbox, task_of(parts, name))


def test_an_archive_whose_files_change_while_its_manifest_is_put_ends_with_the_next_manifest(
    parts: Parts, sandbox: Sandbox, seaweed: Seaweed
) -> None:
    name, changed = before_its_finish(parts), list[str]()

    def slow(request: Request, forward: Forward) -> Answer:
        if request.puts_an_object and not changed:
            changed.append(name)
            with parts.database.write() as session:
                session.execute(update(Asset).values(state=AssetState.DUE, **claims.DUE_NOW))
                reports.reschedule(session, tasks.lock(session, task_of(parts, name).id), parts.schedule)
        return forward(request)

    with FaultProxy(seaweed, slow) as proxy:
        behind = Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)
        with closing(Wired(parts.settings, bucket=behind)) as slowly:
            run(slowly, "finishes")
    task = task_of(parts, name)
    assert (changed, task.archive, task.step, task.manifest_key) == ([name], ArchiveState.ARCHIVING, None, None)
    run(parts, "assets", "finishes")
    assert_archived(parts, sandbox, task_of(parts, name), manifests=2)


def test_a_manifest_that_arrives_after_its_tasks_deletion_is_removed(parts: Parts, seaweed: Seaweed) -> None:
    name = before_its_finish(parts)
    operator = Operator(parts.database, parts.providers, parts.schedule)
    until: list[str] = []

    def slow(request: Request, forward: Forward) -> Answer:
        if request.puts_an_object and not until:
            operator.dismiss(name, "not wanted")
            with parts.database.write() as session:
                (ended,) = session.exec(select(Event).where(Event.name == EventName.TASK_INCOMPLETE)).all()
                until.append(ended.data["held_until"])
                ended.data = {}  # the lease has ended
            delete(parts.database, parts.bucket, name)
            assert kept(parts) == {}
        return forward(request)

    with FaultProxy(seaweed, slow) as proxy:
        behind = Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)
        with closing(Wired(parts.settings, bucket=behind)) as slowly:
            run(slowly, "finishes")
    assert datetime.fromisoformat(until[0]) > parts.database.now()
    assert task_of(parts, name).deleted_at and kept(parts) == {}
