"""An HTTP proxy on loopback, as a company has one: CONNECT, and requests in absolute form. It keeps requests."""

from __future__ import annotations

import http.client
import select
import socket
from urllib.parse import urlsplit

from tests.loopback import HttpServer, QuietHandler


class ForwardProxy(HttpServer):
    """Serves while it is entered. `hosts`: {HOST:PORT: (address, port)} of names that it knows. `refuses`: a status."""

    def __init__(self, hosts: dict[str, tuple[str, int]] | None = None, refuses: int = 0) -> None:
        self.hosts, self.refuses = hosts or {}, refuses
        self.asked: list[tuple[str, str, str]] = []  # method, target, Proxy-Authorization
        super().__init__(handler_for(self))

    @property
    def url(self) -> str:
        return f"http://us%C3%A9r:hush@127.0.0.1:{self.port}"


def handler_for(proxy: ForwardProxy) -> type[QuietHandler]:
    class Handler(QuietHandler):
        def is_refused(self) -> bool:
            proxy.asked.append((self.command, self.path, self.headers.get("Proxy-Authorization", "")))
            if proxy.refuses:
                self.send_error(proxy.refuses)
            return bool(proxy.refuses)

        def do_CONNECT(self) -> None:
            host, _, port = self.path.rpartition(":")
            self.close_connection = True
            if self.is_refused():
                return
            with socket.create_connection(proxy.hosts.get(self.path, (host, int(port))), 10) as onward:
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n")
                relay(self.connection, onward)

        def forward(self) -> None:
            body = self.read_body()
            if self.is_refused():
                return
            parts = urlsplit(self.path)
            onward = http.client.HTTPConnection(parts.netloc, timeout=10)
            headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
            onward.request(self.command, f"{parts.path}?{parts.query}", body, headers)
            response = onward.getresponse()
            self.answer(response.status, dict(response.getheaders()), response.read())
            onward.close()

        do_GET = do_POST = forward

    return Handler


def relay(one: socket.socket, other: socket.socket) -> None:
    """Both ways until either side ends."""
    while ready := select.select([one, other], [], [], 10)[0]:
        for source in ready:
            content = source.recv(65_536)
            if not content:
                return
            (other if source is one else one).sendall(content)
