"""Rows 1, 2, 3 and 11, and their floors: acknowledgements through real HTTP, each only after its commit."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from tests.bench import pictures, stage
from tests.bench.table import Sample

# A server that has just started still writes to the disk on which every commit waits.
SETTLE_SECONDS = 2.0
# Seconds of load, and before it, in the smoke form. Sender and server take a processor each meanwhile.
SMALL = 0.03, 0.02


def per_second(kind: str, small: bool) -> Sample:
    """Distinct callbacks per second over 64 connections, each sent after the last answer: ours, the bare endpoint."""
    seconds, warm_seconds = SMALL if small else (5.0, 1.0)
    with stage.folder() as place:
        with stage.bare(place) as port:
            reference = stage.load(port, seconds=seconds, warm_seconds=warm_seconds)["per_second"]
        with stage.database(kind, place) as url, stage.served(stage.environment(url), place) as port:
            ours = stage.load(port, seconds=seconds, warm_seconds=warm_seconds)["per_second"]
    return Sample(ours, reference)


def floor(kind: str, small: bool) -> Sample:
    """The rate of the minimal durable intake (`tests.bench.floor`), and of the bare endpoint."""
    seconds, warm_seconds = SMALL if small else (5.0, 1.0)
    with stage.folder() as place:
        with stage.bare(place) as port:
            reference = stage.load(port, seconds=seconds, warm_seconds=warm_seconds)["per_second"]
        with stage.database(kind, place) as url, stage.program(place, "tests.bench.floor", url) as port:
            least = stage.load(port, seconds=seconds, warm_seconds=warm_seconds)["per_second"]
    return Sample(least, reference)


def p99_at_half_rate(small: bool) -> Sample:
    """p99 in milliseconds at half of our own maximum rate: ours, the bare endpoint at the same rate."""
    with stage.folder() as place, stage.database("sqlite", place) as url:
        return _p99(place, stage.served(stage.environment(url), place), small)


def floor_p99(small: bool) -> Sample:
    """The same for the minimal durable intake, at half of its own rate."""
    with stage.folder() as place, stage.database("sqlite", place) as url:
        return _p99(place, stage.program(place, "tests.bench.floor", url), small)


def _p99(place: Path, server: AbstractContextManager[int], small: bool) -> Sample:
    seconds, warm_seconds = SMALL if small else (5.0, 1.0)
    with ExitStack() as stack:
        port = stack.enter_context(server)
        rate = stage.load(port, seconds=seconds, warm_seconds=warm_seconds)["per_second"] / 2
        ours = p99(stage.load(port, seconds=seconds, rate=rate, warm_seconds=warm_seconds)["waits"])
        stack.close()
        with stage.bare(place) as port:
            reference = p99(stage.load(port, seconds=seconds, rate=rate, warm_seconds=warm_seconds)["waits"])
    return Sample(ours * 1e3, reference * 1e3)


def p99_beside_archive(small: bool) -> Sample:
    """p99 in milliseconds at 200 a second with 8 archive threads busy, and with an idle archive."""
    seconds, rate = (0.3, 100) if small else (6.0, 200)
    settle_seconds, busy_seconds = (0.2, 0.2) if small else (SETTLE_SECONDS, 0.5)
    with stage.folder() as place, ExitStack() as stack:
        source = stack.enter_context(pictures.source(place, count=2 if small else 8, size=3_000_000))
        found = stack.enter_context(stage.seaweed(place))
        url = stack.enter_context(stage.database("sqlite", place))
        variables = stage.environment(url, **found, RECEIVER_PRIVATE_RESULT_HOSTS=source.address)
        port = stack.enter_context(stage.served(variables, place))
        stack.enter_context(stage.workers(variables, place))
        idle = p99(stage.load(port, seconds=seconds, rate=rate, warm_seconds=settle_seconds)["waits"])
        due = pictures.insert_row(url, source, 2 if small else 400)
        busy = p99(stage.load(port, seconds=seconds, rate=rate, warm_seconds=busy_seconds)["waits"])
        assert small or pictures.count_archived(url) < due, "the archive was done before the measurement was"
    return Sample(busy * 1e3, idle * 1e3)


def floor_p99_beside_transfers(small: bool) -> Sample:
    """p99 of the minimal durable intake, at 200 a second while rclone moves the same pictures, and alone."""
    seconds, rate, settle_seconds = (0.3, 100, 0.2) if small else (6.0, 200, SETTLE_SECONDS)
    with stage.folder() as place, ExitStack() as stack:
        source = stack.enter_context(pictures.source(place, count=2 if small else 8, size=3_000_000))
        url = stack.enter_context(stage.database("sqlite", place))
        port = stack.enter_context(stage.program(place, "tests.bench.floor", url))
        idle = p99(stage.load(port, seconds=seconds, rate=rate, warm_seconds=settle_seconds)["waits"])
        others = stack.enter_context(ThreadPoolExecutor(1))
        moving = others.submit(pictures.rclone, place, source, 2 if small else 400)
        busy = p99(stage.load(port, seconds=seconds, rate=rate, warm_seconds=settle_seconds)["waits"])
        assert small or not moving.done(), "the transfers were done before the measurement was"
        moving.result()
    return Sample(busy * 1e3, idle * 1e3)


def p99(waits: list[float]) -> float:
    return statistics.quantiles(waits, n=100)[98]
