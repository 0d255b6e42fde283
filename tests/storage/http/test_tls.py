"""A host that sends messages of TLS itself without end. OpenSSL alone does not return from them."""

from __future__ import annotations

import hashlib
import hmac
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpcore
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.errors import FetchInterrupted
from storage.http.connection import GuardedStream, TransferDeadline
from tests.loopback import Listener
from tests.storage.fetch.test_client import tls as tls

FLOOD_SECONDS, ALLOWED_SECONDS = 8.0, 0.5
Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
# Records of HelloRequests, which a client ignores while it shakes hands.
HELLO_REQUESTS = b"\x16\x03\x03\x00\x04\x00\x00\x00\x00" * 10_000


def send_for_long(connection: socket.socket, blocks: Iterator[bytes]) -> None:
    ends = time.monotonic() + FLOOD_SECONDS
    with suppress(OSError):  # the client has left
        while time.monotonic() < ends:
            connection.sendall(next(blocks))


def connected(listener: Listener) -> GuardedStream:
    return GuardedStream(socket.create_connection(("127.0.0.1", listener.port)))


def test_handshake_without_an_end_is_given_up(tls: Contexts) -> None:
    listener = Listener(lambda connection: send_for_long(connection, iter(lambda: HELLO_REQUESTS, b"")))
    started = time.monotonic()
    with pytest.raises(httpcore.ConnectTimeout):
        connected(listener).start_tls(tls[1], "cdn.example.com", ALLOWED_SECONDS)
    assert time.monotonic() - started < FLOOD_SECONDS / 2
    listener.close()


def test_session_tickets_without_an_end_are_given_up(tls: Contexts, tmp_path: Path) -> None:
    listener = Listener(lambda connection: send_tickets(connection, tls[0], tmp_path / "secrets"))
    stream = connected(listener).start_tls(tls[1], "cdn.example.com", 10)
    started = time.monotonic()
    with TransferDeadline(60, ALLOWED_SECONDS, 0), pytest.raises((httpcore.ReadTimeout, FetchInterrupted)):
        stream.read(1_000)
    assert time.monotonic() - started < FLOOD_SECONDS / 2
    stream.close()
    listener.close()


def test_refusal_of_a_host_that_leaves_before_the_end_of_a_body_is_read(tls: Contexts) -> None:
    def refuse(connection: socket.socket) -> None:
        with tls[0].wrap_socket(connection, server_side=True) as secure:
            secure.recv(1_000)
            secure.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
            time.sleep(0.1)  # until it has arrived; the end of the block resets the connection, which was not read

    listener = Listener(refuse)
    stream = connected(listener).start_tls(tls[1], "cdn.example.com", 10)
    stream.write(b"PUT / HTTP/1.1\r\n\r\n")
    with pytest.raises(httpcore.WriteError):
        stream.write_body(memoryview(bytes(50_000_000)), 10)
    assert stream.read(1_000).startswith(b"HTTP/1.1 413")
    stream.close()
    listener.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_answer_that_comes_with_the_end_of_the_handshake_is_read(tls: Contexts, version: ssl.TLSVersion) -> None:
    """As from a host that is too busy for a request. It keeps the connection open."""

    def refuse(connection: socket.socket) -> None:
        server, sent = shaken(connection, tls[0])
        server.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
        connection.sendall(sent.read())
        time.sleep(FLOOD_SECONDS)

    listener = Listener(refuse)
    tls[1].maximum_version = version
    stream = connected(listener).start_tls(tls[1], "cdn.example.com", 10)
    tls[1].maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
    stream.write(b"GET / HTTP/1.1\r\n\r\n", 10)
    started = time.monotonic()
    assert stream.read(1_000, FLOOD_SECONDS).startswith(b"HTTP/1.1 503")
    assert time.monotonic() - started < FLOOD_SECONDS / 2
    stream.close()
    listener.close()


def test_falsified_record_behind_a_good_one_is_no_end_of_the_body(tls: Contexts) -> None:
    def falsify(connection: socket.socket) -> None:
        server, sent = shaken(connection, tls[0])
        server.write(b"HTTP/1.1 200 OK\r\n\r\nbegins")
        good = sent.read()
        server.write(b"goes on")
        connection.sendall(good + sent.read()[:-1] + b"\0")
        time.sleep(FLOOD_SECONDS)

    listener = Listener(falsify)
    stream = connected(listener).start_tls(tls[1], "cdn.example.com", 10)
    stream.write(b"GET / HTTP/1.1\r\n\r\n", 10)
    assert stream.read(1_000, 10).startswith(b"HTTP/1.1 200")
    assert stream.read(1_000, 10) == b"begins"
    stream.reusable = True
    assert stream.has_ended()
    with pytest.raises(httpcore.ReadError):
        stream.read(1_000, 10)
    stream.close()
    listener.close()


def shaken(connection: socket.socket, context: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.MemoryBIO]:
    """A server after its handshake, and what it sends next: first its last message of the handshake."""
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(received, sent, server_side=True)
    while True:
        try:
            server.do_handshake()
            return server, sent
        except ssl.SSLWantReadError:
            connection.sendall(sent.read())
            received.write(connection.recv(65_536))


def send_tickets(connection: socket.socket, context: ssl.SSLContext, secrets: Path) -> None:
    """Shake hands as a server of TLS 1.3 and send records full of session tickets, made with its traffic secret."""
    context.keylog_filename, context.num_tickets = str(secrets), 0
    shaken(connection, context)
    line = next(line for line in secrets.read_text().splitlines() if line.startswith("SERVER_TRAFFIC_SECRET_0"))
    send_for_long(connection, tickets(bytes.fromhex(line.split()[2])))


def tickets(secret: bytes) -> Iterator[bytes]:
    """Records of TLS_AES_256_GCM_SHA384 (RFC 8446 sections 4.6.1, 5.2 and 7.1), the first choice of OpenSSL."""

    def derived(name: bytes, length: int) -> bytes:
        info = struct.pack(">HB", length, 6 + len(name)) + b"tls13 " + name + b"\0\1"
        return hmac.digest(secret, info, hashlib.sha384)[:length]

    cipher, start = AESGCM(derived(b"key", 32)), int.from_bytes(derived(b"iv", 12), "big")
    ticket = b"\4\0\0\x0e" + struct.pack(">IIB", 7_200, 1, 0) + b"\0\1t\0\0"
    content = ticket * (16_000 // len(ticket)) + b"\x16"
    head = b"\x17\3\3" + struct.pack(">H", len(content) + 16)
    for number in range(2**20):
        yield head + cipher.encrypt((start ^ number).to_bytes(12, "big"), content, head)
