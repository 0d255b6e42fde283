"""Request bodies over raw sockets: the committed body is the sent one, byte for byte, or the answer is no 2xx."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import httptools
import httpx
import pytest

from receiver.app.wiring import Parts
from tests.pipeline import Web, callbacks_of
from tests.receiver.web.test_http_protocol import connection, read_to_end

ON_SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
KEY = "a-gateway-key-of-more-than-32-characters"
BODY = b'{"task_id": "901", "task_status": "processing"}'
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n"
CHUNKS = b"a;name=value\r\n" + BODY[:10] + b"\r\n%x\r\n" % len(BODY[10:]) + BODY[10:] + b"\r\n"
ONE_BY_ONE = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY)
END = b"0\r\n\r\n"
TRAILERS = b"0\r\nX-Digest: abc\r\nContent-Type: text/trailer\r\n\r\n"
NEXT = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
NEXT_OFFER = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + H2C + b"\r\n"
# The head after its first two lines, for each kind of request with a complete body.
WHOLE = {
    "length": LENGTH + b"\r\n" + BODY,
    "chunks": CHUNKED + b"\r\n" + CHUNKS + END,
    "chunks-of-one": CHUNKED + b"\r\n" + ONE_BY_ONE + END,
    "leading-zeros": CHUNKED + b"\r\n000%x\r\n" % len(BODY) + BODY + b"\r\n000\r\n\r\n",
    "trailers": CHUNKED + b"\r\n" + CHUNKS + TRAILERS,
    "h2c-length": H2C + LENGTH + b"\r\n" + BODY,
    "h2c-length-first": LENGTH + H2C + b"\r\n" + BODY,
    "h2c-chunks": H2C + CHUNKED + b"\r\n" + CHUNKS + END,
    "h2c-trailers": H2C + CHUNKED + b"\r\n" + CHUNKS + TRAILERS,
    "h2c-close": b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n" + LENGTH + b"\r\n" + BODY,
    "websocket": b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    + LENGTH
    + b"\r\n"
    + BODY,
    "two-offers": b"Connection: upgrade\r\nUpgrade: h2c, tls/1.3\r\nUPGRADE: foo/2\r\n" + LENGTH + b"\r\n" + BODY,
    "offer-unnamed": b"Upgrade: h2c\r\n" + LENGTH + b"\r\n" + BODY,
    "expect": b"Expect: 100-continue\r\n" + LENGTH + b"\r\n" + BODY,
    "h2c-expect": H2C + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n" + BODY,
    "pipelined": LENGTH + b"\r\n" + BODY + NEXT,
    "h2c-pipelined": H2C + LENGTH + b"\r\n" + BODY + NEXT + NEXT_OFFER + NEXT,
    "h2c-chunks-pipelined": H2C + CHUNKED + b"\r\n" + CHUNKS + TRAILERS + NEXT_OFFER,
}
# A body that ends early, or whose end is ambiguous.
CUT = {
    "length": LENGTH + CLOSE + b"\r\n" + BODY[:-1],
    "nothing-of-it": LENGTH + CLOSE + b"\r\n",
    "h2c-length": H2C + LENGTH + b"\r\n" + BODY[:-1],
    "h2c-nothing-of-it": H2C + LENGTH + b"\r\n",
    "in-a-chunk": CHUNKED + b"\r\n" + CHUNKS[:-3],
    "no-last-chunk": CHUNKED + b"\r\n" + CHUNKS,
    "in-the-last-chunk": CHUNKED + b"\r\n" + CHUNKS + END[:-1],
    "h2c-no-last-chunk": H2C + CHUNKED + b"\r\n" + CHUNKS,
    "in-the-trailers": CHUNKED + b"\r\n" + CHUNKS + TRAILERS[:-1],
}
WRONG = {
    "length-and-chunked": (LENGTH + CHUNKED + b"\r\n" + CHUNKS + END, b"400"),
    "h2c-length-and-chunked": (H2C + LENGTH + CHUNKED + b"\r\n" + CHUNKS + END, b"400"),
    "two-lengths": (LENGTH + b"Content-Length: 2\r\n\r\n" + BODY, b"400"),
    "gzip": (b"Transfer-Encoding: gzip\r\n\r\n" + BODY, b"400"),
    "h2c-gzip": (H2C + b"Transfer-Encoding: gzip\r\n\r\n" + BODY, b"400"),
    "chunked-not-last": (b"Transfer-Encoding: chunked, gzip\r\n\r\n" + CHUNKS + END, b"400"),
    "chunked-then-identity": (CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + CHUNKS + END, b"400"),
    "no-length": (CLOSE + b"\r\n" + BODY, b"411"),
    "h2c-no-length": (H2C + b"\r\n" + BODY, b"411"),
    "chunk-of-another-size": (CHUNKED + b"\r\n2\r\n" + BODY + b"\r\n" + END, b"400"),
}


def head(web: Web, version: bytes = b"1.1", method: bytes = b"POST") -> bytes:
    return b"%s /callbacks/kling/%s HTTP/%s\r\nHost: x\r\n" % (method, web.account_token.encode(), version)


def stored(parts: Parts) -> list[bytes]:
    return [bytes(row.body) for row in callbacks_of(parts)]


def first_status(raw: socket.socket) -> bytes:
    """The status of the final answer, which is read whole; 100 Continue is none. Empty if the server closes the
    connection.
    """
    answer = b""
    while True:
        head, end, body = answer.partition(b"\r\n\r\n")
        if end and head.startswith(b"HTTP/1.1 100"):
            answer = body
            continue
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if end and len(body) >= int(length[1] if length else 0):
            return head.split()[1]
        if not (more := raw.recv(65_536)):
            return b""
        answer += more


@ON_SQLITE
@pytest.mark.parametrize("rest", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("pieces", ["at-once", "byte-by-byte"])
def test_committed_body_is_the_sent_body(web: Web, parts: Parts, rest: bytes, pieces: str) -> None:
    whole = head(web) + rest
    with connection(web) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(whole), len(whole) if pieces == "at-once" else 1):
            raw.sendall(whole[start:] if pieces == "at-once" else whole[start : start + 1])
        assert first_status(raw) == b"200"
    assert stored(parts) == [BODY]


@ON_SQLITE
@pytest.mark.parametrize("kind", ["h2c-length", "h2c-chunks"])
def test_a_cut_anywhere_in_an_offer_changes_nothing(web: Web, parts: Parts, kind: str) -> None:
    whole = head(web) + WHOLE[kind]
    with connection(web) as other:
        for cut in range(1, len(whole)):
            with connection(web) as raw:
                raw.sendall(whole[:cut])
                other.sendall(NEXT)
                assert first_status(other) == b"200"  # so the server has read the first part by itself
                raw.sendall(whole[cut:])
                assert first_status(raw) == b"200", cut
    assert stored(parts) == [BODY]


@ON_SQLITE
@pytest.mark.parametrize("rest", CUT.values(), ids=CUT)
def test_a_body_that_ends_early_is_neither_kept_nor_answered_200(web: Web, parts: Parts, rest: bytes) -> None:
    with connection(web) as raw:
        raw.sendall(head(web) + rest)
        raw.shutdown(socket.SHUT_WR)
        assert b" 200 " not in read_to_end(raw)
    assert stored(parts) == []


@ON_SQLITE
@pytest.mark.parametrize(("rest", "status"), WRONG.values(), ids=WRONG)
def test_a_body_without_a_certain_end_is_refused(web: Web, parts: Parts, rest: bytes, status: bytes) -> None:
    with connection(web) as raw:
        raw.sendall(head(web) + rest)
        assert read_to_end(raw).split()[1] == status
    assert stored(parts) == []


@ON_SQLITE
@pytest.mark.parametrize(
    ("version", "method", "rest", "status"),
    [
        (b"1.0", b"POST", b"\r\n" + BODY, b"411"),
        (b"1.0", b"POST", LENGTH + b"\r\n" + BODY, b"200"),
        (b"1.0", b"POST", H2C + LENGTH + b"\r\n" + BODY, b"200"),
        (b"1.1", b"CONNECT", LENGTH + b"\r\n" + BODY, b"400"),
        (b"1.1", b"CONNECT", H2C + CHUNKED + b"\r\n" + CHUNKS + END, b"400"),
        (b"2.0", b"PRI", b"\r\nSM\r\n\r\n", b"400"),
    ],
)
def test_requests_of_other_versions_and_methods_are_answered(
    web: Web, parts: Parts, version: bytes, method: bytes, rest: bytes, status: bytes
) -> None:
    with connection(web) as raw:
        raw.sendall(head(web, version, method) + rest)
        assert read_to_end(raw).split()[1] == status
    assert stored(parts) == ([BODY] if status == b"200" else [])


@ON_SQLITE
def test_request_pipelined_behind_an_upgrade_offer_is_answered(web: Web, parts: Parts) -> None:
    with connection(web) as raw:
        raw.sendall(head(web) + WHOLE["h2c-pipelined"][: -len(NEXT)] + NEXT.replace(b"Host", CLOSE + b"Host"))
        assert read_to_end(raw).count(b"HTTP/1.1 200") == 4
    assert stored(parts) == [BODY]


@ON_SQLITE
def test_trailer_does_not_count_as_a_header(web: Web, parts: Parts) -> None:
    with connection(web) as raw:
        raw.sendall(head(web) + WHOLE["trailers"])
        assert first_status(raw) == b"200"
    assert "content-type" not in callbacks_of(parts)[0].headers


@ON_SQLITE
@pytest.mark.parametrize("changes", [{"api_keys": KEY}])
def test_a_create_that_offers_an_upgrade_is_read(web: Web, parts: Parts) -> None:
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAoAAAAAIAAAAA"}
    headers = {**offer, "Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=web.url, headers=headers, trust_env=False, timeout=30) as client:
        words = {"model_name": "kling-image-o1", "prompt": "a lighthouse"}
        answer = client.post("/kling/v1/images/omni-image", json=words).json()
    assert answer["code"] == 0 and answer["data"]["task_id"]


class _Forgetful(httptools.HttpRequestParser):  # type: ignore[misc] # of a compiled module
    """A parser that ends a message without reporting its body, like llhttp at an upgrade."""

    def __init__(self, protocol: Any) -> None:
        class Protocol:
            def __getattr__(self, name: str) -> Any:
                return (lambda *_: None) if name in ("on_body", "on_chunk_complete") else getattr(protocol, name)

        super().__init__(Protocol())


@ON_SQLITE
@pytest.mark.parametrize("kind", ["length", "chunks"])
def test_a_parser_that_loses_a_body_is_not_believed(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(httptools, "HttpRequestParser", _Forgetful)
    with connection(web) as raw:
        raw.sendall(head(web) + WHOLE[kind])
        assert read_to_end(raw).startswith(b"HTTP/1.1 400")
    assert stored(parts) == []


JAVA = """
import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.*;
public class Post {
    public static void main(String[] words) throws Exception {
        byte[] body = words[1].getBytes("UTF-8");
        var length = HttpRequest.BodyPublishers.ofByteArray(body);
        var chunks = HttpRequest.BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body));
        for (var publisher : new HttpRequest.BodyPublisher[] {length, chunks}) {
            var request = HttpRequest.newBuilder(URI.create(words[0])).POST(publisher).build();
            var answer = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.statusCode());
        }
    }
}
"""


@ON_SQLITE
@pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed, and its HttpClient is what is tried.")
def test_request_of_the_jdks_client_is_read(web: Web, parts: Parts, tmp_path: Path) -> None:
    source = tmp_path / "Post.java"
    source.write_text(JAVA)
    url = f"{web.url}/callbacks/kling/{web.account_token}"
    said = subprocess.run(["java", source, url, BODY], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.split() == ["200", "200"]
    assert stored(parts) == [BODY]  # the second is the same delivery again


@ON_SQLITE
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed, and its offer is what is tried.")
def test_upgrade_offer_of_curl_is_ignored(web: Web, parts: Parts) -> None:
    url = f"{web.url}/callbacks/kling/{web.account_token}"
    subprocess.run(["curl", "-sSf", "--noproxy", "*", "--http2", "--data-binary", BODY, url], timeout=60, check=True)
    assert stored(parts) == [BODY]
