"""How much a thousand slow connections delay an acknowledgement: p99 beside them against p99 alone.

A real `receiver serve` on loopback gets new deliveries at a steady rate. Another process holds slow connections that
send their head or body byte by byte or send nothing, and replaces each one that is closed.

    .venv/bin/python -m tests.bench.slow_connections --slow 1000 --rate 100 --seconds 10 --rounds 2
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from receiver.base.tokens import Tokens
from tests.harness import wait_until
from tests.pipeline import CALLBACK_SECRET, free_port

HOST = "127.0.0.1"
KINDS = ("head", "body", "idle")
# The interval of bytes: within the 10 s of a head or a body each slow connection sends about ten.
DRIBBLE_SECONDS = 1.0
# Slow connections open evenly over this time, so that they do not all end, and reopen, at the same moment.
RAMP_SECONDS = 5.0
SENDERS = 16
MAX_P99_RATIO = 3.0
BODY = b'{"task_id":"%d","task_status":"processing","task_info":{}}'


def callback_path() -> str:
    """The path of an unknown task, which is answered like any other."""
    return "/callbacks/kling/" + Tokens([SecretStr(CALLBACK_SECRET)]).sign("kling", uuid.uuid4())


def post(body: bytes, *, length: int | None = None) -> bytes:
    head = f"POST {callback_path()} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


@dataclass
class Slow:
    """The ends of the slow connections: seconds from opening to closing, by kind and status."""

    closed: dict[tuple[str, str], list[float]]
    open: int = 0

    def lines(self) -> Iterator[str]:
        for (kind, status), seconds in sorted(self.closed.items()):
            yield f"{kind:>5} {status:>6}: {len(seconds):>5} closed, after {min(seconds):.1f} to {max(seconds):.1f} s"


async def dawdle(port: int, count: int, until: float, *, dribble_seconds: float = DRIBBLE_SECONDS) -> Slow:
    """Hold `count` slow connections open until the monotonic time `until`."""
    slow = Slow(defaultdict(list))

    async def one(number: int) -> None:
        await asyncio.sleep(RAMP_SECONDS * number / count if count > 100 else 0)
        while time.monotonic() < until:
            await _dawdle_once(port, KINDS[number % len(KINDS)], until, slow, dribble_seconds)

    await asyncio.gather(*(one(number) for number in range(count)))
    return slow


async def _dawdle_once(port: int, kind: str, until: float, slow: Slow, dribble_seconds: float) -> None:
    started = time.monotonic()
    reader, writer = await asyncio.open_connection(HOST, port)
    slow.open += 1
    try:
        words = {"head": b"POST / HTTP/1.1\r\nX-A: ", "body": post(b"{", length=1_000), "idle": b""}[kind]
        writer.write(words)
        answer = asyncio.ensure_future(reader.read(65_536))
        while not answer.done() and time.monotonic() < until:
            await asyncio.wait([answer], timeout=min(dribble_seconds, max(until - time.monotonic(), 0.01)))
            if kind != "idle" and not answer.done():
                writer.write(b"a")
        if answer.done():
            status = [*answer.result().split(), b"", b"closed"][1].decode()
            slow.closed[kind, status].append(time.monotonic() - started)
        answer.cancel()
    except ConnectionError:
        slow.closed[kind, "reset"].append(time.monotonic() - started)
    finally:
        slow.open -= 1
        writer.close()


async def acknowledge(port: int, rate: float, seconds: float) -> list[float]:
    """Deliver `rate` a second for this long. Returns the seconds from when each was due to its 200.

    A wait counts from when the delivery was due, not from when it was sent, so a stall counts for all that were due
    meanwhile.
    """
    numbers = itertools.count()
    start, waits = time.monotonic(), []

    async def sender() -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        while (due := next(numbers) / rate) < seconds:
            await asyncio.sleep(max(0, start + due - time.monotonic()))
            writer.write(post(BODY % time.time_ns()))
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            await reader.readexactly(length)
            waits.append(time.monotonic() - start - due)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"not acknowledged: {head!r}")
        writer.close()

    await asyncio.gather(*(sender() for _ in range(SENDERS)))
    return waits


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """`receiver serve` without workers, because only the web server is measured."""
    port = free_port()
    settings = {
        "RECEIVER_DATABASE_URL": f"sqlite:///{folder}/bench.db", "RECEIVER_CALLBACK_SECRETS": CALLBACK_SECRET,
        "RECEIVER_PORT": str(port), "RECEIVER_S3_BUCKET": "unused", "RECEIVER_WORKERS": "0",
    }  # fmt: skip
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    command = [sys.executable, "-m", "receiver", "serve"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, env={**rest, **settings}, stderr=log) as server:
        try:
            wait_until(lambda: b"web.started" in (folder / "log").read_bytes(), seconds=30)
            yield port
        finally:
            server.terminate()


@contextmanager
def beside(port: int, count: int, seconds: float) -> Iterator[list[str]]:
    """Run slow connections in a separate process; returns their ends."""
    command = [sys.executable, "-m", "tests.bench.slow_connections", "--dawdle", str(port), "--slow", str(count)]
    until = time.monotonic() + RAMP_SECONDS + seconds + 2
    found: list[str] = []
    with subprocess.Popen([*command, "--until", str(until)], stdout=subprocess.PIPE, text=True) as dawdlers:
        time.sleep(RAMP_SECONDS + 1)
        yield found
        found += json.loads(dawdlers.communicate(timeout=seconds + 60)[0])


def measure(given: argparse.Namespace) -> float:
    alone: list[float] = []
    crowded: list[float] = []
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as port:
        asyncio.run(acknowledge(port, given.rate, 2))  # warm-up
        for _ in range(given.rounds):
            alone += asyncio.run(acknowledge(port, given.rate, given.seconds))
            with beside(port, given.slow, given.seconds) as found:
                crowded += asyncio.run(acknowledge(port, given.rate, given.seconds))
            print("\n".join(found))  # noqa: T201
    ratio = p99(crowded) / p99(alone)
    for name, values in (("alone", alone), (f"beside {given.slow}", crowded)):
        middle, worst = statistics.median(values), max(values)
        print(f"{name:>12}: {len(values)} acknowledged at {given.rate}/s, "  # noqa: T201
              f"p50 {middle * 1e3:.1f} ms, p99 {p99(values) * 1e3:.1f} ms, worst {worst * 1e3:.1f} ms")  # fmt: skip
    print(f"p99 ratio: {ratio:.2f} (at most {MAX_P99_RATIO})")  # noqa: T201
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", type=int, default=1_000, help="slow connections at a time")
    parser.add_argument("--rate", type=float, default=100, help="deliveries a second")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each kind, alternating")
    parser.add_argument("--dawdle", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    gc.freeze()  # a pause of this process would look like one of the server
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else 65_536, hard))  # the server inherits it
    if given.dawdle:
        slow = asyncio.run(dawdle(given.dawdle, given.slow, given.until))
        print(json.dumps(list(slow.lines())))  # noqa: T201
    elif measure(given) > MAX_P99_RATIO:
        sys.exit(1)


if __name__ == "__main__":
    main()
