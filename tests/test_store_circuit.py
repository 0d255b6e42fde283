"""What an outage of the store costs, and what is none: links that die meanwhile, and files that are refused alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import col

from receiver.sandbox import Sandbox
from receiver.sandbox.seaweed import Seaweed
from receiver.wiring import Parts
from storage.circuit import FAILURES
from storage.models import Asset
from storage.objects import Bucket
from storage.states import ArchiveState
from tests.archives import REQUEST
from tests.fault_proxy import Answer, FaultProxy
from tests.harness import wait_until
from tests.pipeline import Wired, hurry, run, task_of, working
from tests.rows import LONG_AGO

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"])  # a circuit is a process's own

# Long enough that the pause has outgrown links that live 2 s.
AWAY_SECONDS = 6


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"public_url": "", "poll_after_seconds": 3_600}


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed) as running:
        yield running


@pytest.fixture
def behind(parts: Parts, proxy: FaultProxy) -> Iterator[Parts]:
    """Our parts on a store behind the proxy, probed while it does nothing."""
    bucket = Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)
    assert bucket.capabilities.believed
    made = Wired(parts.settings, bucket=bucket)
    yield made
    made.close()


def read(parts: Parts, sandbox: Sandbox, *names: str) -> None:
    """Submit these tasks and learn of their pictures, which are due then."""
    for name in names:
        parts.submitter.submit(REQUEST, external_task_id=name)
        wait_until(lambda name=name: sandbox.ledger().task(name).status == "succeed")  # type: ignore[misc]
    hurry(parts)
    run(parts, "reads")


def are_archived(parts: Parts, *names: str) -> bool:
    return all(task_of(parts, name).archive is ArchiveState.ARCHIVED for name in names)


def try_again(parts: Parts) -> None:
    """What backs off is due now; what is in hand is left alone."""
    with parts.database.write() as session:
        waits = (col(Asset.due_at).is_not(None), col(Asset.lease).is_(None))
        session.execute(update(Asset).where(*waits).values(due_at=LONG_AGO))


def test_links_that_live_shorter_than_the_pause_outlive_an_outage(
    behind: Parts, sandbox: Sandbox, proxy: FaultProxy
) -> None:
    """Every trial met a link that had died during the pause, and the circuit stayed open for good."""
    sandbox.set(result_lifetime_seconds=2, fresh_urls_on_read=True)
    names = [f"task-{number}" for number in range(FAILURES)]
    read(behind, sandbox, *names)
    proxy.fault = lambda request, forward: Answer(503, {}, b"")
    with working(behind):
        back_at = time.monotonic() + AWAY_SECONDS
        wait_until(lambda: try_again(behind) or time.monotonic() > back_at, every=0.2)
        proxy.fault = lambda request, forward: forward(request)
        wait_until(lambda: try_again(behind) or are_archived(behind, *names), seconds=30, every=0.2)
