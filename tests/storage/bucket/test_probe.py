"""Old leftovers of a killed probe are removed by a later one."""

from __future__ import annotations

import io
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest

from receiver.local_store.seaweed import Seaweed
from storage.bucket.bucket import PROBE_FOLDER, Bucket
from tests.fault_proxy import Answer, FaultProxy, Forward, Request


def leave(bucket: Bucket) -> str:
    """An object and an unfinished upload, as a killed probe leaves them."""
    key = f"{bucket.prefix}{PROBE_FOLDER}0123456789abcdef/first"
    client = bucket._client()
    client.put_object(Bucket=bucket.name, Key=key, Body=io.BytesIO(b"x"))
    client.create_multipart_upload(Bucket=bucket.name, Key=key)
    return key


def left(bucket: Bucket) -> tuple[list[str], list[str]]:
    uploads = bucket._client().list_multipart_uploads(Bucket=bucket.name, Prefix=bucket.prefix).get("Uploads", ())
    return [each.key for each in bucket.list(bucket.prefix)], [upload["Key"] for upload in uploads]


def in_the_past(request: Request, forward: Forward) -> Answer:
    """A proxy fault: everything listed has a time in 2020."""
    answer = forward(request)
    if request.method != "GET" or "prefix=" not in request.path:
        return answer
    old = re.sub(rb"<(LastModified|Initiated)>20[0-9]{2}", rb"<\1>2020", answer.body)
    return replace(answer, body=old)


def test_probe_removes_old_leftovers_but_not_those_of_a_running_probe(bucket: Bucket, seaweed: Seaweed) -> None:
    key = leave(bucket)
    bucket.probe()
    assert left(bucket) == ([key], [key])
    with FaultProxy(seaweed, in_the_past) as proxy:
        Bucket(bucket.name, endpoint_url=proxy.endpoint_url, prefix=bucket.prefix).probe()
    assert left(bucket) == ([], [])


def test_probe_removes_nothing_outside_its_folder(bucket: Bucket, seaweed: Seaweed) -> None:
    key = f"{bucket.prefix}picture.png"
    bucket._client().put_object(Bucket=bucket.name, Key=key, Body=io.BytesIO(b"x"))
    with FaultProxy(seaweed, in_the_past) as proxy:
        Bucket(bucket.name, endpoint_url=proxy.endpoint_url, prefix=bucket.prefix).probe()
    assert left(bucket) == ([key], [])


def in_the_past_without_prefix(request: Request, forward: Forward) -> Answer:
    """A store that lists the whole bucket, whatever prefix is asked for."""
    path = re.sub("prefix=[^&]*", "prefix=", request.path) if request.method == "GET" else request.path
    return in_the_past(replace(request, path=path), forward)


@pytest.fixture
def whole(seaweed: Seaweed, s3_environment: object) -> Iterator[Bucket]:
    """A bucket of the test's own with three objects and an upload, each below another folder."""
    made = Bucket(f"whole-{uuid.uuid4().hex[:8]}", endpoint_url=seaweed.endpoint_url)
    made._client().create_bucket(Bucket=made.name)
    for key in ("a/1", "b/2", "else/3"):
        made._client().put_object(Bucket=made.name, Key=key, Body=b"x")
    made._client().create_multipart_upload(Bucket=made.name, Key="else/4")
    with FaultProxy(seaweed, in_the_past_without_prefix) as proxy:
        yield Bucket(made.name, endpoint_url=proxy.endpoint_url)


def test_store_that_ignores_prefixes_loses_nothing_by_a_probe(whole: Bucket) -> None:
    whole.probe()
    assert left(whole) == (["a/1", "b/2", "else/3"], ["else/4"])


def test_store_that_ignores_prefixes_loses_one_folder_by_a_purge(whole: Bucket) -> None:
    assert [each.key for each in whole.list("b/")] == ["b/2"]
    assert whole.purge("a/") == 1
    assert whole.abort_uploads("a/") == 0
    assert left(whole) == (["b/2", "else/3"], ["else/4"])


def test_next_probe_notices_a_store_that_ignores_conditions(
    bucket: Bucket, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.bucket.bucket.PROBE_SECONDS", 1.0)
    with FaultProxy(seaweed) as proxy:
        behind = Bucket(bucket.name, endpoint_url=proxy.endpoint_url, prefix=bucket.prefix)
        assert behind.capabilities().conditional_put
        proxy.fault = lambda request, forward: forward(request.without("if-none-match"))
        assert behind.capabilities().conditional_put
        time.sleep(1)
        assert not behind.capabilities().conditional_put
