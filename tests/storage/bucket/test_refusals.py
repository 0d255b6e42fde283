"""Refusals of a store: their code is found, the remedy is named, and new credentials are read without a restart."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from receiver.local_store.seaweed import Seaweed
from storage.bucket import bucket as objects
from storage.bucket import store_connection
from storage.bucket.bucket import Bucket
from storage.bucket.probe import Capabilities
from storage.errors import StoreUnavailable
from tests.fault_proxy import Answer, Fault, FaultProxy, Forward, Request

TOKEN = "x-amz-security-token"


def said(status: int, code: str, message: str = "") -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(status, {"content-type": "application/xml"}, body.encode())


def put(bucket: Bucket, content: bytes = b"picture") -> bool:
    return bucket.put_once(
        f"{bucket.prefix}a.png", io.BytesIO(content), sha256=hashlib.sha256(content).hexdigest(), size=len(content),
        media_type="image/png", metadata={},
    )  # fmt: skip


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed) as server:
        yield server


def behind(proxy: FaultProxy, bucket: Bucket, known: Capabilities | None = None) -> Bucket:
    return Bucket(bucket.name, endpoint_url=proxy.endpoint_url, prefix=bucket.prefix, capabilities=known)


@pytest.fixture
def through(bucket: Bucket, proxy: FaultProxy) -> Bucket:
    return behind(proxy, bucket, bucket.capabilities())


@pytest.mark.parametrize("times", [1, 3])
def test_put_answered_with_409_is_sent_again(
    through: Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(objects, "CONFLICT_PAUSES", (0, 0, 0))
    puts: list[str] = []

    def conflicted(request: Request, forward: Forward) -> Answer:
        puts.extend([request.path] * request.puts_an_object)
        again = request.puts_an_object and len(puts) <= times
        return said(409, "ConditionalRequestConflict") if again else forward(request)

    proxy.fault = conflicted
    assert put(through) is True
    assert len(puts) == times + 1


def test_put_answered_with_409_for_ever_blames_no_other_writer(
    through: Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "CONFLICT_PAUSES", (0,))
    proxy.fault = lambda request, forward: (
        said(409, "ConditionalRequestConflict") if request.puts_an_object else forward(request)
    )
    with pytest.raises(StoreUnavailable, match="answers HTTP 409 to each put"):
        put(through)


def test_refusal_of_a_head_has_the_stores_error_code(through: Bucket, proxy: FaultProxy) -> None:
    proxy.fault = lambda *_: said(400, "ExpiredToken", "The provided token has expired.")
    with pytest.raises(StoreUnavailable, match="says the session token has expired"):
        through.head("any")


def test_refusal_names_the_missing_permission(through: Bucket, proxy: FaultProxy) -> None:
    proxy.fault = lambda *_: said(403, "AccessDenied")
    with pytest.raises(StoreUnavailable, match=r"needs s3:GetObject, and s3:ListBucket to look for a missing object"):
        through.head("any")
    with pytest.raises(StoreUnavailable, match=r"\(needs s3:ListBucket\)"):
        list(through.list("any"))


def test_refused_checksum_headers_name_the_remedy(bucket: Bucket, proxy: FaultProxy) -> None:
    words = "A header you provided implies functionality that is not implemented"
    proxy.fault = lambda request, forward: (
        said(501, "NotImplemented", words) if request.method == "PUT" else forward(request)
    )
    with pytest.raises(StoreUnavailable, match=f'"{words}".*set RECEIVER_S3_CHECKSUMS=never'):
        behind(proxy, bucket).probe()


@pytest.mark.parametrize("status", [405, 501])
def test_folder_is_emptied_where_versions_cannot_be_listed(status: int, through: Bucket, proxy: FaultProxy) -> None:
    assert put(through)
    proxy.fault = lambda request, forward: (
        said(status, "MethodNotAllowed") if "?versions" in request.path else forward(request)
    )
    assert through.purge(through.prefix) == 1
    assert list(through.list(through.prefix)) == []


@pytest.mark.parametrize("versions", [False, True])
@pytest.mark.parametrize(
    "page",
    [b"<html><body>Log in</body></html>", b"", b"<?xml version='1.0'?><Owner/>", b"<!DOCTYPE html><html></html>"],
)
def test_page_in_place_of_a_listing_is_no_empty_bucket(
    page: bytes, versions: bool, through: Bucket, proxy: FaultProxy
) -> None:
    assert put(through)
    proxy.fault = lambda request, forward: (
        Answer(200, {"content-type": "text/html"}, page) if "prefix=" in request.path else forward(request)
    )
    with pytest.raises(StoreUnavailable, match=r"answers a listing with what is not one: HTTP 200|no XML of S3"):
        through.purge(through.prefix) if versions else list(through.list(through.prefix))


NOT_A_STORE = {
    "no route": Answer(404, {"content-type": "text/plain"}, b"404 page not found"),
    "to https": Answer(301, {"location": "https://store.example.com/k"}, b""),
    "to a log-in": Answer(302, {"location": "/login?next=%2F"}, b""),
    "empty": Answer(200, {}, b""),
    "a page": Answer(200, {"content-type": "text/html"}, b"<html>Log in</html>"),
    "cut": Answer(200, {"content-type": "application/xml"}, b"<ListBucketResult><Contents><Key>k</K"),
}
CALLS: dict[str, Callable[[Bucket], object]] = {
    "put": put,
    "put in parts": lambda bucket: put(bucket, bytes(7 * 2**20)),
    "list": lambda bucket: list(bucket.list("k/")),
    "purge": lambda bucket: bucket.purge("k/"),
    "probe": lambda bucket: bucket.probe(),
}


@pytest.mark.parametrize("answer", NOT_A_STORE.values(), ids=NOT_A_STORE)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_answer_of_no_store_counts_as_a_store_that_is_down(
    call: Callable[[Bucket], object],
    answer: Answer,
    through: Bucket,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each was taken for a bug: a traceback in the log, no error in the row, and up to an hour until the next try."""
    monkeypatch.setattr(objects, "MULTIPART_THRESHOLD_BYTES", 6 * 2**20)
    asked: list[str] = []

    def answers(request: Request, forward: Forward) -> Answer:
        asked.append(request.path)
        is_look_up = request.method == "HEAD" and call is CALLS["put in parts"]
        return forward(request) if is_look_up else replace(answer, body=answer.body * (request.method != "HEAD"))

    proxy.fault = answers
    with pytest.raises(StoreUnavailable):
        call(through)
    assert len(asked) < 12  # boto3 asks for the region of a redirect, which is redirected, and so on: 110 requests


@pytest.mark.parametrize("host", ["h" * 5_000, "ä.example.com"])
def test_hostile_redirect_is_not_quoted(through: Bucket, proxy: FaultProxy, host: str) -> None:
    proxy.fault = lambda *_: Answer(302, {"location": f"https://{host}/k"}, b"")
    with pytest.raises(StoreUnavailable, match=r"\Athe store at [ -~]{1,150}\Z"):
        through.head("any")


def test_part_without_an_etag_is_an_error_of_the_store(
    through: Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "MULTIPART_THRESHOLD_BYTES", 6 * 2**20)
    proxy.fault = lambda request, forward: Answer(200, {}, b"") if "partNumber" in request.path else forward(request)
    with pytest.raises(StoreUnavailable, match="no XML of S3"):
        put(through, bytes(7 * 2**20))


def test_description_without_a_time_is_an_error_of_the_store(through: Bucket, proxy: FaultProxy) -> None:
    proxy.fault = lambda *_: Answer(200, {"content-type": "text/html"}, b"")
    with pytest.raises(StoreUnavailable, match="without its length or its time"):
        through.head("any")


@pytest.fixture
def credentials(seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_environment: object) -> Path:
    """The shared credentials file, the only place where the chain finds any."""
    for name in seaweed.environment:
        if "KEY" in name:
            monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    return path


def rotate(path: Path, seaweed: Seaweed, token: str) -> None:
    keys = f"aws_access_key_id={seaweed.access_key}\naws_secret_access_key={seaweed.secret_key}\n"
    path.write_text(f"[default]\n{keys}aws_session_token={token}\n")


def only(token: str) -> Fault:
    def check(request: Request, forward: Forward) -> Answer:
        if request.headers.get(TOKEN) != token:
            return said(400, "ExpiredToken") if request.method != "HEAD" else Answer(400, {}, b"")
        return forward(request.without(TOKEN))

    return check


def test_rotated_session_token_is_read_without_a_restart(
    bucket: Bucket, proxy: FaultProxy, seaweed: Seaweed, credentials: Path
) -> None:
    through = behind(proxy, bucket, bucket.capabilities())
    rotate(credentials, seaweed, "first")
    proxy.fault = only("first")
    assert put(through, b"one") is True
    proxy.fault = only("second")
    rotate(credentials, seaweed, "second")
    with pytest.raises(StoreUnavailable, match="session token has expired"):
        put(through, b"one")
    assert put(through, b"one") is False


def test_credentials_are_read_again_at_intervals(
    bucket: Bucket, proxy: FaultProxy, seaweed: Seaweed, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_connection, "RENEW_SECONDS", 600.0)  # a busy machine takes ten seconds for four requests
    through = behind(proxy, bucket, bucket.capabilities())
    rotate(credentials, seaweed, "first")
    proxy.fault = only("another")
    clients = []
    for _ in range(4):
        with pytest.raises(StoreUnavailable, match="expired"):
            through.head("any")
        clients.append(through._client())
    assert len(set(map(id, clients))) == 1  # the one that was made after the first refusal
