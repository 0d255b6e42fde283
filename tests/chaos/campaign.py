"""One campaign: tasks are submitted while everything fails, then all faults end, then the ledgers are compared.

storm: submitters ─┬─ timed faults (kills, freezes, outages) ─┬─▶ calm ─▶ quiet (bounded) ─▶ three ledgers ─▶ Outcome
                   └─ faults of provider and store by chance ─┘
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import func, update
from sqlmodel import col, select

from storage.errors import DatabaseUnavailable
from storage.rows.models import AccountPause, Asset, Callback, Task
from storage.states import TERMINAL, ArchiveState
from tests.chaos import plan as kinds
from tests.chaos.ledgers import Findings, reconcile
from tests.chaos.plan import Fault, Plan
from tests.chaos.stage import CALLBACK_TRIES, Stage

SUBMITTERS = 4
SUBMIT_AGAIN_SECONDS = 0.3
# A submission is repeated until it succeeds. Longer than this after the storm, something is broken for good.
SUBMIT_GRACE_SECONDS = 60
# The duration of a stalled download: longer than a lease, so that leases must be renewed.
STALL_SECONDS = kinds.LEASE_SECONDS * 1.5
# The downloads that must have begun before the freeze, and the longest wait for them.
STALLED_DOWNLOADS = 2
STALL_WAIT_SECONDS = 30.0
# How long an account is refused after the first refused request, and the longest wait for that request: the trial of an
# earlier pause, which stops creates, may be a minute away.
ACCOUNT_SECONDS, ACCOUNT_WAIT_SECONDS = 1.0, 90.0
# The most that a storm exceeds its plan, with a task more each second, until each kind of random fault has happened.
CHANCE_SECONDS = 20.0


@dataclass
class Outcome:
    """`quiet_seconds`: from the end of the storm until nothing was left to do, None = not within the bound.

    `exits`: processes of ours that ended by themselves, by exit code; `bugs`: lines of their logs.
    """

    plan: Plan
    findings: Findings
    counts: Counter[str]
    quiet_seconds: float | None
    exits: Counter[int] = field(default_factory=Counter)
    bugs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def absent(self) -> list[str]:
        """Kinds of fault that did not happen. A campaign without them proves nothing."""
        return [kind for kind in self.plan.kinds if not self.counts[kind]]

    @property
    def failures(self) -> list[str]:
        """One line per reason why the campaign failed."""
        found = [f"{name}: {each}" for name, list_ in self.findings.faults.items() for each in list_]
        found += [f"fault that never happened: {kind}" for kind in self.absent]
        found += [f"bug in a log: {line[:2_000]}" for line in self.bugs]
        found += ["it did not become quiet"] * (self.quiet_seconds is None)
        return found + self.errors


def run(plan: Plan, *, keep: Path | None = None, postgres_data: Path | None = None) -> Outcome:
    """Run the whole campaign. `keep`: a folder for databases, objects and logs; None = removed at the end.

    `postgres_data`: a cluster to copy; None = a new one is made.
    """
    folder = Path(keep or tempfile.mkdtemp(prefix="receiver-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Stage(plan, folder, postgres_data) as stage:
            return Campaign(plan, stage).run()
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


class Campaign:
    def __init__(self, plan: Plan, stage: Stage) -> None:
        self._plan = plan
        self._stage = stage
        self._counts: Counter[str] = Counter()
        self._accepted: set[str] = set()
        self._errors: list[str] = []
        self._lock = threading.Lock()
        self._account = threading.Lock()
        self._broken_off = threading.Event()

    def run(self) -> Outcome:
        self._started = time.monotonic()
        self._storm()
        self._stage.calm()
        quiet_seconds = self._wait_until_quiet()
        findings = reconcile(self._stage, self._accepted)
        processes = [self._stage.web, *self._stage.workers]
        return Outcome(
            plan=self._plan,
            findings=findings,
            counts=self._all_counts(),
            quiet_seconds=quiet_seconds,
            exits=sum((each.exits for each in processes), Counter()),
            bugs=[line for each in processes for line in each.bugs()],
            errors=self._errors,
        )

    def _storm(self) -> None:
        faults, requests = self._plan.faults(), self._plan.requests()
        with ThreadPoolExecutor(SUBMITTERS) as submitters, ThreadPoolExecutor(len(faults) or 1) as breakers:
            done = [submitters.submit(self._submit, *request) for request in requests]
            done += [breakers.submit(self._break, fault) for fault in faults]
            try:
                for each in done:
                    if error := each.exception():
                        self._errors.append(f"{type(error).__name__}: {error}")
            except BaseException:  # interrupted: the rest of the storm is skipped
                self._broken_off.set()
                raise
        deadline = time.monotonic() + CHANCE_SECONDS
        more = count()
        while not all(map(self._all_counts().__getitem__, self._plan.kinds)) and time.monotonic() < deadline:
            self._submit(0, *self._plan.one_more(f"more-{next(more)}"))
            time.sleep(1)

    def _all_counts(self) -> Counter[str]:
        return self._counts + self._stage.counts()

    def _sleep_until(self, at: float) -> None:
        if self._broken_off.wait(max(0.0, self._started + at - time.monotonic())):
            raise InterruptedError("the campaign was broken off")

    def _submit(self, at: float, name: str, request: dict[str, Any]) -> None:
        """Submit until it succeeds, like a caller whose call failed: same id, same request."""
        self._sleep_until(at)
        while True:
            try:
                self._stage.parts.submitter.submit(request, external_task_id=name)
            except DatabaseUnavailable:
                if time.monotonic() > self._started + self._plan.storm_seconds + SUBMIT_GRACE_SECONDS:
                    raise
                time.sleep(SUBMIT_AGAIN_SECONDS)
            else:
                with self._lock:
                    self._accepted.add(name)
                return

    def _break(self, fault: Fault) -> None:
        self._sleep_until(fault.at)
        actions = {
            kinds.WORKER_KILLED: lambda: self._stage.workers[fault.target].kill(),
            kinds.WORKER_FROZEN: lambda: self._freeze_in_a_stall(fault.target, fault.seconds),
            kinds.WEB_KILLED: self._stage.web.kill,
            kinds.STORE_STOPPED: lambda: self._stop_store(fault.seconds),
            kinds.DATABASE_KILLED: self._kill_database,
            kinds.BALANCE_USED_UP: lambda: self._use_up_the_balance(fault),
            kinds.KEY_REFUSED: lambda: self._refuse_the_key(fault),
        }
        times = int(actions[fault.kind]())
        with self._lock:
            self._counts[fault.kind] += times

    def _stop_store(self, seconds: float) -> bool:
        self._stage.seaweed.stop()
        time.sleep(seconds)
        self._stage.seaweed.start()
        return True

    def _kill_database(self) -> bool:
        assert self._stage.postgres is not None
        self._stage.postgres.kill()
        self._stage.postgres.start()
        return True

    def _use_up_the_balance(self, fault: Fault) -> bool:
        return self._refuse_the_account(fault, {"balance": 0}, {"balance": None}, "create:1102")

    def _refuse_the_key(self, fault: Fault) -> bool:
        """Refuse creates and reads."""
        refused, allowed = {"api_keys": ["another-key"]}, {"api_keys": [self._stage.sandbox.api_key]}
        return self._refuse_the_account(fault, refused, allowed, "create:1002", "query:1002")

    def _refuse_the_account(self, fault: Fault, refused: dict[str, Any], allowed: dict[str, Any], *counts: str) -> bool:
        """Refuse the account until a request has met it and a little longer, one refusal at a time. A task of its own
        makes sure of that request. The following trials are made due at once, unless the plan is patient.
        """
        sandbox = self._stage.sandbox

        def met() -> int:
            return sum(sandbox.ledger().counts[name] for name in counts)

        with self._account:
            before = met()
            sandbox.set(**refused)
            self._submit(fault.at, *self._plan.one_more(f"{fault.at:.3f}"))
            deadline = time.monotonic() + ACCOUNT_WAIT_SECONDS
            while met() == before and time.monotonic() < deadline:
                self._cut_pauses_short()  # one that an earlier refusal left
                time.sleep(0.25)
            time.sleep(ACCOUNT_SECONDS)
            sandbox.set(**allowed)
            self._cut_pauses_short()
            return met() > before

    def _cut_pauses_short(self) -> None:
        """Make the trial of a paused account due now, unless the plan is patient or the database away: the next round
        does it.
        """
        if self._plan.patient:
            return
        with suppress(DatabaseUnavailable), self._stage.parts.database.write() as session:
            stands = col(AccountPause.trial_at) >= col(AccountPause.since)
            session.execute(update(AccountPause).where(stands).values(trial_at=datetime.now(UTC)))

    def _freeze_in_a_stall(self, target: int, seconds: float) -> bool:
        """Freeze a worker for longer than its leases while downloads are stalled, so that it probably holds some."""
        sandbox, worker = self._stage.sandbox, self._stage.workers[target]
        before = sandbox.ledger().counts["cdn:200"]
        sandbox.set(cdn_seconds=STALL_SECONDS)
        deadline = time.monotonic() + STALL_WAIT_SECONDS
        while sandbox.ledger().counts["cdn:200"] < before + STALLED_DOWNLOADS and time.monotonic() < deadline:
            time.sleep(0.1)
        with worker.frozen() as done:
            with self._lock:
                self._counts[kinds.CDN_STALLED] += sandbox.ledger().counts["cdn:200"] - before
            sandbox.set(cdn_seconds=0)
            time.sleep(seconds)
        return done

    def _wait_until_quiet(self) -> float | None:
        """Seconds until no row waits, no task is unfinished and no callback is on its way; None = it took too long."""
        began = time.monotonic()
        while (seconds := time.monotonic() - began) < self._plan.quiet_seconds:
            if not self._plan.patient:
                self._cut_waiting_short()
            if not self._open_rows() and not self._open_callbacks():
                return seconds
            time.sleep(0.25)
        return None

    def _open_rows(self) -> int:
        unfinished = col(Task.state).not_in(TERMINAL) | (col(Task.archive) == ArchiveState.ARCHIVING)
        with self._stage.parts.database.read() as session:
            tasks = session.exec(select(func.count()).where(unfinished | col(Task.due_at).is_not(None))).one()
            waiting = [
                session.exec(select(func.count()).where(col(model.due_at).is_not(None))).one()
                for model in (Callback, Asset)
            ]
        return tasks + sum(waiting)

    def _open_callbacks(self) -> int:
        """Callbacks that the provider still has to deliver or to give up."""
        sent = (callback for callback in self._stage.sandbox.ledger().callbacks if not callback.dropped)
        return sum(not callback.delivered and len(callback.attempts) < CALLBACK_TRIES for callback in sent)

    def _cut_waiting_short(self) -> None:
        """Make rows in backoff due now, except rows that are held or locked."""
        self._cut_pauses_short()
        now = datetime.now(UTC)
        for model in (Task, Callback, Asset):
            table: Any = model
            waiting = select(table.id).where(table.due_at > now, table.lease.is_(None))
            with self._stage.parts.database.write() as session:
                ids = session.exec(waiting.with_for_update(skip_locked=True)).all()
                session.execute(update(table).where(table.id.in_(ids)).values(due_at=now))
                if model is Task:
                    missed = update(Task).where(col(Task.id).in_(ids), col(Task.missed_at).is_not(None))
                    session.execute(missed.values(missed_at=now - timedelta(hours=1)))


def report(outcome: Outcome) -> str:
    """The figures, and the command that runs the same plan again."""
    findings, plan = outcome.findings, outcome.plan
    quiet = "never" if outcome.quiet_seconds is None else f"{outcome.quiet_seconds:.1f} s"
    figures = {
        "accepted tasks": findings.accepted,
        "accepted deliveries": findings.deliveries,
        "archived pictures": findings.archived,
        **{name: len(list_) for name, list_ in findings.faults.items()},
        "time to quiet": quiet,
        "leftovers of the store's probe": len(findings.probe_leftovers),
        "processes that ended by themselves": dict(outcome.exits) or 0,
    }
    lines = [f"{plan.database}, {plan.tasks} tasks, {plan.workers} workers, {plan.storm_seconds:.0f} s of faults"]
    lines += [f"  {name:<36} {value}" for name, value in figures.items()]
    lines += ["faults", *(f"  {kind:<36} {outcome.counts[kind]}" for kind in plan.kinds)]
    lines += [f"FAILED {failure}" for failure in outcome.failures] or ["ok: the three ledgers agree"]
    again = f"--database {plan.database} --tasks {plan.tasks} --workers {plan.workers} --seed {plan.seed}"
    return "\n".join([*lines, f"again: {Path(sys.executable).name} -m tests.chaos {again}"])
