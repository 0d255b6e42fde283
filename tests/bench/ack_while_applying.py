"""Acknowledgements while 5,000 deliveries are applied by two worker processes, on SQLite: p99 below half a second.

python -m tests.bench.ack_while_applying [--deliveries 5000] [--rate 100] [--database sqlite]

Every delivery reports a finished task with one picture, whose host refuses the connection, so the lane of assets writes
as well. Deliveries are sent at a steady rate until the 5,000 are applied (two minutes at most). Each wait counts from
the time when the delivery was due. Exit 1 above the goal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack

from sqlmodel import func, select

from storage.database.sessions import Database
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Callback
from storage.states import CallbackState, Step, TaskState
from tests.bench import stage
from tests.rows import new_task

GOAL_SECONDS = 0.5
WORKERS = 2
# No program listens at the discard port.
REFUSING = "127.0.0.1:9"
CHUNK = 250
LOAD_SECONDS, BOUND_SECONDS = 3.0, 120.0


def insert_row(database: Database, count: int) -> None:
    """Insert submitted tasks, each with an unapplied delivery that reports its end."""
    for start in range(0, count, CHUNK):
        with database.write() as session:
            rows = [
                new_task(session, state=TaskState.SUBMITTED, step=Step.READ, due_at=None, expected=1)
                for _ in range(start, min(start + CHUNK, count))
            ]
            store(session, [Delivery("kling", "push", row.id, body()) for row in rows])


def body() -> bytes:
    name = uuid.uuid4().hex
    pictures = [{"index": 0, "url": f"http://{REFUSING}/{name}.png"}]
    return json.dumps({"task_id": name, "task_status": "succeed", "task_result": {"images": pictures}}).encode()


def waiting(database: Database) -> int:
    """The number of our deliveries that are not applied yet. Deliveries sent meanwhile name no task."""
    with database.read() as session:
        unread = select(func.count()).where(Callback.state == CallbackState.RECEIVED)
        return session.exec(unread).one()


def measure(kind: str, deliveries: int, rate: float) -> tuple[list[float], float]:
    """The waits in seconds of all acknowledgements given meanwhile, and how long applying took."""
    with stage.folder() as place, ExitStack() as stack:
        url = stack.enter_context(stage.database(kind, place))
        database = Database(url)
        stack.callback(database.close)
        insert_row(database, deliveries)
        changes = {"RECEIVER_CONFIRM": "never", "RECEIVER_PRIVATE_RESULT_HOSTS": REFUSING}
        variables = stage.environment(url, **changes)
        port = stack.enter_context(stage.served(variables, place))
        stack.enter_context(stage.workers(variables, place, WORKERS))
        began, waits = time.monotonic(), list[float]()
        while (left := waiting(database)) and time.monotonic() < began + BOUND_SECONDS:
            say(f"{left} to apply")
            waits += stage.load(port, seconds=LOAD_SECONDS, rate=rate)["waits"]
        return waits, time.monotonic() - began


def say(words: str) -> None:
    print(words, flush=True)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deliveries", type=int, default=5_000)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    given = parser.parse_args(arguments)
    waits, seconds = measure(given.database, given.deliveries, given.rate)
    p50, p99 = (statistics.quantiles(waits, n=100)[place] * 1e3 for place in (49, 98))
    say(f"{given.database}: {given.deliveries} deliveries, {WORKERS} workers, {seconds:.0f} s")
    say(f"{len(waits)} acknowledgements: p50 {p50:.1f} ms, p99 {p99:.1f} ms, most {max(waits) * 1e3:.1f} ms")
    return int(p99 > GOAL_SECONDS * 1e3)


if __name__ == "__main__":
    sys.exit(main())
