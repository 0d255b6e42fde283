"""1,000 tasks archived; 20 objects deleted, 10 changed by a bit, 5 unknown ones added: `audit --deep` finds exactly
these.

Run by hand: `python -m tests.bench.audit_1000 [TASKS]`. Ends by itself; everything is on loopback and in a temporary
folder. Then it repairs and prints what was not repaired; deletes the database, rebuilds it from the bucket alone and
compares row for row; exports everything, then once more with one file corrupted.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from sqlmodel import col, func, select

from receiver.app.wiring import Parts
from receiver.base import telemetry
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Knobs, Sandbox
from storage.archive.audit import Audit, Counts, Finding
from storage.archive.rebuild import Rebuild
from storage.archive.repair import Repairer
from storage.bucket.bucket import Bucket
from storage.rows import migrations
from storage.rows.models import Asset, Task
from tests.archived_tasks import REQUEST, all_assets, flip, put
from tests.conftest import s3_variables
from tests.pipeline import settings_for

# The time limit. 1,000 tasks took 11 minutes on 2 cores with a load of 20, 9 of them for archiving.
BOUND_SECONDS = 900


def say(words: object) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {words}", flush=True)  # noqa: T201


def work(parts: Parts, deadline: float) -> None:
    """Run a worker with all its threads until nothing waits."""
    worker = parts.worker()
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        while waiting := count_waiting(parts):
            assert time.monotonic() < deadline, f"{waiting} rows still wait"
            time.sleep(0.5)
    finally:
        worker.stop()
        thread.join(60)


def count_waiting(parts: Parts) -> int:
    with parts.database.read() as session:
        waiting = [select(func.count()).select_from(one).where(col(one.due_at).is_not(None)) for one in (Task, Asset)]
        return sum(session.exec(statement).one() for statement in waiting)


def audit(parts: Parts) -> list[Finding]:
    counts, findings, started = Counts(), [], time.monotonic()
    for batch in Audit(parts.database, parts.bucket, deep=True).run():
        counts.add(batch.counts)
        findings += [finding for finding in batch.findings if finding.is_fault]
    say(f"audit --deep: {counts.as_json()} in {time.monotonic() - started:.1f} s")
    return findings


def damage(parts: Parts) -> set[tuple[str, str]]:
    """Delete 20 objects, change 10, add 5. Returns the findings that an audit must report."""
    keys = [str(asset.key) for asset in all_assets(parts)]
    chosen = random.sample(keys, 30)
    for key in chosen[:20]:
        parts.bucket.delete(key)
    for key in chosen[20:]:
        flip(parts, key)
    strangers = [f"{parts.bucket.prefix}2026/01/0{day}/stranger/image-0-aa.png" for day in range(1, 6)]
    for key in strangers:
        put(parts, key, b"a stranger's")
    kinds = ["missing"] * 20 + ["checksum_differs"] * 10 + ["orphaned"] * 5
    return set(zip(kinds, chosen + strangers, strict=True))


def run(parts: Parts, sandbox: Sandbox, folder: Path, tasks: int) -> None:
    deadline = time.monotonic() + BOUND_SECONDS
    for _ in range(tasks):
        parts.submitter.submit(REQUEST)
    work(parts, deadline)
    assert audit(parts) == []
    expected = damage(parts)
    findings = audit(parts)
    assert {(finding.kind.value, finding.key) for finding in findings} == expected and len(findings) == 35
    repairer = Repairer(parts.database, parts.bucket, parts.schedule)
    say(Counter(repairer.repair(finding) for finding in findings))
    work(parts, deadline)
    left = audit(parts)
    say(f"after the repair: {Counter(finding.kind.value for finding in left)}")
    assert {finding.key for finding in left} == {key for kind, key in expected if kind == "orphaned"}
    rebuild(parts, folder / "receiver.db")


# Columns that no bucket contains: a secret, the schedule of reads and callbacks, the time when an archive ended.
UNKNOWN = {"callback_url", "archived_at", "polls", "reported_at", "called_back_at", "end_called_back_at"}


def rows(parts: Parts) -> dict[str, dict[str, object]]:
    """Every task and file with what the bucket contains; addresses are cut before `?`."""
    with parts.database.read() as session:
        tasks = [task.model_dump(exclude=UNKNOWN) for task in session.exec(select(Task))]
        assets = [asset.model_dump() for asset in session.exec(select(Asset))]
    for asset in assets:
        asset["source_url"] = asset["source_url"].partition("?")[0]
    return {str(row["id"]): row for row in tasks + assets}


def rebuild(parts: Parts, file: Path) -> None:
    """Delete the database file and rebuild: all rows return, callbacks find their tasks, new work continues."""
    before = rows(parts)
    with parts.database.read() as session:
        tokens = {task.id: parts.tokens.sign("kling", task.id) for task in session.exec(select(Task).limit(20))}
    parts.close()
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()
    fresh = Parts(parts.settings)
    migrations.upgrade(fresh.database)
    counts: Counter[str] = Counter()
    for restored in Rebuild(fresh.database, fresh.bucket, deep=True).run():
        counts += restored.counts
        for problem in restored.problems:
            say(problem)
    after = rows(fresh)
    differing = [
        (row, name) for row in before for name in before[row] if after.get(row, {}).get(name) != before[row][name]
    ]
    say(f"rebuild: {dict(counts)}; {len(before)} rows before, {len(after)} after; differing: {differing[:20]}")
    assert before.keys() == after.keys() and not differing
    with fresh.database.read() as session:
        for task_id, token in tokens.items():
            assert fresh.tokens.read("kling", token) == task_id and session.get(Task, task_id)
    assert {finding.kind.value for finding in audit(fresh)} == {"orphaned"}
    for _ in range(10):
        fresh.submitter.submit(REQUEST)
    work(fresh, time.monotonic() + BOUND_SECONDS)
    assert {finding.kind.value for finding in audit(fresh)} == {"orphaned"}
    say(f"{len(tokens)} old tokens name their tasks; 10 new tasks are archived")
    export(fresh, file.parent)
    fresh.close()


def export(parts: Parts, folder: Path) -> None:
    """Export everything by the command, then once more with one file corrupted."""
    for name, bad in (("out", None), ("out-2", str(all_assets(parts)[7].key))):
        if bad:
            flip(parts, bad)
        started = time.monotonic()
        done = receiver(parts, folder, "export", name, "--all", "--json")
        told = json.loads(done.stdout)
        say(f"export: exit code {done.returncode}, {told} in {time.monotonic() - started:.1f} s")
        assert (done.returncode, [fault["key"] for fault in told["faults"]]) == ((1, [bad]) if bad else (0, []))


def receiver(parts: Parts, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    chosen = parts.settings
    variables = {
        "DATABASE_URL": chosen.database_url.get_secret_value(), "KLING_BASE_URL": chosen.kling_base_url,
        "S3_BUCKET": chosen.s3_bucket, "S3_ENDPOINT_URL": str(chosen.s3_endpoint_url), "S3_PREFIX": chosen.s3_prefix,
    }  # fmt: skip
    environment = dict(os.environ) | {f"RECEIVER_{name}": value for name, value in variables.items()}
    command = [sys.executable, "-m", "receiver", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=BOUND_SECONDS)


def main(tasks: int) -> None:
    telemetry.configure("error")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        knobs = Knobs(picture_bytes=20_000, submitted_seconds=0, processing_seconds=0)
        with Seaweed(folder / "seaweed", "pictures") as seaweed, Sandbox(knobs=knobs) as sandbox:
            os.environ.update(s3_variables(seaweed))
            bucket = Bucket(seaweed.bucket, endpoint_url=seaweed.endpoint_url, prefix="bench")
            parts = Parts(settings_for(f"sqlite:///{folder / 'receiver.db'}", bucket, sandbox, lease_seconds=60))
            migrations.upgrade(parts.database)
            say(f"{tasks} tasks")
            run(parts, sandbox, folder, tasks)
    say("all as it should be")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000)
