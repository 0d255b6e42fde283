"""Options of every put: storage class, encryption, Object Lock, tags and cache header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Literal, NamedTuple
from urllib.parse import urlencode

LockMode = Literal["GOVERNANCE", "COMPLIANCE"]
# S3's own limits.
MAX_TAGS, MAX_TAG_NAME, MAX_TAG_VALUE = 10, 128, 256


@dataclass(frozen=True)
class PutOptions:
    """Options that every object gets. None or empty = the bucket's default.

    `sse`: `AES256` (SSE-S3) or `aws:kms`, the latter with `kms_key_id` or the account's default key. `lock_mode`,
    `lock_days`: Object Lock from the time of the put; the bucket must have been created with it. `cache_control`: the
    header that readers get.
    """

    storage_class: str | None = None
    sse: Literal["AES256", "aws:kms"] | None = None
    kms_key_id: str | None = None
    lock_mode: LockMode | None = None
    lock_days: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    cache_control: str | None = None
    _constant: dict[str, str] = field(init=False, repr=False, compare=False)  # arguments of every put

    def __post_init__(self) -> None:
        values = {
            "StorageClass": self.storage_class,
            "ServerSideEncryption": self.sse,
            "SSEKMSKeyId": self.kms_key_id,
            "ObjectLockMode": self.lock_mode,
            "Tagging": urlencode(self.tags) or None,
            "CacheControl": self.cache_control,
        }
        object.__setattr__(self, "_constant", {name: value for name, value in values.items() if value is not None})

    def arguments(self) -> dict[str, str]:
        """Arguments for boto3's `put_object` and `create_multipart_upload`, each as the text of its header."""
        if not self.lock_days:
            return self._constant
        until = datetime.now(UTC) + timedelta(days=self.lock_days)
        return self._constant | {"ObjectLockRetainUntilDate": f"{until:%Y-%m-%dT%H:%M:%SZ}"}


class Put(NamedTuple):
    """One object to be put. `options`: boto3's arguments for a single put and for a multipart upload.

    `condition`: the arguments with which the put, or the completion of the upload, only creates an object.
    """

    key: str
    file: BinaryIO
    sha256: str
    size: int
    options: Mapping[str, Any]
    condition: Mapping[str, str]


def parse_tags(words: str) -> dict[str, str]:
    """`team=art,kind=picture` as tags. Raises ValueError."""
    tags = {}
    for word in filter(None, (word.strip() for word in words.split(","))):
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{word!r} is not a tag; write NAME=VALUE")
        tags[name.strip()] = value.strip()
    if len(tags) > MAX_TAGS:
        raise ValueError(f"{len(tags)} tags; S3 allows at most {MAX_TAGS}")
    if any(len(name) > MAX_TAG_NAME or len(value) > MAX_TAG_VALUE for name, value in tags.items()):
        raise ValueError(f"a tag is too long; its name may have {MAX_TAG_NAME} characters, its value {MAX_TAG_VALUE}")
    return tags
