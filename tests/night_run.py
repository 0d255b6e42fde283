"""A long batch, killed on the way: `python -m tests.night_run --lines 2000 --database postgresql`.

Two worker processes, the web server with a gateway client that submits beside it, the sandbox with its own limit of
slots. The command that submits the file and both workers are killed with SIGKILL, twice, each time while the workers
hold leases of creates and of files; the same command is started again. Then provider, rows, bucket and report are
compared. The short form of it runs in the suite.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from sqlmodel import col, func, select

from receiver.sandbox import Knobs
from storage.accounts import batches
from storage.accounts.batches import Counts
from storage.rows.models import Asset, Task
from storage.states import Step
from tests.forked import Forked
from tests.harness import wait_until
from tests.running_product import Scene
from tests.runs.outcome import Outcome
from tests.unreported_tasks import unanswered, undelivered

NAME = "night"
SLOTS = 20
API_KEY = "an-api-key-of-the-gateway"
# One line in this many asks for two pictures, or for nine: half of all slots, which must not starve.
TWO_IN, NINE_IN = 10, 50
ONE_LINE_SECONDS = 3.0  # an upper bound for a slow machine; two thousand lines take some minutes
GATEWAY_PAUSE_SECONDS = 0.3
PATH = "/kling/v1/images/omni-image"


def request(number: int) -> dict[str, Any]:
    n = 9 if number % NINE_IN == 7 else 2 if number % TWO_IN == 0 else 1
    return {"model_name": "kling-v3-omni", "prompt": f"a boat, seen for the {number}. time", "n": n}


class Night(Scene):
    """A file to submit, and all processes that work on it."""

    def __init__(self, folder: Path, *, lines: int, database: str, task_seconds: float, count: int) -> None:
        super().__init__(folder)
        self.count = count
        self.lines, self.database, self.task_seconds = lines, database, task_seconds
        self.file = folder / f"{NAME}.jsonl"
        self.file.write_text("".join(json.dumps(request(number)) + "\n" for number in range(lines)))
        self.reports = [folder / "report.json", folder / "report.csv"]

    def _build(self) -> None:
        times = {"submitted_seconds": 0.05, "processing_seconds": self.task_seconds}
        self.start_servers(self.database, Knobs(picture_bytes=4_000, concurrency_limit=SLOTS, **times))
        self.know_the_store()
        self.start_processes(
            self.count,
            RECEIVER_API_KEYS=API_KEY,
            RECEIVER_KLING_SLOTS=str(SLOTS),
            RECEIVER_WORKER_THREADS="4",
            RECEIVER_LEASE_SECONDS="5",
            RECEIVER_POLL_AFTER_SECONDS="5",
        )

    def submit(self) -> Forked:
        """The command that a person would start, and start again."""
        words = ["submit", "--batch", str(self.file), "--wait"]
        words += [word for report in self.reports for word in ("--report", str(report))]
        return Forked(tuple(words), self.environment, self.folder, out=self.folder / "submit.log")

    def counts(self) -> Counts:
        with self.parts.database.read() as session:
            batch = batches.find(session, NAME)
            return batches.counts(session, batch.id) if batch else Counts()


class GatewayClient(threading.Thread):
    """A client of Kling's API beside the batch. It repeats a create that was refused for lack of slots."""

    def __init__(self, url: str, most: int) -> None:
        super().__init__(daemon=True)
        self._url, self._most = url, most
        self.ended = threading.Event()
        self.accepted: list[str] = []
        self.codes: Counter[str] = Counter()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60) as client:
            while not self.ended.is_set() and len(self.accepted) < self._most:
                self._create(client, f"beside-{len(self.accepted)}")
                self.ended.wait(GATEWAY_PAUSE_SECONDS)

    def _create(self, client: httpx.Client, external_id: str) -> None:
        body = {**request(1), "prompt": external_id, "external_task_id": external_id}
        try:
            answer = client.post(PATH, json=body)
        except httpx.HTTPError as error:
            self.codes[type(error).__name__] += 1
            return
        code = str(answer.json().get("code"))
        self.codes[f"{answer.status_code}/{code}"] += 1
        if answer.status_code == 200 or "already exists" in answer.text:
            self.accepted.append(external_id)


def run(
    folder: Path, *, lines: int, database: str, kills: int = 2, task_seconds: float = 0.1, workers: int = 2
) -> Outcome:
    """One night: submit, kill, submit again, wait, compare. `task_seconds`: how long the provider takes for a task."""
    with Night(folder, lines=lines, database=database, task_seconds=task_seconds, count=workers) as night:
        outcome, started = Outcome(), time.monotonic()
        client = GatewayClient(f"http://127.0.0.1:{night.environment['RECEIVER_PORT']}", max(5, lines // 50))
        client.start()
        for kill in range(1, kills + 1):
            outcome.figures[f"leases lost at kill {kill}"] = _submit_and_kill(night, lines // (2 * kills))
        last = night.submit()
        code = last.wait(lines * ONE_LINE_SECONDS + 60)
        seconds = time.monotonic() - started
        client.ended.set()
        client.join(60)
        _wait_for_the_rest(night)
        outcome.figures |= {"seconds": round(seconds, 1), "lines a second": round(lines / seconds, 1)}
        if code != 0:
            outcome.faults.append(f"the last command ended with {code}: {_tail(night)}")
        _compare(night, client, outcome)
        return outcome


def _submit_and_kill(night: Night, answered: int) -> list[int]:
    """Start the command, and kill it and the workers with SIGKILL while answers are missing. `answered`: how many
    creates are answered before. Returns how many leases the workers held, of creates and of files.

    Without missing answers a worker holds a lease for milliseconds, and a kill would rarely meet one.
    """
    command = night.submit()
    seconds = night.lines * ONE_LINE_SECONDS + 60
    with unanswered(night.sandbox, but=answered), undelivered(night.sandbox, but=answered // 2):
        try:
            wait_until(lambda: all(_leases(night)) or _ended(command, night), seconds=seconds, every=0.1)
            for worker in night.workers:
                worker.kill()
            return _leases(night)
        finally:
            command.kill()
            command.wait()


def _leases(night: Night) -> list[int]:
    """How many leases workers hold, or held when they were killed: of the batch's creates, and of files."""
    creates = (col(Task.step) == Step.CREATE, col(Task.batch_id).is_not(None))
    with night.parts.database.read() as session:
        held = [select(func.count()).where(col(Task.lease).is_not(None), *creates)]
        held += [select(func.count()).where(col(Asset.lease).is_not(None))]
        return [session.exec(each).one() for each in held]


def _ended(command: Forked, night: Night) -> bool:
    assert command.poll() in (None, 0), _tail(night)
    return False


def _tail(night: Night) -> str:
    return (night.folder / "submit.log").read_text(errors="replace")[-2_000:]


def _wait_for_the_rest(night: Night) -> None:
    """Wait until the gateway's tasks have ended, too."""
    from receiver.tasks.task_view import is_over

    def all_over() -> bool:
        with night.parts.database.read() as session:
            return all(is_over(task) for task in session.exec(select(Task)))

    wait_until(all_over, seconds=120, every=0.5)


def _compare(night: Night, client: GatewayClient, outcome: Outcome) -> None:
    ledger, counts = night.sandbox.ledger(), night.counts()
    made = Counter(str(task.external_task_id) for task in ledger.tasks)
    mine = {name for name in made if name.startswith(f"{NAME}-")}
    report = json.loads(night.reports[0].read_text()) if night.reports[0].exists() else {"tasks": []}
    kept = {file["sha256"]: file["key"] for line in report["tasks"] for file in line["files"] if file["key"]}
    drawn = {asset.sha256 for asset in ledger.assets.values() if asset.external_task_id in mine}
    with night.reports[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    present = {each.key for each in night.parts.bucket.list("")}
    checks = {
        f"{len(mine)} batch tasks upstream, not {night.lines}": len(mine) == night.lines,
        f"made twice upstream: {[name for name, count in made.items() if count > 1][:5]}": max(made.values()) == 1,
        f"not all archived: {counts}": counts.archived == counts.total == night.lines,
        f"slots passed the limit: {ledger.slots_peak}": ledger.slots_peak <= SLOTS,
        f"the report has {len(report['tasks'])} lines": len(report["tasks"]) == night.lines,
        "the report's files are not those that were made": set(kept) == drawn and len(rows) == len(drawn),
        "a key of the report is not in the bucket": set(kept.values()) <= present,
        "a task of the gateway client was not made": set(client.accepted) <= set(made),
        "slots are held at the end": ledger.slots_held == 0 and not _held(night),
    }
    outcome.faults += [text for text, holds in checks.items() if not holds]
    outcome.faults += [line for each in (night.web, *night.workers) for line in each.bugs()]
    outcome.figures |= {
        "batch tasks upstream": len(mine),
        "archived": counts.archived,
        "files": len(drawn),
        "most slots at once": ledger.slots_peak,
        "refused for want of slots upstream": ledger.counts["create:1303"],
        "creates in all": len(ledger.creates),
        "beside": f"{len(client.accepted)} accepted, answers {dict(client.codes)}",
    }


def _held(night: Night) -> dict[Any, int]:
    with night.parts.database.read() as session:
        return night.parts.slots.held(session)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=2_000)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--task-seconds", type=float, default=3, help="3: all slots are held most of the time")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="receiver-night-") as folder:
        outcome = run(Path(folder), lines=chosen.lines, database=chosen.database, task_seconds=chosen.task_seconds)
    return outcome.report()


if __name__ == "__main__":
    sys.exit(main())
