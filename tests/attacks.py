"""Attacks on the running product beside honest traffic: how much one attacker delays everybody else.

Real processes on loopback: store, stand-in provider, `receiver serve` and a worker. A separate process attacks while
deliveries arrive at a steady rate and another client's creates are called back. Each attack is bounded in time.

    .venv/bin/python -m tests.attacks --seconds 10 --rate 50
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from receiver.sandbox import Knobs
from tests.bench.slow_connections import HOST, acknowledge, dawdle, p99
from tests.forked import Forked
from tests.harness import wait_until
from tests.running_product import Scene
from tests.webhook_receiver import SECRET, Hook

# The attacker's key and another client's.
KEY, OTHER_KEY = "a-key-of-an-attacker-1234567890", "a-key-of-another-client-1234567890"
CREATES = "/kling/v1/images/omni-image"
PLAIN = {"model_name": "kling-image-o1", "prompt": "a boat", "n": 1}
MOST_TIMES = 2.0
# A create is called back some 0.5 s later. A smaller additional delay is not noticeable.
FREE_SECONDS = 1.0
CREATE_SECONDS = 0.2
SLOW_HOST_SECONDS = 20.0
PATIENCE_SECONDS = 60
# The time an attack has to begin, or half of a short measurement.
LEAD_SECONDS = 1.5


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


@dataclass(frozen=True)
class Honest:
    """Seconds of acknowledgements, and of another client's creates until the callback of their success."""

    acks: list[float]
    callbacks: list[float]
    missing: int

    @property
    def words(self) -> str:
        slowest = max(self.callbacks, default=float("nan"))
        middle = statistics.median(self.callbacks or [float("nan")])
        return f"acks p99 {p99(self.acks) * 1e3:6.1f} ms, callbacks p50 {middle:5.2f} s, worst {slowest:5.2f} s"


class Stage(Scene):
    """The product, the webhook receivers of two clients, and what the attackers know."""

    def _build(self) -> None:
        self.start_servers("sqlite", Knobs(submitted_seconds=0.1, processing_seconds=0.1, picture_bytes=2_000_000))
        self.know_the_store()
        self.hook = self.stack.enter_context(Hook())
        self.slow_hook = self.stack.enter_context(Hook(pause_seconds=SLOW_HOST_SECONDS))
        self.start_processes(
            1,
            RECEIVER_API_KEYS=f"{KEY},{OTHER_KEY}",
            RECEIVER_GATEWAY_RESULTS="provider",
            RECEIVER_PRIVATE_CALLBACK_HOSTS=f"{self.hook.host},{self.slow_hook.host}",
            RECEIVER_EVENT_SECRETS=SECRET,
        )
        self.port = self.parts.settings.port
        self.client = self.stack.enter_context(
            httpx.Client(
                base_url=f"http://{HOST}:{self.port}",
                headers={"Authorization": f"Bearer {OTHER_KEY}"},
                timeout=PATIENCE_SECONDS,
                trust_env=False,
            )
        )

    def create(self) -> str:
        answer = self.client.post(CREATES, json=PLAIN | {"callback_url": f"{self.hook.url}"})
        return str(answer.raise_for_status().json()["data"]["task_id"])

    def link(self) -> str:
        """The path of an asset link, once its picture is archived."""
        name = self.create()

        def path() -> str | None:
            images = self.client.get(f"{CREATES}/{name}").json()["data"].get("task_result", {}).get("images", [])
            return next((url.partition(str(self.port))[2] for one in images if "/assets/" in (url := one["url"])), None)

        return str(wait_until(path, seconds=PATIENCE_SECONDS, every=0.2))

    def target(self, seconds: float) -> Target:
        sign = self.parts.tokens.sign
        task, account = (f"/callbacks/kling/{sign('kling', named)}" for named in (uuid.uuid4(), None))
        return Target(
            self.port, task, account, self.asset, self.slow_hook.url, self.hook.url, time.monotonic() + seconds
        )

    async def honest(self, rate: float, seconds: float) -> Honest:
        acks, starts = await asyncio.gather(acknowledge(self.port, rate, seconds), self._creates(seconds))
        with suppress(AssertionError):
            await asyncio.to_thread(wait_until, lambda: starts.keys() <= self._told().keys(), seconds=PATIENCE_SECONDS)
        told = self._told()
        waits = [told[name] - start for name, start in starts.items() if name in told]
        return Honest(acks, waits, len(starts) - len(waits))

    async def _creates(self, seconds: float) -> dict[str, float]:
        """One create a second: when each was answered, by its id."""
        starts: dict[str, float] = {}
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            starts[await asyncio.to_thread(self.create)] = time.monotonic()
            await asyncio.sleep(max(0, min(1, until - time.monotonic())))
        return starts

    def _told(self) -> dict[str, float]:
        ends = [got for got in self.hook.taken if got.json.get("task_status") == "succeed"]
        return {got.json["task_id"]: got.at for got in reversed(ends)}

    def measure(self, attack: Attack, rate: float, seconds: float) -> Honest:
        """Measure honest traffic beside an attack from a separate process."""
        target = self.target(seconds + 2)
        words = ("--attack", attack.__name__, "--target", json.dumps(vars(target)))
        log = self.folder / "attack.log"
        attacker = Forked(words, os.environ, self.folder, out=log, module="tests.attacks")
        try:
            time.sleep(min(LEAD_SECONDS, seconds))
            assert attacker.poll() is None, log.read_text()
            return asyncio.run(self.honest(rate, seconds))
        finally:
            attacker.kill()
            attacker.wait()


def is_within(alone: Honest, beside: Honest) -> bool:
    late = statistics.median(beside.callbacks or [float("inf")]) - FREE_SECONDS
    return (
        not beside.missing
        and p99(beside.acks) <= MOST_TIMES * p99(alone.acks)
        and late <= MOST_TIMES * statistics.median(alone.callbacks)
    )


def play(names: list[str], rate: float, seconds: float) -> list[str]:
    """Print a line for each attack. Returns the attacks beside which honest traffic took more than twice as long."""
    beyond = []
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        stage.asset = stage.link()
        for name in names:
            alone = asyncio.run(stage.honest(rate, seconds))
            if name in LOADS:
                words, load = LOADS[name]
                print(f"{words}\n   beside {stage.measure(load, rate, seconds).words}", flush=True)  # noqa: T201
            beside = stage.measure(ATTACKS[name][1], rate, seconds)
            print(f"{ATTACKS[name][0]}: {name}\n   alone  {alone.words}\n   beside {beside.words}", flush=True)  # noqa: T201
            beyond += [] if is_within(alone, beside) else [name]
            if beside.missing:
                print(f"   {beside.missing} callbacks did not come", flush=True)  # noqa: T201
    return beyond


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rate", type=float, default=50, help="deliveries a second")
    parser.add_argument("--only", action="append", choices=sorted(ATTACKS), help="one attack; repeatable")
    parser.add_argument("--no-limit", action="store_true", help="exit 0 whatever was measured")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=json.loads, help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if given.attack:
        asyncio.run(globals()[given.attack](Target(**given.target)))
        return
    beyond = play(given.only or list(ATTACKS), given.rate, given.seconds)
    if beyond:
        print(f"honest traffic took more than {MOST_TIMES:g} times as long beside: {', '.join(beyond)}")  # noqa: T201
    sys.exit(bool(beyond) and not given.no_limit)


if __name__ == "__main__":
    main()
