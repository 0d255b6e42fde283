"""Bounds on the cost of connections: memory, time and descriptors. Against real processes and the protocol alone."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from pydantic import SecretStr

from receiver.app.process import RESERVED_DESCRIPTORS, web_config
from receiver.base.tokens import Tokens
from receiver.web import http_protocol, reader_speed
from tests.forked import Forked
from tests.harness import wait_until
from tests.pipeline import CALLBACK_SECRET, free_port
from tests.receiver.web.test_http_protocol import GET, read_to_end, send_all

CALLBACK = f"/callbacks/kling/{Tokens([SecretStr(CALLBACK_SECRET)]).sign('kling', None)}"
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="What a process has is read from /proc.")
LARGE, PIECE = 32 * 2**20, 64 * 1024
PIPELINING = 20


@contextmanager
def serving(folder: Path, *, descriptors: tuple[int, int] | None = None, **more: str) -> Iterator[tuple[int, int]]:
    """`receiver serve` in a process of its own, without workers: its port and its process id.

    `descriptors`: its soft and its hard limit of them; `more`: settings.
    """
    port, log = free_port(), folder / "log"
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    settings = {
        "RECEIVER_DATABASE_URL": f"sqlite:///{folder}/receiver.db", "RECEIVER_CALLBACK_SECRETS": CALLBACK_SECRET,
        "RECEIVER_PORT": str(port), "RECEIVER_S3_BUCKET": "unused", "RECEIVER_WORKERS": "0",
        **more,
    }  # fmt: skip
    limits = {resource.RLIMIT_NOFILE: descriptors} if descriptors else None
    server = Forked(("serve",), {**rest, **settings}, folder, out=log, limits=limits)
    try:
        wait_until(lambda: log.exists() and b"web.started" in log.read_bytes(), seconds=60)
        yield port, server.pid
    finally:
        server.kill()
        server.wait(20)


def peak_kib(pid: int) -> int:
    [kib] = re.findall(r"VmHWM:\s+([0-9]+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kib)


async def large(scope: Any, receive: Any, send: Any) -> None:
    """An application with answers larger than the kernel's buffers for a client that does not read."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    headers = [(b"content-length", b"%d" % LARGE)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for sent in range(0, LARGE, PIECE):
        await send({"type": "http.response.body", "body": bytes(PIECE), "more_body": sent + PIECE < LARGE})


@contextmanager
def large_answers() -> Iterator[tuple[int, set[Any]]]:
    """The HTTP protocol with `large` behind it: its port and its connections."""
    port = free_port()
    server = uvicorn.Server(web_config(large, "127.0.0.1", port))
    server.capture_signals = nullcontext  # type: ignore[method-assign,assignment] # only the main thread may
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield port, server.server_state.connections
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)


@ON_LINUX
def test_pipelined_requests_take_little_memory(tmp_path: Path) -> None:
    with serving(tmp_path) as (port, pid), ThreadPoolExecutor(PIPELINING) as senders:
        before = peak_kib(pid)

        def send(_: int) -> int | None:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                return send_all(raw, GET * (9_600_000 // len(GET)))

        assert list(senders.map(send, range(PIPELINING))) == [None] * PIPELINING  # refused before it was all sent
        assert peak_kib(pid) - before < 16 * 1024  # 2 MB were measured


@contextmanager
def unread_answer(port: int) -> Iterator[socket.socket]:
    """A connection that asked for a large answer and reads nothing of it."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(GET)
        yield raw


def read_slowly(raw: socket.socket) -> int:
    """The number of bytes of a large answer that arrived."""
    taken = 0
    while taken < LARGE:
        try:
            size = len(raw.recv(1 << 20))
        except ConnectionResetError:
            return taken
        if not size:
            return taken
        taken += size
        time.sleep(0.02)
    return taken


def test_unread_answer_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_speed, "GRACE_SECONDS", 0.3)
    with large_answers() as (port, connections), unread_answer(port) as kept, unread_answer(port) as closed:
        closed.sendall(b"nonsense\r\n")
        wait_until(lambda: len(connections) == 2)
        wait_until(lambda: not connections)
        for raw in (kept, closed):
            assert len(read_to_end(raw)) < LARGE


def test_slowly_read_answer_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_speed, "GRACE_SECONDS", 0.3)
    with large_answers() as (port, connections), unread_answer(port) as raw:
        assert read_slowly(raw) >= LARGE  # more time than a reader may be behind
        assert connections


def test_handler_of_the_first_of_several_requests_learns_that_its_client_has_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Otherwise it would continue to read, and fail at the closed connection with a traceback in the log."""
    caplog.set_level("ERROR", "uvicorn.error")
    with large_answers() as (port, connections):
        for _ in range(20):
            with unread_answer(port) as raw:
                raw.sendall(GET)
                wait_until(lambda: len(connections) == 1)
        wait_until(lambda: not connections)
    assert [line for line in caplog.records if "ASGI" in line.getMessage()] == []


def test_lost_connections_are_freed_without_the_collector() -> None:
    """Those of a thousand connections a second held up the event loop for 40 ms."""
    with large_answers() as (port, connections):
        gc.collect()
        gc.disable()
        try:
            for flood in (b"", GET * 50, b"GET / HTTP"):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
                    raw.sendall(flood)
                    [lost] = map(weakref.ref, wait_until(lambda: list(connections)))
                wait_until(lambda lost=lost: lost() is None)
        finally:
            gc.enable()


def test_request_in_work_is_answered_before_too_many_behind_it_end_the_connection() -> None:
    with large_answers() as (port, connections), unread_answer(port) as raw:
        wait_until(lambda: [each.flow.write_paused for each in connections] == [True])
        raw.sendall(GET * (http_protocol.MAX_PIPELINED + 1))
        answer = bytearray()
        while piece := raw.recv(1 << 20):
            answer += piece
    assert answer.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 429" in answer[LARGE:]


def test_answer_read_below_the_least_speed_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read makes progress, in time."""
    monkeypatch.setattr(reader_speed, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(reader_speed, "LEAST_BYTES_PER_SECOND", 2**40)
    with large_answers() as (port, _connections), unread_answer(port) as raw:
        assert read_slowly(raw) < LARGE


def test_connection_that_leaves_its_answer_unread_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 3)
    with (
        large_answers() as (port, connections),
        unread_answer(port) as first,
        unread_answer(port) as second,
        unread_answer(port),
    ):
        wait_until(lambda: [each.flow.write_paused for each in connections] == [True] * 3)
        answer = httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
        assert len(answer.content) == LARGE
        assert len(read_to_end(first)) < LARGE
        assert second.recv(1) == b"H"


@contextmanager
def silent(port: int) -> Iterator[Callable[[int], None]]:
    """A function that opens that many connections, which stay open and send nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as opened:

        def more(count: int) -> None:
            for _ in range(count):
                opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))

        yield more
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def logged(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "log").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


@ON_LINUX
def test_deliveries_are_stored_beside_more_silent_connections_than_descriptors(tmp_path: Path) -> None:
    with serving(tmp_path, descriptors=(256, 256)) as (port, pid), silent(port) as more:
        more(4 * 256)
        for number in range(100):
            more(4)
            answer = httpx.post(f"http://127.0.0.1:{port}{CALLBACK}", content=b"{}%d" % number, trust_env=False)
            assert answer.status_code == 200
        assert len(list(Path(f"/proc/{pid}/fd").iterdir())) < 192
    [warning] = logged(tmp_path, "start.descriptors_limited")
    assert (warning["limit"], warning["connections"]) == (256, 128)


@ON_LINUX
def test_soft_limit_of_descriptors_is_raised_to_what_connections_need(tmp_path: Path) -> None:
    needed = http_protocol.MAX_CONNECTIONS + RESERVED_DESCRIPTORS
    with serving(tmp_path, descriptors=(256, needed)) as (_, pid):
        assert re.search(rf"Max open files +{needed} ", Path(f"/proc/{pid}/limits").read_text())
    assert logged(tmp_path, "start.descriptors_limited") == []
