"""SIGTERM under load: the process ends in time, every acknowledged delivery is there, no lease is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlmodel import col, func, select

from receiver.app.wiring import Parts
from receiver.base.tokens import Tokens
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.operations import heartbeats
from storage.rows.models import Asset, Callback, Task
from tests.command_line import variables
from tests.forked import Forked
from tests.harness import wait_until
from tests.pipeline import CALLBACK_SECRET, free_port, insert_row

SENDERS = 8
# The web server ends a slow body after 10 s; here after one, which is enough for the test.
BODY_SECONDS = {"receiver.web.callbacks:BODY_SECONDS": 1.0}
# The grace times of the web server and of the workers, added. A process that takes longer hangs.
EXIT_SECONDS = 40


class FewThreads:
    """In place of `threading` in a worker: the system allows two of the threads that claim rows."""

    Event, Lock, Condition = threading.Event, threading.Lock, threading.Condition
    started = 0

    class Thread(threading.Thread):
        def start(self) -> None:
            FewThreads.started += self.name.startswith("feed-")
            if FewThreads.started > 2:
                raise RuntimeError("can't start new thread")
            super().start()


@contextmanager
def serving(settings: dict[str, str], folder: Path, log: Path | None = None) -> Iterator[Forked]:
    """`receiver serve` with one worker process, ready; killed at the end if it still runs."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    out = log or folder / "serve.log"
    process = Forked(("serve",), {**rest, **settings}, folder, out=out, constants=BODY_SECONDS)
    url = settings["RECEIVER_PUBLIC_URL"]
    try:
        wait_until(lambda: _answers(f"{url}/readyz?strict=1"), seconds=40)
        yield process
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


class Sender:
    """Posts distinct callbacks of many tasks until it is refused, and remembers those answered 200."""

    def __init__(self, urls: list[str]) -> None:
        self.accepted: list[bytes] = []
        self._urls = urls
        self.thread = threading.Thread(target=self._send)
        self.thread.start()

    def _send(self) -> None:
        with httpx.Client(trust_env=False, timeout=30) as client:
            for number in range(100_000):
                body = {"task_id": uuid.uuid4().hex, "task_status": "processing", "task_status_msg": str(number)}
                raw = json.dumps(body).encode()
                try:
                    answer = client.post(self._urls[number % len(self._urls)], content=raw)
                except httpx.HTTPError:
                    return
                if answer.status_code == 200:
                    self.accepted.append(raw)


@contextmanager
def open_body(url: str) -> Iterator[None]:
    """A request whose body never ends."""
    host, port = url.removeprefix("http://").split("/")[0].split(":")
    path = url.removeprefix(f"http://{host}:{port}")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
        yield


def leases(database: Database) -> int:
    with database.read() as session:
        held = [select(func.count()).where(col(model.lease).is_not(None)) for model in (Task, Asset, Callback)]
        return sum(session.exec(count).one() for count in held)


def missing(database: Database, accepted: list[bytes]) -> int:
    with database.read() as session:
        stored = set(session.exec(select(Callback.body)))
    return len(set(accepted) - stored)


@pytest.fixture
def settings(database_url: str, bucket: Bucket, sandbox: Sandbox) -> dict[str, str]:
    port = free_port()
    own = {
        "RECEIVER_PORT": str(port),
        "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{port}",
        "RECEIVER_CALLBACK_SECRETS": CALLBACK_SECRET,
    }
    return {**variables(database_url, bucket, sandbox), **own}


@pytest.mark.campaign("sqlite")
def test_sigterm_under_load_loses_no_acknowledged_delivery(
    settings: dict[str, str], parts: Parts, tmp_path: Path
) -> None:
    tokens = Tokens(parts.settings.callback_secrets)
    tasks = [insert_row(parts, external_task_id=f"t-{number}") for number in range(20)]
    urls = [f"{settings['RECEIVER_PUBLIC_URL']}/callbacks/kling/{tokens.sign('kling', task.id)}" for task in tasks]
    with serving(settings, tmp_path) as process, open_body(urls[0]):
        senders = [Sender(urls) for _ in range(SENDERS)]
        wait_until(lambda: sum(len(sender.accepted) for sender in senders) > 200, seconds=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_SECONDS) == 0
        for sender in senders:
            sender.thread.join(40)
    accepted = [body for sender in senders for body in sender.accepted]
    assert (missing(parts.database, accepted), leases(parts.database)) == (0, 0)


@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="runs under nohup")
@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_a_terminal_that_is_closed_ends_it_in_order(settings: dict[str, str], parts: Parts, tmp_path: Path) -> None:
    with serving(settings, tmp_path) as process:
        process.send_signal(signal.SIGHUP)
        assert process.wait(EXIT_SECONDS) == 0


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_full_disk_behind_the_log_ends_no_process(settings: dict[str, str], tmp_path: Path) -> None:
    with serving(settings, tmp_path, log=Path("/dev/full")) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_SECONDS) == 0


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_signals_that_come_while_another_is_handled_end_a_worker_once(
    settings: dict[str, str], parts: Parts, tmp_path: Path
) -> None:
    log = tmp_path / "work.log"
    process = Forked(("work",), {**os.environ, **settings}, tmp_path, out=log)
    try:
        wait_until(lambda: heartbeats.count_alive(parts.database), seconds=40)  # before, it ends silently
        for number in range(2_000):  # Ctrl-C sends one to the group, and the supervisor another to its workers
            process.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
        assert process.wait(EXIT_SECONDS / 2) == 0
    finally:
        process.kill()
        process.wait()
    assert log.read_text().count("worker.stopped") == 1


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_worker_that_gets_too_few_threads_ends_with_a_line(settings: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "work.log"
    few = {"receiver.workers.worker:threading": FewThreads}
    process = Forked(("work",), {**os.environ, **settings}, tmp_path, out=log, constants=few)
    try:
        assert process.wait(EXIT_SECONDS / 2) == 1
    finally:
        process.kill()
        process.wait()
    assert "worker.not_started" in log.read_text() and "pids_limit" in log.read_text()
