"""Acknowledgements with ten open, live consoles, and without: `python -m tests.bench.consoles [--rounds 6]`.

One server, SQLite, and one sender over 64 connections in a process of its own. It sends without a pause while consoles
are opened and closed. First it sends at a fixed rate, a third of what the server takes, then as fast as it is answered.
Each stream is cut into windows of 60 s with ten consoles and without. A round is one of each, and every second round
begins with the consoles, because the database grows.

In a window the consoles are open and live. Beside more than 1,000 callbacks a second they are told of a change once a
minute, so a window holds one whole live update: the announcement and all pages that are fetched and rendered after it.
Logins, first pages and what closing costs fall into the gap of six seconds or more before a window, which is not
counted. Like the browser's script, every console holds its stream and fetches its page after a change. Their client has
low priority, because browsers have cores of their own.

The figures are ratios of the waits of all windows with consoles to those of all windows without. The spread beside each
is the same ratio between two halves of the windows without, in nine of ten ways to halve them: what noise alone does.
Halves are half as long, so their ratio is 1.4 times as noisy as the figure. The goal is a ratio within 5 % on a machine
that does nothing else. Six rounds take 23 minutes.

A second p99 takes only the seconds of live updates from the windows with consoles, and the rest from those without.
Most of a window is no live update and adds nothing but noise. Last, the median p99 of live updates' six seconds stands
beside the median p99 of all six seconds without consoles: ten times the effect on a window, and no stall of the disk
counts more than once.

`--rate`: another rate than a third. `--same`: all consoles show one view, instead of two at each of five.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.bench import stage
from tests.bench.acks import p99
from tests.console_reader import KEYS, Reader
from tests.forked import FORKS
from tests.pipeline import free_port

CONSOLES, SMALL_CONSOLES = 10, 2
PATHS = ("", "/tasks", "/gallery", "/deliveries", "/events")
APART_SECONDS = 2.5
NICE = 10
WINDOW_SECONDS, GAP_SECONDS, WARM_SECONDS = 60.0, 6.0, 10.0
# Windows of the smoke form. Beside few callbacks consoles are told every three seconds.
SMALL = 4.0, 0.2
# A live update of ten consoles with five views, rendered with rests, lies in these seconds, of which one is before it.
SLICE_SECONDS = 6.0
LEAST = 2  # waits of a slice that has a p99
MAX_TOLD = 64


@dataclass
class Window:
    """`cpu`: the server's milliseconds of CPU a second. `pages`: fetched after changes. `told`: seconds from the start
    to each change. `waits`: in seconds, each with the seconds from the start to when the callback was due.
    """

    beside: bool
    start: float
    end: float
    cpu: float = 0.0
    pages: int = 0
    told: Sequence[float] = ()
    waits: Sequence[tuple[float, float]] = ()

    def take(self, sent: dict[str, Any]) -> None:
        pairs = zip(sent["dues"], sent["waits"], strict=True)
        self.waits = [(due - self.start, wait) for due, wait in pairs if self.start <= due < self.end]


@contextmanager
def consoles(port: int, views: Sequence[str]) -> Iterator[tuple[Sequence[int], Sequence[float]]]:
    """Open, live consoles with these views in a process of their own. Yields the number of pages that each has fetched
    after a change, and the times of the changes.
    """
    fetched, told, opened = FORKS.Array("i", len(views)), FORKS.Array("d", MAX_TOLD), FORKS.Semaphore(0)
    process = FORKS.Process(target=_follow, args=(port, views, fetched, told, opened), daemon=True)
    process.start()
    try:
        for _ in fetched:
            assert opened.acquire(timeout=stage.START_SECONDS), "the consoles did not open"
        yield fetched.get_obj(), told.get_obj()
    finally:
        process.kill()
        process.join()


def _follow(port: int, views: Sequence[str], fetched: Any, told: Any, opened: Any) -> None:
    os.nice(NICE)

    def follow(number: int) -> None:
        reader, path = Reader(f"http://127.0.0.1:{port}"), views[number]
        reader.get(path).raise_for_status()
        last = 0.0
        with suppress(httpx.HTTPError), reader.http.stream("GET", "/console/live", timeout=60) as live:
            for line in live.iter_lines():
                if line == "event: hello":
                    opened.release()
                if line == "event: change" and time.monotonic() > last + APART_SECONDS:
                    if number == 0:
                        told[fetched[0] % MAX_TOLD] = time.monotonic()
                    reader.get(path, headers={"X-Live": "1"}).raise_for_status()
                    last, fetched[number] = time.monotonic(), fetched[number] + 1

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(len(views))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


class Bench:
    """One server and the windows of its streams."""

    def __init__(self, process_id: int, port: int, views: Sequence[str], gap_seconds: float) -> None:
        self._process_id, self._port, self._views = process_id, port, views
        self._gap_seconds = gap_seconds

    def stream(self, rounds: int, rate: float, seconds: float) -> list[Window]:
        """Send in one stream over all windows of so many rounds. `rate` 0: as fast as it is answered."""
        sides = [beside for number in range(rounds) for beside in ((False, True), (True, False))[number % 2]]
        with stage.folder() as place, ThreadPoolExecutor(1) as threads:
            options = {"rate": rate, "warm_seconds": 0.5, "until": place / "over"}
            sending = threads.submit(stage.load, self._port, seconds=len(sides) * (seconds + 60), **options)
            try:
                time.sleep(self._gap_seconds / 2)
                windows = [self._window(beside, seconds) for beside in sides]
                assert not sending.done(), "the consoles opened too slowly: use a machine with less to do"
            finally:
                options["until"].touch()
            sent = sending.result()
        for window in windows:
            window.take(sent)
        return windows

    def _window(self, beside: bool, seconds: float) -> Window:
        begin = time.monotonic()
        if not beside:
            return self._count(Window(beside, begin + self._gap_seconds, begin + self._gap_seconds + seconds))
        with consoles(self._port, self._views) as (fetched, told):
            start = max(begin + self._gap_seconds, time.monotonic() + self._gap_seconds / 4)
            before = sum(fetched)
            window = self._count(Window(beside, start, start + seconds))
            window.pages = sum(fetched) - before
            window.told = [at - start for at in told if at > start]
        return window

    def _count(self, window: Window) -> Window:
        _sleep_until(window.start)
        before = _tree_seconds(self._process_id)
        _sleep_until(window.end)
        used = max(_tree_seconds(self._process_id) - before, 1 / stage.TICKS_PER_SECOND)  # the kernel's least
        window.cpu = used / (window.end - window.start) * 1e3
        return window


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _tree_seconds(process_id: int) -> float:
    children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    return stage.cpu_seconds(process_id) + sum(_tree_seconds(int(each)) for each in children)


Figure = Callable[[Sequence[Window]], float]


def pooled_p99(windows: Sequence[Window]) -> float:
    return p99([wait for window in windows for _, wait in window.waits])


def rate_of(windows: Sequence[Window]) -> float:
    """A server that stalled for all of a short window still has a rate, which is bad."""
    answered = sum(len(window.waits) for window in windows)
    return max(answered, 1) / sum(window.end - window.start for window in windows)


def cpu_of(windows: Sequence[Window]) -> float:
    return statistics.mean(window.cpu for window in windows)


def spread(windows: Sequence[Window], figure: Figure) -> str:
    """The ratio of the figure between two halves of windows of one side: nine in ten of all ways to halve them."""
    if len(windows) < 4:
        return "too few rounds for a spread"
    numbers, ratios = range(len(windows)), []
    for half in itertools.combinations(numbers, len(windows) // 2):
        rest = [number for number in numbers if number not in half]
        ratios.append(figure([windows[each] for each in half]) / figure([windows[each] for each in rest]))
    ratios.sort()
    least = len(ratios) // 20
    return f"halves without: x {ratios[least]:.3f} to {ratios[-1 - least]:.3f}"


def compare(name: str, unit: str, windows: Sequence[Window], figure: Figure) -> float:
    """Print the figure of both sides and return their ratio."""
    beside = [window for window in windows if window.beside]
    without = [window for window in windows if not window.beside]
    one, other = figure(without), figure(beside)
    print(  # noqa: T201
        f"{name}: {one:,.2f} {unit} without, {other:,.2f} with consoles: x {other / one:.3f}"
        f" ({spread(without, figure)})",
        flush=True,
    )
    return other / one


def is_update(window: Window, due: float) -> bool:
    return any(at - 1 <= due < at - 1 + SLICE_SECONDS for at in window.told)


def spliced(without: Sequence[Window], beside: Sequence[Window], updates: Sequence[Window]) -> float:
    """The p99 of the windows without, whose seconds of a live update in `updates` are those of `beside` instead."""
    waits: list[float] = []
    for one, other, told in zip(without, beside, updates, strict=True):
        waits += [wait for due, wait in one.waits if not is_update(told, due)]
        waits += [wait for due, wait in other.waits if is_update(told, due)]
    return p99(waits)


def compare_updates(windows: Sequence[Window]) -> None:
    """Print what live updates alone do to the p99, as little of the windows with consoles is one. Its noise is the same
    with seconds of other windows without consoles in their place.
    """
    beside = [window for window in windows if window.beside]
    without = [window for window in windows if not window.beside]
    limit = pooled_p99(without)
    turned = [[*without[turn:], *without[:turn]] for turn in range(1, len(without))]
    noise = sorted(spliced(without, each, beside) / limit for each in turned)
    said = f"other windows without: x {noise[0]:.3f} to {noise[-1]:.3f}" if noise else "too few rounds for a spread"
    ratio = spliced(without, beside, beside) / limit
    print(f"p99 with the seconds of live updates alone from the windows with consoles: x {ratio:.3f} ({said})")  # noqa: T201
    during = [p99(waits) for each in beside for at in each.told if len(waits := waits_from(each, at - 1)) >= LEAST]
    starts = range(int(without[0].end - without[0].start - SLICE_SECONDS) + 1)[:: int(SLICE_SECONDS)]
    usual = [p99(waits) for each in without for at in starts if len(waits := waits_from(each, at)) >= LEAST]
    for name, found in ((f"of {len(during)} live updates", during), (f"of {len(usual)} without consoles", usual)):
        if len(found) > 1:
            low, middle, high = (value * 1e3 for value in statistics.quantiles(found, n=4))
            said = f"median {middle:.2f} ms, half are {low:.2f} to {high:.2f}"
            print(f"p99 of {SLICE_SECONDS:.0f} s {name}: {said}", flush=True)  # noqa: T201


def waits_from(window: Window, at: float) -> list[float]:
    return [wait for due, wait in window.waits if at <= due < at + SLICE_SECONDS]


@contextmanager
def bench(views: Sequence[str], gap_seconds: float, warm_seconds: float) -> Iterator[tuple[Bench, float]]:
    """A server with a console. Yields it with the rate at which it takes callbacks."""
    nothing = "http://127.0.0.1:9"  # no request needs a store here
    variables = {"RECEIVER_CONSOLE_KEYS": KEYS, "RECEIVER_S3_ENDPOINT_URL": nothing, "AWS_ACCESS_KEY_ID": "key"}
    variables |= {"AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    with stage.folder() as place, stage.database("sqlite", place) as url:
        port = free_port()
        variables |= {"RECEIVER_PORT": str(port), "RECEIVER_WORKERS": "0"}
        command = [sys.executable, "-m", "receiver", "serve"]
        with stage.running(command, stage.environment(url, **variables), place) as process:
            stage.wait_for(f"http://{stage.HOST}:{port}/readyz")
            with consoles(port, views):  # starts the fork server
                pass
            most = stage.load(port, seconds=warm_seconds)["per_second"]
            yield Bench(process.pid, port, views, gap_seconds), most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="at the fixed rate; two thirds as many at the full rate")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="callbacks a second instead of a third of the full rate"
    )
    parser.add_argument("--same", action="store_true", help="all consoles look at one view")
    parser.add_argument("--smoke", action="store_true", help="windows too short to judge")
    given = parser.parse_args()
    count = SMALL_CONSOLES if given.smoke else CONSOLES
    views = list(itertools.islice(itertools.cycle(("/tasks",) if given.same else PATHS), count))
    rounds = 1 if given.smoke else min(given.rounds, 20)
    seconds, full_seconds = SMALL if given.smoke else (WINDOW_SECONDS, WINDOW_SECONDS)
    with bench(views, *((0.2, 0.1) if given.smoke else (GAP_SECONDS, WARM_SECONDS))) as (server, most):
        rate = given.rate or (15.0 if given.smoke else most / 3)
        windows = server.stream(rounds, rate, seconds)
        assert all(window.pages for window in windows if window.beside), "a window without a live update"
        print(f"at {rate:,.0f} callbacks a second of {most:,.0f}, {rounds} rounds", flush=True)  # noqa: T201
        for each in windows:
            side = f"with, {each.pages} pages" if each.beside else "without"
            print(f"  {side}: p99 {pooled_p99([each]) * 1e3:.1f} ms, {each.cpu:.0f} ms/s of CPU", flush=True)  # noqa: T201
        compare("p99", "ms", windows, lambda these: pooled_p99(these) * 1e3)
        compare("median", "ms", windows, lambda these: statistics.median(w for t in these for _, w in t.waits) * 1e3)
        compare("CPU", "ms/s", windows, cpu_of)
        compare_updates(windows)
        windows = server.stream(max(1, rounds * 2 // 3), 0, full_seconds)
        compare("full rate", "/s", windows, rate_of)
        compare("CPU of each", "ms", windows, lambda these: cpu_of(these) / rate_of(these))


if __name__ == "__main__":
    main()
