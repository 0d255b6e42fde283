"""The plan of a campaign: all timed faults, drawn from the seed before anything starts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

# Short, so that a takeover after a kill and a freeze past the lease fit into the storm many times.
LEASE_SECONDS = 3.0
FREEZE_SECONDS = LEASE_SECONDS + 2

WORKER_KILLED = "worker killed"
WORKER_FROZEN = "worker frozen past its lease"
WEB_KILLED = "web killed"
STORE_STOPPED = "store stopped"
DATABASE_KILLED = "database killed"
CDN_STALLED = "download stalled"
BALANCE_USED_UP = "balance used up"
KEY_REFUSED = "key refused"
# The sandbox's permanent faults, which its ledger counts.
PROVIDER_FAULTS = ("callback dropped", "callback duplicated", "callback reordered", "callback without its body",
                   "callback that offers HTTP/2", "download 503", "download truncated", "download an error page",
                   "download empty", "download redirected to itself", "create in doubt", "read refused")  # fmt: skip
# The permanent faults of the proxy in front of the store.
STORE_FAULTS = ("store 500", "store 503", "store slow", "store reset mid-body", "store request lost",
                "store answer lost")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """`at`: seconds since the storm began; `target`: which worker; `seconds`: how long it lasts."""

    at: float
    kind: str
    target: int = 0
    seconds: float = 0


@dataclass(frozen=True)
class Plan:
    """One campaign. The seed decides requests, times and targets; their coincidence depends on the machine.

    `patient`: wait out every backoff after the storm; False makes waiting rows due, for the form in the suite.
    """

    database: Literal["sqlite", "postgresql"]
    seed: int
    tasks: int
    workers: int
    storm_seconds: float
    quiet_seconds: float
    worker_kills: int
    worker_freezes: int
    web_kills: int
    store_outages: int
    database_kills: int
    account_refusals: int
    patient: bool = True

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of fault that must have happened at least once."""
        timed = [WORKER_KILLED, WORKER_FROZEN, WEB_KILLED, STORE_STOPPED, CDN_STALLED, BALANCE_USED_UP, KEY_REFUSED]
        if self.database == "postgresql":
            timed.append(DATABASE_KILLED)
        return (*timed, *STORE_FAULTS, *PROVIDER_FAULTS)

    def faults(self) -> list[Fault]:
        """The faults that have a time, in its order."""
        rng = random.Random(f"faults {self.seed}")
        found = [
            *(Fault(at, WORKER_KILLED, rng.randrange(self.workers)) for at in self._times(rng, self.worker_kills)),
            *(Fault(at, WEB_KILLED) for at in self._times(rng, self.web_kills)),
            *(Fault(at, STORE_STOPPED, 0, rng.uniform(2, 6)) for at in self._times(rng, self.store_outages)),
        ]
        freezes = [at / 2 for at in self._times(rng, self.worker_freezes)]  # the longest faults come early
        found += [Fault(at, WORKER_FROZEN, rng.randrange(self.workers), FREEZE_SECONDS) for at in freezes]
        if self.database == "postgresql":
            found += [Fault(at, DATABASE_KILLED) for at in self._times(rng, self.database_kills)]
        half = self.storm_seconds / 2  # later, because paused creates leave nothing to stall
        refusals = [half + at / 2 for at in self._times(rng, 2 * self.account_refusals)]
        found += [Fault(at, (BALANCE_USED_UP, KEY_REFUSED)[number % 2]) for number, at in enumerate(refusals)]
        return sorted(found, key=lambda fault: fault.at)

    def _times(self, rng: random.Random, count: int) -> Iterator[float]:
        """Random moments, one in each of `count` equal parts of the storm."""
        part = self.storm_seconds / max(count, 1)
        return ((number + rng.random()) * part for number in range(count))

    def requests(self) -> list[tuple[float, str, dict[str, Any]]]:
        """(when it is sent, external id, request) of every task."""
        rng = random.Random(f"requests {self.seed}")
        times = sorted(rng.uniform(0, self.storm_seconds * 0.95) for _ in range(self.tasks))
        return [(at, f"chaos-{self.seed}-{number}", _request(rng, number)) for number, at in enumerate(times)]

    def one_more(self, name: str) -> tuple[str, dict[str, Any]]:
        """(external id, request) of a task outside the plan, which meets a fault that the others have not met."""
        return f"chaos-{self.seed}-{name}", {"model_name": "kling-image-o1", "prompt": name, "n": 4}


def _request(rng: random.Random, number: int) -> dict[str, Any]:
    marks = {1: " [drop]", 2: " [fail]", 3: " [expire]"}  # the first few make sure that each happens
    mark = marks.get(number) or rng.choices(["", " [drop]", " [fail]", " [expire]"], [90, 3, 4, 3])[0]
    prompt = f"picture {number}{mark}"
    if rng.random() < 0.15:
        series = {"result_type": "series", "series_amount": rng.randint(2, 3), "watermark_info": {"enabled": True}}
        return {"model_name": "kling-v3-omni", "prompt": prompt, **series}
    return {"model_name": "kling-image-o1", "prompt": prompt, "n": rng.randint(1, 4)}


def full(database: Literal["sqlite", "postgresql"], *, seed: int, tasks: int, workers: int) -> Plan:
    """The campaign of the command: its length follows from the number of tasks."""
    return Plan(
        database=database,
        seed=seed,
        tasks=tasks,
        workers=workers,
        storm_seconds=max(60.0, tasks * 0.5),
        quiet_seconds=700,  # longer than the longest backoff, and than the wait after seven unusable answers
        worker_kills=52,
        worker_freezes=6,
        web_kills=12,
        store_outages=4,
        database_kills=4,
        account_refusals=1,
    )


def bounded(database: Literal["sqlite", "postgresql"], *, seed: int) -> Plan:
    """The campaign of the suite: every kind of fault, a few times."""
    return Plan(
        database=database,
        seed=seed,
        tasks=25,
        workers=2,
        storm_seconds=10,
        quiet_seconds=90,  # 2 to 5 s; a machine with ten other jobs took more than 45
        worker_kills=3,
        worker_freezes=1,
        web_kills=2,
        store_outages=1,
        database_kills=1,
        account_refusals=1,
        patient=False,
    )
