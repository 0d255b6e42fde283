"""Every event is delivered though its receiver fails: `python -m tests.event_delivery_run --tasks 1000 --down 60`.

The web server and a worker process, the sandbox, SeaweedFS, and a webhook that fails 30 % of its requests and is down
for a while. It runs once without and once with the webhook, to measure its cost for archiving. Then the rows are
compared with the delivered events: every event at least once, per task in order, one id for one event. The short form
runs in the suite.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from sqlmodel import col, func, select

from receiver.base import telemetry
from receiver.events.cloudevents import event_id
from receiver.sandbox import Knobs
from storage.database.sessions import Database
from storage.rows.models import Dispatch, Event, Task
from storage.states import ArchiveState, DispatchState
from tests.chaos.processes import Kept
from tests.harness import wait_until
from tests.running_product import Scene
from tests.runs.outcome import Outcome
from tests.webhook_receiver import SECRET, Got, Hook

FAIL_RATE = 0.3
SUBMITTERS = 8
# The schedule of days, in seconds; long enough for 30 % of failures a dozen times in a row.
RETRY_SECONDS = "1,2,4,8,15,15,15,15,15,15,15,15,15,15,15,15"
DOWN_AT, MEANWHILE = "went down after seconds", "archived while it was down"
ONE_TASK_SECONDS = 1.0  # an upper bound for a slow machine


class Failing:
    """Answers 500 to a share of the requests, the same ones for the same seed."""

    def __init__(self, rate: float = FAIL_RATE, seed: int = 1) -> None:
        self._rate = rate
        self._random = random.Random(seed)

    def __call__(self) -> int:
        return 500 if self._random.random() < self._rate else 204


def open_dispatches(database: Database) -> int:
    with database.read() as session:
        unsequenced = session.exec(select(func.count()).where(col(Event.seq).is_(None))).one()
        return unsequenced + session.exec(select(func.count()).where(Dispatch.state == DispatchState.DUE)).one()


def compare(database: Database, got: list[Got]) -> Outcome:
    """Compare the rows with the delivered events."""
    with database.read() as session:
        rows = session.exec(
            select(Event, Task.external_task_id).outerjoin(Task, col(Task.id) == col(Event.task_id)).order_by(Event.seq)
        ).all()
    wanted: dict[str, list[str]] = {}
    for event, subject in rows:
        wanted.setdefault(subject or "", []).append(event_id(event))
    taken = [each for each in got if 200 <= each.status < 300]
    told = [(each.json.get("subject", ""), each.json["id"]) for each in taken]
    arrived: dict[str, dict[str, None]] = {}
    for subject, key in told:
        arrived.setdefault(subject, {}).setdefault(key)
    bodies = {(each.headers["webhook-id"], each.body) for each in got}
    missing = {key for keys in wanted.values() for key in keys} - {key for _, key in told}
    disordered = [subject for subject, keys in wanted.items() if subject and list(arrived.get(subject, ())) != keys]
    outcome = Outcome()
    outcome.faults += [f"{len(missing)} events never arrived"] if missing else []
    outcome.faults += [f"{len(disordered)} tasks out of order, the first {disordered[0]}"] if disordered else []
    outcome.faults += ["an id changed between tries"] if len(bodies) != len({key for key, _ in bodies}) else []
    outcome.figures = {
        "events": len(rows),
        "requests": len(got),
        "failed on purpose": len(got) - len(taken),
        "arrived more than once": sum(count > 1 for count in Counter(key for _, key in told).values()),
    }
    return outcome


# -- the long form ----------------------------------------------------------------------------------------------------


class Stage(Scene):
    """`hook`: the receiver of events; None = none."""

    def __init__(self, folder: Path, *, database: str, hook: Hook | None) -> None:
        folder.mkdir()
        super().__init__(folder)
        self._database, self._hook = database, hook

    def _build(self) -> None:
        self.start_servers(self._database, Knobs(picture_bytes=20_000, submitted_seconds=0.05, processing_seconds=0.1))
        self.know_the_store()
        self.start_processes(1, **self._sink())
        (self.worker,) = self.workers

    def _sink(self) -> dict[str, str]:
        if self._hook is None:
            return {}
        return {
            "RECEIVER_EVENT_SINKS": f"hook={self._hook.url}",
            "RECEIVER_EVENT_SECRETS": SECRET,
            "RECEIVER_PRIVATE_EVENT_HOSTS": self._hook.host,
            "RECEIVER_EVENT_RETRY_SECONDS": RETRY_SECONDS,
        }

    def submit(self, tasks: int) -> None:
        request = {"model_name": "kling-image-o1", "prompt": "a boat"}
        with ThreadPoolExecutor(SUBMITTERS) as pool:
            for done in [pool.submit(self.parts.submitter.submit, request) for _ in range(tasks)]:
                done.result()

    def archived(self) -> int:
        with self.parts.database.read() as session:
            return session.exec(select(func.count()).where(Task.archive == ArchiveState.ARCHIVED)).one()

    def offsets(self) -> list[float]:
        """When each task was archived, in seconds since the first was submitted."""
        with self.parts.database.read() as session:
            rows = session.exec(select(Task.created_at, Task.archived_at)).all()
        start = min(created for created, _ in rows)
        return [_seconds(start, archived) for _, archived in rows if archived]

    def seconds(self) -> float:
        """Seconds since the first task was submitted."""
        with self.parts.database.read() as session:
            return _seconds(session.exec(select(func.min(Task.created_at))).one(), self.parts.database.now())

    def archiving(self) -> dict[str, Any]:
        """The duration of archiving: of all tasks, and of each from its end at the provider."""
        with self.parts.database.read() as session:
            rows = session.exec(select(Task.created_at, Task.completed_at, Task.archived_at)).all()
        spans = [_seconds(completed, archived) for _, completed, archived in rows]
        return {
            "all archived after seconds": round(_seconds(min(row[0] for row in rows), max(row[2] for row in rows)), 1),
            "one archived after seconds, median": round(median(spans), 2),
            "one archived after seconds, 99 %": round(quantiles(spans, n=100)[98], 2),
            "CPU seconds of the worker": round(_cpu_seconds(self.worker), 1),
        }


def _seconds(start: datetime | None, end: datetime | None) -> float:
    assert start and end
    return (end - start).total_seconds()


def _cpu_seconds(kept: Kept) -> float:
    assert kept._process is not None
    fields = Path(f"/proc/{kept._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def alone(folder: Path, *, tasks: int, database: str) -> tuple[dict[str, Any], list[float]]:
    """Run the same work without a receiver of events. Returns its figures, and when each task was archived."""
    with Stage(folder / "alone", database=database, hook=None) as stage:
        stage.submit(tasks)
        wait_until(lambda: stage.archived() == tasks, seconds=60 + tasks * ONE_TASK_SECONDS, every=0.2)
        return stage.archiving(), stage.offsets()


def run(folder: Path, *, tasks: int, down_seconds: float, database: str) -> Outcome:
    """Run with the receiver down after a tenth is archived."""
    with Hook(Failing()) as hook, Stage(folder / "told", database=database, hook=hook) as stage:
        with ThreadPoolExecutor(1) as pool:
            submitting = pool.submit(stage.submit, tasks)
            wait_until(lambda: stage.archived() >= tasks / 10, seconds=60 + tasks * ONE_TASK_SECONDS, every=0.1)
            before, requests, went_down = stage.archived(), len(hook.got), stage.seconds()
            hook.down()
            time.sleep(down_seconds)
            meanwhile = stage.archived() - before
            waiting = open_dispatches(stage.parts.database)
            hook.up()
            submitting.result()
        wait_until(lambda: stage.archived() == tasks, seconds=60 + tasks * ONE_TASK_SECONDS, every=0.2)
        archiving = stage.archiving()
        started = time.monotonic()
        wait_until(lambda: not open_dispatches(stage.parts.database), seconds=300 + tasks * ONE_TASK_SECONDS, every=0.2)
        told_after = round(time.monotonic() - started, 1)
        outcome = compare(stage.parts.database, list(hook.got))
        outcome.figures |= {
            "requests before it went down": requests,
            DOWN_AT: round(went_down, 1),
            MEANWHILE: meanwhile,
            "events that waited when it came back": waiting,
            "all told after the last was archived, seconds": told_after,
        } | archiving
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000)
    parser.add_argument("--down", type=float, default=60, help="seconds")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    chosen = parser.parse_args()
    telemetry.configure("warning")
    with tempfile.TemporaryDirectory(prefix="receiver-told-") as folder:
        without, offsets = alone(Path(folder), tasks=chosen.tasks, database=chosen.database)
        outcome = run(Path(folder), tasks=chosen.tasks, down_seconds=chosen.down, database=chosen.database)
    start = outcome.figures[DOWN_AT]
    without[MEANWHILE] = sum(start <= offset < start + chosen.down for offset in offsets)
    for name in outcome.figures.keys() & without.keys():
        outcome.figures[name] = f"{outcome.figures[name]} (without events: {without[name]})"
    return outcome.report()


if __name__ == "__main__":
    sys.exit(main())
