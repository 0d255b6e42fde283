"""The conformance suite itself: it passes on SeaweedFS, and it fails on a store on which a promise does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from receiver.local_store.seaweed import Seaweed
from storage.errors import StoreUnavailable
from tests.conformance.__main__ import CASES, LACKS, YES, Result, run
from tests.conformance.stage import Case, Stage, stage
from tests.fault_proxy import Answer, FaultProxy, Forward, Request

# Capabilities that SeaweedFS 4.48 lacks in a bucket without lock.
SEAWEED_LACKS = {
    "keys listed in the order of their bytes",
    "Object Lock (in this bucket)",
    "a wrong region is named",
}
# The longest cases, each of which has tests of its own on SeaweedFS; the command runs all of them.
ELSEWHERE = (
    "16 racing",
    "archived byte for byte",
    "a big file",
    "an audit",
    "all rows",
    "a deleted task",
    "takes over",
)


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed) as running:
        yield running


@pytest.fixture
def on(
    seaweed: Seaweed, proxy: FaultProxy, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    """SeaweedFS, through a proxy that a test may make lie."""
    for name in ("PREFIX", "CHECKSUMS", "ADDRESSING"):
        monkeypatch.delenv(f"RECEIVER_S3_{name}", raising=False)
    monkeypatch.setenv("RECEIVER_S3_BUCKET", seaweed.bucket)
    monkeypatch.setenv("RECEIVER_S3_ENDPOINT_URL", proxy.endpoint_url)
    with stage(keys=30) as made:
        yield made
    assert list(made.bucket.list(made.bucket.prefix)) == []


def chosen(*words: str) -> list[Case]:
    found = [case for case in CASES if any(word in case.name for word in words)]
    assert len(found) == len(words)
    return found


def words_of(results: list[Result]) -> dict[str, str]:
    return {result.name: result.word for result in results}


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 30


def test_seaweedfs_keeps_every_promise(seaweed: Seaweed, on: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    on.bucket._endpoint_url = seaweed.endpoint_url  # directly, without the proxy, which signs for every client
    results = list(run(on, [case for case in CASES if not any(words in case.name for words in ELSEWHERE)]))
    assert len(results) > 24 and [result for result in results if result.is_fault] == []
    assert {name for name, word in words_of(results).items() if word == LACKS} == SEAWEED_LACKS
    assert on.bucket.capabilities().believed


def test_store_that_returns_other_bytes_breaks_promises(proxy: FaultProxy, on: Stage) -> None:
    assert on.bucket.capabilities().believed

    def spoil(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        is_file = request.method == "GET" and "?" not in request.path and answer.status == 200
        return replace(answer, body=answer.body[:-1] + b"?") if is_file else answer

    proxy.fault = spoil
    results = list(run(on, chosen("put, get, head", "an audit finds", "all rows come back")))
    assert [result.is_fault for result in results] == [True, True, True]


def test_store_with_plain_puts_only_keeps_every_promise(proxy: FaultProxy, on: Stage) -> None:
    """The store ignores conditions and checksums, and returns metadata with capitals."""

    def plain(request: Request, forward: Forward) -> Answer:
        answer = forward(request.without("if-none-match", "x-amz-checksum-sha256", "x-amz-sdk-checksum-algorithm"))
        headers = {name: value for name, value in answer.headers.items() if not name.startswith("x-amz-checksum")}
        return replace(answer, headers={name.replace("-sha256", "-Sha256"): value for name, value in headers.items()})

    proxy.fault = plain
    promised = chosen(
        "a repeated put succeeds", "changed on the way", "16 racing writers", "counts no damaged", "that takes over"
    )
    assert words_of(list(run(on, promised))) == {case.name: YES for case in promised}
    capable = chosen("create-only put (If", "wrong SHA-256 refused", "SHA-256 named")
    assert words_of(list(run(on, capable))) == {case.name: LACKS for case in capable}


def test_objects_that_cannot_be_listed_are_reported_as_left_and_hide_no_result(
    proxy: FaultProxy, on: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    def unlisted(request: Request, forward: Forward) -> Answer:
        failed = Answer(500, {"content-type": "application/xml"}, b"<Error><Code>InternalError</Code></Error>")
        return failed if request.method == "GET" and "prefix=" in request.path else forward(request)

    with stage(keys=1) as made:
        proxy.fault = unlisted
        with pytest.raises(StoreUnavailable):
            list(made.bucket.list(made.bucket.prefix))
    proxy.fault = lambda request, forward: forward(request)
    assert f"objects below {made.bucket.prefix} are left behind" in capsys.readouterr().err
