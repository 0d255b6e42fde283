"""Objects in one S3 bucket: described, read, listed, linked and removed. `bucket.py` creates them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import unquote

from botocore import exceptions as boto_errors

from storage.bucket import multipart
from storage.bucket.listings import entries
from storage.bucket.probe import whole_checksum
from storage.bucket.store_connection import StoreConnection
from storage.bucket.store_errors import NoSuchObject, code, status
from storage.errors import StoreUnavailable

MAX_LINK_SECONDS = 7 * 24 * 3600  # limit of AWS Signature Version 4 for presigned URLs
READ_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Stored:
    """One object as the store describes it.

    `sha256`: of the whole object, 64 hex digits. It is the store's own checksum, else the one in the metadata that
    `put_once` wrote; None when neither is known. `checksum`: the store's own only. `metadata`: as given to `put_once`.
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


class StoredObjects(StoreConnection):
    """The objects of one bucket. Thread-safe. The arguments are those of `Bucket`."""

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def head(self, key: str) -> Stored | None:
        """Describe the object; None when there is no object or no such bucket, which a HEAD does not tell apart."""
        try:
            with self._errors():
                answer = self._head_object(key, ChecksumMode="ENABLED")
        except NoSuchObject:
            return None
        metadata = {name.lower(): unquote(value) for name, value in answer["Metadata"].items()}
        if "LastModified" not in answer or "ContentLength" not in answer:  # a proxy or a log-in page in front
            raise StoreUnavailable(f"{self.place} describes an object without its length or its time")
        return Stored(
            size=answer["ContentLength"],
            sha256=whole_checksum(answer) or metadata.get("sha256"),
            checksum=whole_checksum(answer),
            etag=answer.get("ETag", ""),
            media_type=answer.get("ContentType", ""),
            modified_at=answer["LastModified"].astimezone(UTC),
            metadata=metadata,
        )

    def read(self, key: str, span: range | None = None) -> Generator[bytes, None, None]:
        """The object's bytes, at most 1 MiB at a time. Raises `NoSuchObject`, `StoreUnavailable` on the way.

        `span`: the positions to read, not empty; None = all.
        """
        wanted = {} if span is None else {"Range": f"bytes={span.start}-{span.stop - 1}"}
        with self._errors():
            answer = self._client().get_object(Bucket=self.name, Key=key, **wanted)
            with closing(answer["Body"]) as body:
                length = answer.get("ContentLength")  # a body without one may never end
                if length is None or (span is not None and length != len(span)):
                    raise StoreUnavailable("the store ignored the range of a read, or sent no length")
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

    def sha256(self, key: str, on_chunk: Callable[[bytes], object] | None = None) -> str:
        """Read the whole object and return its SHA-256 as 64 hex digits. `on_chunk` gets each chunk.

        Raises as `read`.
        """
        digest = hashlib.sha256()
        for chunk in self.read(key):
            digest.update(chunk)
            if on_chunk is not None:
                on_chunk(chunk)
        return digest.hexdigest()

    def delete(self, key: str) -> None:
        """Remove the object if it exists."""
        with self._errors():
            self._client().delete_object(Bucket=self.name, Key=key)

    def purge(self, folder: str) -> int:
        """Remove every version of every object under `folder`. Returns how many there were.

        In a versioned bucket `delete` only adds a delete marker.
        """
        if not folder:
            raise ValueError("folder is empty; name the folder to purge")
        count = 0
        with self._errors():
            for key, version in self._versions(folder):
                self._client().delete_object(Bucket=self.name, Key=key, **version)
                count += 1
        return count

    def _versions(self, folder: str) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Every version and delete marker, or only the objects if the store cannot list versions."""
        try:
            for each in entries(self._client(), "list_object_versions", Bucket=self.name, Prefix=folder):
                yield each["Key"], {"VersionId": each["VersionId"]} if each.get("VersionId") else {}
        except boto_errors.ClientError as error:
            if status(error) not in (405, 501):
                raise
            for listed in self.list(folder):
                yield listed.key, {}

    def locked_until(self, key: str) -> datetime | None:
        """When Object Lock ends, None when the object can be removed, `datetime.max` under a legal hold."""
        try:
            with self._errors():
                answer = self._head_object(key)
        except NoSuchObject:
            return None
        if answer.get("ObjectLockLegalHoldStatus") == "ON":
            return datetime.max.replace(tzinfo=UTC)
        until: datetime | None = answer.get("ObjectLockRetainUntilDate")
        return until.astimezone(UTC) if until and until > datetime.now(UTC) else None

    def list(self, prefix: str, *, after: str = "") -> Iterator[Listed]:
        """Every object whose key begins with `prefix` and sorts after `after`, in the store's order."""
        place = {"Bucket": self.name, "Prefix": prefix} | ({"StartAfter": after} if after else {})
        with self._errors():
            for each in entries(self._client(), "list_objects_v2", **place):
                modified_at = each["LastModified"].astimezone(UTC)
                yield Listed(each["Key"], each["Size"], each.get("ETag", ""), modified_at)

    def presigned_get(self, key: str, *, expires_seconds: int, disposition: str | None = None) -> str:
        """A URL that reads the object without credentials for 1 to 604,800 seconds. Treat it as a secret.

        `disposition`: the `Content-Disposition` of the store's answer.
        """
        if not 1 <= expires_seconds <= MAX_LINK_SECONDS:
            raise ValueError(f"expires_seconds is {expires_seconds}; it must be 1 to {MAX_LINK_SECONDS}")
        with self._errors():
            client = self._client(self._public_endpoint_url)
            named = {"ResponseContentDisposition": disposition} if disposition else {}
            link: str = client.generate_presigned_url(
                "get_object", Params={"Bucket": self.name, "Key": key, **named}, ExpiresIn=expires_seconds
            )
            return link

    def abort_uploads(self, prefix: str, *, older_than_seconds: float = 0, only: Callable[[str], object] = bool) -> int:
        """Abort unfinished multipart uploads of keys that begin with `prefix` and satisfy `only`. Returns how many.

        A writer of such an upload gets `NoSuchUpload` and checks the key again. A store that cannot list uploads
        (HTTP 404, 405 or 501) counts as having none.
        """
        count = 0
        with suppress(NoSuchObject), self._errors():
            try:
                for place in multipart.unfinished(self._client(), self.name, prefix, time.time() - older_than_seconds):
                    if only(place["Key"]):
                        self._client().abort_multipart_upload(**place)
                        count += 1
            except boto_errors.ClientError as error:
                if status(error) not in (404, 405, 501) or code(error) == "NoSuchBucket":
                    raise
        return count
