"""Acknowledgements with ten open, live consoles, and without: `python -m tests.bench.consoles [--rounds 4]`.

`--cpu`: the server's cost of ten consoles at 50 callbacks a second (`--rate`), in milliseconds of CPU a second.
`--same`: all show one view, instead of two at each of five.

One server, SQLite, callbacks over 64 connections from a separate process. Each round measures the rate, and six times
as long the p99 at half of the first round's rate, once without consoles and once with ten. Each p99 lasts 60 s, because
live pages change that seldom beside so many callbacks. Every second round begins with the consoles, because the
database grows. The figures are the ratios of the medians of all rounds.

Every console holds its live stream and fetches its page again after a change, like the browser's script. Their client
is a process of low priority, because browsers have cores of their own. The goal is a ratio within 5 % on a machine that
does nothing else. Takes ten minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tests.bench import stage
from tests.bench.acks import p99
from tests.console_reader import KEYS, Reader
from tests.pipeline import free_port

CONSOLES = 10
PATHS = ("", "/tasks", "/gallery", "/deliveries", "/events")
APART_SECONDS = 2.5
NICE = 10


@contextmanager
def consoles(port: int, count: int, paths: Sequence[str]) -> Iterator[Sequence[int]]:
    """Open, live consoles in a process of their own. Yields the number of pages that each has fetched so far."""
    spawned = multiprocessing.get_context("spawn")
    fetched, opened, ends = spawned.Array("i", count), spawned.Event(), spawned.Event()
    process = spawned.Process(target=_follow, args=(port, paths, fetched, opened, ends), daemon=True)
    process.start()
    try:
        assert opened.wait(stage.START_SECONDS), "the consoles did not open"
        yield fetched.get_obj()
    finally:
        ends.set()
        process.join(30)  # a stream sends something at least every 15 s
        process.kill()
        process.join()


def _follow(port: int, paths: Sequence[str], fetched: Any, opened: Any, ends: Any) -> None:
    os.nice(NICE)
    readers = [Reader(f"http://127.0.0.1:{port}") for _ in fetched]

    def follow(number: int) -> None:
        reader, path = readers[number], paths[number % len(paths)]
        last = 0.0
        with suppress(httpx.HTTPError), reader.http.stream("GET", "/console/live", timeout=60) as live:
            for line in live.iter_lines():
                if ends.is_set():
                    return
                if line == "event: change" and time.monotonic() > last + APART_SECONDS:
                    reader.get(path, headers={"X-Live": "1"}).raise_for_status()
                    last, fetched[number] = time.monotonic(), fetched[number] + 1

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(len(readers))]
    for each in threads:
        each.start()
    opened.set()
    for each in threads:
        each.join()


def acknowledgements(_process_id: int, port: int, seconds: float, *, at: list[float]) -> tuple[float, float]:
    """Acknowledgements a second, and their p99 in seconds, measured for six times as long at the rate in `at`.

    The first call sets that rate: two p99 at different rates cannot be compared.
    """
    rate = stage.load(port, seconds=seconds, warm_seconds=0.5)["per_second"]
    if not at:
        at.append(rate / 2)
    return rate, p99(stage.load(port, seconds=6 * seconds, rate=at[0], warm_seconds=0.5)["waits"])


def cpu(process_id: int, port: int, seconds: float, rate: float) -> tuple[float, float]:
    """Milliseconds of CPU a second of the server and its children at this rate of callbacks, and their p99."""
    before, started = _tree_seconds(process_id), time.monotonic()
    waits = stage.load(port, seconds=3 * seconds, rate=rate, warm_seconds=0.5)["waits"]
    return (_tree_seconds(process_id) - before) / (time.monotonic() - started) * 1e3, p99(waits)


def _tree_seconds(process_id: int) -> float:
    children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    return stage.cpu_seconds(process_id) + sum(_tree_seconds(int(each)) for each in children)


Measure = Callable[[int, int, float], tuple[float, float]]
Rounds = Iterator[tuple[tuple[float, float], tuple[float, float], int]]


def rounds(count: int, seconds: float, measure: Measure, paths: Sequence[str] = PATHS) -> Rounds:
    """(without, with, pages fetched) of each round, in one server."""
    nothing = "http://127.0.0.1:9"  # no request needs a store here
    variables = {"RECEIVER_CONSOLE_KEYS": KEYS, "RECEIVER_S3_ENDPOINT_URL": nothing, "AWS_ACCESS_KEY_ID": "key"}
    variables |= {"AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    with stage.folder() as place, stage.database("sqlite", place) as url:
        port = free_port()
        variables |= {"RECEIVER_PORT": str(port), "RECEIVER_WORKERS": "0"}
        command = [sys.executable, "-m", "receiver", "serve"]
        with stage.running(command, stage.environment(url, **variables), place) as process:
            stage.wait_for(f"http://{stage.HOST}:{port}/readyz")
            stage.load(port, seconds=seconds)  # an empty database takes more callbacks
            for number in range(count):
                without = None if number % 2 else measure(process.pid, port, seconds)
                with consoles(port, CONSOLES, paths) as fetched:
                    beside = measure(process.pid, port, seconds)
                    pages = sum(fetched)
                yield without or measure(process.pid, port, seconds), beside, pages


def _say_cpu(found: Rounds) -> None:
    more, waits = [], []
    for without, beside, pages in found:
        more.append(beside[0] - without[0])
        waits.append(beside[1] / without[1])
        print(  # noqa: T201
            f"{without[0]:.1f} ms/s, p99 {without[1] * 1e3:.1f} ms without;"
            f" with {CONSOLES} consoles ({pages} pages fetched) {beside[0]:.1f} ms/s, p99 {beside[1] * 1e3:.1f} ms",
            flush=True,
        )
    print(f"median of {len(more)} rounds: {statistics.median(more):+.1f} ms/s, p99 x {statistics.median(waits):.2f}")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a rate; a p99 takes six times as long")
    parser.add_argument("--cpu", action="store_true", help="what the consoles cost the server")
    parser.add_argument("--rate", type=float, default=50.0, help="callbacks a second of --cpu")
    parser.add_argument("--same", action="store_true", help="all consoles look at one view")
    given = parser.parse_args()
    paths = ("/tasks",) if given.same else PATHS
    count, seconds = min(given.rounds, 20), min(given.seconds, 10.0)
    if given.cpu:
        _say_cpu(rounds(count, seconds, partial(cpu, rate=given.rate), paths))
    else:
        _say_acknowledgements(rounds(count, seconds, partial(acknowledgements, at=[]), paths))


def _say_acknowledgements(found: Rounds) -> None:
    all_without, all_beside = [], []
    for without, beside, pages in found:
        all_without.append(without)
        all_beside.append(beside)
        print(  # noqa: T201
            f"{without[0]:,.0f}/s, p99 {without[1] * 1e3:.1f} ms without;"
            f" with {CONSOLES} consoles ({pages} pages fetched) {beside[0]:,.0f}/s, p99 {beside[1] * 1e3:.1f} ms",
            flush=True,
        )
    rate, wait = (
        statistics.median(one) / statistics.median(other)
        for one, other in zip(zip(*all_beside, strict=True), zip(*all_without, strict=True), strict=True)
    )
    print(f"medians of {len(all_beside)} rounds: rate x {rate:.3f}, p99 x {wait:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
