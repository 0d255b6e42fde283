"""The store under test, a prefix of its own in it, and helpers of the cases."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.bucket.bucket import Bucket
from storage.errors import StoreUnavailable

# Bytes whose size is no power of two and whose checksums no other content has.
CONTENT = bytes(range(256)) * 400 + b"end"


class Lacks(Exception):
    """The store lacks the capability. The message says what it does instead."""


class Broken(Exception):
    """A promise of ours does not hold on this store."""


@dataclass(frozen=True)
class Case:
    """`is_promise`: it must hold on any store; otherwise it is a capability, which may be missing."""

    name: str
    is_promise: bool
    run: Callable[[Stage], str | None]


@dataclass
class Stage:
    """`keys`: the number of objects in the listing's case. `small`: parts of 5 MiB, so that files need not be large."""

    bucket: Bucket
    folder: Path
    keys: int = 1_005
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def client(self) -> Any:
        return self.bucket._client()

    def key(self, name: str) -> str:
        return f"{self.bucket.prefix}{name}"

    def place(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket.name, "Key": self.key(name)}

    def put(self, name: str, content: bytes = CONTENT, **options: Any) -> Any:
        """Put like any client, without a checksum."""
        return self.client.put_object(**self.place(name), Body=content, **options)

    def get(self, name: str) -> bytes:
        content: bytes = self.client.get_object(**self.place(name))["Body"].read()
        return content

    def put_once(self, name: str, content: bytes, claimed: bytes | None = None) -> bool:
        """Put through our own code. `claimed`: the bytes whose hash is sent, as if the file had changed since."""
        digest = hashlib.sha256(content if claimed is None else claimed).hexdigest()
        return self.bucket.put_once(
            self.key(name), io.BytesIO(content), sha256=digest, size=len(content), media_type="image/png", metadata={}
        )  # fmt: skip

    def is_there(self, name: str) -> bool:
        return any(each.key == self.key(name) for each in self.bucket.list(self.key(name)))

    def refusal(self, call: Callable[[], object]) -> str | None:
        """The store's refusal; None if it does the call."""
        try:
            call()
        except self.client.exceptions.ClientError as error:
            answer = error.response
            return f"{answer['ResponseMetadata']['HTTPStatusCode']} {answer.get('Error', {}).get('Code', '')}"
        return None


@contextmanager
def stage(keys: int = 1_005) -> Iterator[Stage]:
    """The store that the environment names. Removes everything at the end, as far as the store allows."""
    value = os.environ.get
    bucket = Bucket(
        os.environ["RECEIVER_S3_BUCKET"],
        endpoint_url=value("RECEIVER_S3_ENDPOINT_URL") or None,
        prefix=f"{value('RECEIVER_S3_PREFIX', '')}receiver-conformance-{secrets.token_hex(4)}",
        checksum_mode=value("RECEIVER_S3_CHECKSUMS", "when_supported"),  # type: ignore[arg-type]
        addressing=value("RECEIVER_S3_ADDRESSING", "auto"),  # type: ignore[arg-type]
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Stage(bucket, Path(folder), keys)
        finally:
            with suppress(Exception):
                bucket.abort_uploads(bucket.prefix)
            with suppress(Exception):
                _unlock(bucket)
            _purge(bucket)


def _purge(bucket: Bucket) -> None:
    """Report leftovers without hiding a result: s3rver answers 500 for more than 1,000 keys."""
    try:
        bucket.purge(bucket.prefix)
    except StoreUnavailable as error:
        sys.stderr.write(f"objects below {bucket.prefix} are left behind: {error}\n")


def _unlock(bucket: Bucket) -> None:
    """Unlock objects that a case has locked for a day; GOVERNANCE allows it to their owner."""
    client = bucket._client()
    pages = client.get_paginator("list_object_versions").paginate(Bucket=bucket.name, Prefix=bucket.prefix + "locked")
    for version in (each for page in pages for each in page.get("Versions", ())):
        place = {"Bucket": bucket.name, "Key": version["Key"], "VersionId": version["VersionId"]}
        client.delete_object(**place, BypassGovernanceRetention=True)
