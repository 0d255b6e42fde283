"""The HTTP protocol over raw sockets: slow, idle and oversized connections end, honest ones beside them do not."""

from __future__ import annotations

import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from receiver.app.wiring import Parts
from receiver.tasks.allowance import Allowance
from receiver.web import account_budget, callbacks, http_protocol, rate_limits
from receiver.web.joined_writes import WholeAnswer
from tests.console_reader import KEYS, Reader
from tests.harness import wait_until
from tests.pipeline import Web, callbacks_of, insert_row

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
DATA_SEGMENTS_IN = 152  # its place in Linux's `struct tcp_info`
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def connection(web: Web) -> Iterator[socket.socket]:
    host, port = web.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        yield raw


def read_to_end(raw: socket.socket) -> bytes:
    """Everything until the server closes; TimeoutError if it never does."""
    answer = b""
    while True:
        try:
            chunk = raw.recv(65_536)
        except ConnectionResetError:
            return answer
        if not chunk:
            return answer
        answer += chunk


def send_all(raw: socket.socket, data: bytes) -> int | None:
    """The number of bytes; None when the server ended the connection before."""
    try:
        raw.sendall(data)
    except ConnectionError:
        return None
    return len(data)


@pytest.fixture
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of half a second instead of ten."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(callbacks, "BODY_SECONDS", 0.5)


@pytest.mark.usefixtures("short_deadlines")
@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_head_that_never_ends_is_answered_408(web: Web, start: bytes) -> None:
    with connection(web) as raw:
        raw.sendall(start)
        assert read_to_end(raw).startswith(b"HTTP/1.1 408")


def test_second_head_has_its_own_deadline(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with connection(web) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(65_536).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
        raw.sendall(b"GET /healthz HTTP/1.1\r\nX-")
        assert b"HTTP/1.1 408" in read_to_end(raw)


@pytest.mark.usefixtures("short_deadlines")
def test_idle_connection_has_no_deadline_of_a_head_after_a_body_that_came_apart(web: Web, parts: object) -> None:
    with connection(web) as raw:
        for _ in range(2):
            raw.sendall(f"POST /callbacks/kling/{web.account_token} HTTP/1.1\r\nContent-Length: 2\r\n\r\n".encode())
            time.sleep(0.1)  # the server reads the body apart
            raw.sendall(b"{}")
            assert raw.recv(65_536).startswith(b"HTTP/1.1 200")
            time.sleep(0.7)


@pytest.mark.usefixtures("short_deadlines")
def test_body_that_never_ends_is_answered_408(web: Web, parts: object) -> None:
    token = web.account_token
    with connection(web) as raw:
        head = f"POST /callbacks/kling/{token} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{"
        raw.sendall(head.encode())
        assert read_to_end(raw).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * 3_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"414"),
        (b"GET /healthz HTTP/1.1\r\nX-Long: " + b"a" * 40_000, b"431"),
        (b"GET /healthz HTTP/1.1\r\n" + b"X-Many: yes\r\n" * 3_000, b"431"),
        (b"GET /healthz HTTP/1.1\r\n" + b"A:\r\n" * 101 + b"\r\n", b"431"),
        (b"what is this\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
    ],
    ids=["long-url", "long-header", "many-headers", "small-headers", "nonsense", "two-lengths"],
)
def test_oversized_or_invalid_head_is_refused(web: Web, head: bytes, status: bytes) -> None:
    with connection(web) as raw:
        raw.sendall(head)
        assert read_to_end(raw).split()[1] == status


def test_unread_body_ends_the_connection(web: Web) -> None:
    with connection(web) as raw:
        raw.sendall(b"POST /callbacks/kling/bad HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        answer = read_to_end(raw)
        assert answer.startswith(b"HTTP/1.1 404") and b"connection: close" in answer


def test_complete_unread_body_keeps_the_connection(web: Web) -> None:
    with connection(web) as raw:
        for _ in range(2):
            raw.sendall(b"POST /callbacks/kling/bad HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            answer = raw.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 404") and b"connection: close" not in answer


def test_connection_that_waits_longest_for_a_head_makes_room(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 5)
    with connection(web) as first, connection(web), connection(web), connection(web), connection(web):
        assert httpx.get(f"{web.url}/healthz", trust_env=False).status_code == 200
        assert read_to_end(first) == b""


def test_kept_connection_that_idles_longest_makes_room(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 3)
    ask = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with connection(web) as first, connection(web) as second, connection(web) as third:
        for raw in (second, first, third):
            raw.sendall(ask)
            assert raw.recv(65_536).startswith(b"HTTP/1.1 200")
        assert httpx.get(f"{web.url}/healthz", trust_env=False).status_code == 200
        assert read_to_end(second) == b""
        first.sendall(ask)
        assert first.recv(65_536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "rest",
    [
        b"1;" + b"a" * 200_000,
        b"0" * 200_000,
        b"1\r\n{\r\n" * 2 + b"1;" + b"a" * 200_000,
        b"0\r\nX-Long: " + b"a" * 200_000,
        b"0\r\n" + b"X-Many: yes\r\n" * 20_000,
    ],
    ids=["extension", "leading-zeros", "later-extension", "long-trailer", "many-trailers"],
)
def test_framing_of_a_chunked_body_is_bounded(web: Web, rest: bytes) -> None:
    head = f"POST /callbacks/kling/{web.account_token} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with connection(web) as raw:
        assert send_all(raw, head + rest) is None or read_to_end(raw).split()[1] in (b"400", b"431")


def test_one_pipelined_request_too_many_ends_the_connection(web: Web) -> None:
    """None that arrived with it is begun. The answer is a second late: senders that come again at once cost little."""
    with connection(web) as raw:
        raw.sendall(GET * (http_protocol.MAX_PIPELINED + 1))
        wait_until(lambda: raw.recv(65_536, socket.MSG_PEEK).count(b"HTTP/1.1 200") == http_protocol.MAX_PIPELINED + 1)
        started = time.monotonic()
        raw.sendall(GET * (http_protocol.MAX_PIPELINED + 5))
        statuses = [line.split()[1] for line in read_to_end(raw).splitlines() if b"HTTP/1.1 " in line]
        assert statuses == [b"200"] * (http_protocol.MAX_PIPELINED + 1) + [b"429"]
        assert time.monotonic() - started > http_protocol.TARPIT_SECONDS / 2
    assert httpx.get(f"{web.url}/healthz", trust_env=False).status_code == 200


def test_flood_of_pipelined_requests_is_not_parsed(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing took a third of the time of such a connection."""
    parsed, on_url = list[bytes](), http_protocol.BoundedHttpProtocol.on_url
    monkeypatch.setattr(
        http_protocol.BoundedHttpProtocol, "on_url", lambda self, url: (parsed.append(url), on_url(self, url))
    )
    with connection(web) as raw:
        raw.sendall(GET)
        assert raw.recv(65_536).startswith(b"HTTP/1.1 200")
        raw.sendall(GET * (http_protocol.MAX_PIPELINED + 2))
        assert read_to_end(raw).startswith(b"HTTP/1.1 429")
    assert parsed == [b"/healthz"]


def test_connection_that_pipelined_too_much_makes_room_first(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(http_protocol, "TARPIT_SECONDS", 3_600)
    with connection(web) as idle, connection(web) as refused:
        idle.sendall(GET)
        assert idle.recv(65_536).startswith(b"HTTP/1.1 200")
        refused.sendall(GET * (http_protocol.MAX_PIPELINED + 2))
        wait_until(lambda: http_protocol.BoundedHttpProtocol._refused)
        assert httpx.get(f"{web.url}/healthz", trust_env=False).status_code == 200
        assert read_to_end(refused) == b""
        idle.sendall(GET)
        assert idle.recv(65_536).startswith(b"HTTP/1.1 200")


def test_refused_connection_does_not_delay_the_shutdown(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "TARPIT_SECONDS", 3_600)
    with connection(web) as raw:
        raw.sendall(GET * (http_protocol.MAX_PIPELINED + 2))
        wait_until(lambda: http_protocol.BoundedHttpProtocol._refused)
        web.stop_listening()
        assert read_to_end(raw) == b""


def hold_keyless_answers(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """Hold every answer that needs no key but the first."""
    monkeypatch.setattr(rate_limits, "KEYLESS_A_SECOND", 1e-6)
    monkeypatch.setattr(rate_limits, "MOST_KEYLESS", 0.5)
    monkeypatch.setattr(rate_limits, "HOLD_SECONDS", seconds)


@pytest.mark.parametrize("path", ["/healthz", "/nothing", "/events", f"/callbacks/kling/{'x' * 55}"])
def test_keyless_answers_are_held_back_while_there_are_many(
    path: str, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of requests that need no key took all of a processor. Deliveries do not wait."""
    hold_keyless_answers(monkeypatch, seconds=1)
    with Web(parts) as web, httpx.Client(base_url=web.url, trust_env=False) as client:
        client.post(path)
        started = time.monotonic()
        client.post(path)
        assert time.monotonic() - started > rate_limits.HOLD_SECONDS / 2
        monkeypatch.setattr(rate_limits, "HOLD_SECONDS", 3_600)
        assert client.post(f"/callbacks/kling/{web.account_token}", content=b"{}").status_code == 200


def test_refused_heads_are_held_back_while_there_are_many(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty senders of malformed requests that reconnected at once took 42 % of a processor."""
    monkeypatch.setattr(http_protocol.BoundedHttpProtocol, "_prompt", Allowance(1e-6, 0.5))
    took = []
    for _ in range(2):
        with connection(web) as raw:
            started = time.monotonic()
            raw.sendall(b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_to_end(raw).startswith(b"HTTP/1.1 400")
            took.append(time.monotonic() - started)
    assert took[1] > http_protocol.TARPIT_SECONDS / 2


@pytest.mark.parametrize("changes", [{"cors_origins": "https://app.example.com"}])
@pytest.mark.parametrize("origin", ["https://app.example.com", "https://evil.example.com"])
def test_preflights_are_held_back_while_there_are_many(
    origin: str, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty connections that repeated one took 55 % of a processor."""
    hold_keyless_answers(monkeypatch, seconds=1)
    asked = {"Origin": origin, "Access-Control-Request-Method": "GET"}
    with Web(parts) as web, httpx.Client(base_url=web.url, trust_env=False) as client:
        client.options("/assets/x.png", headers=asked)
        started = time.monotonic()
        client.options("/assets/x.png", headers=asked)
        assert time.monotonic() - started > rate_limits.HOLD_SECONDS / 2


OPEN_PATHS = ["", "/", "/login", "/nothing", "/tasks", "/static/style.css", "/static/nothing", "/language/en"]


@pytest.mark.parametrize("changes", [{"console_keys": KEYS, "api_keys": "a-key-of-more-than-24-characters"}])
@pytest.mark.parametrize("path", ["/kling/openapi.json", *(f"/console{each}" for each in OPEN_PATHS)])
def test_pages_without_a_session_are_held_back_and_those_with_one_are_not(
    path: str, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty connections that asked for one of them took 54 to 71 % of a processor."""
    hold_keyless_answers(monkeypatch, seconds=0)
    holds, held = list[str](), rate_limits.held
    monkeypatch.setattr(rate_limits, "held", lambda scope: holds.append(scope["path"]) or held(scope))
    with Web(parts) as web, httpx.Client(base_url=web.url, trust_env=False) as stranger, Reader(web.url) as person:
        for _ in range(2):
            stranger.get(path)
        assert holds and set(holds) == {path}
        count = len(holds)
        for each in (path, "/console/static/style.css", "/console/tasks"):
            person.http.get(each)
        assert len(holds) == count + (not path.startswith("/console"))


@pytest.mark.parametrize("path", ["/healthz", "the account URL"])
def test_connection_with_a_held_answer_makes_room_before_an_honest_one(
    path: str, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A held answer counted as work, so a flood of them had every honest connection closed before its request."""
    hold_keyless_answers(monkeypatch, seconds=8)
    monkeypatch.setattr(callbacks, "TARPIT_SECONDS", 8)
    monkeypatch.setattr(account_budget, "MAX_ROWS", 0)
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 2)
    task = insert_row(parts)
    token = parts.tokens.sign("kling", task.id)
    with Web(parts) as web, connection(web) as honest, connection(web) as held:
        honest.sendall(GET)
        assert honest.recv(65_536).startswith(b"HTTP/1.1 200"), "the last prompt answer"
        path = f"/callbacks/kling/{web.account_token}" if path == "the account URL" else path
        held.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        wait_until(lambda: http_protocol.BoundedHttpProtocol._held)
        url = f"{web.url}/callbacks/kling/{token}"
        assert httpx.post(url, content=b"{}", trust_env=False).status_code == 200
        assert read_to_end(held) == b""
        honest.sendall(f"POST /callbacks/kling/{token} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        assert honest.recv(65_536).startswith(b"HTTP/1.1 200")


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's tcp_info")
def test_answer_arrives_in_one_segment(web: Web) -> None:
    """Two writes for head and body cost one more system call, a sixth of the answer's CPU."""
    with connection(web) as raw:
        for count in (1, 2):
            raw.sendall(GET)
            wait_until(lambda: raw.recv(65_536).endswith(b"}"))
            received = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
            assert struct.unpack_from("I", received, DATA_SEGMENTS_IN) == (count,)


def test_head_without_a_body_arrives(web: Web) -> None:
    with connection(web) as raw:
        for _ in range(2):
            raw.sendall(GET.replace(b"GET", b"HEAD"))
            assert raw.recv(65_536).endswith(b"\r\n\r\n")


def test_invalid_request_behind_a_delivery_is_refused_after_its_answer(web: Web, parts: Parts) -> None:
    post = f"POST /callbacks/kling/{web.account_token} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    with connection(web) as raw:
        raw.sendall(post + post.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked"))
        answers = read_to_end(raw)
        assert answers.startswith(b"HTTP/1.1 200") and answers.count(b"HTTP/1.1 400") == 1
    assert [row.body for row in callbacks_of(parts)] == [b"{}"]


def test_delivery_in_work_before_an_invalid_request_makes_no_room_before_silent_connections(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 2)
    path = f"/callbacks/kling/{parts.tokens.sign('kling', insert_row(parts).id)}"
    post = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    with connection(web) as busy, connection(web) as silent:
        with parts.database.write():  # so that the delivery waits for its commit
            busy.sendall(post + b"invalid\r\n\r\n")
            wait_until(lambda: web.requests_under_way)
            with connection(web):
                assert read_to_end(silent) == b""
        assert read_to_end(busy).startswith(b"HTTP/1.1 200")


def test_body_that_arrives_during_shutdown_does_not_delay_it(web: Web) -> None:
    path = f"/callbacks/kling/{web.account_token}".encode()
    with connection(web) as raw:
        raw.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
        wait_until(lambda: web.requests_under_way)
        web.stop_listening()
        raw.sendall(b"{}")
        answer = read_to_end(raw)
        assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer


def test_answers_have_security_headers_and_no_banner(web: Web) -> None:
    answer = httpx.get(f"{web.url}/healthz", trust_env=False)
    assert "server" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's tcp_info")
@pytest.mark.parametrize("end", [b"", b"Connection: close\r\n"])
def test_whole_answer_equals_the_one_of_two_messages(web: Web, monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    whole, is_sent_whole = http_protocol.BoundedHttpProtocol.send_whole, list[bool]()

    def send_whole(protocol: http_protocol.BoundedHttpProtocol, answer: WholeAnswer) -> bool:
        is_sent_whole.append(not is_sent_whole and whole(protocol, answer))
        return is_sent_whole[-1]

    monkeypatch.setattr(http_protocol.BoundedHttpProtocol, "send_whole", send_whole)
    head = f"POST /callbacks/kling/{web.account_token} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n".encode()
    answers = []
    for _ in range(2):
        with connection(web) as raw:
            raw.sendall(head + end + b"\r\n{}")
            wait_until(lambda: raw.recv(65_536, socket.MSG_PEEK).endswith(b"}"))
            received = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
            assert struct.unpack_from("I", received, DATA_SEGMENTS_IN) == (1,)
            answers.append(re.sub(b"date: [^\r]+", b"date: then", raw.recv(65_536)))
    assert is_sent_whole == [True, False]
    assert answers[0] == answers[1] and answers[0].startswith(b"HTTP/1.1 200 OK\r\ndate: then\r\n")
    assert (b"connection: close" in answers[0]) == bool(end)
