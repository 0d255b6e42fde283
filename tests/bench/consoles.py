"""Acknowledgements with ten consoles open and live, beside without: `python -m tests.bench.consoles [--rounds 4]`.

One server, SQLite, callbacks over 64 connections from a process of its own. Each round measures the rate and the p99 at
half of that rate, once without consoles and once with ten. Every console holds its live stream and fetches its page
anew after a change, two seconds apart at least, as the browser's script does. The goal is a ratio within 5 %, on a
machine whose cores are not shared with the consoles' own client. Takes about a minute.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

from tests.bench import stage
from tests.bench.acks import p99
from tests.console_reader import KEYS, Reader

CONSOLES = 10
PATHS = ("", "/tasks", "/gallery", "/deliveries", "/events")
APART_SECONDS = 2.0


@contextmanager
def consoles(port: int, count: int) -> Iterator[list[int]]:
    """So many consoles, open and live. Yields the number of pages that each has fetched so far."""
    readers = [Reader(f"http://127.0.0.1:{port}") for _ in range(count)]
    fetched, ends = [0] * count, threading.Event()

    def follow(number: int) -> None:
        reader, path = readers[number], PATHS[number % len(PATHS)]
        last = 0.0
        with suppress(httpx.HTTPError), reader.http.stream("GET", "/console/live", timeout=60) as live:
            for line in live.iter_lines():
                if ends.is_set():
                    return
                if line == "event: change" and time.monotonic() > last + APART_SECONDS:
                    reader.get(path, headers={"X-Live": "1"}).raise_for_status()
                    last, fetched[number] = time.monotonic(), fetched[number] + 1

    threads = [threading.Thread(target=follow, args=(number,), daemon=True) for number in range(count)]
    for each in threads:
        each.start()
    try:
        yield fetched
    finally:
        ends.set()
        for each in threads:  # a stream says something at least every 15 s
            each.join(20)
        for reader in readers:
            reader.http.close()


def measure(port: int, seconds: float) -> tuple[float, float]:
    """Acknowledgements a second, and their p99 in seconds at half of that rate."""
    rate = stage.load(port, seconds=seconds, warm_seconds=0.5)["per_second"]
    return rate, p99(stage.load(port, seconds=seconds, rate=rate / 2, warm_seconds=0.5)["waits"])


def rounds(count: int, seconds: float) -> Iterator[tuple[tuple[float, float], tuple[float, float], int]]:
    """(without, with, pages fetched) of each round, in one server."""
    nothing = "http://127.0.0.1:9"  # no store is asked for anything here
    variables = {"RECEIVER_CONSOLE_KEYS": KEYS, "RECEIVER_S3_ENDPOINT_URL": nothing, "AWS_ACCESS_KEY_ID": "key"}
    variables |= {"AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    with stage.folder() as place, stage.database("sqlite", place) as url:
        with stage.served(stage.environment(url, **variables), place) as port:
            for _ in range(count):
                without = measure(port, seconds)
                with consoles(port, CONSOLES) as fetched:
                    beside = measure(port, seconds)
                yield without, beside, sum(fetched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement; a round has four")
    given = parser.parse_args()
    rates, waits = [], []
    for without, beside, pages in rounds(min(given.rounds, 20), min(given.seconds, 10.0)):
        rates.append(beside[0] / without[0])
        waits.append(beside[1] / without[1])
        print(  # noqa: T201
            f"{without[0]:,.0f}/s, p99 {without[1] * 1e3:.1f} ms without;"
            f" with {CONSOLES} consoles ({pages} pages fetched) {beside[0]:,.0f}/s, p99 {beside[1] * 1e3:.1f} ms",
            flush=True,
        )
    ratio = f"rate x {statistics.median(rates):.2f}, p99 x {statistics.median(waits):.2f}"
    print(f"median of {len(rates)} rounds: {ratio}")  # noqa: T201


if __name__ == "__main__":
    main()
