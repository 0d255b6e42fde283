"""After a crash at any point and a restart, everything is archived once.

First in this process: a fuse ends the step before or after one effect (commit, HTTP call, put), the rest is abandoned,
leases run out, and new parts do all due work. Then real worker processes, killed and frozen with real signals.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import update
from sqlmodel import Session, col, select

from receiver.app.wiring import Parts
from receiver.base.cached_property import cached_property
from receiver.sandbox import Sandbox
from receiver.tasks.task_view import is_over
from storage.database.sessions import Database
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Asset, Callback, Event, Task
from storage.states import ArchiveState, AssetState
from tests.forked import Forked
from tests.harness import wait_until
from tests.pipeline import Wired, assert_archived, assets_of, kept, make_due_now, run, task_of
from tests.unreported_tasks import undelivered

REQUEST = {"model_name": "kling-image-o1", "prompt": "a boat", "n": 2}
TEN_FILES = {
    "model_name": "kling-v3-omni", "prompt": "a boat", "result_type": "series", "series_amount": 5,
    "watermark_info": {"enabled": True},
}  # fmt: skip


# Threads that renew claims by the clock. They are no effect of the step, whose boundaries must be the same each time.
RENEWERS = ("renew", "lease-renewal")


class Died(BaseException):
    """The simulated end of the process. No code of ours catches it."""


class Fuse:
    """Counts the boundaries of effects and raises at number `at`, from 1 on."""

    def __init__(self, at: int) -> None:
        self._at, self._passed = at, 0

    def boundary(self, name: str) -> None:
        if threading.current_thread().name in RENEWERS:
            return
        self._passed += 1
        if self._passed == self._at:
            raise Died(name)

    @contextmanager
    def effect(self, name: str) -> Iterator[None]:
        self.boundary(f"before {name}")
        yield
        self.boundary(f"after {name}")


class Mortal:
    """A part some of whose methods have effects that may be the last."""

    def __init__(self, part: Any, fuse: Fuse, *effects: str) -> None:
        self._part, self._fuse, self._effects = part, fuse, effects

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._part, name)

        def guarded(*arguments: Any, **options: Any) -> Any:
            with self._fuse.effect(name):
                return method(*arguments, **options)

        return guarded if name in self._effects else method


class MortalDatabase(Database):
    fuse: Fuse

    @contextmanager
    def write(self) -> Iterator[Session]:
        with self._mortal(super().write()) as session:
            yield session

    @contextmanager
    def group_write(self) -> Iterator[Session]:
        with self._mortal(super().group_write()) as session:
            yield session

    @contextmanager
    def _mortal(self, transaction: AbstractContextManager[Session]) -> Iterator[Session]:
        with transaction as session:
            yield session
            self.fuse.boundary("before a commit")
        self.fuse.boundary("after a commit")


@dataclass(frozen=True)
class MortalParts(Wired):
    """The parts of a process that dies at the fuse. Parts without memory are shared: TLS contexts, bucket."""

    kling: Any = field(kw_only=True)
    fetcher: Any = field(kw_only=True)
    fuse: Fuse = field(kw_only=True)

    @cached_property
    def database(self) -> Database:
        database = MortalDatabase(self.settings.database_url.get_secret_value())
        database.fuse = self.fuse
        return database


@contextmanager
def mortal(parts: Parts, fuse: Fuse) -> Iterator[Parts]:
    made = MortalParts(
        parts.settings,
        bucket=Mortal(parts.bucket, fuse, "put_once", "holds"),
        kling=Mortal(parts.kling, fuse, "create", "read", "read_many"),
        fetcher=Mortal(parts.fetcher, fuse, "fetch"),
        fuse=fuse,
    )
    try:
        yield made
    finally:
        made.database.close()


# -- a crash at each boundary -----------------------------------------------------------------------------------------


@pytest.fixture
def changes() -> dict[str, Any]:
    """Nothing happens by itself: polls are hours away, and callbacks go to a closed port."""
    return {"poll_after_seconds": 3_600, "lease_seconds": 1, "worker_threads": 4}


def ended(sandbox: Sandbox, external_task_id: str) -> bool:
    return sandbox.ledger().task(external_task_id).status == "succeed"


def submit_task(parts: Parts, sandbox: Sandbox, external_task_id: str) -> None:
    parts.submitter.submit(REQUEST, external_task_id=external_task_id)
    wait_until(lambda: ended(sandbox, external_task_id))


def take_in(parts: Parts, sandbox: Sandbox, external_task_id: str) -> None:
    """The last callback arrives."""
    sent = [each for each in sandbox.ledger().callbacks if each.external_task_id == external_task_id]
    delivery = Delivery("kling", "push", task_of(parts, external_task_id).id, sent[-1].body)
    with parts.database.write() as session:
        store(session, [delivery])


def apply(parts: Parts, *_: object) -> None:
    run(parts, "callbacks")


def read(parts: Parts, sandbox: Sandbox, external_task_id: str) -> None:
    with Session(parts.database.writer) as session:  # the test's own commit, which must not be the one that dies
        session.execute(update(Task).values(due_at=Task.created_at))
        session.commit()
    run(parts, "reads")


def archive(parts: Parts, *_: object) -> None:
    run(parts, "assets")


def end(parts: Parts, *_: object) -> None:
    run(parts, "finishes")


Act = Callable[[Parts, Sandbox, str], None]
# The step that dies, and the steps before it.
STEPS: dict[str, tuple[Act, list[Act]]] = {
    "submit": (submit_task, []),
    "intake": (take_in, [submit_task]),
    "apply": (apply, [submit_task, take_in]),
    "read": (read, [submit_task]),
    "archive": (archive, [submit_task, take_in, apply]),
    "finish": (end, [submit_task, take_in, apply, archive]),
}


def dies(parts: Parts, sandbox: Sandbox, step: str, external_task_id: str, at: int) -> str | None:
    """Do everything up to the step, then the step until boundary number `at`. Returns its name, None = not reached."""
    act, before = STEPS[step]
    for each in before:
        each(parts, sandbox, external_task_id)
    with mortal(parts, Fuse(at)) as doomed:
        try:
            act(doomed, sandbox, external_task_id)
        except Died as death:
            return str(death)
    return None


def take_over(parts: Parts, external_task_id: str) -> Task:
    """Continue in another process: the caller submits again, the leases have run out, all due work is done."""
    parts.submitter.submit(REQUEST, external_task_id=external_task_id)
    worker = parts.worker()

    def over() -> Task | None:
        make_due_now(parts)
        worker.run_until_idle()
        task = task_of(parts, external_task_id)
        return task if is_over(task) else None

    return wait_until(over)


def assert_done_once(parts: Parts, sandbox: Sandbox, task: Task) -> None:
    assert_archived(parts, sandbox, task)
    made = [each for each in sandbox.ledger().tasks if each.external_task_id == task.external_task_id]
    assert len(made) == 1
    with parts.database.read() as session:
        names = session.exec(select(Event.name).where(Event.task_id == task.id)).all()
    assert sorted(name for name in names if name.endswith("archived")) == ["asset.archived"] * 2 + ["task.archived"]


@pytest.mark.campaign("sqlite")
@pytest.mark.parametrize("step", STEPS)
def test_crash_at_any_boundary_leaves_everything_archived_once(step: str, parts: Parts, sandbox: Sandbox) -> None:
    deaths = []
    for at in range(1, 100):
        external_task_id = f"{step}-{at}"
        death = dies(parts, sandbox, step, external_task_id, at)
        try:
            assert_done_once(parts, sandbox, take_over(parts, external_task_id))
        except AssertionError as error:
            raise AssertionError(f"died {death} (boundary {at} of {step})") from error
        if death is None:
            break
        deaths.append(death)
    assert {"before a commit", "after a commit"} <= set(deaths)


# -- real processes ---------------------------------------------------------------------------------------------------


START_SECONDS = 60  # the start of a worker process on a busy machine; two seconds on an idle one


def environment_of(parts: Parts) -> dict[str, str]:
    """The settings of `parts` as a child process reads them."""
    given = {name: getattr(parts.settings, name) for name in parts.settings.model_fields_set}
    return {**os.environ, **{f"RECEIVER_{name.upper()}": word(value) for name, value in given.items()}}


def word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(word, value))
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


@contextmanager
def worker_process(parts: Parts, folder: Path) -> Iterator[Forked]:
    process = Forked(("work",), environment_of(parts), folder, out=folder / "worker.log")
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def count(parts: Parts, *conditions: Any) -> int:
    with parts.database.read() as session:
        return len(session.exec(select(Asset.id).where(*conditions)).all())


@pytest.mark.campaign("sqlite")
def test_kill_9_during_ten_downloads_loses_and_doubles_none(parts: Parts, sandbox: Sandbox, tmp_path: Path) -> None:
    parts.submitter.submit(TEN_FILES, external_task_id="ten")
    wait_until(lambda: ended(sandbox, "ten"))
    make_due_now(parts)
    with undelivered(sandbox, but=3), worker_process(parts, tmp_path) as first:
        wait_until(lambda: count(parts, col(Asset.state) == AssetState.ARCHIVED) == 3, seconds=START_SECONDS)
        first.kill()
        first.wait(20)
    assert count(parts, col(Asset.lease).is_not(None)) > 0
    assert count(parts, col(Asset.state) == AssetState.ARCHIVED) == 3
    with worker_process(parts, tmp_path):
        wait_until(lambda: task_of(parts, "ten").archive is ArchiveState.ARCHIVED, seconds=START_SECONDS)
    assert_archived(parts, sandbox, task_of(parts, "ten"))


def rows_of(parts: Parts) -> list[dict[str, Any]]:
    """All rows without the numbers of events, which any running worker assigns."""
    with parts.database.read() as session:
        rows = [row for model in (Task, Callback, Asset, Event) for row in session.exec(select(model))]
        return [
            row.model_dump(exclude={"seq"})
            for row in sorted(rows, key=lambda row: (row.__class__.__name__, str(row.id)))
        ]


def give_other_bytes(parts: Parts, frozen: Asset, other: Asset) -> None:
    """Give the next worker another picture than the frozen one holds, so that a second object would be seen."""
    with parts.database.write() as session:
        changed = update(Asset).where(col(Asset.id) == frozen.id).values(source_url=other.source_url)
        session.execute(changed)


def is_free(parts: Parts) -> bool:
    """Whether no other process is writing. PostgreSQL: always true, because writers of other rows do not wait."""
    if not parts.database.is_sqlite:
        return True
    with Path(f"{parts.database.url.database}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def freeze(parts: Parts, sandbox: Sandbox, process: Forked) -> Asset:
    """Stop the process while it downloads. Returns the asset that it holds."""
    wait_until(lambda: sum(asset.hits for asset in sandbox.ledger().assets.values()), seconds=START_SECONDS)
    process.send_signal(signal.SIGSTOP)
    for _ in range(100):
        if is_free(parts):
            break
        process.send_signal(signal.SIGCONT)  # a stop during a periodic job's commit would block every writer
        time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
    (held,) = [asset for asset in assets_of(parts, task_of(parts, "two")) if asset.lease]
    return held


@pytest.mark.campaign("postgresql")
@pytest.mark.parametrize("changes", [{"poll_after_seconds": 3_600, "lease_seconds": 1, "worker_threads": 1}])
def test_a_frozen_worker_that_wakes_changes_no_row_and_leaves_no_second_object(
    parts: Parts, sandbox: Sandbox, tmp_path: Path
) -> None:
    sandbox.set(cdn_seconds=3)
    submit_task(parts, sandbox, "two")
    make_due_now(parts)
    with worker_process(parts, tmp_path) as process:
        held = freeze(parts, sandbox, process)
        other = next(asset for asset in assets_of(parts, task_of(parts, "two")) if asset.id != held.id)
        give_other_bytes(parts, held, other)
        sandbox.set(cdn_seconds=0)
        wait_until(lambda: parts.worker().run_until_idle() and is_over(task_of(parts, "two")))
        before = rows_of(parts), kept(parts)
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)  # SIGTERM lets the worker finish its rows
        assert process.wait(30) == 0
    assert [row for row in rows_of(parts) if row not in before[0]] == []
    assert (rows_of(parts), kept(parts)) == before
    assert len(before[1]) == 3 and task_of(parts, "two").archive is ArchiveState.ARCHIVED
