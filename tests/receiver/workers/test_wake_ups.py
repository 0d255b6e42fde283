"""A waiting thread sleeps through commits without work for it, and misses none with work."""

from __future__ import annotations

import threading
import time

from receiver.workers.due_checks import DueChecks
from receiver.workers.wake_ups import WakeUps
from storage.database.sessions import Database
from storage.rows import claims
from storage.states import Step
from tests.receiver.workers.test_due_checks import lanes
from tests.receiver.workers.test_worker import Desk, running
from tests.rows import new_assets

SECONDS = 30.0


def test_a_wake_up_between_the_claim_and_the_wait_ends_the_wait() -> None:
    wake_ups = WakeUps(["assets"])
    wake_ups.begin("assets")
    wake_ups.wake()
    began = time.monotonic()
    wake_ups.wait("assets", SECONDS)
    assert time.monotonic() - began < SECONDS


def test_only_the_named_threads_are_woken() -> None:
    wake_ups, woken = WakeUps(["assets", "reads"]), list[str]()

    def wait(name: str) -> None:
        wake_ups.wait(name, SECONDS)
        woken.append(name)

    threads = {name: threading.Thread(target=wait, args=(name,)) for name in ("assets", "reads")}
    for thread in threads.values():
        thread.start()
    wake_ups.wake({"assets"})
    threads["assets"].join(SECONDS)
    assert woken == ["assets"] and threads["reads"].is_alive()
    wake_ups.wake()
    threads["reads"].join(SECONDS)
    assert woken == ["assets", "reads"]


def test_a_check_names_the_lanes_that_have_rows(database: Database) -> None:
    checks = DueChecks(database, lanes(lambda _: None), {})
    assert checks.check() == set()
    new_assets(database, 1, losses=claims.QUARANTINE_AFTER)
    assert checks.check() == {"assets", "images"}
    assert checks.is_any("assets") and not checks.is_any(Step.READ.value)


def test_feeders_without_rows_sleep_while_others_are_busy(database: Database) -> None:
    desk, checked = Desk(database), list[str]()
    with running(database, *lanes(desk.work)) as worker:
        before = worker._due_checks.is_any
        worker._due_checks.is_any = lambda name: checked.append(name) or before(name)  # type: ignore[method-assign, func-returns-value]
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            new_assets(database, 1)
            time.sleep(0.06)
    # some 20 wake-ups a second; each feeder polls once a second without one
    assert len([name for name in checked if name == Step.READ.value]) <= 8
