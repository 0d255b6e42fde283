"""A lazy attribute that several threads need first is made once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from receiver.base.cached_property import cached_property
from receiver.events.http_post import Poster
from receiver.events.sqs import Sqs
from storage.fetch.addresses import AddressPolicy

THREADS = 8


class Slow:
    def __init__(self) -> None:
        self.made = 0

    @cached_property
    def part(self) -> object:
        self.made += 1
        time.sleep(0.05)
        return object()


def seen_by_threads(owner: Any, name: str) -> set[int]:
    """The ids of the values that threads get at the same time."""
    together = threading.Barrier(THREADS)

    def ask(_: int) -> Any:
        together.wait(10)
        return getattr(owner, name)

    with ThreadPoolExecutor(THREADS) as threads:
        return set(map(id, list(threads.map(ask, range(THREADS)))))


def test_first_threads_share_one_value() -> None:
    first, other = Slow(), Slow()
    assert len(seen_by_threads(first, "part")) == 1 == first.made
    assert other.part is other.part is not first.part


@pytest.mark.parametrize("sink", ["webhook", "sqs"])
def test_threads_of_a_sink_share_its_connections(sink: str, queues: Any) -> None:
    poster, queue = Poster(AddressPolicy(), connections=THREADS), Sqs("http://127.0.0.1:1/1/queue")
    owner, name = (poster, "_pool") if sink == "webhook" else (queue, "_client")
    assert len(seen_by_threads(owner, name)) == 1
    poster.close()
    queue.close()
