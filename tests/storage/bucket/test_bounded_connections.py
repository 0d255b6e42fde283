"""A store that drips, floods or never ends is given up, in every request of boto3; over raw loopback sockets."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable

import pytest

from storage.bucket import bounded_connections, listings, store_connection
from storage.bucket.bucket import Bucket
from storage.errors import StoreUnavailable
from tests.storage.bucket.test_http_connections import Store, store

__all__ = ["store"]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n"
MOMENT = b"2026-01-01T00:00:00.000Z"
# The root of a page, the tag of its entries, and what names the next page.
LISTINGS = {
    "list": (b"ListBucketResult", b"Contents", b"<NextContinuationToken>#</NextContinuationToken>"),
    "purge": (b"ListVersionsResult", b"Version", b"<NextKeyMarker>#</NextKeyMarker>"),
    "abort_uploads": (b"ListMultipartUploadsResult", b"Upload", b"<NextKeyMarker>#</NextKeyMarker>"),
}
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


def answer(body: bytes, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n%b\r\n%b" % (status, len(body), more, body)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_of_an_answer_are_not_expanded(store: Store, bucket: Bucket, encoding: str) -> None:
    """expat allows 100 times the bytes that came: 1 MiB took 200 MB of memory, and 10 MiB more than there is."""
    entities = f'<!ENTITY a "{"A" * 1_000}"><!ENTITY b "{"&a;" * 10}">'
    padding, text = " " * 100_000, "&b;" * 500
    xml = f"<!--{padding}--><!DOCTYPE r [{entities}]><ListBucketResult><Prefix>{text}</Prefix></ListBucketResult>"
    store.scripts = [answer(xml.encode(encoding))]
    with pytest.raises(StoreUnavailable, match="no XML of S3"):
        list(bucket.list(""))


def test_answer_of_very_many_elements_is_not_parsed(store: Store, bucket: Bucket) -> None:
    store.scripts = [answer(b"<ListBucketResult>" + b"<a/>" * 250_000 + b"</ListBucketResult>")]
    with pytest.raises(StoreUnavailable, match="no XML of S3"):
        list(bucket.list(""))


@pytest.mark.parametrize("name", ["get", "list"])
def test_page_of_a_proxy_leaves_the_status(store: Store, bucket: Bucket, name: str) -> None:
    store.scripts = [answer(b"<!DOCTYPE html><html><body>down</body></html>", b"502 Bad Gateway")]
    with pytest.raises(StoreUnavailable, match="HTTP 502"):
        CALLS[name](bucket)


@pytest.mark.parametrize("name", ["get", "list"])
def test_error_without_an_end_is_given_up(store: Store, bucket: Bucket, name: str) -> None:
    head = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n"
    store.scripts = [sending(head, b"a" * 65_536)]
    assert seconds_until_given_up(lambda: CALLS[name](bucket)) < 3


@pytest.mark.parametrize("name", ["list", "purge", "abort_uploads"])
@pytest.mark.parametrize("key", [b"", b"<Key>k</Key>"], ids=["empty", "same key"])
def test_listing_without_further_keys_ends(
    store: Store, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, name: str, key: bytes
) -> None:
    """Each page names a new token, so boto3 would ask for the next one for ever."""
    monkeypatch.setattr(listings, "MAX_IDLE_PAGES", 5)
    entry = (
        key
        and b"%b<Size>1</Size><LastModified>%b</LastModified><Initiated>%b</Initiated><UploadId>u</UploadId>"
        % (
            key,
            MOMENT,
            MOMENT,
        )
    )
    root, tag, tokens = LISTINGS[name]
    listed = b"<%b>%b</%b>" % (tag, entry, tag) if key else b""
    page = b"<%b><IsTruncated>true</IsTruncated>%b%b</%b>"
    pages = [answer(page % (root, tokens.replace(b"#", b"%d" % number), listed, root)) for number in range(20)]
    deleted = answer(b"")
    store.script_of = lambda head: pages.pop(0) if head.startswith(b"GET") else deleted  # type: ignore[method-assign]
    call = getattr(bucket, name)
    with pytest.raises(StoreUnavailable, match="no further object"):
        list(call("p")) if name == "list" else call("p")
    assert 6 <= 20 - len(pages) <= 8


@pytest.mark.parametrize("name", ["list", "purge", "abort_uploads"])
def test_entry_without_what_every_entry_has_is_an_error_of_the_store(store: Store, bucket: Bucket, name: str) -> None:
    root, tag, _ = LISTINGS[name]
    store.scripts = [answer(b"<%b><%b><Size>1</Size></%b></%b>" % (root, tag, tag, root))]
    with pytest.raises(StoreUnavailable, match="no XML of S3"):
        list(bucket.list("p")) if name == "list" else getattr(bucket, name)("p")


def test_endless_100_continue_responses_are_given_up(store: Store, bucket: Bucket) -> None:
    store.scripts = [lambda connection: connection.sendall(b"HTTP/1.1 100 Continue\r\n")]  # then the server closes

    def put() -> None:
        with bucket._errors(), io.BytesIO(b"bytes") as file:
            bucket._client().put_object(Bucket="b", Key="k", Body=file)

    assert seconds_until_given_up(put) < 3
