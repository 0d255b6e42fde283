"""A file host with one oddity after the other: `python -m tests.runs.file_host --database postgresql --seconds 60`.

The web server and a worker process, the sandbox and SeaweedFS. Tasks are submitted under each oddity. All of their
files must be archived without help, within a number of requests per file. The short form runs in the suite.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from sqlmodel import col, func, select

from receiver.base import telemetry
from receiver.sandbox import Knobs
from storage.archive.unusable import MAX_TRIES
from storage.rows.models import Task
from storage.states import ArchiveState
from tests.harness import wait_until
from tests.running_product import Scene

PICTURE_BYTES = 60_000
FILES_A_TASK = 2
LINK_SECONDS = 2
# The time between two tries is at most this multiple of the time since the first (`storage.archive.unusable`), 10 %
# more by chance.
LONGEST_WAIT = 3.3
MACHINE_SECONDS = 60.0  # for a slow machine
# Oddities by chance end only by chance: nine tries, and one file in 512 needs more.
BY_CHANCE_SECONDS = 2_000.0


@dataclass(frozen=True)
class Oddity:
    """`knobs`: of the sandbox. `most`: requests that one file may take. `by_chance`: it meets some requests only."""

    name: str
    knobs: dict[str, Any]
    most: int = 1
    by_chance: bool = False


@dataclass
class Result:
    """`requests`: of each file, those among them that led to a redirect included. `faults`: empty = the promise holds.

    `dead_links`: requests with links that had expired; `reads`: queries of tasks.
    """

    oddity: Oddity
    files: int = 0
    archived: int = 0
    seconds: float = 0
    requests: list[int] = field(default_factory=list)
    dead_links: int = 0
    reads: int = 0
    faults: list[str] = field(default_factory=list)


def oddities(seconds: float) -> Iterator[Oddity]:
    """`seconds`: the duration of oddities that pass."""
    passes = {"cdn_break_share": 0.6, "cdn_break_seconds": seconds}
    yield Oddity("none", {})
    yield Oddity("an error page with status 200", {"cdn_html_seconds": seconds}, MAX_TRIES)
    yield Oddity("an empty body with status 200", {"cdn_empty_seconds": seconds}, MAX_TRIES)
    yield Oddity("redirects to itself", {"cdn_self_redirect_seconds": seconds}, MAX_TRIES)
    yield Oddity(
        f"an error page, and links that live {LINK_SECONDS} s",
        {"cdn_html_seconds": seconds, "result_lifetime_seconds": LINK_SECONDS, "fresh_urls_on_read": True},
        MAX_TRIES,
    )
    yield Oddity("cut without a length, half of the time", {"cdn_truncated_silent_rate": 0.5}, MAX_TRIES, True)
    yield Oddity("cut before its length, half of the time", {"cdn_truncated_rate": 0.5}, MAX_TRIES, True)
    yield Oddity("breaks at 60 %, no ranges", passes, MAX_TRIES)
    yield Oddity("breaks at 60 % for ever, with ranges", {"cdn_break_share": 0.6, "cdn_ranges": True}, 2)
    yield Oddity("206 with the whole file", {"cdn_206_whole": True})
    yield Oddity("a Content-Encoding that names no coding", {"cdn_content_encoding": "UTF-8"})
    yield Oddity("gzip that was not asked for", {"cdn_content_encoding": "gzip"})
    yield Oddity("a line that is no header", {"cdn_junk_header": True})
    yield Oddity("a space in links and in Location", {"cdn_link_form": "space", "cdn_redirects": 1}, 2)
    yield Oddity("blanks and a line end around links", {"cdn_link_form": "blanks"})


class FileHost(Scene):
    def __init__(self, folder: Path, database: str) -> None:
        super().__init__(folder)
        self._database = database

    def _build(self) -> None:
        self.start_servers(self._database, Knobs(picture_bytes=PICTURE_BYTES))
        self.know_the_store()
        self.start_processes(1)

    def play(self, oddity: Oddity, tasks: int, bound_seconds: float) -> Result:
        """Submit `tasks` tasks under this oddity and wait until all is archived, for a bounded time."""
        defaults = Knobs(picture_bytes=PICTURE_BYTES, api_keys=[self.sandbox.api_key]).model_dump()
        self.sandbox.set(**{**defaults, **oddity.knobs})
        before, started = self.sandbox.ledger().counts, time.monotonic()
        request = {"model_name": "kling-image-o1", "prompt": "a boat", "n": FILES_A_TASK}
        names = [self.parts.submitter.submit(request).task.external_task_id for _ in range(tasks)]
        result = Result(oddity, files=tasks * FILES_A_TASK)
        try:
            wait_until(lambda: self._archived(names) == tasks, seconds=bound_seconds, every=0.25)
        except AssertionError:
            result.faults.append(f"{oddity.name}: {self._archived(names)} of {tasks} tasks archived")
        result.seconds = time.monotonic() - started
        self._judge(result, names)
        counts = self.sandbox.ledger().counts - before
        result.dead_links, result.reads = counts["cdn:403"], counts["query"]
        return result

    def _archived(self, names: list[str]) -> int:
        with self.parts.database.read() as session:
            done = select(func.count()).where(Task.archive == ArchiveState.ARCHIVED)
            return session.exec(done.where(col(Task.external_task_id).in_(names))).one()

    def _judge(self, result: Result, names: list[str]) -> None:
        """Compare the provider's files with the archived ones, and count the requests."""
        ledger, objects = self.sandbox.ledger(), {each.key: each.size for each in self.parts.bucket.list("")}
        made = [asset for name in names for asset in ledger.task(name).assets]
        kept = [asset for name in names for asset in self._assets(name)]
        right = {(asset.sha256, asset.size) for asset in made}
        result.requests = sorted(asset.hits for asset in made)
        result.archived = sum(
            (asset.sha256, asset.size) in right and objects.get(str(asset.key)) == asset.size for asset in kept
        )
        oddity = result.oddity
        if len(made) != result.files or result.archived != result.files:
            result.faults.append(f"{oddity.name}: {result.archived} of {result.files} files are kept as they were made")
        if result.requests and max(result.requests) > oddity.most:
            result.faults.append(f"{oddity.name}: {max(result.requests)} requests for one file, not {oddity.most}")

    def _assets(self, name: str) -> list[Any]:
        from tests.pipeline import assets_of, task_of

        return assets_of(self.parts, task_of(self.parts, name))


def run(folder: Path, *, database: str, tasks: int, seconds: float, only: str = "") -> Iterator[Result]:
    """`only`: oddities whose names hold this text."""
    bound = seconds * LONGEST_WAIT + MACHINE_SECONDS
    with FileHost(folder, database) as host:
        for oddity in oddities(seconds):
            if only in oddity.name:
                yield host.play(oddity, tasks, BY_CHANCE_SECONDS if oddity.by_chance else bound)
        for line in host.bugs():
            yield Result(Oddity("log", {}), faults=[line])


def row(result: Result) -> str:
    least, middle, most = (
        (result.requests[0], median(result.requests), result.requests[-1]) if result.requests else (0, 0, 0)
    )
    cells = (result.oddity.name, f"{result.archived} of {result.files}", f"{result.seconds:.0f}", least, f"{middle:g}",
             most, result.dead_links, result.reads)  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


HEAD = (
    "| file host | files archived | seconds | requests a file: fewest | median | most | dead links | reads |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=8, help="how long an oddity lasts that passes")
    parser.add_argument("--only", default="", help="oddities whose names hold this text")
    chosen = parser.parse_args()
    telemetry.configure("error")
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="receiver-file-host-") as folder:
        sys.stdout.write(HEAD)
        for result in run(
            Path(folder), database=chosen.database, tasks=chosen.tasks, seconds=chosen.seconds, only=chosen.only
        ):
            sys.stdout.write(row(result))
            sys.stdout.flush()
            faults += result.faults
    sys.stdout.write("".join(f"FAULT {fault}\n" for fault in faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
