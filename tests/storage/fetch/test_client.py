"""Fetching, observed at the connect call, and over real loopback sockets for the behaviour of hosts.

The only doubles are the seams of `Fetcher`: a resolver with the test's answers, and a dial that records every attempt
and lets none leave loopback.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import ipaddress
import logging
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage.errors import (
    AddressRefused,
    AssetDamaged,
    DiskFull,
    FetchCut,
    FetchExpired,
    FetchInterrupted,
    FetchRefused,
    FetchTooLarge,
    FetchUnusable,
    NotAnAsset,
)
from storage.fetch import connection as wire
from storage.fetch.addresses import AddressPolicy
from storage.fetch.client import Fetched, Fetcher
from storage.fetch.connection import USER_AGENT
from storage.http.connection import HEAD_READ_BYTES, TransferDeadline
from storage.spool import spool, sweep
from tests.address_vectors import ALLOWED_ADDRESSES, ALLOWED_URLS, FORBIDDEN_ADDRESSES, MIXED_ANSWERS, REFUSED_URLS
from tests.harness import wait_until
from tests.loopback import Script, ScriptedServer

PUBLIC = "93.184.215.14"
MIB = 1024 * 1024


def png(body: bytes = b"\0" * 13) -> bytes:
    """A 2 × 2 picture whose data chunk holds `body`, which no test decodes."""
    header = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def answer(body: bytes = b"", *headers: str, status: str = "200 OK", length: int | None = -1) -> bytes:
    """A whole response. `length`: -1 = the true Content-Length, None = no header, else a false one."""
    declared = len(body) if length == -1 else length
    lines = [f"HTTP/1.1 {status}", *headers, *([] if declared is None else [f"Content-Length: {declared}"])]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def part(body: bytes, start: int, total: int, *headers: str) -> bytes:
    """A 206 response: `body` is the part from byte `start` of a file of `total` bytes."""
    content_range = f"Content-Range: bytes {start}-{start + len(body) - 1}/{total}"
    return answer(body, content_range, *headers, status="206 Partial Content")


GZIPPED = gzip.compress(png())


class FileHost(ScriptedServer):
    """An HTTP/1.1 server on loopback that sends exactly the script of a path and closes if the script is not framed."""

    closes_unframed = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.scripts: dict[str, Script] = {}
        super().__init__(context)
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def heads(self) -> list[str]:
        return [request.decode() for request in self.requests]

    def script_of(self, head: bytes) -> Script:
        return self.scripts[head.split(b" ")[1].decode()]


@pytest.fixture
def host() -> Iterator[FileHost]:
    server = FileHost()
    yield server
    server.close()


class Recorder:
    """The dial seam: records every attempt and connects only to loopback, or to port `reroute` there."""

    def __init__(self, reroute: int | None = None) -> None:
        self.attempts: list[tuple[str, str, int]] = []
        self._reroute = reroute

    def __call__(self, host: str, address: str, port: int, timeout: float | None) -> socket.socket:
        self.attempts.append((host, address, port))
        if self._reroute:
            return wire.dial(host, "127.0.0.1", self._reroute, timeout)
        if address != "127.0.0.1":
            raise ConnectionRefusedError(errno.ECONNREFUSED, "not dialled in tests")
        return wire.dial(host, address, port, timeout)


# Trusts no certificate, and saves reading 140 of them in each test.
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
opened: list[Fetcher] = []


def fetcher(*hosts: FileHost, answers: tuple[str, ...] = (PUBLIC,), **settings) -> Fetcher:
    """A Fetcher for which `hosts` are listed as private; closed at the end of the test."""
    policy = AddressPolicy(private_hosts=frozenset(("127.0.0.1", host.port) for host in hosts))
    timeouts = {"connect_timeout_seconds": 5, "read_timeout_seconds": 5}
    defaults = {"max_bytes": 8 * MIB, "resolve": lambda host, port: answers, "ssl_context": NO_CERTIFICATES} | timeouts
    opened.append(Fetcher(policy, **(defaults | settings)))
    return opened[-1]


@pytest.fixture(autouse=True)
def _close_fetchers() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


def fetch(host: FileHost, path: str = "/", *, accept_unverified: bool = False, **settings) -> Fetched:
    return fetcher(host, **settings).fetch(host.url + path, io.BytesIO(), accept_unverified=accept_unverified)


# Allowed addresses


# The tables are run in full against the policy (test_addresses.py). Here some rows of each go through the fetcher.


def ten_of(table: Sequence[Any]) -> Sequence[Any]:
    return table[:: max(1, len(table) // 10)]


def test_refused_url_is_never_dialled() -> None:
    recorder = Recorder()
    client = fetcher(dial=recorder)
    for url, reason in ten_of(REFUSED_URLS):
        with pytest.raises(FetchRefused, match=reason):
            client.fetch(url, io.BytesIO())
    assert recorder.attempts == []


def test_allowed_url_is_dialled_at_the_checked_address() -> None:
    recorder = Recorder()
    client = fetcher(dial=recorder)
    for url, name in ten_of(ALLOWED_URLS):
        with pytest.raises(FetchInterrupted, match="not dialled in tests"):
            client.fetch(url, io.BytesIO())
        is_literal = ":" in name or name == "8.8.8.8"
        assert recorder.attempts.pop() == (name, name if is_literal else PUBLIC, 443)
        assert recorder.attempts == []


def test_name_with_a_forbidden_answer_is_never_dialled() -> None:
    recorder = Recorder()
    for answers in [*((text,) for text in ten_of(FORBIDDEN_ADDRESSES)), *MIXED_ANSWERS]:
        with pytest.raises(AddressRefused) as refusal:
            fetcher(answers=answers, dial=recorder).fetch("https://cdn.example.com/a.png", io.BytesIO())
        assert (refusal.value.after, recorder.attempts) == (900, []), answers


def test_only_the_allowed_answers_are_dialled_in_their_order() -> None:
    for text in ten_of(ALLOWED_ADDRESSES):
        recorder = Recorder()
        with pytest.raises(FetchInterrupted):
            fetcher(answers=(text, PUBLIC), dial=recorder).fetch("https://cdn.example.com/a.png", io.BytesIO())
        expected = str(ipaddress.ip_address(text))
        assert recorder.attempts == [("cdn.example.com", expected, 443), ("cdn.example.com", PUBLIC, 443)]


def test_many_dead_addresses_of_one_kind_do_not_hide_the_other(host: FileHost) -> None:
    """A CDN's name has eight addresses of each kind, and a network's IPv6 may lead nowhere."""
    recorder, sixes = Recorder(), [f"2001:4860:4860::{number}" for number in range(1, 9)]
    with pytest.raises(FetchInterrupted):
        fetcher(answers=(*sixes, PUBLIC), dial=recorder).fetch("https://cdn.example.com/a.png", io.BytesIO())
    assert [address for _, address, _ in recorder.attempts] == [sixes[0], PUBLIC, *sixes[1:3]]


NOT_IN_A_HEADER = ("absolute", "control", "surrogate", "international")
REDIRECTABLE = [url for url, reason in REFUSED_URLS if reason not in NOT_IN_A_HEADER]


def test_redirect_to_a_refused_url_is_never_dialled(host: FileHost) -> None:
    recorder = Recorder()
    client = fetcher(host, dial=recorder)
    for number, url in enumerate(REDIRECTABLE):
        host.scripts[f"/{number}"] = answer(b"", f"Location: {url}", status="302 Found")
        with pytest.raises(FetchInterrupted, match=r"redirect from 127\.0\.0\.1 refused"):
            client.fetch(f"{host.url}/{number}", io.BytesIO())
    assert {attempt[1:] for attempt in recorder.attempts} == {("127.0.0.1", host.port)}


def test_rebinding_name_is_resolved_once_per_connection(host: FileHost) -> None:
    """The name resolves to a public address first and to loopback afterwards."""
    answers, asked, recorder = [PUBLIC], [], Recorder()

    def flipping(name: str, port: int) -> list[str]:
        asked.append(name)
        return [answers.pop() if answers else "127.0.0.1"]

    client = fetcher(resolve=flipping, dial=recorder)
    with pytest.raises(FetchInterrupted):
        client.fetch("https://rebind.example.com/a.png", io.BytesIO())
    assert (asked, recorder.attempts) == (["rebind.example.com"], [("rebind.example.com", PUBLIC, 443)])
    with pytest.raises(AddressRefused):
        client.fetch("https://rebind.example.com/a.png", io.BytesIO())
    assert len(recorder.attempts) == 1


class FlippingDns:
    """A DNS server on loopback whose A records for any name alternate between a public and a private address."""

    def __init__(self) -> None:
        self.queries = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(10)
        self._address = self._socket.getsockname()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._socket:
            for address in (PUBLIC, "127.0.0.1", PUBLIC, "169.254.169.254"):
                query, client = self._socket.recvfrom(512)
                self.queries += 1
                record = struct.pack(">HHHIH4s", 0xC00C, 1, 1, 0, 4, socket.inet_aton(address))
                self._socket.sendto(query[:2] + struct.pack(">HHHHH", 0x8180, 1, 1, 0, 0) + query[12:] + record, client)

    def resolve(self, name: str, port: int) -> list[str]:
        labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(10)
            client.sendto(
                struct.pack(">HHHHHH", 1, 256, 1, 0, 0, 0) + labels + b"\0\0\1\0\1", self._socket.getsockname()
            )
            return [socket.inet_ntoa(client.recv(512)[-4:])]


def test_alternating_dns_server_is_asked_once_per_connection() -> None:
    dns, recorder = FlippingDns(), Recorder()
    client = fetcher(resolve=dns.resolve, dial=recorder)
    for expected in (FetchInterrupted, AddressRefused, FetchInterrupted, AddressRefused):
        with pytest.raises(expected):
            client.fetch("https://rebind.example.com/a.png", io.BytesIO())
    assert dns.queries == 4
    assert recorder.attempts == [("rebind.example.com", PUBLIC, 443)] * 2


def test_unknown_name_is_retried() -> None:
    def unknown(name: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(FetchInterrupted, match="not resolved"):
        fetcher(resolve=unknown).fetch("https://nowhere.example.com/a.png", io.BytesIO())


def test_silent_name_server_holds_no_thread_beyond_the_timeout() -> None:
    silence = threading.Event()

    def silent(name: str, port: int) -> list[str]:
        silence.wait(30)
        return [PUBLIC]

    client = fetcher(resolve=silent, connect_timeout_seconds=0.1)
    started = time.monotonic()
    with ThreadPoolExecutor(16) as threads:
        tries = [threads.submit(client.fetch, f"https://{n}.example.com/", io.BytesIO()) for n in range(80)]
        errors = [str(one.exception(20)) for one in tries]
    assert time.monotonic() - started < 10
    stuck = [thread for thread in threading.enumerate() if thread.name == "lookup"]
    silence.set()
    assert len(stuck) == wire.MAX_LOOKUPS == sum("no answer in time" in error for error in errors)
    assert sum("64 lookups are unanswered" in error for error in errors) == 80 - wire.MAX_LOOKUPS
    wait_until(lambda: not any(thread.is_alive() for thread in stuck))
    with pytest.raises(FetchInterrupted, match="not dialled in tests"):
        fetcher(resolve=silent, dial=Recorder()).fetch("https://cdn.example.com/", io.BytesIO())


def test_proxy_and_certificate_variables_are_ignored(host: FileHost, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    host.scripts["/"] = answer(png())
    assert fetch(host).verified


# TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server, client) contexts around one certificate for cdn.example.com."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test"
    names = ["-addext", "subjectAltName=DNS:cdn.example.com", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *request.split(), *names], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


@pytest.fixture
def secure(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[tuple[FileHost, Fetcher, Recorder]]:
    server = FileHost(tls[0])
    recorder = Recorder(reroute=server.port)
    client = fetcher(dial=recorder, ssl_context=tls[1])
    yield server, client, recorder
    server.close()


def test_host_header_and_certificate_check_use_the_name(secure: tuple[FileHost, Fetcher, Recorder]) -> None:
    server, client, recorder = secure
    body = png(os.urandom(MIB))
    server.scripts["/a.png?b=c"] = answer(body)
    for _ in range(2):
        sink = io.BytesIO()
        assert client.fetch("https://CDN.example.com./a.png?b=c", sink).host == "cdn.example.com"
        assert sink.read() == body
    assert recorder.attempts == [("cdn.example.com", PUBLIC, 443)]
    assert "\r\nHost: cdn.example.com\r\n" in server.heads[0]


def test_certificate_for_another_name_is_refused(secure: tuple[FileHost, Fetcher, Recorder]) -> None:
    with pytest.raises(FetchInterrupted, match="TLS"):
        secure[1].fetch("https://other.example.com/a.png", io.BytesIO())
    assert secure[0].heads == []


def test_redirect_from_https_to_http_is_refused(
    secure: tuple[FileHost, Fetcher, Recorder], host: FileHost, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    secure[0].scripts["/"] = answer(b"", f"Location: {host.url}/", status="302 Found")
    recorder = Recorder(reroute=secure[0].port)
    client = fetcher(host, dial=recorder, ssl_context=tls[1])
    with pytest.raises(FetchInterrupted, match="from https to http"):
        client.fetch("https://cdn.example.com/", io.BytesIO())
    assert host.connections == 0


# Received files


def test_fetched_file_is_whole_and_described(host: FileHost) -> None:
    body = png(os.urandom(3 * MIB))
    host.scripts["/a"] = answer(body, "ETag: " + "e" * 500, "Content-Type: text/html", "Set-Cookie: a=b")
    sink = io.BytesIO()
    fetched = fetcher(host).fetch(f"{host.url}/a", sink)
    assert sink.read() == body
    assert (fetched.size, fetched.sha256) == (len(body), hashlib.sha256(body).hexdigest())
    assert (fetched.media_type, fetched.extension, fetched.verified) == ("image/png", "png", True)
    assert (fetched.width, fetched.height, fetched.host) == (2, 2, "127.0.0.1")
    assert fetched.headers == {"content-length": str(len(body)), "content-type": "text/html", "etag": "e" * 256}


def test_request_has_only_four_headers_and_reuses_the_connection(host: FileHost) -> None:
    host.scripts["/a?b=%20c"] = answer(png(), "Set-Cookie: session=1")
    client = fetcher(host)
    for _ in range(2):
        client.fetch(f"{host.url}/a?b=%20c#fragment", io.BytesIO())
    expected = f"Host: 127.0.0.1:{host.port}\r\nUser-Agent: {USER_AGENT}\r\nAccept: */*\r\nAccept-Encoding: identity"
    assert host.heads == [f"GET /a?b=%20c HTTP/1.1\r\n{expected}\r\n\r\n"] * 2
    assert host.connections == 1


def test_connection_that_the_host_has_closed_is_replaced(host: FileHost) -> None:
    host.scripts["/"] = _then_close(answer(png()))
    client = fetcher(host)
    assert client.fetch(host.url, io.BytesIO()).verified
    time.sleep(0.1)
    assert client.fetch(host.url, io.BytesIO()).verified
    assert host.connections == 2


def test_kept_connection_that_ends_at_the_next_request_is_replaced(host: FileHost) -> None:
    def answer_one_and_end_at_the_next(connection: socket.socket) -> None:
        connection.sendall(answer(png()))
        connection.recv(65_536)

    host.scripts["/"] = answer_one_and_end_at_the_next
    client = fetcher(host)
    assert [client.fetch(host.url, io.BytesIO()).verified for _ in range(2)] == [True, True]
    assert host.connections == 2


def test_file_that_is_cut_after_a_kept_connection_was_reset_counts_as_cut(host: FileHost) -> None:
    def reset_then_cut(connection: socket.socket) -> None:
        if host.connections > 1:
            connection.sendall(answer(png())[:-10])
            return
        connection.sendall(answer(png()))
        connection.recv(65_536)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    host.scripts["/"] = reset_then_cut
    client = fetcher(host)
    client.fetch(host.url, io.BytesIO())
    with pytest.raises(FetchCut):
        client.fetch(host.url, io.BytesIO())


@pytest.mark.parametrize("head", ["HTTP/1.1 200 OK\r\nConnection: Close", "HTTP/1.0 200 OK"])
def test_connection_that_the_host_will_close_is_not_kept(host: FileHost, head: str) -> None:
    body = answer(png()).replace(b"HTTP/1.1 200 OK", head.encode())
    host.scripts["/"] = body
    client = fetcher(host)
    for _ in range(2):
        client.fetch(host.url, io.BytesIO())
    assert host.connections == 2


def test_kept_connections_are_bounded_and_end_with_the_fetcher(host: FileHost) -> None:
    other = FileHost()
    host.scripts["/"] = other.scripts["/"] = answer(png())
    client = fetcher(host, other, connections=1)
    for each in (host, other, host):
        client.fetch(each.url, io.BytesIO())
    assert (host.connections, other.connections) == (1, 1)  # the second one was closed
    client.close()
    for _ in range(2):  # a request of another thread that ends after the close leaves no connection behind
        client.fetch(host.url, io.BytesIO())
    assert host.connections == 3
    other.close()


def test_space_in_a_url_is_sent_as_percent_20(host: FileHost) -> None:
    moved = answer(b"", "Location:  my new image.png?sig=a+b%2F~ c \t", status="302 Found")
    host.scripts |= {"/my%20image.png?sig=a%20b&c=%2f+": moved, "/my%20new%20image.png?sig=a+b%2F~%20c": answer(png())}
    assert fetch(host, "/my image.png?sig=a b&c=%2f+ \r\n").verified


def test_control_character_in_a_location_is_refused(host: FileHost) -> None:
    host.scripts["/"] = answer(b"", "Location: /a\tb.png", status="302 Found")
    with pytest.raises(FetchInterrupted, match=r"redirect from .* refused: URL holds a control character"):
        fetch(host)


def test_chunked_and_unframed_bodies_are_received_whole(host: FileHost) -> None:
    chunked = b"".join(b"%x;x=y\r\n%c\r\n" % (1, byte) for byte in png()) + b"0\r\nTrailer: x\r\n\r\n"
    host.scripts["/chunked"] = answer(chunked, "Transfer-Encoding: chunked", length=None)
    host.scripts["/unframed"] = answer(png(), length=None)
    host.scripts["/hints"] = b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" + answer(png())
    for path in host.scripts:
        assert fetch(host, path).size == len(png())


def test_threads_share_the_connections(host: FileHost) -> None:
    bodies = {f"/{n}": png(os.urandom(50_000)) for n in range(8)}
    host.scripts |= {path: answer(body) for path, body in bodies.items()}
    client = fetcher(host, connections=8)

    def one(path: str) -> bool:
        return client.fetch(host.url + path, io.BytesIO()).sha256 == hashlib.sha256(bodies[path]).hexdigest()

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, [*bodies] * 8))
    assert host.connections <= 8


# Hostile and slow hosts


@pytest.mark.parametrize(
    ("coding", "start", "piece"),
    [
        ("Transfer-Encoding: chunked", b"", b"1\r\nx\r\n"),
        ("Content-Encoding: gzip", GZIPPED[:10], bytes.fromhex("000000ffff")),
    ],
)
def test_body_of_very_many_pieces_is_refused(host: FileHost, coding: str, start: bytes, piece: bytes) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(answer(start, coding, length=None))
        while True:
            connection.sendall(piece * 10_000)

    host.scripts["/a.png"] = endless
    with pytest.raises(FetchUnusable, match="too many pieces"):
        fetch(host, "/a.png", total_seconds=5)


@pytest.mark.parametrize(
    ("script", "error", "reason"),
    [
        (answer(png(), length=10_000), FetchCut, "broke off after"),
        (answer(png() + b"HTTP/1.1 200 OK\r\n", length=len(png())), FetchUnusable, "more bytes than"),
        (answer(b"\x0b\x02" + png(), "Content-Encoding: br"), FetchUnusable, "Content-Encoding"),
        (answer(GZIPPED[:-1], "Content-Encoding: gzip"), FetchUnusable, "coding is cut short"),
        (answer(GZIPPED[:-1] + b"x", "Content-Encoding: gzip"), FetchUnusable, "coding is broken"),
        (answer(GZIPPED + b"<script>", "Content-Encoding: gzip"), FetchUnusable, "coding is broken"),
        (answer(GZIPPED + GZIPPED[:-1], "Content-Encoding: gzip"), FetchUnusable, "coding is cut short"),
        (answer(gzip.compress(bytes(99)) * 4_201, "Content-Encoding: gzip"), FetchUnusable, "more than 4200 members"),
        (answer(gzip.compress(bytes(9 * MIB)), "Content-Encoding: gzip"), FetchTooLarge, "more than"),
        (answer(gzip.compress(b"<html>", mtime=0), "Content-Encoding: gzip"), NotAnAsset, "html"),
        (answer(png(), length=9 * MIB), FetchTooLarge, "announced"),
        (answer(png(), "Transfer-Encoding: gzip", length=None), FetchUnusable, "not HTTP"),
        (answer(b"ffffffffffffffff\r\n", "Transfer-Encoding: chunked", length=None), FetchInterrupted, "broke off"),
        (answer(b"-1\r\n", "Transfer-Encoding: chunked", length=None), FetchUnusable, "not HTTP"),
        (answer(png(), "Content-Length: 1"), FetchUnusable, "not HTTP"),
        (answer(png(), length=-2), FetchUnusable, "not HTTP"),
        (b"", FetchInterrupted, "broke off"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", FetchUnusable, "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, FetchUnusable, "not HTTP"),
        (answer(png(), status="206 Partial Content"), FetchUnusable, "206"),
        (part(png(), 1, 99), FetchUnusable, "206"),
        (part(png(), 0, 99), FetchUnusable, "206"),
        (answer(png(), "Content-Range: bytes 0-9/*", status="206 Partial Content"), FetchUnusable, "206"),
        (b"HTTP/1.1 200 OK\r\nContent-Length : 9\r\n\r\n" + png(), FetchUnusable, "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: a\rContent-Length: 9\r\n\r\n" + png(), FetchUnusable, "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX Transfer-Encoding: chunked\r\n\r\n" + png(), FetchUnusable, "not HTTP"),
        (answer(b"", length=None, status="302 Found"), FetchUnusable, "without a Location"),
        (answer(b""), NotAnAsset, "empty"),
        (answer(b"<!DOCTYPE html><title>Sorry</title>"), NotAnAsset, "html"),
        (answer(png()[:-5]), AssetDamaged, "cut short"),
        (answer(png()[:-5], length=None), AssetDamaged, "cut short"),
        (answer(png() + b"<script>"), AssetDamaged, "8 bytes after the end hold markup"),
    ],
)
def test_hostile_response_is_refused(host: FileHost, script: bytes, error: type[Exception], reason: str) -> None:
    host.scripts["/"] = (
        script if b"Content-Length" in script and error not in (FetchInterrupted, FetchCut) else _then_close(script)
    )
    with pytest.raises(error, match=reason) as raised:
        fetch(host)
    assert raised.type is error  # a broken connection is tried again sooner than an answer that is no file


def _then_close(script: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(script)


def test_bytes_after_a_response_are_not_read_as_the_next_one(host: FileHost) -> None:
    other = answer(png(b"other"))
    host.scripts["/long"] = answer(png() + other, length=len(png()))
    host.scripts["/next"] = answer(png(b"next!"))
    client, sink = fetcher(host), io.BytesIO()
    with pytest.raises(FetchInterrupted):
        client.fetch(f"{host.url}/long", io.BytesIO())
    client.fetch(f"{host.url}/next", sink)
    assert sink.read() == png(b"next!")
    assert host.connections == 2


def test_bytes_that_tls_holds_after_a_response_are_not_the_next_one(
    secure: tuple[FileHost, Fetcher, Recorder],
) -> None:
    """A head and a body that end with a read leave the rest of their TLS record where the socket does not show it."""
    server, client, _ = secure
    filler = 8_000 + HEAD_READ_BYTES - len(answer(png(bytes(8_000))))
    whole = answer(png(bytes(filler)))
    assert len(whole) == HEAD_READ_BYTES
    server.scripts["/long"] = whole + answer(png(b"forged"))
    with pytest.raises(FetchUnusable, match="more bytes"):
        client.fetch("https://cdn.example.com/long", io.BytesIO())
    server.scripts["/next"], sink = answer(png(b"next!")), io.BytesIO()
    client.fetch("https://cdn.example.com/next", sink)
    assert sink.read() == png(b"next!")


def test_endless_stream_stops_at_the_size_limit_in_constant_memory(host: FileHost) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(answer(png()[:50], length=None))
        while True:
            connection.sendall(b"\0" * MIB)

    host.scripts["/"] = endless
    client = fetcher(host, max_bytes=96 * MIB)
    peaks = []
    for _ in range(3):  # threads that earlier tests left are traced, too
        tracemalloc.start()
        with spool(None) as sink, pytest.raises(FetchTooLarge):
            client.fetch(host.url, sink)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 24 * MIB


HASTY_HEAD = {"connect_timeout_seconds": 0.2, "read_timeout_seconds": 0.2}


def _dripping(first: bytes, byte: bytes = b"\0") -> Callable[[socket.socket], None]:
    def drip(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            time.sleep(0.02)
            connection.sendall(byte)

    return drip


@pytest.mark.parametrize(
    ("script", "reason", "bounds"),
    [
        (_dripping(answer(png(), length=None)), "longer than 0.6 s", {"total_seconds": 0.6}),
        # A drip that a busy machine delays looks like silence.
        (_dripping(b"HTTP/1.1 200 OK\r\nX: "), "no complete response head within 0.4 s|timed out", HASTY_HEAD),
        (lambda connection: connection.recv(1), "timed out|no complete response head", HASTY_HEAD),
        (
            lambda connection: (connection.sendall(answer(b"", length=9)), connection.recv(1)),
            "timed out",
            {"read_timeout_seconds": 0.2},
        ),
    ],
    ids=["body drips", "head drips", "silence", "silence in the body"],
)
def test_slow_host_is_given_up_in_time(host: FileHost, script: Script, reason: str, bounds: dict[str, float]) -> None:
    host.scripts["/"] = script
    with pytest.raises(FetchInterrupted, match=reason):
        fetch(host, **bounds)


def test_speed_counts_only_the_time_spent_waiting() -> None:
    now = [0.0]
    pace = TransferDeadline(600, head_seconds=40, min_bytes_per_second=4_096, clock=lambda: now[0])
    pace.moved(1, waited=30)  # until the head is complete, only the head deadline counts
    pace.expect_body()
    for _ in range(40):
        pace.moved(MIB, waited=0.25)
    with pytest.raises(FetchInterrupted, match="slower than 4096 bytes a second"):
        pace.moved(1, waited=10)
    now[0] = 600
    with pytest.raises(FetchInterrupted, match="longer than 600 s"):
        pace.allow(30)


# Status codes and redirects


def test_expired_url_raises_fetch_expired(host: FileHost) -> None:
    for status in (401, 403, 404, 410):
        host.scripts["/"] = answer(b"<Error/>", status=f"{status} Gone")
        with pytest.raises(FetchExpired, match=str(status)):
            fetch(host)


def test_other_statuses_are_retried(host: FileHost) -> None:
    for status in (400, 402, 405, 408, 418, 425, 429, 451, 500, 502, 503, 504, 599, 204, 300, 304):
        host.scripts["/"] = answer(b"", "Retry-After: 17", status=f"{status} Later")
        with pytest.raises(FetchInterrupted, match=str(status)) as interruption:
            fetch(host)
        assert interruption.value.after == 17


def test_three_redirects_are_followed_but_not_a_fourth(host: FileHost) -> None:
    for number, status in enumerate((301, 302, 303, 307)):
        host.scripts[f"/{number}"] = answer(b"", f"Location: {number + 1}", status=f"{status} Moved")
    host.scripts["/4"] = answer(png())
    assert fetch(host, "/1").verified
    with pytest.raises(FetchInterrupted, match="more than 3 redirects"):
        fetch(host, "/0")


def test_url_signatures_are_in_no_log_and_no_error(host: FileHost, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    location = f"Location: {host.url}/end?Signature=canary"
    host.scripts["/?Signature=canary"] = answer(b"", location, status="302 Found")
    host.scripts["/end?Signature=canary"] = answer(b"canary\r\n", status="403 Forbidden")
    with pytest.raises(FetchExpired) as expiry:
        fetch(host, "/?Signature=canary")
    assert "canary" not in caplog.text + repr(expiry.value)


# Damaged files and the disk


def test_accept_unverified_keeps_a_damaged_file_as_unverified(host: FileHost) -> None:
    host.scripts["/"] = answer(png()[:-5])
    fetched = fetch(host, accept_unverified=True)
    assert (fetched.media_type, fetched.extension, fetched.verified) == ("image/png", "png", False)


def test_accept_unverified_still_refuses_a_page(host: FileHost) -> None:
    host.scripts["/"] = answer(b"<html>")
    with pytest.raises(NotAnAsset):
        fetch(host, accept_unverified=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_raises_disk_full(host: FileHost) -> None:
    host.scripts["/"] = answer(png())
    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(DiskFull):
        fetcher(host).fetch(host.url, full)


def test_spool_file_is_in_its_folder_and_removed_on_close(tmp_path: Path) -> None:
    with spool(tmp_path, memory_bytes=10) as file:
        file.write(b"x" * 100)
        file.seek(0)
        assert file.read() == b"x" * 100
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_stale_spool_files_and_nothing_else(tmp_path: Path) -> None:
    stale, fresh, foreign = (tmp_path / name for name in ("receiver-spool-a", "receiver-spool-b", "holiday.jpg"))
    for path in (stale, fresh, foreign):
        path.touch()
    for path in (stale, foreign):
        os.utime(path, (0, 0))
    (tmp_path / "receiver-spool-link").symlink_to(foreign)
    assert sweep(tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"receiver-spool-b", "holiday.jpg", "receiver-spool-link"}
