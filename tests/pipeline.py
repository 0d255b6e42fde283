"""The whole product in this process: real web server, real rows, real bucket, the sandbox as the provider."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import Table, Update, update
from sqlmodel import col, select

from receiver.app.process import _Server, web_config
from receiver.app.wiring import Parts
from receiver.base import config
from receiver.local_store.seaweed import HIGHEST_PORT, is_free
from receiver.sandbox import Sandbox
from receiver.workers.worker import Worker
from storage.database import prepared
from storage.keys import manifest_key, task_folder
from storage.rows import tasks
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Asset, Callback, Task
from storage.states import ArchiveState, AssetState, Step, TaskState
from tests import objects
from tests.harness import CALLBACK_SECRET, wait_until
from tests.rows import LONG_AGO, new_task


@cache  # at the first call, because the processes of a run are forked after the import
def _own_ports() -> Iterator[int]:
    """Ports of this test process alone, in turn: two processes once chose the same before either had opened it.

    They are above the ports of databases and stores, which try another one, and below those that the system gives out.
    """
    worker, workers = (os.environ.get(f"PYTEST_XDIST_WORKER{each}") for each in ("", "_COUNT"))
    own = range(HIGHEST_PORT, 32_000)[int((worker or "gw0")[2:]) :: int(workers or 1)]
    first = secrets.randbelow(len(own))
    return itertools.cycle([*own[first:], *own[:first]])


def free_port() -> int:
    """A port on which no program listens, and that no other test and no system gives out until it is used."""
    return next(filter(is_free, _own_ports()))


def settings_for(database_url: str, bucket: Any, sandbox: Sandbox, **changes: Any) -> config.Settings:
    """A user's settings for this sandbox and this bucket; `changes` take precedence."""
    port = free_port()
    values = {
        "database_url": database_url,
        "host": "127.0.0.1",
        "port": port,
        "public_url": f"http://127.0.0.1:{port}",
        "callback_secrets": CALLBACK_SECRET,
        "kling_base_url": sandbox.url,
        "kling_api_key": sandbox.api_key,
        "private_result_hosts": sandbox.url.removeprefix("http://"),
        "s3_bucket": bucket.name,
        "s3_endpoint_url": bucket._endpoint_url,
        "s3_prefix": bucket.prefix,
        "lease_seconds": 5,
        "poll_after_seconds": 0.2,
    }
    return config.load(**{**values, **changes})


@dataclass(frozen=True)
class Wired(Parts):
    """The parts, on the test's own bucket, which is connected and probed already."""

    bucket: Any = field(kw_only=True)


class Web:
    """The receiver's own web server, with our own uvicorn settings, in a thread of the test."""

    def __init__(self, parts: Parts) -> None:
        chosen = parts.settings
        self._server = _Server(web_config(parts.web(), chosen.host, chosen.port), None)
        self._server.capture_signals = _no_signals  # type: ignore[method-assign] # only the main thread may
        self._thread = threading.Thread(target=self._server.run)
        self.url = f"http://{chosen.host}:{chosen.port}"
        self.account_token = parts.tokens.sign("kling", None)

    def __enter__(self) -> Web:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)

    @property
    def requests_under_way(self) -> int:
        return len(self._server.server_state.tasks)

    def stop_listening(self) -> None:
        """Begin to end; requests in progress continue."""
        self._server.should_exit = True
        wait_until(lambda: not any(each.is_serving() for each in self._server.servers))


class _no_signals:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def run(parts: Parts, *lanes: str) -> int:
    """Do what is due in these lanes, in this thread; the other lanes do nothing. Returns the number of rows."""
    chosen = [lane for lane in parts.lanes() if lane.name in lanes]
    assert len(chosen) == len(lanes)
    return parts.worker(chosen).run_until_idle()


@contextmanager
def working(parts: Parts) -> Iterator[None]:
    """Run a worker in a thread of the test, as its own process would run it."""
    with running(parts.worker()):
        yield


@contextmanager
def running(worker: Worker) -> Iterator[None]:
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield
    finally:
        worker.stop()
        thread.join(30)


def make_due_now(parts: Parts, *models: Any) -> None:
    """Make everything due now that is due later or held under the lease of a dead worker."""
    with parts.database.write() as session:
        for model in models or (Task, Callback, Asset):
            prepared.execute(session, _made_due(model.__table__, "due_at"))
        prepared.execute(session, _made_due(Task.__table__, "missed_at"))  # type: ignore[attr-defined]


@cache
def _made_due(table: Table, column: str) -> Update:
    """Built once: most tests of an archived task run it."""
    return update(table).where(table.c[column].is_not(None)).values({column: LONG_AGO})


def insert_row(parts: Parts, **values: Any) -> Task:
    """A task that the provider accepted long ago, whose next read is far away."""
    later = datetime.now(UTC) + timedelta(hours=1)
    start = {"state": TaskState.SUBMITTED, "step": Step.READ, "due_at": later, "expected": 1, "series": False}
    with parts.database.write() as session:
        return new_task(session, **{**start, **values})


def deliver(parts: Parts, task: Task | None, body: Any, *, webhook_id: str | None = None) -> Callback:
    """Commit one delivery like the web server, apply it, return its row. `task` None: account URL."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    delivery = Delivery("kling", "push", task.id if task else None, raw, webhook_id=webhook_id)
    with parts.database.write() as session:
        store(session, [delivery])
    run(parts, "callbacks")
    return callback_of(parts, delivery.key)


def callback_of(parts: Parts, key: str) -> Callback:
    with parts.database.read() as session:
        return session.exec(select(Callback).where(Callback.delivery_key == key)).one()


def callbacks_of(parts: Parts) -> list[Callback]:
    with parts.database.read() as session:
        return list(session.exec(select(Callback).order_by(col(Callback.id))))


def kept(parts: Parts, task: Task | None = None) -> dict[str, str]:
    """Every object of this test, or of one task in it: {key: SHA-256 of its bytes}."""
    prefix = parts.bucket.prefix
    folder = task_folder(prefix, task.created_at, task.external_task_id) if task else prefix
    keys = objects.keys(parts.bucket, folder)
    return {key: hashlib.sha256(objects.content(parts.bucket, key)).hexdigest() for key in keys}


def assert_archived(parts: Parts, sandbox: Sandbox, task: Task, *, manifests: int = 1) -> None:
    """Assert that all files of this task are archived once, byte for byte, and nothing else but the manifest.

    `manifests` is how many numbers there may be. A commit that failed after its put leaves a number that does not
    count, if another delivery of the same report was applied in between.
    """
    assets, found = assets_of(parts, task), kept(parts, task)
    made = [asset.sha256 for asset in sandbox.ledger().task(task.external_task_id).assets]
    assert task.archive is ArchiveState.ARCHIVED
    assert {asset.state for asset in assets} == {AssetState.ARCHIVED}
    assert sorted(str(asset.sha256) for asset in assets) == sorted(made)
    keys = [manifest_key(parts.bucket.prefix, task.created_at, task.external_task_id, n + 1) for n in range(manifests)]
    assert task.manifest_key in keys
    assert set(found) == {asset.key for asset in assets} | set(keys[: keys.index(task.manifest_key) + 1])
    assert all(found[str(asset.key)] == asset.sha256 for asset in assets)


def task_of(parts: Parts, external_task_id: str) -> Task:
    with parts.database.read() as session:
        task = tasks.by_external_id(session, external_task_id)
    assert task is not None
    return task


def assets_of(parts: Parts, task: Task) -> list[Asset]:
    with parts.database.read() as session:
        return tasks.assets_of(session, task.id)


def drain(parts: Parts, external_task_id: str, *, seconds: float = 30) -> Task:
    """Do all due work in this thread until the task is over; returns its row."""
    from receiver.tasks.task_view import is_over

    worker = parts.worker()

    def over() -> Task | None:
        worker.run_until_idle()
        task = task_of(parts, external_task_id)
        return task if is_over(task) else None

    return wait_until(over, seconds=seconds)
