"""A forked child has connections of its own. On its parent's, each would get the other's answers."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
from pydantic import SecretStr

from receiver.providers.kling.client import Kling
from storage.bucket.bucket import Bucket
from storage.errors import FetchUnusable
from storage.fetch.addresses import AddressPolicy
from storage.fetch.client import Fetcher
from tests.loopback import HttpServer, QuietHandler


class Noting(QuietHandler):
    """A provider without tasks and objects that records the connection of each request in `ports`."""

    ports: list[int]

    def do_GET(self) -> None:
        self.ports.append(self.client_address[1])
        self.answer(404 if self.command == "HEAD" else 200, {}, b"" if self.command == "HEAD" else b'{"data": []}')

    do_HEAD = do_GET


def provider(port: int, ends: ExitStack) -> Callable[[], Any]:
    client = ends.enter_context(closing(Kling(base_url=f"http://127.0.0.1:{port}", api_key=SecretStr("a-key"))))
    return lambda: client.list_page(1, 1)


def store(port: int, ends: ExitStack) -> Callable[[], Any]:
    bucket = Bucket("pictures", endpoint_url=f"http://127.0.0.1:{port}", keys=("a-key", "a-secret"))
    ends.enter_context(closing(bucket._client()))
    return lambda: bucket.head("a-key")


def store_signed(port: int, ends: ExitStack) -> Callable[[], Any]:
    bucket = Bucket("pictures", endpoint_url=f"http://127.0.0.1:{port}", keys=("a-key", "a-secret"))
    ends.enter_context(closing(bucket._client()))
    return lambda: bucket._is_missing("a-key")


def file_host(port: int, ends: ExitStack) -> Callable[[], Any]:
    files = Fetcher(AddressPolicy(private_hosts=frozenset({("127.0.0.1", port)})), max_bytes=1_000)
    ends.enter_context(closing(files))

    def fetch() -> None:
        with suppress(FetchUnusable):
            files.fetch(f"http://127.0.0.1:{port}/", io.BytesIO())

    return fetch


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("asked", [provider, store, store_signed, file_host])
def test_a_forked_child_has_connections_of_its_own(asked: Callable[[int, ExitStack], Callable[[], Any]]) -> None:
    ports: list[int] = []
    with HttpServer(type("Handler", (Noting,), {"ports": ports})) as server, ExitStack() as ends:
        ask = asked(server.port, ends)
        ask()
        child = os.fork()
        if not child:
            with suppress(BaseException):
                ask()
            os._exit(0)
        os.waitpid(child, 0)
        ask()
    of_parent, of_child, again = ports
    assert of_parent == again != of_child


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_child_forks_as_often_as_it_likes() -> None:
    """Its second fork waited for ever for a lock that its first one had kept."""
    child = os.fork()
    if not child:
        signal.alarm(20)
        for _ in range(3):
            if not (grandchild := os.fork()):
                os._exit(0)
            os.waitpid(grandchild, 0)
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
