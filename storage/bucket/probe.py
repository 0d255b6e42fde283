"""Finds out what an S3 store can do, with a few small objects. Works on a boto3 client that it is given."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal

from storage.bucket.bounded_connections import member
from storage.errors import StoreUnavailable

# A wrong checksum is refused with one of these (BadDigest is 400); a conditional write with 412 alone.
CHECKSUM_REFUSALS = (400, 412, 422)
# A probe takes seconds. Older leftovers come from a killed process, even if our clock is some minutes wrong.
LEFT_AFTER = timedelta(hours=1)
WRONG_MD5 = base64.b64encode(hashlib.md5(b"something else", usedforsecurity=False).digest()).decode()
MAX_READ_BYTES = 64 * 1024  # an object that is read back has the bytes of a key at most
NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Capabilities:
    """What a store did in the probe. The probe raises if an object cannot be written and read back.

    Conditional writes are tried one after another, so a race between two writers is not probed.
    """

    conditional_put: bool
    refuses_wrong_checksum: bool
    returns_checksum: bool
    keeps_metadata: bool
    multipart: bool
    refuses_wrong_part: bool
    conditional_multipart: bool
    delete: bool
    # In a put and in a part. None: not tried, because SHA-256 is proof enough.
    refuses_wrong_md5: bool | None = None

    @property
    def believed(self) -> bool:
        """Whether the store's checksums count: it refuses wrong ones in every kind of put that we use."""
        return self.refuses_wrong_checksum and (self.refuses_wrong_part or not self.multipart)

    @property
    def proof(self) -> Literal["sha256", "md5", "read"]:
        """The proof that the store has our bytes: the hash with which it refuses other bytes, or reading them back."""
        if self.believed:
            return "sha256"
        return "md5" if self.refuses_wrong_md5 else "read"


class Probe:
    """One run of the probe. `folder`: begins its keys and must be empty."""

    def __init__(self, client: Any, bucket: str, folder: str) -> None:
        self._client = client
        self._bucket = bucket
        self._folder = folder
        self._keys: list[str] = []

    def run(self, large_bytes: int = 0) -> Capabilities:
        """Try every capability. `large_bytes`: also put an object of this size, and look for it in the listing.

        Raises boto3's errors, and `StoreUnavailable` when other bytes come back, or the object is not listed.
        """
        body = self._folder.encode()
        first = self._key("first")
        self._put(first, body)
        if self._read(first) != body:
            raise StoreUnavailable("the store returned other bytes than were written; examine the store")
        if large_bytes:
            large = self._key("large")
            self._put(large, bytes(large_bytes))
            listed = self._client.list_objects_v2(Bucket=self._bucket, Prefix=large).get("Contents", ())
            if large not in [each["Key"] for each in listed]:
                raise StoreUnavailable("the store does not list an object that it has just stored; examine the store")
        head = self._client.head_object(Bucket=self._bucket, Key=first, ChecksumMode="ENABLED")
        conditional_put = self._refusal(lambda: self._put(first, b"other", IfNoneMatch="*")) == 412
        multipart = not self._refusal(lambda: self._put_in_parts(self._key("parts"), body))
        can = Capabilities(
            conditional_put=conditional_put and self._read(first) == body,
            refuses_wrong_checksum=self._refuses_wrong_checksum(),
            returns_checksum=whole_checksum(head) == hashlib.sha256(body).hexdigest(),
            keeps_metadata=head["Metadata"].get("probe") == "1",
            multipart=multipart,
            refuses_wrong_part=multipart and self._refuses_wrong_part(),
            conditional_multipart=multipart
            and self._refusal(lambda: self._put_in_parts(first, b"other", IfNoneMatch="*")) == 412,
            delete=not self._refusal(lambda: self._delete(first)),
        )
        return can if can.believed else replace(can, refuses_wrong_md5=self._refuses_wrong_md5(in_parts=multipart))

    def clean_up(self) -> None:
        """Remove the objects of this run and of killed runs. Errors are ignored."""
        for key in self._keys:
            with suppress(Exception):
                self._delete(key)
        with suppress(Exception):
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove the first page of leftovers of killed runs; the next probe removes the rest."""
        place = {"Bucket": self._bucket, "Prefix": f"{self._folder.rpartition('/')[0]}/"}
        before = datetime.now(UTC) - LEFT_AFTER
        for each in self._client.list_objects_v2(**place).get("Contents", ()):
            if each["Key"].startswith(place["Prefix"]) and each["LastModified"] < before:
                self._delete(each["Key"])
        for upload in self._client.list_multipart_uploads(**place).get("Uploads", ()):
            if upload["Key"].startswith(place["Prefix"]) and upload["Initiated"] < before:
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _refuses_wrong_checksum(self) -> bool:
        key = self._key("wrong")
        wrong = sha256_base64(b"something else")
        refusal = self._refusal(lambda: self._put(key, b"something", ChecksumSHA256=wrong))
        return refusal in CHECKSUM_REFUSALS and self._refusal(lambda: self._read(key)) == 404

    def _refuses_wrong_part(self) -> bool:
        key, wrong = self._key("wrong-part"), sha256_base64(b"something else")
        return self._refusal(lambda: self._put_in_parts(key, b"something", wrong)) in CHECKSUM_REFUSALS

    def _refuses_wrong_md5(self, *, in_parts: bool) -> bool:
        key, part_key, wrong = self._key("wrong-md5"), self._key("wrong-md5-part"), {"ContentMD5": WRONG_MD5}
        refusal = self._refusal(lambda: self._put(key, b"something", **wrong))
        if refusal not in CHECKSUM_REFUSALS or self._refusal(lambda: self._read(key)) != 404:
            return False
        return not in_parts or (
            self._refusal(lambda: self._put_in_parts(part_key, b"something", md5=wrong)) in CHECKSUM_REFUSALS
        )

    def _refusal(self, call: Callable[[], object]) -> int:
        """The HTTP status of the store's refusal, 0 if it did the call. Temporary errors (408, 429, 5xx) are raised."""
        try:
            call()
        except self._client.exceptions.ClientError as error:
            status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
            if status in (408, 429, 500, 502, 503, 504):
                raise
            return status
        return 0

    def _key(self, name: str) -> str:
        key = f"{self._folder}/{name}"
        self._keys.append(key)
        return key

    def _put(self, key: str, body: bytes, **options: str) -> None:
        options = {"ChecksumSHA256": sha256_base64(body)} | options
        self._client.put_object(Bucket=self._bucket, Key=key, Body=body, Metadata={"probe": "1"}, **options)

    def _put_in_parts(
        self, key: str, body: bytes, checksum: str | None = None, md5: Mapping[str, str] = NONE, **options: str
    ) -> None:
        place = {"Bucket": self._bucket, "Key": key}
        created = self._client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")
        place["UploadId"] = member(created, "UploadId")
        part = {"PartNumber": 1, "ChecksumSHA256": checksum or sha256_base64(body)}
        try:
            part["ETag"] = member(self._client.upload_part(**place, **part, **md5, Body=body), "ETag")
            self._client.complete_multipart_upload(**place, **options, MultipartUpload={"Parts": [part]})
        except BaseException:
            with suppress(Exception):
                self._client.abort_multipart_upload(**place)
            raise

    def _read(self, key: str) -> bytes:
        body: bytes = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read(MAX_READ_BYTES)
        return body

    def _delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=key)


def sha256_base64(content: bytes) -> str:
    """The SHA-256 in the form of S3's headers."""
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def whole_checksum(answer: dict[str, Any]) -> str | None:
    """The SHA-256 of the whole object in a store's response, as hex; None when it has none, or one of parts."""
    try:
        digest = base64.b64decode(answer.get("ChecksumSHA256", ""), validate=True)
    except ValueError:  # `…-3`: a checksum over the checksums of three parts
        return None
    return digest.hex() if len(digest) == 32 else None
