"""A sender of distinct callbacks over kept connections, cheap enough not to be the bottleneck.

Sends after each answer (`rate` 0), or at a steady rate. At a rate each wait counts from the time when the callback was
due, so a stall counts for all callbacks that were due meanwhile. Prints as JSON the number answered a second, the waits
and, with `--dues`, when each was due by the system's monotonic clock.

    python -m tests.bench.load PORT --connections 64 --seconds 4 --rate 0
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import uvloop
from pydantic import SecretStr

from receiver.base.tokens import Tokens
from tests.harness import CALLBACK_SECRET

# One body for each status, as the provider sends them (KLING §5).
DELIVERIES_PER_TASK = 4
# A server that stalled for all of a short measurement still gets a rate and a p99, both bad.
LEAST = 2
PAYLOAD = Path(__file__).parents[1] / "payloads" / "callback-single.json"


class Requests:
    """An endless sequence of requests. Every body is new, and every task gets four."""

    def __init__(self) -> None:
        document = {**json.loads(PAYLOAD.read_text()), "number": random.randrange(10**9, 10**10)}
        self._body = json.dumps(document, separators=(",", ":")).encode().removesuffix(b"}")  # the number comes last
        self._tokens = Tokens([SecretStr(CALLBACK_SECRET)])
        self._count = 0
        self._head = b""

    def next(self) -> bytes:
        if self._count % DELIVERIES_PER_TASK == 0:
            self._head = self._new_head()
        self._count += 1
        return self._head + self._body + b"%09d}" % self._count

    def _new_head(self) -> bytes:
        token = self._tokens.sign("kling", uuid.uuid4())
        length = len(self._body) + len(b"000000000}")
        head = f"POST /callbacks/kling/{token} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
        return f"{head}Content-Type: application/json; charset=utf-8\r\n\r\n".encode()


class Run:
    """One measurement: its connections, its start, and all waits."""

    def __init__(self) -> None:
        self.requests = Requests()
        self.waits: list[float] = []
        self.dues: list[float] = []
        self.idle: deque[Connection] = deque()
        self.overdue: deque[float] = deque()
        self.is_closed_loop = True
        self.refused = 0

    def forget(self) -> None:
        self.waits.clear()
        self.dues.clear()


class Connection(asyncio.Protocol):
    """Sends one request at a time. An answer may come in pieces."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._due = 0.0
        self._got = b""
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self.transport = transport

    def send(self, due: float) -> None:
        self._due = due
        self.transport.write(self._run.requests.next())

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        if not end or len(body) < _length(head):
            return
        self._got = b""
        self._run.waits.append(time.perf_counter() - self._due)
        self._run.dues.append(self._due)
        self._run.refused += not head.startswith(b"HTTP/1.1 200")
        if self._run.is_closed_loop:
            self.send(time.perf_counter())
        elif self._run.overdue:
            self.send(self._run.overdue.popleft())
        else:
            self._run.idle.append(self)


def _length(head: bytes) -> int:
    return int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0])


async def measure(
    port: int, connections: int, seconds: float, rate: float, warm_seconds: float, until: Path
) -> dict[str, object]:
    run = Run()
    run.is_closed_loop = rate == 0
    loop = asyncio.get_running_loop()
    lines = [(await loop.create_connection(lambda: Connection(run), "127.0.0.1", port))[1] for _ in range(connections)]
    if run.is_closed_loop:
        for line in lines:
            line.send(time.perf_counter())
        await asyncio.sleep(warm_seconds)
        run.forget()
        started = time.perf_counter()
        while time.perf_counter() < started + seconds and not until.exists():
            await asyncio.sleep(min(0.05, seconds))
    else:
        run.idle.extend(lines)
        await _at_rate(run, rate, warm_seconds, until)
        run.forget()
        started = time.perf_counter()
        await _at_rate(run, rate, seconds, until)
    while len(run.waits) < LEAST:
        await asyncio.sleep(0.01)
    took = time.perf_counter() - started
    answered, dues = list(run.waits), list(run.dues)
    for line in lines:
        line.transport.abort()
    return {"per_second": len(answered) / took, "refused": run.refused, "waits": answered, "dues": dues}


async def _at_rate(run: Run, rate: float, seconds: float, until: Path) -> None:
    """Send each millisecond the callbacks that are due. One without an idle connection waits, and its wait counts."""
    start, sent = time.perf_counter(), 0
    while ((now := time.perf_counter()) < start + seconds and not until.exists()) or sent < LEAST:
        while (due := start + sent / rate) <= now:
            sent += 1
            if run.idle:
                run.idle.popleft().send(due)
            else:
                run.overdue.append(due)
        await asyncio.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--warm-seconds", type=float, default=1)
    parser.add_argument("--rate", type=float, default=0, help="requests a second; 0: as fast as they are answered")
    parser.add_argument("--until", type=Path, default=Path(os.devnull, "none"), help="ends early when this file exists")
    parser.add_argument("--dues", action="store_true")
    given = parser.parse_args()
    gc.disable()  # a pause of this process would look like one of the server
    uvloop.install()
    wanted = (given.connections, given.seconds, given.rate, given.warm_seconds, given.until)
    found = asyncio.run(measure(given.port, *wanted))
    if not given.dues:
        del found["dues"]
    rest = json.dumps(found).encode()
    while rest:  # an unbuffered stdout takes only what fits into the pipe, and `print` drops the rest
        rest = rest[os.write(1, rest) :]


if __name__ == "__main__":
    main()
