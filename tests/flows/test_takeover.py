"""A worker process dies by `kill -9`: another worker has its row within the lease and a second. Prints the times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlmodel import select

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.operations import heartbeats
from storage.rows.models import Asset
from tests.command_line import variables
from tests.forked import Forked
from tests.harness import wait_until
from tests.pipeline import task_of
from tests.unreported_tasks import REQUEST, undelivered

# Renewed three times per lease, so a process without CPU for two seconds does not lose its row.
LEASE_SECONDS = 4
# Our own delay is 1 s, because an idle worker checks every half second. The machine of a whole test run is slower.
MACHINE_SECONDS = 8.0


@contextmanager
def working(settings: dict[str, str], folder: Path) -> Iterator[Forked]:
    """`receiver work`; killed at the end if it still runs."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    process = Forked(("work",), {**rest, **settings}, folder, out=folder / "work.log")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def only_asset(parts: Parts) -> Asset | None:
    with parts.database.read() as session:
        return session.exec(select(Asset)).one_or_none()


def held(parts: Parts) -> Asset | None:
    asset = only_asset(parts)
    return asset if asset and asset.lease else None


@pytest.mark.campaign("postgresql")
def test_a_killed_workers_row_is_taken_over_within_its_lease_and_a_second(
    database_url: str, bucket: Bucket, parts: Parts, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = {**variables(database_url, bucket, sandbox), "RECEIVER_LEASE_SECONDS": str(LEASE_SECONDS)}
    name = parts.submitter.submit(REQUEST).task.external_task_id
    with ExitStack() as processes:
        with undelivered(sandbox):
            first = processes.enter_context(working(settings, tmp_path))
            before = wait_until(lambda: held(parts))
            processes.enter_context(working(settings, tmp_path))
            wait_until(lambda: heartbeats.count_alive(parts.database) == 2)
            ends_at, killed_at = lease_end(parts), parts.database.now()
            first.kill()
            taken = wait_until(lambda: (asset := held(parts)) and asset.lease != before.lease and asset, seconds=30)
            taken_at = taken.due_at - timedelta(seconds=LEASE_SECONDS)
        wait_until(lambda: task_of(parts, name).archive == "archived", seconds=30)
    asset = only_asset(parts)
    late, after = (taken_at - ends_at).total_seconds(), (taken_at - killed_at).total_seconds()
    print(f"lease {LEASE_SECONDS} s: taken over {after:.2f} s after the kill, {late:.2f} s after the lease's end")  # noqa: T201
    assert asset is not None
    assert (taken.losses, asset.state) == (1, "archived")
    assert 0 <= late < MACHINE_SECONDS
    assert after < LEASE_SECONDS + MACHINE_SECONDS


def lease_end(parts: Parts) -> datetime:
    asset = held(parts)
    assert asset is not None
    assert asset.due_at is not None
    return asset.due_at
