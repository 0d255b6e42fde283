"""A store with faults: a proxy in front of SeaweedFS that changes requests and answers, or swallows them.

It signs every request again, so SeaweedFS accepts a request without a header or with a flipped byte.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from receiver.local_store.seaweed import Seaweed
from tests.loopback import HttpServer, QuietHandler

# Headers that the new signature and the new request replace.
HOP_HEADERS = {"host", "authorization", "x-amz-date", "x-amz-content-sha256", "content-length", "connection", "expect"}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def without(self, *names: str) -> Request:
        return replace(self, headers={name: value for name, value in self.headers.items() if name not in names})

    @property
    def puts_an_object(self) -> bool:
        """Whether the request puts an object of the test, and not one of the probe."""
        return self.method == "PUT" and "?" not in self.path and ".receiver-probe" not in self.path


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


Forward = Callable[[Request], Answer]
# The answer; None closes the connection without one.
Fault = Callable[[Request, Forward], Answer | None]


class FaultProxy(HttpServer):
    """Serves on loopback while it is entered. `fault` may be replaced at any time."""

    def __init__(self, store: Seaweed, fault: Fault = lambda request, forward: forward(request)) -> None:
        self.fault = fault
        self._store = store
        super().__init__(handler_for(self))

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def forward(self, request: Request) -> Answer:
        """Sign the request again, send it to SeaweedFS and return its answer."""
        signed = AWSRequest(request.method, self._store.endpoint_url + request.path, request.headers, request.body)
        S3SigV4Auth(Credentials(self._store.access_key, self._store.secret_key), "s3", "us-east-1").add_auth(signed)
        connection = http.client.HTTPConnection(urlsplit(self._store.endpoint_url).netloc, timeout=30)
        try:
            connection.request(request.method, request.path, request.body, dict(signed.headers.items()))
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())
        finally:
            connection.close()


def handler_for(proxy: FaultProxy) -> type[QuietHandler]:
    class Handler(QuietHandler):
        def handle_any(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
            answer = proxy.fault(Request(self.command, self.path, headers, self.read_body()), proxy.forward)
            if answer is None:
                self.close_connection = True
                return
            length = answer.headers.get("content-length", "0") if self.command == "HEAD" else None
            self.answer(answer.status, answer.headers, answer.body, length=length)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    return Handler
