"""Connections to a store that closes them, answers with garbage or not at all; over raw loopback sockets."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from storage.bucket import http_connections
from storage.bucket.http_connections import TOO_SLOW, UNEXPECTED, HttpConnections
from tests.loopback import Script, ScriptedServer

OK = b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 0\r\n\r\n'


class Store(ScriptedServer):
    """Answers the requests of all connections with one script after another, and repeats the last one."""

    def __init__(self) -> None:
        self.scripts: list[Script] = [OK]
        super().__init__()

    def script_of(self, head: bytes) -> Script:
        return self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.close()


def to(store: Store, *, most: int = 2, read_seconds: float = 5) -> HttpConnections:
    return HttpConnections("127.0.0.1", store.port, None, most=most, connect_seconds=0.5, read_seconds=read_seconds)


def put(connections: HttpConnections, body: bytes = b"bytes", method: str = "PUT") -> int:
    headers = {"host": connections.authority, "content-length": str(len(body))}
    return connections.send(method, "/b/k", headers, lambda: [memoryview(body)]).status


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_requests_share_one_connection(store: Store) -> None:
    connections = to(store)
    assert [put(connections, b"x" * size) for size in (0, 5, 3_000_000)] == [200] * 3
    assert put(connections, b"", "HEAD") == 200
    assert (store.connections, store.requests[1].endswith(b"\r\n\r\nxxxxx")) == (1, True)


def test_connection_that_the_store_closed_as_idle_is_not_used(store: Store) -> None:
    def answer_and_end(connection: socket.socket) -> None:
        connection.sendall(OK)

    store.scripts, connections = [answer_and_end, OK], to(store)
    assert put(connections, b"") == 200
    time.sleep(0.1)
    assert put(connections) == 200
    assert (store.connections, len(store.requests)) == (2, 2)


@pytest.mark.parametrize("ending", [reset, lambda connection: None], ids=["reset", "closed"])
def test_kept_connection_that_ends_at_its_next_request_is_replaced_once(
    store: Store, ending: Callable[[socket.socket], None]
) -> None:
    store.scripts, connections = [OK, ending, OK], to(store)
    assert [put(connections), put(connections)] == [200, 200]
    assert (store.connections, len(store.requests)) == (2, 3)
    store.scripts = [ending]
    with pytest.raises(UNEXPECTED):
        put(connections)
    assert (store.connections, len(store.requests)) == (3, 5)


def test_fresh_connection_that_breaks_in_the_middle_of_a_body_is_reported(store: Store) -> None:
    store.scripts = [lambda connection: reset(connection) if connection.recv(50_000) else None]
    with pytest.raises(UNEXPECTED):
        put(to(store), b"x" * 9_000_000)
    assert store.connections == 1


@pytest.mark.parametrize(
    ("script", "status", "kept"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, True),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 8\r\n\r\n<Error/>", 403, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: Close\r\n\r\n", 200, False),
        (b"HTTP/1.1 200 OK\r\n\r\n", 200, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", 200, False),
        (b"HTTP/1.1 500 Error\r\nContent-Length: 999999999\r\n\r\nx", 500, False),
        (OK + b"more", 200, False),
    ],
)
def test_connection_is_kept_only_after_a_response_that_ends_where_it_says(
    store: Store, script: bytes, status: int, kept: bool
) -> None:
    store.scripts, connections = [script, OK], to(store)
    assert [put(connections), put(connections)] == [status, 200]
    assert store.connections == (1 if kept else 2)


@pytest.mark.parametrize(
    "script",
    [
        b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
        b"HTTP/1.1 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_response_that_is_not_http_is_reported(store: Store, script: bytes) -> None:
    store.scripts = [script]
    with pytest.raises(UNEXPECTED):
        put(to(store))


def _drip(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"H")
        time.sleep(0.05)


@pytest.mark.parametrize(
    "script", [lambda connection: connection.recv(1) and time.sleep(2), _drip], ids=["silent", "drips"]
)
def test_store_that_never_answers_is_given_up_after_one_timeout(store: Store, script: Script) -> None:
    store.scripts, started = [script], time.monotonic()
    with pytest.raises(TOO_SLOW):
        put(to(store, read_seconds=0.3))
    assert (time.monotonic() - started < 1.5, store.connections) == (True, 1)


def test_store_that_never_reads_is_given_up_in_time(store: Store) -> None:
    store.scripts, started = [lambda connection: time.sleep(3)], time.monotonic()
    with pytest.raises(TOO_SLOW):
        put(to(store), b"x" * 40_000_000)
    assert time.monotonic() - started < 2.5


def test_early_refusal_is_read_although_the_body_was_not(store: Store) -> None:
    def refuse(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        while connection.recv(1_000_000):
            pass

    store.scripts, connections = [refuse, OK], to(store)
    assert put(connections, b"x" * 9_000_000) == 413


def test_idle_connections_are_bounded(store: Store) -> None:
    connections, together = to(store, most=2), threading.Barrier(5)
    store.scripts = [lambda connection: (together.wait(5), connection.sendall(OK), connection.recv(1))]
    threads = [threading.Thread(target=put, args=(connections,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(connections._connections._idle) == 2


def test_connection_that_a_router_forgot_while_it_was_idle_is_not_used(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connections, "IDLE_SECONDS", 0.0)
    connections = to(store)
    assert put(connections) == 200
    store.scripts = [lambda connection: time.sleep(2) if store.connections == 1 else connection.sendall(OK)]
    started = time.monotonic()
    assert put(connections) == 200
    assert time.monotonic() - started < 1


def test_flood_of_100_continue_is_given_up_at_once(store: Store) -> None:
    was_cut = threading.Event()

    def flood(connection: socket.socket) -> None:
        try:
            for _ in range(100_000):  # 250 MB
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        except (BrokenPipeError, ConnectionResetError):
            was_cut.set()

    store.scripts = [flood]
    with pytest.raises(UNEXPECTED):
        put(to(store))
    assert was_cut.wait(20)
