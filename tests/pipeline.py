"""The whole product in this process: real web server, real rows, real bucket, the sandbox as the provider."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass
from typing import Any

from receiver import app, config
from receiver.process import _Server, web_config
from receiver.sandbox import Sandbox
from receiver.wiring import Parts
from storage import tasks
from storage.models import Asset, Task
from tests.harness import wait_until

CALLBACK_SECRET = "a-secret-of-more-than-thirty-two-characters"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings_for(database_url: str, bucket: Any, sandbox: Sandbox, **changes: Any) -> config.Settings:
    """Settings as a user would make them for this sandbox and this bucket; `changes` win."""
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

    bucket: Any


class Web:
    """The receiver's own web server, with our own uvicorn settings, in a thread of the test."""

    def __init__(self, parts: Parts) -> None:
        chosen = parts.settings
        web = app.build(
            parts.database, parts.providers, parts.tokens, parts.schedule, metrics_token=chosen.metrics_token
        )
        self._server = _Server(web_config(web, chosen.host, chosen.port), None)
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


class _no_signals:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


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
    from receiver.waiting import is_over

    worker = parts.worker()

    def over() -> Task | None:
        worker.run_until_idle()
        task = task_of(parts, external_task_id)
        return task if is_over(task) else None

    return wait_until(over, seconds=seconds)
