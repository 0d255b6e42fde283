"""Objects in one S3 bucket: created once, verified, never overwritten. The only file here that makes clients of boto3.

`signed` signs with botocore, `store_errors` words its errors; `probe` and `multipart` use the client they are given.

What a store really does is probed, not assumed: only one that refuses a wrong checksum is believed about
checksums; from any other the object is read back and hashed before `put_once` succeeds.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, Literal, NamedTuple
from urllib.parse import unquote

import boto3
import structlog
from botocore import exceptions as boto_errors
from botocore.config import Config

from storage.bucket import checksums, multipart
from storage.bucket.checksums import Evidence
from storage.bucket.probe import Capabilities, Probe, whole_checksum
from storage.bucket.put_options import Put, PutOptions
from storage.bucket.signed_requests import ConditionFailed, Signed, Unexpected
from storage.bucket.store_errors import code, refusal, status
from storage.bucket.store_errors import reason_code as reason_code
from storage.errors import ObjectConflict, StoreUnavailable, UserError
from storage.keys import encode_id as encode_id
from storage.keys import header_text, normal_prefix
from storage.keys import manifest_key as manifest_key
from storage.keys import object_key as object_key

log = structlog.get_logger()

MAX_LINK_SECONDS = 7 * 24 * 3600  # the limit of a presigned link: AWS Signature Version 4
# Above this a file goes in parts, one of them in memory at a time.
MULTIPART_THRESHOLD_BYTES = 64 * 1024 * 1024
READ_BYTES = 1024 * 1024
PROBE_FOLDER = ".receiver-probe/"
CONNECT_SECONDS = 5
READ_SECONDS = 60
# Two tries catch a connection that the store had closed while it idled; everything longer is the claim's backoff.
TRIES = 2

ChecksumMode = Literal["when_supported", "when_required", "never"]
Addressing = Literal["auto", "path", "virtual"]


class EndpointInvalid(UserError, ValueError):
    """An endpoint's URL that boto3 does not take."""


class NoSuchObject(LookupError):
    """Nothing is stored under the key that was read."""


@dataclass(frozen=True)
class Stored:
    """One object as the store describes it.

    `sha256`: of the whole object, 64 hex digits: the store's own checksum where it keeps one, else what was
    claimed when it was put; None when neither is known. `checksum`: the store's own alone. `metadata`: what `put_once`
    was given.
    """

    size: int
    sha256: str | None
    checksum: str | None
    etag: str
    media_type: str
    modified_at: datetime
    metadata: Mapping[str, str] = field(default_factory=dict)


class Listed(NamedTuple):
    key: str
    size: int
    etag: str
    modified_at: datetime


class _Taken(Exception):
    """The store refused to create the object because one stands there, or someone ended our upload."""


class Bucket:
    """One bucket. Thread-safe; credentials and region come by boto3's own chain when it is first used.

    Every method raises `StoreUnavailable` for whatever may pass or be put right outside (down, refused,
    missing bucket, no credentials); its message says which and holds no secret.
    `prefix`: of every key that the caller makes; kept here in its normal form. `public_endpoint_url`: how
    links are signed for readers outside. `checksum_mode`: whether boto3 adds its default checksums to other
    requests, which broke some stores; the SHA-256 of an object is sent in any case but "never", for stores that refuse
    its header: they get an MD5, and everything is read back. `addressing`: whether the bucket is named in the path or
    in the host; "auto" = in the host at AWS, in the path elsewhere. `connections`: in the pool, one per thread that
    uses it. `capabilities`: None = probed when the first object is put. `put_options`: what every object that is put
    gets (storage class, encryption, lock, tags, cache header). `keys`: access and secret key, in place of the chain.
    """

    def __init__(
        self,
        name: str,
        *,
        endpoint_url: str | None = None,
        prefix: str = "",
        public_endpoint_url: str | None = None,
        checksum_mode: ChecksumMode = "when_supported",
        addressing: Addressing = "auto",
        connections: int = 16,
        capabilities: Capabilities | None = None,
        put_options: PutOptions | None = None,
        keys: tuple[str, str] | None = None,
    ) -> None:
        self.name = name
        self.prefix = normal_prefix(prefix)
        self._keys = keys
        self._endpoint_url = endpoint_url
        self._public_endpoint_url = public_endpoint_url
        self._config = Config(
            signature_version="s3v4",
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": TRIES},
            max_pool_connections=connections,
            tcp_keepalive=True,
            s3=None if addressing == "auto" else {"addressing_style": addressing},
            request_checksum_calculation="when_required" if checksum_mode == "never" else checksum_mode,
            response_checksum_validation="when_required",  # what is read back is hashed here, with SHA-256
        )
        self._clients: dict[str | None, Any] = {}
        self._clients_lock = threading.Lock()
        self._signed: Signed | None = None
        self._capabilities = capabilities
        self._put_options = put_options or PutOptions()
        self._sends_sums = checksum_mode != "never"
        self._etags_are_md5 = True  # until a read shows one that is none
        # This host's clock minus the Date of the store's last answer, for `receiver check`; None before the first.
        self.clock_ahead_seconds: float | None = None
        self._probe_lock = threading.Lock()

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do: probed once, then remembered."""
        with self._probe_lock:
            if self._capabilities is None:
                self._capabilities = self.probe()
            return self._capabilities

    @property
    def is_reached_from_outside(self) -> bool:
        """Whether a presigned link is of use to anyone: a private store without a public endpoint signs for nobody."""
        return self._public_endpoint_url is not None or self._endpoint_url is None

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def put_once(
        self, key: str, file: BinaryIO, *, sha256: str, size: int, media_type: str, metadata: Mapping[str, str]
    ) -> bool:
        """Create the object, or find the same bytes already there.

        Nothing that stood there is overwritten. Only where the store's own condition is not atomic (none at
        all, or on multipart completion) can two writers of *different* bytes at the same instant both be told
        True, and the later stands; asset keys name their bytes, so there both write the same.
        When it returns, the bytes under `key` are proven to be `file`'s. A crash half-way leaves the whole
        object or none; calling again tells which. `file`: seekable, `size` bytes with this `sha256` (hex).
        `metadata`: text values; `sha256` is added. Returns True when this call created it, False when it was
        there. Raises `ObjectConflict` when another object stands there (never retry), `StoreUnavailable`.
        """
        can = self.capabilities
        in_parts = can.multipart and size > MULTIPART_THRESHOLD_BYTES
        conditional = can.conditional_multipart if in_parts else can.conditional_put
        put = Put(key, file, sha256, size, self._options(key, sha256, media_type, metadata), conditional)
        # Looked for first in any case: a store refuses parts only after it has got them all, and one that has
        # forgotten its conditions since it was probed would overwrite.
        if not self._is_missing(key) and self.holds(key, sha256=sha256, size=size):
            return False
        return self._create(put, self._put_in_parts if in_parts else self._put_whole)

    def holds(self, key: str, *, sha256: str, size: int) -> bool:
        """Whether exactly these bytes stand under `key`; False when nothing does.

        Read back and hashed unless a store that is to be believed names their checksum: one that was claimed when they
        were put, or that is of parts, does not count. Raises `ObjectConflict` when another object stands there,
        `StoreUnavailable`.
        """
        stored = self.head(key)
        if stored is None:
            return False
        told = stored.checksum == sha256 and self.capabilities.believed
        if stored.size == size and (told or self._hash(key) == sha256):
            return True
        raise ObjectConflict(f"another object of {stored.size} bytes stands under {key}")

    def _is_missing(self, key: str) -> bool:
        """Whether nothing stands there for certain: what every new file is asked, at half of what `head` takes."""
        with self._errors():
            signed = self._own_requests()
            with suppress(Unexpected):
                return signed is not None and signed.is_missing(key)
        return False

    def head(self, key: str) -> Stored | None:
        """Describe the object; None when there is none (or no such bucket: the store does not say which)."""
        try:
            with self._errors():
                answer = self._client().head_object(Bucket=self.name, Key=key, ChecksumMode="ENABLED")
        except NoSuchObject:
            return None
        metadata = {name.lower(): unquote(value) for name, value in answer["Metadata"].items()}
        return Stored(
            size=answer["ContentLength"],
            sha256=whole_checksum(answer) or metadata.get("sha256"),
            checksum=whole_checksum(answer),
            etag=answer.get("ETag", ""),
            media_type=answer.get("ContentType", ""),
            modified_at=answer["LastModified"].astimezone(UTC),
            metadata=metadata,
        )

    def read(self, key: str) -> Iterator[bytes]:
        """The object's bytes, at most 1 MiB at a time. Raises `NoSuchObject`, `StoreUnavailable` on the way."""
        with self._errors():
            answer = self._client().get_object(Bucket=self.name, Key=key)
            with closing(answer["Body"]) as body:
                while chunk := body.read(READ_BYTES):
                    yield chunk

    def read_bytes(self, key: str, max_bytes: int) -> bytes:
        """The whole object. Raises ValueError when it is longer than `max_bytes`, else as `read`."""
        content = bytearray()
        for chunk in self.read(key):
            content += chunk
            if len(content) > max_bytes:
                raise ValueError(f"{key} is longer than {max_bytes} bytes")
        return bytes(content)

    def delete(self, key: str) -> None:
        """Remove the object; nothing when there is none."""
        with self._errors():
            self._client().delete_object(Bucket=self.name, Key=key)

    def purge(self, folder: str) -> int:
        """Remove everything under `folder`, all versions of it. Returns how many there were.

        On a bucket with versions a plain delete only hides.
        """
        if not folder:
            raise ValueError("a folder must be named")
        count = 0
        with self._errors():
            for key, version in self._versions(folder):
                self._client().delete_object(Bucket=self.name, Key=key, **version)
                count += 1
        return count

    def _versions(self, folder: str) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Every version and delete marker; the objects alone where a store does not list versions."""
        try:
            pages = self._client().get_paginator("list_object_versions").paginate(Bucket=self.name, Prefix=folder)
            for page in pages:
                for each in (*page.get("Versions", ()), *page.get("DeleteMarkers", ())):
                    yield each["Key"], {"VersionId": each["VersionId"]} if each.get("VersionId") else {}
        except boto_errors.ClientError as error:
            if status(error) != 501:
                raise
            for listed in self.list(folder):
                yield listed.key, {}

    def locked_until(self, key: str) -> datetime | None:
        """Until when the object cannot be removed, None when it can; under a legal hold that is the end of time."""
        try:
            with self._errors():
                answer = self._client().head_object(Bucket=self.name, Key=key)
        except NoSuchObject:
            return None
        if answer.get("ObjectLockLegalHoldStatus") == "ON":
            return datetime.max.replace(tzinfo=UTC)
        until: datetime | None = answer.get("ObjectLockRetainUntilDate")
        return until.astimezone(UTC) if until and until > datetime.now(UTC) else None

    def list(self, prefix: str, *, after: str = "") -> Iterator[Listed]:
        """Every object whose whole key begins with `prefix` and comes behind `after`, in the store's order of keys."""
        place = {"Bucket": self.name, "Prefix": prefix} | ({"StartAfter": after} if after else {})
        with self._errors():
            for page in self._client().get_paginator("list_objects_v2").paginate(**place):
                for each in page.get("Contents", ()):
                    modified_at = each["LastModified"].astimezone(UTC)
                    yield Listed(each["Key"], each["Size"], each.get("ETag", ""), modified_at)

    def presigned_get(self, key: str, *, expires_seconds: int) -> str:
        """A link that reads the object without credentials for 1–604,800 seconds. It is a secret until then."""
        if not 1 <= expires_seconds <= MAX_LINK_SECONDS:
            raise ValueError(f"expires_seconds must be 1 to {MAX_LINK_SECONDS}")
        with self._errors():
            client = self._client(self._public_endpoint_url)
            link: str = client.generate_presigned_url(
                "get_object", Params={"Bucket": self.name, "Key": key}, ExpiresIn=expires_seconds
            )
            return link

    def probe(self) -> Capabilities:
        """Find out what the store does, with small objects under `{prefix}.receiver-probe/`, removed afterwards.

        Raises `StoreUnavailable` when one cannot be written or read back.
        """
        folder = f"{self.prefix}{PROBE_FOLDER}{secrets.token_hex(8)}"
        with self._errors():
            probe = Probe(self._client(), self.name, folder)
            try:
                return probe.run()
            finally:
                probe.clean_up()

    def _client(self, endpoint_url: str | None = None) -> Any:
        endpoint_url = endpoint_url or self._endpoint_url
        with self._clients_lock:
            if endpoint_url not in self._clients:
                session = boto3.Session(*self._keys, region_name="us-east-1") if self._keys else boto3.Session()
                try:
                    client = session.client("s3", endpoint_url=endpoint_url, config=self._config)
                except boto_errors.BotoCoreError:
                    raise
                except ValueError:  # a host name with an underscore, as compose files have
                    raise EndpointInvalid("boto3 can dial no such host as RECEIVER_S3_ENDPOINT_URL names") from None
                client.meta.events.register("after-call.s3", self._note_date)
                if not self._sends_sums:
                    client.meta.events.register("provide-client-params.s3", _without_sums)
                if endpoint_url == self._endpoint_url:
                    self._signed = Signed.of(client, session.get_credentials(), self.name, self._note_date)
                self._clients[endpoint_url] = client
            return self._clients[endpoint_url]

    def _own_requests(self) -> Signed | None:
        """What sends the two commonest requests without boto3, where it can; made with the client."""
        self._client()
        return self._signed

    def _note_date(self, http_response: Any, **_: Any) -> None:
        with suppress(TypeError, ValueError):  # no Date, or none that is one
            sent_at = parsedate_to_datetime(http_response.headers.get("Date"))
            self.clock_ahead_seconds = time.time() - sent_at.timestamp()

    def _options(self, key: str, sha256: str, media_type: str, metadata: Mapping[str, str]) -> dict[str, Any]:
        values = {name: header_text(value) for name, value in metadata.items()}
        own = {"Bucket": self.name, "Key": key, "ContentType": media_type, "Metadata": values | {"sha256": sha256}}
        return {**self._put_options.arguments(), **own}

    def _create(self, put: Put, send: Callable[[Put], Evidence]) -> bool:
        """Send it, then prove it unless that was done. False: the same bytes were there first."""
        with suppress(_Taken):
            found = send(put)
            if not (self._is_proof(found) and put.conditional):
                self._prove(put, found)
            return True
        if self.holds(put.key, sha256=put.sha256, size=put.size):
            return False
        raise StoreUnavailable("another writer was at the same key; it must be looked at again")

    def _is_proof(self, found: Evidence) -> bool:
        """Whether the answer speaks for our bytes as far as this store speaks at all; loud when it contradicts them."""
        can = self.capabilities
        etag_agrees = found.etag_agrees is not False or not self._etags_are_md5
        sum_agrees = found.sum_agrees is True or (found.sum_agrees is None and not can.returns_checksum)
        if can.believed and not (sum_agrees and etag_agrees):
            log.warning("store.doubted", bucket=self.name, checksum=found.sum_agrees, etag=found.etag_agrees)
        return can.believed and sum_agrees and etag_agrees

    def _put_whole(self, put: Put) -> Evidence:
        """One request."""
        md5 = checksums.md5_of(put.file)
        checksum = base64.b64encode(bytes.fromhex(put.sha256)).decode()
        arguments = {**put.options, **put.condition, **self._md5(md5), "ChecksumSHA256": checksum}
        with self._creating(put):
            answer = self._send_whole(put, arguments)
        return checksums.of_answer(answer, checksum, md5)

    def _send_whole(self, put: Put, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Boto3's answer, or one in its words. What our own request was refused, boto3 is asked for."""
        signed = self._own_requests()
        if signed is not None:
            sent = arguments if self._sends_sums else _without_sums(arguments)
            try:
                return signed.put(sent, put.file, sha256=put.sha256, size=put.size)
            except ConditionFailed as error:
                raise _Taken from error
            except Unexpected:
                pass
        put.file.seek(0)
        answer: Mapping[str, Any] = self._client().put_object(**arguments, Body=put.file, ContentLength=put.size)
        if signed is not None and signed.is_refused:
            log.warning("store.only_by_boto3", bucket=self.name)
            self._signed = None  # boto3 knows something of this store that we do not: another region, mostly
        return answer

    def _put_in_parts(self, put: Put) -> Evidence:
        """A multipart upload with one part in memory, aborted on any failure."""
        with self._creating(put):
            found = multipart.upload(self._client(), self.name, put, self._md5)
        # SeaweedFS 4.48 checks the condition and completes in two steps, so 2 racing completions both succeeded in 21
        # of 40 rounds (single puts never did). The loser must notice.
        stored = self.head(put.key)
        if stored is None:
            raise StoreUnavailable("the object was gone right after it was stored")
        if stored.etag != found.etag and not self.holds(put.key, sha256=put.sha256, size=put.size):
            raise StoreUnavailable("the object was gone right after it was stored")
        return found

    def _md5(self, md5: str) -> Mapping[str, str]:
        """What a store that takes no SHA-256 checks instead, on the way in."""
        return {} if self._sends_sums else {"ContentMD5": base64.b64encode(bytes.fromhex(md5)).decode()}

    def abort_uploads(self, prefix: str, *, older_than_seconds: float = 0, only: Callable[[str], object] = bool) -> int:
        """Abort unfinished multipart uploads of keys that begin with `prefix` and are `only`'s. Returns how many.

        Whoever still writes one finds it gone and must look again. A store that does not list them has none to abort.
        """
        count = 0
        with suppress(NoSuchObject), self._errors():
            try:
                for place in multipart.unfinished(self._client(), self.name, prefix, time.time() - older_than_seconds):
                    if only(place["Key"]):
                        self._client().abort_multipart_upload(**place)
                        count += 1
            except boto_errors.ClientError as error:
                if status(error) != 501:
                    raise
        return count

    def _prove(self, put: Put, found: Evidence) -> None:
        """Read back what was just put. Damaged, it is removed, so that the next try may put it again."""
        try:
            if self._hash(put.key) == put.sha256:
                self._etags_are_md5 = self._etags_are_md5 and found.etag_agrees is not False
                return
        except NoSuchObject:
            pass
        stored = self.head(put.key)  # after the read: another writer's object may have taken its place meanwhile
        if stored is None:
            raise StoreUnavailable("the store said it kept the object, but there is none")
        if stored.etag != found.etag or stored.metadata.get("sha256") != put.sha256:
            raise ObjectConflict(f"another writer's object stands under {put.key}")
        self._disbelieve()
        self.delete(put.key)
        raise StoreUnavailable("the store kept other bytes than it was sent; they were removed")

    def _disbelieve(self) -> None:
        """From now on everything is read back, whatever the probe had found."""
        if self.capabilities.believed:
            log.error("store.lied", bucket=self.name)
        self._capabilities = replace(self.capabilities, refuses_wrong_checksum=False)

    def _hash(self, key: str) -> str:
        digest = hashlib.sha256()
        for chunk in self.read(key):
            digest.update(chunk)
        return digest.hexdigest()

    @contextmanager
    def _creating(self, put: Put) -> Iterator[None]:
        """As `_errors`, and `_Taken` when the store would not create the object because of another."""
        with self._errors(put.size):
            try:
                yield
            except boto_errors.ClientError as error:
                if status(error) in (409, 412) or code(error) == "NoSuchUpload":
                    raise _Taken from error
                raise

    @contextmanager
    def _errors(self, size: int | None = None) -> Iterator[None]:
        """Raise boto3's errors as ours. `size`: of the object that is being put."""
        try:
            yield
        except boto_errors.ClientError as error:
            if code(error) in ("NoSuchKey", "NotFound") or (status(error), code(error)) == (404, "404"):
                raise NoSuchObject("nothing is stored under that key") from error
            raise refusal(error, self.name, self._endpoint_url, size) from error
        except boto_errors.BotoCoreError as error:
            raise refusal(error, self.name, self._endpoint_url, size) from error


def _without_sums(params: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """The arguments of any request without what makes boto3 send, or ask for, an `x-amz-checksum-…` header."""
    kept = {name: value for name, value in params.items() if not name.startswith("Checksum")}
    if parts := params.get("MultipartUpload", {}).get("Parts"):
        kept["MultipartUpload"] = {"Parts": [{name: part[name] for name in ("PartNumber", "ETag")} for part in parts]}
    return kept
