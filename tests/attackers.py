"""Attackers, by what each knows. One is a process of its own, started by `tests/attacks.py`."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from tests.bench.slow_connections import HOST, dawdle

# The attacker's key.
KEY = "a-key-of-an-attacker-1234567890"
CREATES = "/kling/v1/images/omni-image"
PLAIN = {"model_name": "kling-image-o1", "prompt": "a boat", "n": 1}
CREATE_SECONDS = 0.2
# A neighbour works in pieces like those of an attacker: some sends and answers, then a wait.
PIECE_SECONDS = 0.001


@dataclass(frozen=True)
class Target:
    """What the attackers know. `task`, `account`: paths of callback URLs. `asset`: path of an asset link."""

    port: int
    task: str
    account: str
    asset: str
    slow_hook: str
    hook: str
    until: float

    @property
    def is_open(self) -> bool:
        return time.monotonic() < self.until


Attack = Callable[[Target], Awaitable[object]]


async def many(target: Target, count: int, once: Callable[[int], Awaitable[object]]) -> None:
    """`count` attackers side by side. Each continues after any defence."""
    numbers = itertools.count()

    async def one() -> None:
        while target.is_open:
            with suppress(OSError, EOFError, TimeoutError, httpx.HTTPError):
                async with asyncio.timeout(max(target.until - time.monotonic(), 0.01)):
                    await once(next(numbers))
            await asyncio.sleep(0.01)

    await asyncio.gather(*(one() for _ in range(count)))


def request(method: str, path: str, body: bytes = b"", *, key: str = "", length: int | None = None) -> bytes:
    sign = f"Authorization: Bearer {key}\r\n" if key else ""
    size = len(body) if length is None else length
    return f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\n{sign}Content-Length: {size}\r\n\r\n".encode() + body


async def say(target: Target, words: bytes, *, reads: bool = True, holds: bool = False) -> bytes:
    """Send over a new connection. `holds`: keep it open until the end, or until it is closed."""
    reader, writer = await asyncio.open_connection(HOST, target.port)
    try:
        writer.write(words)
        await writer.drain()
        if holds and not reads:
            await asyncio.sleep(max(target.until - time.monotonic(), 0))
        return await reader.read(-1 if holds else 65_536)
    finally:
        writer.transport.abort()


async def pipelining(target: Target) -> None:
    flood = request("GET", "/healthz") * 2_000
    await many(target, 20, lambda _: say(target, flood))


async def pipelining_and_leaving(target: Target) -> None:
    """Wait for no answer, so that a late one slows nothing down."""
    flood = request("GET", "/healthz") * 2_000

    async def leave(_: int) -> None:
        _, writer = await asyncio.open_connection(HOST, target.port)
        writer.write(flood)
        await asyncio.sleep(0.002)
        writer.transport.abort()

    await many(target, 20, leave)


async def keyless_requests(target: Target) -> None:
    """As many requests as are answered, over twenty connections."""

    async def repeat(_: int) -> None:
        reader, writer = await asyncio.open_connection(HOST, target.port)
        try:
            while target.is_open:
                writer.write(request("GET", "/healthz"))
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
        finally:
            writer.transport.abort()

    await many(target, 20, repeat)


async def unread_answers(target: Target) -> None:
    flood = request("GET", "/healthz") * 8
    await many(target, 500, lambda _: say(target, flood, reads=False, holds=True))


async def slow_requests(target: Target) -> None:
    await dawdle(target.port, 500, target.until)


def forged(number: int) -> bytes:
    images = [{"index": 0, "url": f"https://p9-fdl.klingai.com/{number}.png"}]
    told = {"task_id": "901", "task_status": "succeed", "task_result": {"images": images}}
    return json.dumps(told | {"updated_at": number}).encode()


async def forged_reports(target: Target) -> None:
    await many(target, 8, lambda number: say(target, request("POST", target.task, forged(number))))


async def cut_bodies(target: Target) -> None:
    """Send bodies that lack their end. A refused one is not repeated at once: their number is measured, not the
    bandwidth.
    """
    body = request("POST", target.task, b" " * 250_000, length=262_000)

    async def keep_back(_: int) -> None:
        try:
            await say(target, body, holds=True)
        finally:
            await asyncio.sleep(1)

    await many(target, 200, keep_back)


async def account_deliveries(target: Target) -> None:
    """Every second body costs the parser as much as the longest, because it is full of numbers."""
    paddings = b" " * 60_000, b',"n":[1' + b",1" * 30_000 + b"]}"

    def body(number: int) -> bytes:
        return forged(number) + paddings[0] if number % 2 else forged(number)[:-1] + paddings[1]

    await many(target, 8, lambda number: say(target, request("POST", target.account, body(number))))


async def unread_pictures(target: Target) -> None:
    await many(target, 64, lambda _: say(target, request("GET", target.asset), reads=False, holds=True))


async def nested_creates(target: Target) -> None:
    body = b'{"prompt":' + b"[[],[]," * 1_500_000
    await many(target, 2, lambda _: say(target, request("POST", CREATES, body, key=KEY)))


async def held_creates(target: Target) -> None:
    await many(target, 70, lambda _: say(target, request("POST", CREATES, b"{", key=KEY, length=9_000), holds=True))


async def held_streams(target: Target) -> None:
    await many(target, 70, lambda _: say(target, request("GET", "/events", key=KEY), reads=False, holds=True))


async def slow_callback_host(target: Target) -> None:
    """Ten creates a second cause thirty callbacks, which occupy the callback threads but not the processors."""
    await called_back(target, target.slow_hook)


async def quick_callback_host(target: Target) -> None:
    """The same creates without an attack: their cost with a quick host."""
    await called_back(target, target.hook)


async def called_back(target: Target, url: str) -> None:
    body = json.dumps(PLAIN | {"callback_url": url}).encode()

    async def create(_: int) -> None:
        await say(target, request("POST", CREATES, body, key=KEY))
        await asyncio.sleep(CREATE_SECONDS)

    await many(target, 2, create)


# Attacks by what the attacker knows.
ATTACKS: dict[str, tuple[str, Attack]] = {
    "pipelined requests": ("nothing", pipelining),
    "pipelined requests, then leaving at once": ("nothing", pipelining_and_leaving),
    "requests without a key": ("nothing", keyless_requests),
    "answers that nobody reads": ("nothing", unread_answers),
    "requests that dribble": ("nothing", slow_requests),
    "forged reports of one task": ("one callback URL", forged_reports),
    "bodies that lack their end": ("one callback URL", cut_bodies),
    "deliveries that match no task": ("the account URL", account_deliveries),
    "a picture that nobody reads": ("one asset link", unread_pictures),
    "10 MB of nested JSON": ("one client key", nested_creates),
    "creates of a head and a byte": ("one client key", held_creates),
    "streams of events": ("one client key", held_streams),
    "a slow host to call back": ("one client key", slow_callback_host),
}
# Measurements without an attack, which show the effect of its load alone.
LOADS: dict[str, tuple[str, Attack]] = {
    "a slow host to call back": ("the same creates, a quick host", quick_callback_host),
}


def be_a_neighbour(target: Target, share: float) -> None:
    """Take this share of a processor, and send nothing."""
    while target.is_open:
        end = time.thread_time() + PIECE_SECONDS
        while time.thread_time() < end:
            pass
        time.sleep(PIECE_SECONDS * max(0, 1 / share - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attack", help="the name of its function")
    parser.add_argument("--share", type=float, help="of a processor, for a neighbour that attacks nobody")
    parser.add_argument("--target", type=json.loads, required=True)
    given: Any = parser.parse_args()
    target = Target(**given.target)
    if given.attack:
        asyncio.run(globals()[given.attack](target))
    else:
        be_a_neighbour(target, given.share)
    signal.pause()  # the starter reads the processor time, then ends it


if __name__ == "__main__":
    main()
