"""A store that drips, floods or never ends is given up, in every request of boto3; over raw loopback sockets."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable

import pytest

from storage.bucket import bounded_connections, store_connection
from storage.bucket.bucket import Bucket
from storage.errors import StoreUnavailable
from tests.storage.bucket.test_http_connections import Store, store

__all__ = ["store"]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n"
CALLS: dict[str, Callable[[Bucket], object]] = {
    "get": lambda bucket: list(bucket.read("k")),
    "head": lambda bucket: bucket.head("k"),
    "list": lambda bucket: list(bucket.list("")),
    "delete": lambda bucket: bucket.delete("k"),
}


def sending(first: bytes, again: bytes, pause: float = 0) -> Callable[[socket.socket], None]:
    """Sends `first`, then `again` for at most 10 s."""

    def send(connection: socket.socket) -> None:
        ends = time.monotonic() + 10
        connection.sendall(first)
        while time.monotonic() < ends:
            connection.sendall(again)
            time.sleep(pause)

    return send


DRIPPED_BODY = sending(HEAD, b"a", 0.05)
DRIPPED_HEAD = sending(b"HTTP/1.1 200 OK\r\nX: ", b"a", 0.05)
FLOOD = sending(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500)
ENDLESS_BODY = sending(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"a" * 65_536)


@pytest.fixture
def bucket(store: Store, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(store_connection, "READ_SECONDS", 0.3)
    monkeypatch.setattr(store_connection, "TRIES", 1)
    return Bucket("b", endpoint_url=f"http://127.0.0.1:{store.port}", keys=("access", "secret"))


def seconds_until_given_up(call: Callable[[], object]) -> float:
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        call()
    return time.monotonic() - started


@pytest.mark.parametrize("name", ["get", "head", "list", "delete"])
@pytest.mark.parametrize("script", [DRIPPED_HEAD, FLOOD], ids=["drip", "flood"])
def test_store_whose_response_does_not_begin_is_given_up(
    store: Store, bucket: Bucket, name: str, script: Callable[[socket.socket], None]
) -> None:
    store.scripts = [script]
    assert seconds_until_given_up(lambda: CALLS[name](bucket)) < 3


@pytest.mark.parametrize("name", ["get", "list"])
def test_store_that_drips_a_body_is_given_up(store: Store, bucket: Bucket, name: str) -> None:
    store.scripts = [DRIPPED_BODY]
    assert seconds_until_given_up(lambda: CALLS[name](bucket)) < 3


def test_body_may_take_longer_than_one_wait_at_a_fair_speed(store: Store, bucket: Bucket) -> None:
    def send(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 40000\r\n\r\n")
        for _ in range(10):
            time.sleep(0.1)
            connection.sendall(b"a" * 4_000)

    store.scripts = [send]
    assert sum(map(len, bucket.read("k"))) == 40_000


@pytest.mark.parametrize("name", ["get", "list"])
def test_body_without_an_end_is_given_up(
    store: Store, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(bounded_connections, "MAX_ANSWER_BYTES", 1_000_000)
    store.scripts = [ENDLESS_BODY]
    assert seconds_until_given_up(lambda: CALLS[name](bucket)) < 3


def test_endless_100_continue_responses_are_given_up(store: Store, bucket: Bucket) -> None:
    store.scripts = [lambda connection: connection.sendall(b"HTTP/1.1 100 Continue\r\n")]  # then the server closes

    def put() -> None:
        with bucket._errors(), io.BytesIO(b"bytes") as file:
            bucket._client().put_object(Bucket="b", Key="k", Body=file)

    assert seconds_until_given_up(put) < 3
