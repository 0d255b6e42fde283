"""Response heads: a plain one is read by us, every other one by httpcore, and for both the same file comes out."""

from __future__ import annotations

import io
import re
import socket
import threading
import time
from typing import Any

import httpcore
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage.fetch.transfer import Body
from storage.http import client, connection
from storage.http.client import Connections, Request
from storage.http.connection import GuardedStream

BODY = b"a picture"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
GET = Request("GET", ("http", "127.0.0.1", 8080), "/1.png?a=b", {"Host": "127.0.0.1:8080"})


class Wire:
    """One connection, on which the response has arrived already and after which the host hangs up."""

    def __init__(self, response: bytes) -> None:
        self._ours, self.host = socket.socketpair()
        self.host.sendall(response)
        self.host.shutdown(socket.SHUT_WR)

    def connect(self, _origin: object) -> GuardedStream:
        return GuardedStream(self._ours)


def outcome(response: bytes) -> Any:
    """What the request was, and what came out: status, headers, body and what is known of the connection; or the
    error."""
    wire, sink = Wire(response), io.BytesIO()
    connections = Connections(wire.connect, most=1, write_seconds=5.0, idle_seconds=4.0)
    found: Any
    try:
        with connections.get(GET) as answer:
            body = Body(sink, 10_000)
            body.receive(answer)
            found = answer.status, answer.headers, body.notes, answer.stream.reusable, answer.ends_connection
    except Exception as error:  # noqa: BLE001 - it is compared
        found = type(error), str(error)
    request = wire.host.recv(65_536)
    connections.close()
    wire.host.close()
    return request, found, sink.getvalue()


def by_httpcore(response: bytes) -> Any:
    with pytest.MonkeyPatch.context() as only:
        only.setattr(client, "PLAIN_HEAD", re.compile(rb"(?!)"))
        return outcome(response)


def head(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK\r\n", length: bytes = LENGTH) -> bytes:
    return status + b"".join(lines) + length + b"\r\n"


PLAIN = {
    "a file server": head(b"Accept-Ranges: bytes\r\nContent-Type: image/png\r\nServer: rclone/v1.60.1\r\n"),
    "a store": head(b'Etag: "a"\r\n', b"X-Amz-Request-Id: 1\r\n", b"Connection: keep-alive\r\n"),
    "a host that closes": head(b"connection: Keep-Alive, CLOSE\r\n"),
    "no body": head(status=b"HTTP/1.1 204 No Content\r\n"),
    "a redirect": head(b"Location: /2.png\r\n", status=b"HTTP/1.1 302 Found\r\n"),
    "a part": head(b"Content-Range: bytes 0-8/9\r\n", status=b"HTTP/1.1 206 Partial\r\n"),
    "no reason": head(status=b"HTTP/1.1 200\r\n"),
    "an empty reason": head(status=b"HTTP/1.1 200 \r\n"),
    "blanks and tabs": head(b"X:\r\nY: \t \r\nZ:\t a\tb  c \t\r\n", length=b"content-LENGTH:9\r\n"),
    "other letters": head("X: héllo\r\n".encode(), b"Y: \xff\r\n", status=b"HTTP/1.1 200 \xe9\r\n"),
    "64 fields": head(b"X: y\r\n" * 63),
    "zeros": head(length=b"Content-Length: 0009\r\n"),
    "too short": head(length=b"Content-Length: 3\r\n"),
    "too long": head(length=b"Content-Length: 30\r\n"),
    "coded": head(b"Content-Encoding: gzip\r\n"),
    "malformed lines": head(b"no header\r\n", b": b\r\n", b"X Y: z\r\n", b"Z: \0\r\n"),
}
OTHERS = {
    "another protocol": head(status=b"HTTP/1.1 101 Switching\r\n"),
    "a status of 600": head(status=b"HTTP/1.1 600 Other\r\n"),
    "an old version": head(status=b"HTTP/1.0 200 OK\r\n"),
    "a later version": head(status=b"HTTP/1.2 200 OK\r\n"),
    "two blanks": head(status=b"HTTP/1.1  200 OK\r\n"),
    "four digits": head(status=b"HTTP/1.1 2000 OK\r\n"),
    "a control character": head(status=b"HTTP/1.1 200 O\x01K\r\n"),
    "no status": head(status=b""),
    "a blank line": head(status=b"\r\nHTTP/1.1 200 OK\r\n"),
    "early hints": b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + head(),
    "65 fields": head(b"X: y\r\n" * 64),
    "a large head": head(b"X: %b\r\n" % (b"y" * 9_000)),
    "a folded line": head(b"X: a\r\n b\r\n"),
    "a folded length": head(length=b"Content-Length:\r\n 9\r\n"),
    "bare line feeds": head().replace(b"\r\n", b"\n"),
    "one bare line feed": head(b"X: y\n"),
    "no length": head(length=b""),
    "the same length twice": head(length=LENGTH * 2),
    "two lengths": head(LENGTH, length=b"Content-Length: 4\r\n"),
    "a list of lengths": head(length=b"Content-Length: 9, 9\r\n"),
    "a signed length": head(length=b"Content-Length: +9\r\n"),
    "a negative length": head(length=b"Content-Length: -9\r\n"),
    "a length in hex": head(length=b"Content-Length: 0x9\r\n"),
    "a length with a blank": head(length=b"Content-Length: 9 9\r\n"),
    "a blank before the colon": head(length=b"Content-Length : 9\r\n"),
    "an empty length": head(length=b"Content-Length:\r\n"),
    "a huge length": head(length=b"Content-Length: %d\r\n" % 10**18),
    "chunked": head(b"Transfer-Encoding: chunked\r\n", length=b""),
    "chunked with a length": head(b"Transfer-Encoding: chunked\r\n"),
    "chunked twice": head(b"Transfer-Encoding: chunked\r\n" * 2, length=b""),
    "another transfer coding": head(b"transfer-encoding: gzip, chunked\r\n", length=b""),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_head_is_read_without_httpcore(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_httpcore(PLAIN[name] + BODY)
    monkeypatch.delattr(httpcore, "HTTP11Connection")
    assert outcome(PLAIN[name] + BODY) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_an_unusual_head_is_left_to_httpcore(name: str) -> None:
    with pytest.MonkeyPatch.context() as without:
        without.delattr(httpcore, "HTTP11Connection")
        assert outcome(OTHERS[name] + BODY)[1][0] is AttributeError
    assert outcome(OTHERS[name] + BODY) == by_httpcore(OTHERS[name] + BODY)


@pytest.mark.parametrize(
    "response", [b"", head()[:-4], b"HTTP/1.1 100 Go\r\n\r\n" * 10_000], ids=["none", "cut", "many"]
)
def test_a_response_without_a_bounded_head_is_refused(response: bytes) -> None:
    assert outcome(response)[1][0] in (httpcore.RemoteProtocolError, client.NotHttp)


@pytest.mark.parametrize("name", sorted((PLAIN | OTHERS).keys() - {"no body"}))  # bytes behind a 204 may be seen or not
def test_a_head_comes_out_the_same_however_it_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    response = (PLAIN | OTHERS)[name] + BODY
    expected = outcome(response)
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(connection, "HEAD_READ_BYTES", size)
        assert outcome(response) == expected


NAMES = st.sampled_from([b"Content-Length", b"content-length", b"Transfer-Encoding", b"Connection", b"X", b"\xe9", b""])
VALUES = st.sampled_from([b"9", b"4", b"09", b"9,9", b"chunked", b"close", b"", b"\x01", b"\0", b"\x7f", b"a\tb"])
LINES = st.tuples(
    NAMES, st.sampled_from([b":", b": ", b" : ", b":\t", b""]), VALUES, st.sampled_from([b"\r\n", b"\n", b" \r\n"])
)
STATUSES = st.sampled_from([each + b"\r\n" for each in (b"HTTP/1.1 200 OK", b"HTTP/1.1 200", b"HTTP/1.0 200 OK")])
HEADS = st.builds(
    lambda status, lines: status + b"".join(map(b"".join, lines)) + b"\r\n", STATUSES, st.lists(LINES, max_size=5)
)
# A byte of a head, replaced by others.
CHANGES = st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(max_size=2))


@settings(max_examples=200, deadline=None)
@given(st.one_of(HEADS, st.sampled_from([*PLAIN.values(), *OTHERS.values()])), st.lists(CHANGES, max_size=3))
@example(head(b"X: a\r\n\tb\r\n"), [])
def test_fuzzed_heads_come_out_as_by_httpcore(given_head: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    for at, count, new in changes:
        given_head = given_head[:at] + new + given_head[at + count :]
    assert outcome(given_head + BODY) == by_httpcore(given_head + BODY)


def test_repr_of_a_response_shows_no_header() -> None:
    redirect = client.Response(302, {"location": "https://cdn.example/?Signature=canary"}, None, False, Any, None)  # type: ignore[arg-type]
    assert "canary" not in repr(redirect)


def cpu_of_a_head_in_bytes(start: bytes) -> float:
    """Seconds of CPU to read a head whose lines after `start` arrive byte by byte, and then end."""
    ours, host = socket.socketpair()

    def send() -> None:
        host.sendall(b"HTTP/1.1 200 OK\r\n" + start)
        for _ in range(1_000):
            host.sendall(b"a")
            time.sleep(0.0002)
        host.sendall(b": b\r\n\r\n")

    sending = threading.Thread(target=send)
    with ours, host:
        sending.start()
        before = time.thread_time()
        GuardedStream(ours).read(1_000)
        sending.join()
        return time.thread_time() - before


def test_a_long_head_is_searched_once_for_its_end() -> None:
    """A byte more, every half a millisecond, kept a quarter of a processor busy for the 40 s of a head."""
    cpu = [(cpu_of_a_head_in_bytes(b""), cpu_of_a_head_in_bytes(b"a: b\n" * 18_000)) for _ in range(3)]
    assert min(long for _, long in cpu) < 3 * max(short for short, _ in cpu) + 0.02
