"""Servers on loopback for tests: raw connections, scripts of raw answers, and HTTP handlers."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO, Self

# The bytes of an answer, or a function for the connection, which then ends.
Script = bytes | Callable[[socket.socket], None]


class Listener:
    """Serves each connection in a thread of its own, from the beginning until `close`. `connections`: how many."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self.connections = 0
        self._serve = serve
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self.connections += 1
                threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()

    def _serve_one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the other side has closed it
            self._serve(connection)


class ScriptedServer(Listener):
    """Answers each request with the bytes that `script_of` returns for its head. `requests`: head and body of each."""

    closes_unframed = False  # whether a script without a Content-Length ends its connection

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self._context = context
        super().__init__(self._answer_all)

    def script_of(self, head: bytes) -> Script:
        raise NotImplementedError

    def _answer_all(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        plain = self._context.wrap_socket(connection, server_side=True) if self._context else connection
        with plain, plain.makefile("rb") as file:
            while head := _head(file):
                script = self.script_of(head)
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
                self.requests.append(head if callable(script) else head + file.read(length))
                if callable(script):
                    script(plain)
                    return
                plain.sendall(script)
                if self.closes_unframed and b"Content-Length" not in script:
                    return


def _head(file: BinaryIO) -> bytes:
    """The next request's head with the empty line; nothing when the client has closed."""
    lines = [file.readline()]
    while lines[-1] not in (b"\r\n", b""):
        lines.append(file.readline())
    return b"".join(lines)


class HttpServer:
    """Serves HTTP while it is entered."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class QuietHandler(BaseHTTPRequestHandler):
    """Keeps connections and logs nothing."""

    protocol_version = "HTTP/1.1"

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, headers: Mapping[str, str], body: bytes, *, length: str | None = None) -> None:
        """`length`: the Content-Length in place of the body's."""
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)) if length is None else length)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
