"""A request with a body, over a socket whose other side reads slowly or answers early."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import httpcore
import pytest

from storage.errors import FetchInterrupted
from storage.http import connection
from storage.http.client import Connections, Request
from storage.http.connection import GuardedStream, TransferDeadline
from tests.storage.fetch.test_client import tls as tls

ORIGIN = ("http", "store.example", 80)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
    with ours, theirs:
        yield ours, theirs


def put(ours: socket.socket, size: int, **bounds: float) -> int:
    connections = Connections(lambda _: GuardedStream(ours), most=1, write_seconds=5.0, idle_seconds=4.0)
    body = [memoryview(bytes(1_024))] * (size // 1_024)
    request = Request("PUT", ORIGIN, "/b/k", {"Host": "store.example"}, lambda: body)
    limits = {"total_seconds": 60.0, "head_seconds": 0.5, "min_bytes_per_second": 13_000, "wait_seconds": 5.0, **bounds}
    with TransferDeadline(**limits), connections.get(request) as response:
        response.discard()
    return response.status


def read_at(theirs: socket.socket, bytes_per_second: int, size: int, answer: bytes = OK) -> threading.Thread:
    def read() -> None:
        left = size
        with contextlib.suppress(OSError):  # the other side has given up
            while left > 0 and (block := theirs.recv(1_024)):
                left -= len(block)
                time.sleep(len(block) / bytes_per_second)
            theirs.sendall(answer)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def test_body_that_is_read_too_slowly_is_given_up(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SPEED_WINDOW_SECONDS", 0.3)
    read_at(pair[1], 8_000, 100_000)
    started = time.monotonic()
    with pytest.raises(FetchInterrupted, match="slower than 13000 bytes a second"):
        put(pair[0], 100_000, head_seconds=60.0)
    assert time.monotonic() - started < 5


def test_time_of_the_body_does_not_count_for_the_head(pair: tuple[socket.socket, socket.socket]) -> None:
    reader = read_at(pair[1], 10_000, 40_000)  # twice the time that a head may take
    assert put(pair[0], 40_960, head_seconds=2.0, min_bytes_per_second=1) == 200
    reader.join(10)


def test_silence_after_a_body_is_given_up_after_the_time_of_a_head(pair: tuple[socket.socket, socket.socket]) -> None:
    read_at(pair[1], 10_000_000, 10**9)
    started = time.monotonic()
    with pytest.raises((FetchInterrupted, httpcore.ReadTimeout)):
        put(pair[0], 2_048)
    assert time.monotonic() - started < 4


def test_answer_to_a_head_request_has_no_body() -> None:
    ours, theirs = socket.socketpair()
    connections = Connections(lambda _: GuardedStream(ours), most=1, write_seconds=5.0, idle_seconds=4.0)
    theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    with ours, theirs:
        with connections.get(Request("HEAD", ORIGIN, "/b/k", {"Host": "store.example"})) as response:
            response.discard()
        assert response.stream.reusable
        connections.close()


@pytest.mark.parametrize("value", ["a\r\nX: b", "\x7f", "a\0"])
def test_header_that_would_be_another_request_is_not_sent(
    pair: tuple[socket.socket, socket.socket], value: str
) -> None:
    connections = Connections(lambda _: GuardedStream(pair[0]), most=1, write_seconds=5.0, idle_seconds=4.0)
    with (
        pytest.raises(httpcore.LocalProtocolError),
        connections.get(Request("GET", ORIGIN, "/", {"Host": "store.example", "X": value})),
    ):
        pass
    assert not pair[1].recv(100)


def test_large_body_over_tls_arrives_whole_although_it_is_read_slowly(
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    size, arrived = 3_000_000, bytearray()
    body = os.urandom(size)

    def serve() -> None:
        connection, _ = listening.accept()
        with tls[0].wrap_socket(connection, server_side=True) as server:
            for _ in range(2):
                while not arrived.endswith(body) and (block := server.recv(65_536)):
                    arrived.extend(block)
                    time.sleep(0.001)
                server.sendall(OK)
                arrived.clear()

    def connect(_: object) -> GuardedStream:
        plain = socket.create_connection(listening.getsockname())
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        return GuardedStream(plain).start_tls(tls[1], "cdn.example.com", 5.0)

    connections = Connections(connect, most=1, write_seconds=5.0, idle_seconds=4.0)
    request = Request("PUT", ("https", "cdn.example.com", 443), "/b/k", {"Host": "a"}, lambda: [memoryview(body)])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        limits = TransferDeadline(60.0, head_seconds=10.0, min_bytes_per_second=13_000, wait_seconds=5.0)
        for _ in range(2):  # the second one over the same connection, because the server accepts one
            with limits, connections.get(request) as response:
                response.discard()
            assert response.status == 200
        connections.close()
        thread.join(10)
