"""A receiver of webhooks: a real HTTP server on loopback that can fail, be slow, and be down."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook

SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="
OTHER_SECRET = "whsec_b3RoZXJzZWNyZXRvdGhlcnNlY3JldG90aGVyc2VjcmV0MDA="


@dataclass(frozen=True)
class Got:
    """One request. `status`: of its answer."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    status: int
    at: float = field(default_factory=time.monotonic)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def verified(self, secret: str = SECRET) -> Any:
        """The body, if its signature is good; raises otherwise."""
        return Webhook(secret).verify(self.body, dict(self.headers))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128


class Hook:
    """`answer`: asked for each request, returns the status, or (status, headers). `pause_seconds`: before that."""

    def __init__(self, answer: Callable[[], Any] = lambda: 204, *, pause_seconds: float = 0) -> None:
        self.answer = answer
        self.pause_seconds = pause_seconds
        self.got: list[Got] = []
        self._port = 0
        self._start()

    def _start(self) -> None:
        self._server = _Server(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/hook?token=secret-in-url"

    def down(self) -> None:
        """Stop listening. `up` listens again on the same port."""
        self._server.shutdown()
        self._server.server_close()

    def up(self) -> None:
        self._start()

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def taken(self) -> list[Got]:
        """The requests that were answered 2xx."""
        return [got for got in self.got if 200 <= got.status < 300]

    def names(self) -> dict[str, list[str]]:
        """{external id: event names in the order of their first arrival}."""
        first: dict[str, dict[str, str]] = defaultdict(dict)
        for got in self.taken:
            first[got.json.get("subject", "")].setdefault(got.json["id"], got.json["type"])
        return {subject: list(names.values()) for subject, names in first.items()}


def _handler(hook: Hook) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(hook.pause_seconds)
            answer = hook.answer()
            status, headers = answer if isinstance(answer, tuple) else (answer, {})
            lowered = {name.lower(): value for name, value in self.headers.items()}
            hook.got.append(Got(self.path, lowered, body, status))
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    return Handler
