"""A store that loses, changes, ignores or misreports: each fault is noticed, and no wrong object counts as archived.

Both if the probe has seen the fault, and if it begins only after the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from receiver.app.wiring import Parts
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.keys import object_key
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState
from tests.archived_tasks import REQUEST, put
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.harness import wait_until
from tests.pipeline import Wired, assert_archived, assets_of, kept, make_due_now, run, task_of

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"])
SUM, MD5 = "x-amz-checksum-sha256", "content-md5"
WRONG_SUM = "n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg="


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"public_url": "", "poll_after_seconds": 3_600}


@dataclass
class Faulty:
    """The application on a store behind a proxy, with one due picture. `reads`: paths of objects read through it."""

    parts: Parts
    honest: Parts
    proxy: FaultProxy
    sandbox: Sandbox
    reads: list[str] = field(default_factory=list)

    def begin(self, spoil: Callable[[Request, Forward], Answer | None]) -> None:
        def fault(request: Request, forward: Forward) -> Answer | None:
            if request.method == "GET" and "/image-" in request.path and "?" not in request.path:
                self.reads.append(request.path)
            return spoil(request, forward)

        self.proxy.fault = fault

    def end(self) -> None:
        self.proxy.fault = lambda request, forward: forward(request)
        make_due_now(self.parts)
        run(self.parts, "assets", "finishes")

    @property
    def task(self) -> Task:
        return task_of(self.parts, "task")

    @property
    def asset(self) -> Asset:
        return assets_of(self.parts, self.task)[0]

    @property
    def downloads(self) -> int:
        return sum(asset.hits for asset in self.sandbox.ledger().task("task").assets)


SEEN, LATER = "seen by the probe", "begins after the probe"


@pytest.fixture(params=[SEEN, LATER])
def faulty(
    request: pytest.FixtureRequest, parts: Parts, seaweed: Seaweed, sandbox: Sandbox
) -> Iterator[Callable[..., Faulty]]:
    parts.submitter.submit(REQUEST, external_task_id="task")
    wait_until(lambda: sandbox.ledger().task("task").status == "succeed")
    make_due_now(parts)
    run(parts, "reads")
    with FaultProxy(seaweed) as proxy:
        bucket = Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)
        made = Faulty(Wired(parts.settings, bucket=bucket), parts, proxy, sandbox)

        def begin(spoil: Callable[[Request, Forward], Answer | None]) -> Faulty:
            if request.param == LATER:
                assert bucket.capabilities().believed
            made.begin(spoil)
            assert bucket.capabilities() is not None
            return made

        yield begin
        made.parts.close()


def told(answer: Answer, checksum: str | None) -> Answer:
    headers = {name: value for name, value in answer.headers.items() if name != SUM}
    return replace(answer, headers=headers if checksum is None else headers | {SUM: checksum})


def test_object_is_found_after_its_response_was_lost(faulty: Callable[..., Faulty]) -> None:
    def hang_up(request: Request, forward: Forward) -> Answer | None:
        answer = forward(request)
        return None if request.puts_an_object else answer

    on = faulty(hang_up)
    run(on.parts, "assets")
    assert (on.asset.state, list(kept(on.honest))) == (AssetState.DUE, [on.asset.key])
    on.end()
    assert on.downloads == 1  # the existing object is found, verified and settled
    assert_archived(on.honest, on.sandbox, on.task)


# A store that begins to lie about its checksums after the probe is found by the audit, which reads.
@pytest.mark.parametrize(
    ("faulty", "says"),
    [(SEEN, "nothing"), (SEEN, "what it was sent"), (LATER, "nothing")],
    indirect=["faulty"],
)
def test_flipped_byte_behind_a_200_is_removed(faulty: Callable[..., Faulty], says: str) -> None:
    def flip(request: Request, forward: Forward) -> Answer:
        if not request.body or "x-amz-decoded-content-length" in request.headers or "/.receiver" in request.path:
            return forward(request.without(SUM, MD5) if request.method == "PUT" else request)
        sent = request.headers.get(SUM)
        body = bytes([request.body[0] ^ 1]) + request.body[1:]
        answer = forward(replace(request.without(SUM, MD5), body=body))
        return told(answer, sent if says == "what it was sent" else None)

    on = faulty(flip)
    run(on.parts, "assets")
    assert (on.asset.state, kept(on.honest)) == (AssetState.DUE, {})
    assert "other bytes" in str(on.asset.error) and not on.parts.bucket.capabilities().believed
    on.end()
    assert_archived(on.honest, on.sandbox, on.task)


@pytest.mark.parametrize("faulty", [SEEN], indirect=True)
def test_ignored_condition_overwrites_nothing(faulty: Callable[..., Faulty]) -> None:
    on = faulty(lambda request, forward: forward(request.without("if-none-match")))
    (made,) = on.sandbox.ledger().task("task").assets
    key = object_key(on.parts.bucket.prefix, on.task.created_at, "task", "image", 0, made.sha256, "png")
    put(on.honest, key, b"a stranger's")
    before = kept(on.honest)
    run(on.parts, "assets", "finishes")
    assert (on.asset.state, on.task.archive) == (AssetState.FAILED, ArchiveState.INCOMPLETE)
    assert before.items() <= kept(on.honest).items() and "another object" in str(on.asset.error)


@pytest.mark.parametrize("checksum", [None, WRONG_SUM], ids=["none", "a wrong one"])
def test_missing_or_wrong_checksum_proves_nothing(faulty: Callable[..., Faulty], checksum: str | None) -> None:
    on = faulty(lambda request, forward: told(forward(request), checksum))
    run(on.parts, "assets", "finishes")
    seen = not on.parts.bucket.capabilities().returns_checksum
    # A store that was silent in the probe is trusted, because it refuses wrong checksums. A wrong one is never trusted.
    assert len(on.reads) == (0 if seen and checksum is None else 1)
    assert_archived(on.honest, on.sandbox, on.task)


@pytest.mark.parametrize("faulty", [SEEN], indirect=True)
def test_trusted_store_is_not_read_back(faulty: Callable[..., Faulty]) -> None:
    on = faulty(lambda request, forward: forward(request))
    run(on.parts, "assets", "finishes")
    assert on.reads == []
    assert_archived(on.honest, on.sandbox, on.task)


@pytest.mark.parametrize("faulty", [SEEN], indirect=True)
def test_trusted_store_gets_one_request_for_a_file_and_one_for_the_manifest(faulty: Callable[..., Faulty]) -> None:
    seen: list[str] = []

    def record(request: Request, forward: Forward) -> Answer:
        if ".receiver-probe" not in request.path:
            seen.append(request.method)
        return forward(request)

    on = faulty(record)
    run(on.parts, "assets", "finishes")
    assert seen == ["PUT", "PUT"]
    assert_archived(on.honest, on.sandbox, on.task)


@pytest.mark.parametrize("faulty", [SEEN], indirect=True)
def test_store_that_refuses_checksum_headers_gets_none(
    faulty: Callable[..., Faulty], request: pytest.FixtureRequest
) -> None:
    """As documented for Backblaze B2. With RECEIVER_S3_CHECKSUMS=never an MD5 is sent instead, and is the proof."""
    unsupported = b"<Error><Code>InvalidArgument</Code><Message>Unsupported header</Message></Error>"

    def refuse(sent: Request, forward: Forward) -> Answer:
        has_sum = any(
            name.startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer")) for name in sent.headers
        )
        return Answer(400, {"content-type": "application/xml"}, unsupported) if has_sum else told(forward(sent), None)

    on = faulty(lambda sent, forward: forward(sent))
    bucket = Bucket(
        on.parts.bucket.name, endpoint_url=on.proxy.endpoint_url, prefix=on.parts.bucket.prefix, checksum_mode="never"
    )
    on.parts.close()
    on.parts = Wired(on.honest.settings, bucket=bucket)
    on.begin(refuse)
    run(on.parts, "assets", "finishes")
    assert (on.reads, bucket.capabilities().proof) == ([], "md5")
    assert_archived(on.honest, on.sandbox, on.task)
