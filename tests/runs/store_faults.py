"""The cost of the store's faults: `python -m tests.runs.store_faults --database postgresql`.

First the store is down again and again for longer than a link lives. Then a proxy in front of it refuses a few large
files, and many small ones must not wait for them. The web server, a worker process, the sandbox and SeaweedFS.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sqlmodel import col, func, select

from receiver.base import telemetry
from receiver.sandbox import Knobs
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.harness import wait_until
from tests.running_product import Scene
from tests.runs.outcome import Outcome

LINK_SECONDS, AWAY_SECONDS, ROUNDS, TASKS_A_ROUND = 2, 8.0, 20, 3
# After the store is back: the longest pause of a circuit is 30 s, but eight seconds of outage open it for eight.
BACK_SECONDS = 30.0
LARGE, SMALL, LARGE_BYTES, SMALL_BYTES, LIMIT_BYTES = 6, 100, 400_000, 4_000, 100_000
TOO_LARGE = Answer(413, {"content-type": "text/html"}, b"<html>413 Request Entity Too Large</html>")
# The most that a hundred small files wait longer because six large ones are refused.
With_SECONDS = 5.0
SECONDS = 180.0


class Store(Scene):
    """`behind_proxy`: whether the product reaches the store through `self.proxy`."""

    def __init__(self, folder: Path, database: str, knobs: Knobs, *, behind_proxy: bool = False) -> None:
        folder.mkdir()
        super().__init__(folder)
        self._database, self._knobs, self._behind_proxy = database, knobs, behind_proxy

    def _build(self) -> None:
        self.start_servers(self._database, self._knobs)
        self.know_the_store()
        proxy: AbstractContextManager[Any] = FaultProxy(self.seaweed) if self._behind_proxy else nullcontext()
        self.proxy = self.stack.enter_context(proxy)
        self.start_processes(1, store_url=self.proxy.endpoint_url if self._behind_proxy else None)

    def submit(self, count: int) -> list[str]:
        request = {"model_name": "kling-image-o1", "prompt": "a boat"}
        return [self.parts.submitter.submit(request).task.external_task_id for _ in range(count)]

    def archived(self, names: list[str]) -> int:
        with self.parts.database.read() as session:
            done = select(func.count()).where(Task.archive == ArchiveState.ARCHIVED)
            return session.exec(done.where(col(Task.external_task_id).in_(names))).one()

    def wait_for(self, names: list[str]) -> None:
        wait_until(lambda: self.archived(names) == len(names), seconds=SECONDS, every=0.1)

    def waits(self, names: list[str]) -> list[float]:
        """Seconds of each file from the end of its task to its archive, in order."""
        joined = select(Asset.archived_at, Task.completed_at).join(Task, col(Task.id) == col(Asset.task_id))
        with self.parts.database.read() as session:
            rows = session.exec(joined.where(col(Task.external_task_id).in_(names))).all()
        return sorted((archived - completed).total_seconds() for archived, completed in rows if archived and completed)

    def waiting(self) -> int:
        with self.parts.database.read() as session:
            return session.exec(select(func.count()).where(Asset.state == AssetState.DUE)).one()


def outages(folder: Path, *, database: str, rounds: int = ROUNDS, away_seconds: float = AWAY_SECONDS) -> Outcome:
    """Links expire while the store is down. Afterwards everything continues by itself."""
    knobs = Knobs(picture_bytes=SMALL_BYTES, result_lifetime_seconds=LINK_SECONDS, fresh_urls_on_read=True)
    outcome, after = Outcome(), []
    with Store(folder / "outages", database, knobs) as scene:
        for number in range(rounds):
            scene.seaweed.stop()
            names = scene.submit(TASKS_A_ROUND)
            time.sleep(away_seconds)
            scene.seaweed.start()
            back = time.monotonic()
            try:
                scene.wait_for(names)
            except AssertionError:
                outcome.faults.append(f"outage {number + 1}: {scene.archived(names)} of {len(names)} tasks archived")
            after.append(time.monotonic() - back)
        outcome.faults += scene.bugs()
        outcome.figures = {
            "outages": rounds,
            "files": len(scene.sandbox.ledger().assets),
            "dead links met": scene.sandbox.ledger().counts["cdn:403"],
            "seconds until all is archived after the store is back, median": round(median(after), 1),
            "the longest": round(max(after), 1),
        }
    if max(after) > away_seconds + BACK_SECONDS:
        outcome.faults.append(f"the store was back for {max(after):.0f} s before all was archived")
    return outcome


def beside_large(folder: Path, *, database: str, large: int = LARGE, small: int = SMALL) -> Outcome:
    """The same small files twice: alone, and beside large ones that a proxy refuses until its limit is lifted."""
    outcome = Outcome()
    with Store(folder / "large", database, Knobs(), behind_proxy=True) as scene:

        def limited(request: Request, forward: Forward) -> Answer:
            is_large = request.puts_an_object and len(request.body) > LIMIT_BYTES
            return TOO_LARGE if is_large else forward(request)

        alone = _small(scene, small)
        free, scene.proxy.fault = scene.proxy.fault, limited
        scene.sandbox.set(picture_bytes=LARGE_BYTES)
        refused = scene.submit(large)
        wait_until(lambda: scene.waiting() == large, seconds=60)
        beside = _small(scene, small)
        still = scene.waiting()
        scene.proxy.fault = free
        wait_until(lambda: scene.archived(refused) == large, seconds=330, every=0.5)
        outcome.faults += scene.bugs()
    for name, waits in (("alone", alone), ("beside", beside)):
        outcome.figures[f"{small} small files {name}, seconds: median"] = round(median(waits), 2)
        outcome.figures[f"{small} small files {name}, seconds: longest"] = round(max(waits), 2)
    outcome.figures["large files that waited meanwhile, all archived once the limit was lifted"] = still
    if len(beside) != small or max(beside) > max(alone) + With_SECONDS:
        outcome.faults.append(f"a small file waited {max(beside):.1f} s beside large ones, {max(alone):.1f} s alone")
    return outcome


def _small(scene: Store, count: int) -> list[float]:
    scene.sandbox.set(picture_bytes=SMALL_BYTES)
    names = scene.submit(count)
    scene.wait_for(names)
    return scene.waits(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    chosen = parser.parse_args()
    telemetry.configure("error")
    code = 0
    with tempfile.TemporaryDirectory(prefix="receiver-store-faults-") as folder:
        for play in (partial(outages, rounds=chosen.rounds), beside_large):
            code |= play(Path(folder), database=chosen.database).report()
    return code


if __name__ == "__main__":
    sys.exit(main())
