"""The cost of a store's outages, and cases that are no outage: expired links, and files that are refused alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import col

from receiver.app.wiring import Parts
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.circuit import FAILURES
from storage.rows.models import Asset
from storage.states import ArchiveState, AssetState
from tests.archived_tasks import REQUEST
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.harness import wait_until
from tests.pipeline import Wired, assets_of, make_due_now, run, task_of, working
from tests.rows import LONG_AGO
from tests.storage.bucket.test_refusals import credentials as credentials
from tests.storage.bucket.test_refusals import only, rotate

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"])  # each process has its own circuit

# Long enough that the pause exceeds the 2 s life of a link.
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
    """Our parts on a store behind the proxy, probed while the proxy passes everything on."""
    bucket = Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)
    assert bucket.capabilities().believed
    made = Wired(parts.settings, bucket=bucket)
    yield made
    made.close()


def read(parts: Parts, sandbox: Sandbox, *names: str, **fields: Any) -> None:
    """Submit these tasks and read them, so that their pictures are due."""
    for name in names:
        parts.submitter.submit({**REQUEST, **fields}, external_task_id=name)
        wait_until(lambda name=name: sandbox.ledger().task(name).status == "succeed")  # type: ignore[misc]
    make_due_now(parts)
    run(parts, "reads")


def are_archived(parts: Parts, *names: str) -> bool:
    return all(task_of(parts, name).archive is ArchiveState.ARCHIVED for name in names)


LIMIT_BYTES = 30_000
LARGE, SMALL = 2 * FAILURES, 2
DENIED = b"<Error><Code>AccessDenied</Code></Error>"
REFUSALS = {
    "a proxy's limit": Answer(413, {"content-type": "text/html"}, b"<html>413</html>"),
    "the store's limit": Answer(400, {}, b"<Error><Code>EntityTooLarge</Code></Error>"),
    "an argument": Answer(400, {}, b"<Error><Code>InvalidArgument</Code></Error>"),
    "a request": Answer(400, {}, b"<Error><Code>InvalidRequest</Code></Error>"),
}


def large_beside_small(parts: Parts, sandbox: Sandbox) -> None:
    """Waiting pictures, the large ones first, because the provider deletes those soonest."""
    for name, pictures, size in (("large", LARGE, 2 * LIMIT_BYTES), ("small", SMALL, 8_000)):
        sandbox.set(picture_bytes=size)
        read(parts, sandbox, name, n=pictures)
    with parts.database.write() as session:
        large = col(Asset.task_id) == task_of(parts, "large").id
        session.execute(update(Asset).where(large).values(files_expire_at=LONG_AGO))


def refuse_large(proxy: FaultProxy, answer: Answer) -> None:
    def limited(request: Request, forward: Forward) -> Answer:
        return answer if request.puts_an_object and len(request.body) > LIMIT_BYTES else forward(request)

    proxy.fault = limited


@pytest.mark.parametrize("refusal", REFUSALS)
def test_file_that_is_refused_alone_delays_no_other(
    behind: Parts, sandbox: Sandbox, proxy: FaultProxy, refusal: str
) -> None:
    large_beside_small(behind, sandbox)
    refuse_large(proxy, REFUSALS[refusal])
    assert run(behind, "assets") >= LARGE + SMALL
    run(behind, "finishes")
    assert are_archived(behind, "small")
    assert {asset.state for asset in assets_of(behind, task_of(behind, "large"))} == {AssetState.DUE}
    proxy.fault = lambda request, forward: forward(request)
    make_due_now(behind)
    run(behind, "assets", "finishes")
    assert are_archived(behind, "large")


def test_refusal_for_size_names_the_size_and_the_limits_owner(
    behind: Parts, sandbox: Sandbox, proxy: FaultProxy
) -> None:
    sandbox.set(picture_bytes=2 * LIMIT_BYTES)
    read(behind, sandbox, "large")
    refuse_large(proxy, REFUSALS["a proxy's limit"])
    run(behind, "assets")
    (asset,) = assets_of(behind, task_of(behind, "large"))
    host = proxy.endpoint_url.removeprefix("http://")
    assert f"a limit in front of the store at {host} refuses an object of {asset.size:,} bytes" in str(asset.error)
    assert "raise the request limit of the proxy there (nginx: client_max_body_size)" in str(asset.error)


def test_403_on_some_keys_is_not_an_outage_while_others_succeed(
    behind: Parts, sandbox: Sandbox, proxy: FaultProxy
) -> None:
    large_beside_small(behind, sandbox)
    with behind.database.write() as session:
        first = col(Asset.task_id) == task_of(behind, "small").id, col(Asset.index) == 0
        session.execute(update(Asset).where(*first).values(files_expire_at=LONG_AGO - timedelta(days=1)))
    refuse_large(proxy, Answer(403, {}, DENIED))
    assert run(behind, "assets") >= LARGE + SMALL


def test_403_on_every_key_is_an_outage(behind: Parts, sandbox: Sandbox, proxy: FaultProxy) -> None:
    large_beside_small(behind, sandbox)
    proxy.fault = lambda request, forward: Answer(403, {}, DENIED)
    assert run(behind, "assets") == FAILURES


def test_files_that_fail_like_an_outage_leave_the_trials_to_others(
    behind: Parts, sandbox: Sandbox, proxy: FaultProxy
) -> None:
    """The file that expires soonest took every trial, because it was due again at once."""
    large_beside_small(behind, sandbox)
    refuse_large(proxy, Answer(503, {}, b""))
    with working(behind):
        wait_until(lambda: try_again(behind) or are_archived(behind, "small"), every=0.2, seconds=60)


def try_again(parts: Parts) -> None:
    """Make files in backoff due now, except those in hand."""
    with parts.database.write() as session:
        waits = (col(Asset.due_at).is_not(None), col(Asset.lease).is_(None))
        session.execute(update(Asset).where(*waits).values(due_at=LONG_AGO))


def test_links_that_live_shorter_than_the_pause_outlive_an_outage(
    behind: Parts, sandbox: Sandbox, proxy: FaultProxy
) -> None:
    """Every trial met a link that had expired during the pause, and the circuit never closed."""
    sandbox.set(result_lifetime_seconds=2, fresh_urls_on_read=True)
    names = [f"task-{number}" for number in range(FAILURES)]
    read(behind, sandbox, *names)
    proxy.fault = lambda request, forward: Answer(503, {}, b"")
    with working(behind):
        back_at = time.monotonic() + AWAY_SECONDS
        wait_until(lambda: try_again(behind) or time.monotonic() > back_at, every=0.2)
        proxy.fault = lambda request, forward: forward(request)
        wait_until(lambda: try_again(behind) or are_archived(behind, *names), seconds=30, every=0.2)


def test_worker_continues_after_the_session_token_was_rotated(
    parts: Parts, sandbox: Sandbox, proxy: FaultProxy, seaweed: Seaweed, credentials: Path
) -> None:
    rotate(credentials, seaweed, "first")
    proxy.fault = only("first")
    bucket = Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)
    with closing(Wired(parts.settings, bucket=bucket)) as on:
        read(on, sandbox, "before")
        run(on, "assets", "finishes")
        assert are_archived(on, "before")
        read(on, sandbox, "after")
        rotate(credentials, seaweed, "second")
        proxy.fault = only("second")
        with working(on):
            wait_until(lambda: are_archived(on, "after"))
