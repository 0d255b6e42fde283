"""Objects in a real S3 server, also behind a proxy with faults: created once, verified, never overwritten."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from receiver.local_store.seaweed import Seaweed
from storage.bucket import bucket as objects
from storage.bucket import checksums
from storage.bucket.bucket import Bucket
from storage.bucket.probe import Capabilities
from storage.bucket.store_connection import Addressing, EndpointInvalid
from storage.bucket.store_errors import NoSuchObject
from storage.errors import ObjectConflict, StoreUnavailable
from tests.fault_proxy import Answer, FaultProxy, Forward, Request

AWS_LIKE = Capabilities(
    conditional_put=True,
    refuses_wrong_checksum=True,
    returns_checksum=True,
    keeps_metadata=True,
    multipart=True,
    refuses_wrong_part=True,
    conditional_multipart=True,
    delete=True,
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put(bucket: Bucket, name: str, content: bytes, claimed: str | None = None, **metadata: str) -> bool:
    return bucket.put_once(
        bucket.prefix + name,
        io.BytesIO(content),
        sha256=claimed or sha256(content),
        size=len(content),
        media_type="image/png",
        metadata=metadata,
    )


def fresh(bucket: Bucket, server: Seaweed) -> Bucket:
    """The same bucket with a new client, which reads the environment again."""
    return Bucket(bucket.name, endpoint_url=server.endpoint_url, prefix=bucket.prefix)


def content_of(bucket: Bucket, name: str) -> bytes:
    return bucket.read_bytes(bucket.prefix + name, 100_000_000)


def race(bucket: Bucket, contents: list[bytes]) -> list[bool | type[Exception]]:
    """Put all contents under one name at once. Returns the result or the error of each call."""
    together = threading.Barrier(len(contents), timeout=30)

    def attempt(content: bytes) -> bool | type[Exception]:
        together.wait()
        try:
            return put(bucket, "raced.png", content)
        except ObjectConflict as error:
            return type(error)

    with ThreadPoolExecutor(len(contents)) as threads:
        return list(threads.map(attempt, contents))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files above 6 MiB are uploaded in parts of 5 MiB, S3's minimum, so that tests need no larger ones."""
    monkeypatch.setattr(objects, "MULTIPART_THRESHOLD_BYTES", 6 * 1024 * 1024)
    monkeypatch.setattr(checksums, "PART_BYTES", 5 * 1024 * 1024)


@pytest.fixture
def bucket(bucket: Bucket, request: pytest.FixtureRequest) -> Bucket:
    way = getattr(request, "param", "believed")
    if way == "not believed":
        bucket._capabilities = replace(bucket.capabilities(), refuses_wrong_checksum=False)
    if way == "by boto3":
        bucket._client()
        bucket._signed = None
    return bucket


# One signed request; a HEAD, an MD5 and a read around it; boto3. All keep the same promises.
in_every_way = pytest.mark.parametrize("bucket", ["believed", "not believed", "by boto3"], indirect=True)


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed) as running:
        yield running


@pytest.fixture
def through_proxy(bucket: Bucket, proxy: FaultProxy) -> Bucket:
    """The test's bucket through the proxy."""
    return Bucket(bucket.name, endpoint_url=proxy.endpoint_url, prefix=bucket.prefix)


def uploads_left(bucket: Bucket) -> list[str]:
    answer = bucket._client().list_multipart_uploads(Bucket=bucket.name, Prefix=bucket.prefix)
    return [upload["Key"] for upload in answer.get("Uploads", ())]


def test_probe_finds_the_capabilities_of_seaweed_and_leaves_nothing(bucket: Bucket) -> None:
    assert bucket.probe() == AWS_LIKE
    assert list(bucket.list(bucket.prefix)) == []


@in_every_way
def test_put_is_described_and_read_back(bucket: Bucket) -> None:
    content = os.urandom(3_000_000)
    assert put(bucket, "a.png", content, task="bild-ö%", host="cdn.example") is True
    stored = bucket.head(bucket.prefix + "a.png")
    assert stored is not None
    assert (stored.size, stored.sha256, stored.media_type) == (len(content), sha256(content), "image/png")
    assert stored.metadata == {"sha256": sha256(content), "task": "bild-ö%", "host": "cdn.example"}
    assert content_of(bucket, "a.png") == content


@in_every_way
def test_same_bytes_again_succeed_and_other_bytes_conflict(bucket: Bucket) -> None:
    assert put(bucket, "a.png", b"one") is True
    assert put(bucket, "a.png", b"one") is False
    with pytest.raises(ObjectConflict):
        put(bucket, "a.png", b"two")
    assert content_of(bucket, "a.png") == b"one"


@in_every_way
def test_wrong_checksum_leaves_no_object(bucket: Bucket) -> None:
    with pytest.raises(StoreUnavailable, match="not those of the checksum"):
        put(bucket, "a.png", b"one", claimed=sha256(b"two"))
    assert bucket.head(bucket.prefix + "a.png") is None


@in_every_way
def test_concurrent_puts_of_different_bytes_have_one_winner(bucket: Bucket) -> None:
    contents = [b"content %d" % number for number in range(16)]
    outcomes = race(bucket, contents)
    assert outcomes.count(True) == 1
    assert outcomes.count(ObjectConflict) == 15
    assert content_of(bucket, "raced.png") == contents[outcomes.index(True)]


@in_every_way
def test_concurrent_puts_of_equal_bytes_create_one_object(bucket: Bucket) -> None:
    outcomes = race(bucket, [b"the same"] * 16)
    assert (outcomes.count(True), outcomes.count(False)) == (1, 15)


@pytest.mark.usefixtures("small_parts")
def test_large_file_is_uploaded_in_parts_once(bucket: Bucket) -> None:
    content = os.urandom(11_000_000)
    assert put(bucket, "a.mp4", content) is True
    assert put(bucket, "a.mp4", content) is False
    with pytest.raises(ObjectConflict):
        put(bucket, "a.mp4", content[::-1])
    stored = bucket.head(bucket.prefix + "a.mp4")
    assert stored is not None
    assert (stored.etag[-3:], stored.sha256) == ('-3"', sha256(content))
    assert content_of(bucket, "a.mp4") == content


@pytest.mark.usefixtures("small_parts")
def test_concurrent_equal_multipart_uploads_leave_one_whole_object(bucket: Bucket) -> None:
    """Several calls may return True: SeaweedFS 4.48 completes concurrent uploads more than once."""
    content = os.urandom(6_500_000)
    outcomes = race(bucket, [content] * 4)
    assert set(outcomes) <= {True, False}
    assert True in outcomes
    assert content_of(bucket, "raced.png") == content
    assert uploads_left(bucket) == []


@pytest.mark.usefixtures("small_parts")
def test_concurrent_different_multipart_uploads_never_mix(bucket: Bucket) -> None:
    """The object is that of one winner. SeaweedFS does not guarantee a single winner."""
    contents = [bytes([number]) * 6_500_000 for number in range(4)]
    outcomes = race(bucket, contents)
    stored = [content for content, outcome in zip(contents, outcomes, strict=True) if outcome is True]
    assert content_of(bucket, "raced.png") in stored
    assert uploads_left(bucket) == []


@pytest.mark.usefixtures("small_parts")
def test_multipart_upload_does_not_replace_an_object_created_meanwhile(
    proxy: FaultProxy, through_proxy: Bucket, bucket: Bucket
) -> None:
    def come_first(request: Request, forward: Forward) -> Answer:
        if request.method == "POST" and "uploadId=" in request.path and ".receiver-probe" not in request.path:
            put(bucket, "a.mp4", b"another")
        return forward(request)

    proxy.fault = come_first
    with pytest.raises(ObjectConflict):
        put(through_proxy, "a.mp4", bytes(7_000_000))
    assert content_of(bucket, "a.mp4") == b"another"
    assert uploads_left(bucket) == []


@pytest.mark.usefixtures("small_parts")
def test_large_file_that_changed_on_disk_is_not_stored(bucket: Bucket) -> None:
    with pytest.raises(StoreUnavailable, match="changed on our disk"):
        put(bucket, "a.mp4", bytes(7_000_000), claimed=sha256(b"what was hashed"))
    assert bucket.head(bucket.prefix + "a.mp4") is None
    assert uploads_left(bucket) == []


def test_unfinished_uploads_are_aborted_by_prefix_and_age(bucket: Bucket) -> None:
    for name in ("a/1.mp4", "a/2.mp4", "b/3.mp4"):
        bucket._client().create_multipart_upload(Bucket=bucket.name, Key=bucket.prefix + name)
    assert bucket.abort_uploads(bucket.prefix, older_than_seconds=3_600) == 0
    assert bucket.abort_uploads(bucket.prefix + "a/") == 2
    assert uploads_left(bucket) == [bucket.prefix + "b/3.mp4"]
    assert bucket.abort_uploads(bucket.prefix) == 1


def test_holds_compares_the_bytes_under_the_key(bucket: Bucket) -> None:
    put(bucket, "a.png", b"one")
    assert bucket.holds(bucket.prefix + "a.png", sha256=sha256(b"one"), size=3) is True
    assert bucket.holds(bucket.prefix + "b.png", sha256=sha256(b"one"), size=3) is False
    with pytest.raises(ObjectConflict):
        bucket.holds(bucket.prefix + "a.png", sha256=sha256(b"two"), size=3)


@in_every_way
def test_object_without_our_checksum_is_read_and_hashed(bucket: Bucket) -> None:
    bucket._client().put_object(Bucket=bucket.name, Key=bucket.prefix + "a.png", Body=b"one")
    assert put(bucket, "a.png", b"one") is False


def test_objects_are_listed_in_order_and_deleted(bucket: Bucket) -> None:
    for name in ("b/2.png", "a/1.png"):
        put(bucket, name, name.encode())
    assert [listed.key for listed in bucket.list(bucket.prefix)] == [
        bucket.prefix + "a/1.png",
        bucket.prefix + "b/2.png",
    ]
    bucket.delete(bucket.prefix + "a/1.png")
    bucket.delete(bucket.prefix + "a/1.png")
    assert [listed.key for listed in bucket.list(bucket.prefix)] == [bucket.prefix + "b/2.png"]


def test_reading_a_missing_or_too_long_object_raises(bucket: Bucket) -> None:
    put(bucket, "a.png", b"four")
    with pytest.raises(NoSuchObject):
        bucket.read_bytes(bucket.prefix + "missing.png", 10)
    with pytest.raises(ValueError, match="longer than 3 bytes"):
        bucket.read_bytes(bucket.prefix + "a.png", 3)


def test_presigned_link_reads_without_credentials(bucket: Bucket) -> None:
    put(bucket, "a b.png", b"picture")
    link = bucket.presigned_get(bucket.prefix + "a b.png", expires_seconds=60)
    assert httpx.get(link).content == b"picture"
    assert httpx.get(link.partition("?")[0]).status_code == 403


def test_links_are_signed_for_the_public_endpoint(bucket: Bucket, seaweed: Seaweed) -> None:
    public = Bucket(bucket.name, endpoint_url=seaweed.endpoint_url, public_endpoint_url="https://pictures.example")
    assert public.presigned_get("a.png", expires_seconds=60).startswith("https://pictures.example/pictures/a.png?")
    with pytest.raises(ValueError, match="604800"):
        public.presigned_get("a.png", expires_seconds=604_801)


@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize(
    ("addressing", "start"),
    [
        ("auto", "https://s3.example/pictures/"),
        ("path", "https://s3.example/pictures/"),
        ("virtual", "https://pictures.s3.example/"),
    ],
)
def test_addressing_places_the_bucket_name(addressing: Addressing, start: str) -> None:
    made = Bucket("pictures", endpoint_url="https://s3.example", addressing=addressing)
    assert made.presigned_get("a.png", expires_seconds=60).startswith(start)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("AWS_ACCESS_KEY_ID", "somebody", "does not know the access key"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", "says the secret key is wrong"),
    ],
)
def test_wrong_credentials_are_named_without_the_secret(
    bucket: Bucket, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnavailable, match=reason) as refused:
        put(fresh(bucket, seaweed), "a.png", b"one")
    assert "wrong-secret" not in str(refused.value)


def test_missing_credentials_are_named(bucket: Bucket, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreUnavailable, match="export AWS_ACCESS_KEY_ID"):
        put(fresh(bucket, seaweed), "a.png", b"one")


def test_missing_bucket_is_named(bucket: Bucket, seaweed: Seaweed) -> None:
    with pytest.raises(StoreUnavailable, match=r"has no such bucket \(bucket elsewhere"):
        put(Bucket("elsewhere", endpoint_url=seaweed.endpoint_url), "a.png", b"one")
    with pytest.raises(StoreUnavailable, match="has no such bucket"):
        Bucket("elsewhere", endpoint_url=seaweed.endpoint_url).abort_uploads("a")


def test_a_store_on_loopback_is_not_asked_for_through_a_proxy(
    bucket: Bucket, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a company's proxy every shell has these variables, mostly without NO_PROXY."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    beside = fresh(bucket, seaweed)
    assert put(beside, "a.png", b"one") is True
    assert [each.key for each in beside.list(bucket.prefix)] == [f"{bucket.prefix}a.png"]


@pytest.mark.usefixtures("s3_environment")
def test_unreachable_store_is_named_without_its_password() -> None:
    down = Bucket("pictures", endpoint_url="http://user:secret@127.0.0.1:9")
    with pytest.raises(StoreUnavailable, match=r"the store at 127\.0\.0\.1:9 cannot be reached") as refused:
        down.head("a.png")
    assert "secret" not in str(refused.value)


PROFILE = "[default]\nregion = us-east-1\nendpoint_url = http://user:secret@127.0.0.1:9\n"


@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize("source", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "profile"])
def test_unreachable_store_of_boto3s_own_settings_is_named(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if source == "profile":
        (tmp_path / "config").write_text(PROFILE)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    else:
        monkeypatch.setenv(source, "http://user:secret@127.0.0.1:9")
    down = Bucket("pictures")
    with pytest.raises(StoreUnavailable, match=r"the store at 127\.0\.0\.1:9 cannot be reached") as refused:
        down.head("a.png")
    assert "secret" not in str(refused.value)
    assert down.place == "the store at 127.0.0.1:9 (bucket pictures)"


@pytest.mark.usefixtures("s3_environment")
def test_invalid_endpoint_of_boto3s_own_settings_is_refused_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:secret@my_store:9")
    with pytest.raises(EndpointInvalid, match="boto3 refuses the host in AWS_ENDPOINT_URL_S3") as refused:
        Bucket("pictures").head("a.png")
    assert "secret" not in str(refused.value)


def test_lost_responses_are_resolved_by_a_second_put(proxy: FaultProxy, through_proxy: Bucket) -> None:
    def keep_and_hang_up(request: Request, forward: Forward) -> Answer | None:
        answer = forward(request)
        return None if request.puts_an_object else answer

    proxy.fault = keep_and_hang_up
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        put(through_proxy, "a.png", b"one")
    proxy.fault = lambda request, forward: forward(request)
    assert put(through_proxy, "a.png", b"one") is False
    assert content_of(through_proxy, "a.png") == b"one"


def test_one_lost_response_is_retried_by_boto3(proxy: FaultProxy, through_proxy: Bucket) -> None:
    lost: list[Request] = []

    def hang_up_once(request: Request, forward: Forward) -> Answer | None:
        answer = forward(request)
        if request.puts_an_object and not lost:
            lost.append(request)
            return None
        return answer

    proxy.fault = hang_up_once
    assert put(through_proxy, "a.png", b"one") is False
    assert content_of(through_proxy, "a.png") == b"one"


def test_object_with_a_flipped_byte_is_removed(proxy: FaultProxy, through_proxy: Bucket) -> None:
    def flip(request: Request, forward: Forward) -> Answer:
        if request.puts_an_object:
            request = replace(request, body=bytes([request.body[0] ^ 1]) + request.body[1:])
        return forward(request.without("x-amz-checksum-sha256", "content-md5"))

    proxy.fault = flip
    assert through_proxy.capabilities().refuses_wrong_checksum is False
    with pytest.raises(StoreUnavailable, match="kept other bytes"):
        put(through_proxy, "a.png", b"one")
    assert through_proxy.head(through_proxy.prefix + "a.png") is None


def test_store_without_conditional_writes_is_asked_before_the_put(proxy: FaultProxy, through_proxy: Bucket) -> None:
    proxy.fault = lambda request, forward: forward(request.without("if-none-match"))
    assert through_proxy.capabilities() == replace(AWS_LIKE, conditional_put=False, conditional_multipart=False)
    assert put(through_proxy, "a.png", b"one") is True
    assert put(through_proxy, "a.png", b"one") is False
    with pytest.raises(ObjectConflict):
        put(through_proxy, "a.png", b"two")
    assert content_of(through_proxy, "a.png") == b"one"


def with_checksum(answer: Answer, value: str | None) -> Answer:
    headers = {name: text for name, text in answer.headers.items() if name != "x-amz-checksum-sha256"}
    return replace(answer, headers=headers if value is None else headers | {"x-amz-checksum-sha256": value})


@pytest.mark.parametrize("value", [None, "n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg="])
def test_put_succeeds_if_the_store_returns_no_or_a_wrong_checksum(
    proxy: FaultProxy, through_proxy: Bucket, value: str | None
) -> None:
    proxy.fault = lambda request, forward: with_checksum(forward(request), value)
    assert through_proxy.capabilities().returns_checksum is False
    assert put(through_proxy, "a.png", b"one") is True
    assert put(through_proxy, "a.png", b"one") is False
    assert content_of(through_proxy, "a.png") == b"one"


@pytest.mark.parametrize("etag", [{}, {"etag": '"65a1b2c3-1f4"'}], ids=["no ETag", "ETag of a file"])
@pytest.mark.parametrize("believes", ["sha256", "md5"])
def test_page_in_place_of_the_store_is_no_proof_of_a_put(
    proxy: FaultProxy, through_proxy: Bucket, believes: str, etag: dict[str, str]
) -> None:
    """A proxy that answers 200 while the store is down, in front of one that names no checksum."""
    refuses = {"refuses_wrong_checksum": believes == "sha256", "refuses_wrong_md5": True}
    through_proxy._capabilities = replace(AWS_LIKE, returns_checksum=False, **refuses)
    page = Answer(200, {"content-type": "text/html", **etag}, b"<html>down for maintenance</html>")
    proxy.fault = lambda request, forward: page if request.puts_an_object else forward(request)
    with pytest.raises(StoreUnavailable, match="there is no object"):
        put(through_proxy, "a.png", b"one")
    proxy.fault = lambda request, forward: with_checksum(forward(request), None)
    assert put(through_proxy, "a.png", b"one") is True
    assert content_of(through_proxy, "a.png") == b"one"
