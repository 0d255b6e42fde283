"""Times of the console's pages with 1,000,000 tasks: `python -m tests.bench.console_pages [URL] [--times 40]`.

URL: a database that `tests.bench.million` has filled. Without it one of each kind is filled first, which takes some
minutes. All views are fetched in turn, so that cached values are read again, too. `first`: from a server that has just
started. CPU: of the server and PostgreSQL, which other work on the machine does not disturb. The goal is a p95 of 300
ms; the exit code is 1 if a view misses it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import psycopg

from storage.database.sessions import Database
from tests.bench import stage
from tests.bench.million import BATCHES, TASKS, build, task_id
from tests.console_reader import KEYS, Reader
from tests.pipeline import free_port

GOAL_SECONDS = 0.3
MAX_TIMES = 500


def views(tasks: int) -> dict[str, str]:
    """The fetched views: each page and list, its filters, and positions in the middle of the table."""
    now = datetime.now(UTC)
    middle, day = now - timedelta(days=15), (now - timedelta(days=3)).date()
    before = f"before={middle:%Y-%m-%dT%H:%M:%S}~"
    return {
        "overview": "",
        "overview, 30 days": "?span=30d",
        "tasks": "/tasks",
        "tasks, in the middle": f"/tasks?{before}{'f' * 32}",
        "tasks, failed": "/tasks?state=failed",
        "tasks, submitted": "/tasks?state=submitted",
        "tasks, created (none)": "/tasks?state=created",
        "tasks, incomplete": "/tasks?archive=incomplete",
        "tasks, archiving": "/tasks?archive=archiving",
        "tasks, files failed": "/tasks?files=failed",
        "tasks, files waiting": "/tasks?files=waiting",
        "tasks, files expiring": "/tasks?files=expiring",
        "tasks, provider": "/tasks?provider=kling",
        "tasks, model": "/tasks?model=kling-image-o1",
        "tasks, other model": "/tasks?model=none",
        "tasks, batch": f"/tasks?batch=batch-{BATCHES // 2}",
        "tasks, batch and failed": f"/tasks?batch=batch-{BATCHES // 2}&state=failed",
        "tasks, one day": f"/tasks?since={day}&until={day}",
        "tasks, one day and model": f"/tasks?since={day}&until={day}&model=none",
        "tasks, words": "/tasks?q=boat",
        "tasks, absent words": "/tasks?q=absent",
        "tasks, absent words in the middle": f"/tasks?q=absent&{before}{'f' * 32}",
        "tasks, absent words and failed": "/tasks?q=absent&state=failed",
        "task": f"/tasks/million-{tasks // 2}",
        "task, newest": f"/tasks/million-{tasks}",
        "gallery": "/gallery",
        "gallery, in the middle": f"/gallery?{before}{'f' * 32}",
        "gallery, words": "/gallery?q=boat",
        "gallery, absent words": "/gallery?q=absent",
        "gallery, batch": f"/gallery?batch=batch-{BATCHES // 2}",
        "deliveries": "/deliveries",
        "deliveries, in the middle": f"/deliveries?{before}{tasks}",
        "deliveries, applied": "/deliveries?state=applied",
        "deliveries, refused": "/deliveries?state=refused",
        "deliveries, unmatched": "/deliveries?state=unmatched",
        "deliveries, dismissed": "/deliveries?state=dismissed",
        "deliveries, received (none)": "/deliveries?state=received",
        "deliveries, cause": "/deliveries?cause=absent",
        "deliveries, task": f"/deliveries?task=million-{tasks // 2}",
        "delivery": f"/deliveries/{tasks // 2}",
        "replay of refused": "/deliveries/replay?state=refused",
        "events": "/events",
        "events, in the middle": f"/events?before={tasks // 2}",
        "events, dead": "/events?state=dead",
        "events, due": "/events?state=due",
        "events, sink": "/events?sink=hook",
        "batches": "/batches",
        "batch": f"/batches/{BATCHES // 2:032x}",
        "batch, newest": f"/batches/{BATCHES:032x}",
        "ask": "/ask",
        "ask, again": f"/ask?again={task_id(tasks // 2)}",
        "archive": "/archive",
        "settings": "/settings",
    }


class Fetch(NamedTuple):
    seconds: float
    cpu_seconds: float


def measure(url: str, tasks: int, times: int) -> dict[str, list[Fetch]]:
    """The fetches of each view, in their order."""
    found: dict[str, list[Fetch]] = {name: [] for name in views(tasks)}
    port = free_port()
    with stage.folder() as place, stage.seaweed(place) as store:
        keys = {"RECEIVER_CONSOLE_KEYS": KEYS, "RECEIVER_PORT": str(port), "RECEIVER_WORKERS": "0"}
        command = [sys.executable, "-m", "receiver", "serve"]
        with stage.running(command, stage.environment(url, **store, **keys), place) as server:
            stage.wait_for(f"http://{stage.HOST}:{port}/readyz")
            spent = Spent([server.pid, *_postmaster(url)])
            with Reader(f"http://{stage.HOST}:{port}") as reader:
                for _ in range(times):
                    for name, path in views(tasks).items():
                        found[name].append(_fetch(reader, path, spent))
    return found


def _fetch(reader: Reader, path: str, spent: Spent) -> Fetch:
    spent.since_last()
    began = time.perf_counter()
    reader.page(path)
    return Fetch(time.perf_counter() - began, spent.since_last())


def _postmaster(url: str) -> list[int]:
    if url.startswith("sqlite"):
        return []
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        backend = connection.info.backend_pid
        return [int(Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()[1])]


class Spent:
    """CPU of these processes and their children. Each thread is known by its number, as the kernel's list of children
    leaves some out while others end.
    """

    def __init__(self, roots: list[int]) -> None:
        self._roots = roots
        self._known: dict[str, float] = {}
        self.since_last()

    def since_last(self) -> float:
        now = {thread: seconds for root in self._roots for thread, seconds in _threads(root)}
        spent = sum(seconds - self._known.get(thread, 0.0) for thread, seconds in now.items())
        self._known |= now
        return spent


def _threads(process_id: int) -> Iterator[tuple[str, float]]:
    with suppress(OSError):  # a process has ended
        for thread in Path(f"/proc/{process_id}/task").iterdir():
            yield thread.name, int((thread / "schedstat").read_text().split()[0]) / 1e9
            for child in (thread / "children").read_text().split():
                yield from _threads(int(child))


def report(kind: str, found: dict[str, list[Fetch]]) -> bool:
    """Print a line for each view, the slowest last. Returns whether all meet the goal."""
    for name, (first, *later) in sorted(found.items(), key=lambda pair: p95([each.seconds for each in pair[1][1:]])):
        words = [f"{kind}, {name}: first {first.seconds * 1e3:.0f} ms, CPU {first.cpu_seconds * 1e3:.0f}"]
        for what, values in (("", [each.seconds for each in later]), ("CPU ", [each.cpu_seconds for each in later])):
            words.append(f"{what}median {statistics.median(values) * 1e3:.0f}, p95 {p95(values) * 1e3:.0f}")
        print("; ".join(words), flush=True)  # noqa: T201
    return all(p95([each.seconds for each in fetches[1:]]) <= GOAL_SECONDS for fetches in found.values())


def p95(values: list[float]) -> float:
    return sorted(values)[max(0, -(-len(values) * 95 // 100) - 1)]


def measure_both(tasks: int, times: int) -> bool:
    is_good = True
    for kind in ("sqlite", "postgresql"):
        with stage.folder() as place, stage.databases(kind, place) as create:
            url = create("million")
            database = Database(url)
            build(database, tasks)
            database.close()
            is_good &= report(kind, measure(url, tasks, times))
    return is_good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="of a database that tests.bench.million has filled")
    parser.add_argument("--tasks", type=int, default=TASKS, help="how many it has")
    parser.add_argument("--times", type=int, default=40, help="how often each view is fetched")
    given = parser.parse_args()
    times = max(3, min(given.times, MAX_TIMES))
    if given.url:
        is_good = report(given.url.partition(":")[0], measure(given.url, given.tasks, times))
    else:
        is_good = measure_both(given.tasks, times)
    if not is_good:
        sys.exit(1)


if __name__ == "__main__":
    main()
