"""A batch whose account is refused meanwhile: `python -m tests.runs.refused_account --database postgresql`.

The web server, worker processes, the sandbox, SeaweedFS and a webhook. The account's balance ends in the middle of the
batch, then its key is refused, then both are valid again. Nothing may fail or be made twice, the provider may see few
refused creates, and the events and the alarm's metric must report it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from receiver.base import telemetry
from receiver.sandbox import Knobs
from storage.accounts import batches, pauses
from storage.accounts.batches import Counts
from tests.harness import wait_until
from tests.running_product import Scene
from tests.runs.outcome import Outcome
from tests.webhook_receiver import SECRET, Hook

NAME = "refused"
METRICS_TOKEN = "a-metrics-token"
NO_BALANCE, WRONG_KEY = 1102, 1002
MOST_A_MINUTE = 5
ONE_LINE_SECONDS = 1.0  # an upper bound for a slow machine


class Refused(Scene):
    """A file to submit and what works on it. `balance`: tasks that the account can pay at first."""

    def __init__(self, folder: Path, hook: Hook, *, database: str, workers: int, lines: int, balance: int) -> None:
        super().__init__(folder)
        self.processes = workers
        self.hook, self.database, self.lines, self.balance = hook, database, lines, balance
        self.file = folder / f"{NAME}.jsonl"
        requests = ({"model_name": "kling-v3-omni", "prompt": f"boat {number}"} for number in range(lines))
        self.file.write_text("".join(json.dumps(each) + "\n" for each in requests))

    def _build(self) -> None:
        self.start_servers(self.database, Knobs(picture_bytes=4_000, balance=self.balance))
        self.know_the_store()
        self.start_processes(
            self.processes,
            RECEIVER_METRICS_TOKEN=METRICS_TOKEN,
            RECEIVER_EVENT_SINKS=f"hook={self.hook.url}",
            RECEIVER_EVENT_SECRETS=SECRET,
            RECEIVER_PRIVATE_EVENT_HOSTS=self.hook.host,
        )

    def submit(self) -> subprocess.Popen[bytes]:
        with (self.folder / "submit.log").open("ab") as log:
            command = [sys.executable, "-m", "receiver", "submit", "--batch", str(self.file), "--wait"]
            return subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=log, stderr=log)

    def counts(self) -> Counts:
        with self.parts.database.read() as session:
            batch = batches.find(session, NAME)
            return batches.counts(session, batch.id) if batch else Counts()

    def refused(self, code: int) -> int:
        return self.sandbox.ledger().counts[f"create:{code}"]

    def metric(self, name: str) -> float:
        """A gauge of `/metrics`, over all its labels."""
        url = f"http://127.0.0.1:{self.environment['RECEIVER_PORT']}/metrics"
        page = httpx.get(url, headers={"Authorization": f"Bearer {METRICS_TOKEN}"}, trust_env=False, timeout=20).text
        lines = [line for line in page.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


def run(folder: Path, *, database: str, workers: int, lines: int, balance: int, seconds: float) -> Outcome:
    """`seconds`: how long each of the two refusals lasts."""
    with (
        Hook() as hook,
        Refused(folder, hook, database=database, workers=workers, lines=lines, balance=balance) as scene,
    ):
        key, outcome = scene.sandbox.api_key, Outcome()
        metrics: dict[int, float] = {}
        command = scene.submit()
        try:
            wait_until(partial(scene.refused, NO_BALANCE), seconds=60 + lines * ONE_LINE_SECONDS)
            for code, knobs in ((NO_BALANCE, {}), (WRONG_KEY, {"balance": None, "api_keys": ["another-key"]})):
                scene.sandbox.set(**knobs)
                began = time.monotonic()
                wait_until(lambda: scene.metric("receiver_account_paused") == 1, seconds=60, every=0.5)
                metrics[code] = round(time.monotonic() - began, 1)
                wait_until(partial(scene.refused, code), seconds=120, every=0.5)
                time.sleep(max(0.0, began + seconds - time.monotonic()))
            scene.sandbox.set(api_keys=[key])
            mended = time.monotonic()
            wait_until(lambda: scene.counts().archived == lines, seconds=180 + lines * ONE_LINE_SECONDS, every=0.5)
            outcome.figures["all archived after the key was right again, seconds"] = round(time.monotonic() - mended, 1)
            code = command.wait(60)
        finally:
            command.kill()
            command.wait()
        wait_until(lambda: scene.metric("receiver_account_paused") == 0, seconds=60, every=0.5)
        outcome.faults += [f"submit --wait ended with {code}"] * bool(code)
        outcome.figures["the alarm's metric said so after seconds, by code"] = metrics
        _compare(scene, outcome)
        return outcome


def _compare(scene: Refused, outcome: Outcome) -> None:
    ledger, counts = scene.sandbox.ledger(), scene.counts()
    made = Counter(str(task.external_task_id) for task in ledger.tasks)
    refused = [create.at_ms / 1_000 for create in ledger.creates if create.code in (NO_BALANCE, WRONG_KEY)]
    later = [each for each in refused if each >= refused[0] + pauses.TRIAL_SECONDS]
    first = len(refused) - len(later)
    told = [(each.json["type"], each.json["data"]) for each in scene.hook.got]
    account = [(name, data.get("code")) for name, data in told if name.startswith("account.")]
    said = (scene.folder / "submit.log").read_text(errors="replace")
    checks = {
        f"{len(made)} tasks upstream, not {scene.lines}": len(made) == scene.lines,
        f"made twice upstream: {[name for name, count in made.items() if count > 1][:5]}": max(made.values()) == 1,
        f"not all archived: {counts}": counts.archived == counts.total == scene.lines,
        f"{first} creates refused in the first minute": first <= MOST_A_MINUTE,
        f"{most_in_a_minute(later)} creates refused in a later minute": most_in_a_minute(later) <= MOST_A_MINUTE,
        f"the events of the account: {account}": _is_told(account),
        "submit --wait does not tell of the pause": "is paused since" in said,
    }
    outcome.faults += [text for text, holds in checks.items() if not holds]
    outcome.faults += scene.bugs()
    outcome.figures |= {
        "tasks upstream": len(made),
        "archived": counts.archived,
        "failed": counts.failed,
        "creates refused": dict(Counter(create.code for create in ledger.creates if create.code)),
        "refused in the first minute": first,
        "most refused in a later minute": most_in_a_minute(later),
        "events of the account": ", ".join(f"{name} {code}" for name, code in account),
    }


def _is_told(account: Sequence[tuple[str, Any]]) -> bool:
    """Whether events report a pause for each of the reasons, and the resumption."""
    paused = {code for name, code in account if name == "account.paused"}
    return paused == {NO_BALANCE, WRONG_KEY} and account[-1][0] == "account.resumed"


def most_in_a_minute(times: Sequence[float]) -> int:
    return max((sum(start <= each < start + 60 for each in times) for start in times), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--balance", type=int, default=50, help="lines that are made before the balance is used up")
    parser.add_argument("--seconds", type=float, default=90, help="how long each of the two refusals lasts")
    chosen = parser.parse_args()
    telemetry.configure("error")
    with tempfile.TemporaryDirectory(prefix="receiver-refused-") as folder:
        outcome = run(
            Path(folder),
            database=chosen.database,
            workers=chosen.workers,
            lines=chosen.lines,
            balance=chosen.balance,
            seconds=chosen.seconds,
        )
    return outcome.report()


if __name__ == "__main__":
    sys.exit(main())
