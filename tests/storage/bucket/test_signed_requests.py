"""Our own signed requests: the store gets the same as from boto3, and boto3 repeats every unexpected response."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from botocore.awsrequest import AWSPreparedRequest

from receiver.local_store.seaweed import Seaweed
from storage.bucket import checksums, store_connection
from storage.bucket.bucket import Bucket
from storage.bucket.http_connections import TOO_SLOW, HttpConnections
from storage.bucket.probe import Capabilities
from storage.bucket.put_options import PutOptions
from storage.errors import ObjectConflict, StoreUnavailable
from storage.http.client import Origin
from storage.http.connection import GuardedStream
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.harness import wait_until

# Headers that differ by request or count boto3's tries.
ITS_OWN = {"accept-encoding", "user-agent", "amz-sdk-invocation-id", "amz-sdk-request"}
OPTIONS = PutOptions(
    storage_class="STANDARD_IA", sse="aws:kms", kms_key_id="a-key", tags={"a": "b&c"}, cache_control="max-age=60"
)


class NotDialled(Exception):
    """A request reached the socket."""


@contextmanager
def slow_store(bytes_per_second: int, headers: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """An empty store that accepts every put slowly, with small buffers. Yields its URL and its requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(404, {})

        def do_PUT(self) -> None:
            left = int(self.headers["Content-Length"])
            while left and (piece := self.rfile.read(min(left, 8192))):
                left -= len(piece)
                time.sleep(len(piece) / bytes_per_second)
            self.answer(200, headers)

        def answer(self, status: int, headers: dict[str, str]) -> None:
            requests.append(self.command)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def is_ours(request: Request) -> bool:
    return "amz-sdk-invocation-id" not in request.headers


class Recorder:
    """A proxy fault that records requests. `refuse`: the status for our own requests, 0 = hang up."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.refuse: int | None = None

    def __call__(self, request: Request, forward: Forward) -> Answer | None:
        self.seen.append(request)
        if is_ours(request) and self.refuse is not None:
            return Answer(self.refuse, {}, b"") if self.refuse else None
        return forward(request)

    @property
    def told(self) -> list[tuple[str, bool]]:
        return [(request.method, is_ours(request)) for request in self.seen]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def through(bucket: Bucket, seaweed: Seaweed, recorder: Recorder) -> Iterator[Bucket]:
    with FaultProxy(seaweed, recorder) as proxy:
        known = bucket.capabilities()
        yield Bucket(bucket.name, endpoint_url=proxy.endpoint_url, prefix=bucket.prefix, capabilities=known)


def with_small_buffer(monkeypatch: pytest.MonkeyPatch, connections: HttpConnections) -> None:
    """Otherwise the kernel accepts megabytes at once on loopback."""
    kept = connections._connections
    connect = kept._connect

    def connect_small(origin: Origin) -> GuardedStream:
        connection = connect(origin)
        connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        return connection

    monkeypatch.setattr(kept, "_connect", connect_small)


def put(bucket: Bucket, name: str, content: bytes) -> bool:
    digest = hashlib.sha256(content).hexdigest()
    return bucket.put_once(
        bucket.prefix + name, io.BytesIO(content), sha256=digest, size=len(content), media_type="image/png",
        metadata={"task": "bild-ö %+/?=&"},
    )  # fmt: skip


@pytest.mark.parametrize("size", [0, 1_000, 3_000_000])
def test_new_file_takes_one_signed_request_and_none_of_boto3(through: Bucket, recorder: Recorder, size: int) -> None:
    content = os.urandom(size)
    assert put(through, "a b+ö%2F.png", content) is True
    assert recorder.told == [("PUT", True)]
    assert recorder.seen[0].body == content


def test_request_of_boto3_shows_the_clock_of_the_store(through: Bucket) -> None:
    assert through.head("nothing") is None
    assert through.clock_ahead_seconds is not None and abs(through.clock_ahead_seconds) < 60


@pytest.mark.parametrize("lacking", ["conditional_put", "refuses_wrong_checksum", "refuses_wrong_part"])
def test_store_that_lacks_a_capability_is_read_before_every_put(
    through: Bucket, recorder: Recorder, lacking: str
) -> None:
    through._capabilities = replace(through.capabilities(), **{lacking: False})
    assert put(through, "a.png", b"one") is True
    assert recorder.told[:2] == [("HEAD", True), ("PUT", True)]
    assert put(through, "a.png", b"one") is False
    assert [request.method for request in recorder.seen].count("PUT") == 1


def test_refused_condition_causes_a_check_of_the_object(through: Bucket, recorder: Recorder) -> None:
    assert put(through, "a.png", b"one") is True
    recorder.seen.clear()
    assert put(through, "a.png", b"one") is False
    assert recorder.told == [("PUT", True), ("HEAD", False)]
    with pytest.raises(ObjectConflict):
        put(through, "a.png", b"two")


@pytest.mark.parametrize(
    ("lacking", "expected"), [((), 0), (("refuses_wrong_checksum",), 1), (("returns_checksum",), 1)]
)
def test_md5_is_computed_unless_the_checksum_is_proof(
    through: Bucket, monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...], expected: int
) -> None:
    computed, md5_of = [], checksums.md5_of
    monkeypatch.setattr(checksums, "md5_of", lambda file, *sha256: computed.append(file) or md5_of(file, *sha256))
    through._capabilities = replace(through.capabilities(), **dict.fromkeys(lacking, False))
    assert put(through, "a.png", b"one") is True
    assert len(computed) == expected


@pytest.mark.parametrize("mode", ["when_supported", "never"])
def test_signed_requests_send_the_headers_of_boto3(
    through: Bucket, recorder: Recorder, mode: store_connection.ChecksumMode
) -> None:
    endpoint_url, known = through._endpoint_url, replace(through.capabilities(), refuses_wrong_checksum=True)
    sent = {}
    for by_us in (True, False):
        own = Bucket(
            through.name, endpoint_url=endpoint_url, prefix=through.prefix, capabilities=known, put_options=OPTIONS,
            checksum_mode=mode,
        )  # fmt: skip
        assert own._signed_requests() is not None
        own._signed = own._signed if by_us else None
        recorder.refuse = 503 if by_us else None  # so that neither way finds the other's object
        recorder.seen.clear()
        with pytest.raises(StoreUnavailable):  # SeaweedFS has no such KMS key
            put(own, "a ö+%2F.png", b"content")
        chosen = next(request for request in recorder.seen if request.method == "PUT" and is_ours(request) == by_us)
        headers = {name: value for name, value in chosen.headers.items() if name not in ITS_OWN}
        sent[by_us] = replace(chosen, headers=headers)
    assert sent[True] == sent[False]


@pytest.mark.parametrize("refusal", [0, 500, 503], ids=["closed", "broken", "busy"])
def test_failed_request_is_repeated_by_boto3(through: Bucket, recorder: Recorder, refusal: int) -> None:
    put(through, "before.png", b"one")
    recorder.refuse = refusal
    assert put(through, "a.png", b"one") is True
    recorder.refuse = None
    recorder.seen.clear()
    put(through, "b.png", b"one")
    assert recorder.told == [("PUT", True)]


@pytest.mark.parametrize("refusal", [301, 400, 403])
def test_store_that_refuses_signed_requests_gets_those_of_boto3(
    through: Bucket, recorder: Recorder, refusal: int
) -> None:
    recorder.refuse = refusal
    assert put(through, "a.png", b"one") is True
    assert put(through, "b.png", b"one") is True
    recorder.seen.clear()
    put(through, "c.png", b"one")
    assert not any(ours for _, ours in recorder.told)


@pytest.mark.parametrize(("refusal", "times"), [(403, 1), (429, 5)])
def test_single_refusal_keeps_signed_requests(through: Bucket, recorder: Recorder, refusal: int, times: int) -> None:
    recorder.refuse = refusal
    assert all(put(through, f"{number}.png", b"one") for number in range(times))
    recorder.refuse = None
    assert put(through, "then.png", b"one") is True
    assert recorder.told[-1:] == [("PUT", True)]


@pytest.mark.parametrize("addressing", ["auto", "path", "virtual"])
@pytest.mark.parametrize(
    ("region", "switch"),
    [
        *((region, None) for region in ("us-east-1", "eu-central-1", "me-central-1", "cn-north-1", "us-gov-west-1")),
        ("us-west-2", "AWS_USE_FIPS_ENDPOINT"),
        ("us-west-2", "AWS_USE_DUALSTACK_ENDPOINT"),
    ],
)
def test_signed_requests_use_the_url_and_scope_of_boto3_at_aws(
    region: str, switch: str | None, addressing: store_connection.Addressing, monkeypatch: pytest.MonkeyPatch,
    s3_environment: dict[str, str],
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    if switch:
        monkeypatch.setenv(switch, "true")
    bucket = Bucket("a-bucket", addressing=addressing)
    signed, client = bucket._signed_requests(), bucket._client()
    assert signed is not None
    asked = []

    def dial(request: AWSPreparedRequest) -> None:
        signature = request.headers["Authorization"]
        words = signature.decode() if isinstance(signature, bytes) else signature
        scope = words.partition("Credential=")[2].partition(",")[0]
        asked.append((request.url, scope))
        raise NotDialled

    def dial_ours(method: str, path: str, headers: dict[str, str], body: object) -> None:
        authorization = {"Authorization": headers["authorization"]}
        dial(AWSPreparedRequest(method, f"https://{headers['host']}{path}", authorization, None, False))

    client._endpoint.http_session.send, signed._connections.send = dial, dial_ours
    for ask in (signed.is_missing, bucket.head):
        with pytest.raises(NotDialled):
            ask("a ö/k")
    assert asked[0] == asked[1]
    assert signed._connections.authority in str(asked[0])


def test_slow_uplink_does_not_time_out(
    monkeypatch: pytest.MonkeyPatch, bucket: Bucket, s3_environment: dict[str, str]
) -> None:
    """The connect timeout also applies to each wait to send: 2.5 s here, for a body that takes 4 s."""
    monkeypatch.setattr(store_connection, "CONNECT_SECONDS", 2.5)
    content = os.urandom(1_200_000)
    digest = hashlib.sha256(content)
    told = {"x-amz-checksum-sha256": base64.b64encode(digest.digest()).decode(), "etag": '"x"'}
    with slow_store(bytes_per_second=300_000, headers=told) as (url, requests):
        slow = Bucket("any", endpoint_url=url, capabilities=replace(bucket.capabilities(), refuses_wrong_checksum=True))
        signed = slow._signed_requests()
        assert signed is not None
        with_small_buffer(monkeypatch, signed._connections)
        assert put(slow, "a.png", content) is True
    assert requests == ["PUT"]


def test_lost_race_is_noticed_without_a_second_put(bucket: Bucket, seaweed: Seaweed, recorder: Recorder) -> None:
    def race(request: Request, forward: Forward) -> Answer | None:
        if request.method == "PUT":
            put(bucket, "a.png", b"one")
        return recorder(request, forward)

    with FaultProxy(seaweed, race) as proxy:
        own = Bucket(
            bucket.name, endpoint_url=proxy.endpoint_url, prefix=bucket.prefix, capabilities=bucket.capabilities()
        )
        assert put(own, "a.png", b"one") is False
    assert recorder.told == [("PUT", True), ("HEAD", False)]


def test_silent_store_is_given_up_after_one_timeout(
    monkeypatch: pytest.MonkeyPatch, bucket: Bucket, s3_environment: dict[str, str]
) -> None:
    monkeypatch.setattr(store_connection, "READ_SECONDS", 0.3)
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        silent = Bucket(bucket.name, endpoint_url=url, capabilities=bucket.capabilities())
        with pytest.raises(StoreUnavailable) as raised:
            put(silent, "a.png", b"one")
        wait_until(lambda: accepted)
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    for connection in accepted:
        connection.close()
    assert isinstance(raised.value.__cause__, TOO_SLOW)
    assert len(accepted) == 1


def test_missing_credentials_are_reported_by_boto3(monkeypatch: pytest.MonkeyPatch, seaweed: Seaweed) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    everything = Capabilities(*(True for _ in Capabilities.__dataclass_fields__))
    with pytest.raises(StoreUnavailable, match="no credentials"):
        put(Bucket("any", endpoint_url=seaweed.endpoint_url, capabilities=everything), "a.png", b"one")
