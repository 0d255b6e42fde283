"""1,000 tasks archived; 20 objects deleted, 10 changed by a bit, 5 strangers added: `audit --deep` finds exactly these.

Run by hand: `python -m tests.bench.audit_1000 [TASKS]`. Ends by itself; everything is on loopback and in a temporary
folder. Then repairs, says what was not repaired, rebuilds the rows from the bucket alone and exports everything.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from pydantic import SecretStr
from sqlmodel import col, func, select

from receiver import telemetry
from receiver.sandbox import Knobs, Sandbox
from receiver.sandbox.seaweed import Seaweed
from receiver.wiring import Parts
from storage import migrations
from storage.audit import Audit, Counts, Finding
from storage.export import Export, tasks_between
from storage.models import Asset, Task
from storage.objects import Bucket
from storage.rebuild import Rebuild
from storage.repair import Repairer
from tests.archives import REQUEST, all_assets, flip, put
from tests.conftest import s3_variables
from tests.pipeline import settings_for

# What all of it may take: 1,000 tasks took 11 minutes on 2 cores with a load of 20, 9 of them to archive them first.
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


def harm(parts: Parts) -> set[tuple[str, str]]:
    """20 deleted, 10 changed, 5 strangers; what an audit must say of them."""
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
    expected = harm(parts)
    findings = audit(parts)
    assert {(finding.kind.value, finding.key) for finding in findings} == expected and len(findings) == 35
    repairer = Repairer(parts.database, parts.bucket, parts.schedule)
    say(Counter(repairer.repair(finding) for finding in findings))
    work(parts, deadline)
    left = audit(parts)
    say(f"after the repair: {Counter(finding.kind.value for finding in left)}")
    assert {finding.key for finding in left} == {key for kind, key in expected if kind == "orphaned"}
    rebuild_and_export(parts, folder)


def rebuild_and_export(parts: Parts, folder: Path) -> None:
    url = f"sqlite:///{folder / 'rebuilt.db'}"
    fresh = Parts(parts.settings.model_copy(update={"database_url": SecretStr(url)}))
    migrations.upgrade(fresh.database)
    counts: Counter[str] = Counter()
    for restored in Rebuild(fresh.database, fresh.bucket, deep=True).run():
        counts += restored.counts
        for problem in restored.problems:
            say(problem)
    say(f"rebuild: {dict(counts)}; then:")
    audit(fresh)
    chosen = tasks_between(fresh.database, None, None)
    exported = list(Export(fresh.database, fresh.bucket, folder / "out").run(chosen))
    assert not any(each.faults for each in exported)
    say(f"export: {sum(each.files for each in exported)} files, {sum(each.bytes for each in exported):,} bytes")
    fresh.close()


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
            parts.close()
    say("all as it should be")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000)
