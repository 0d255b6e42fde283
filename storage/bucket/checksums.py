"""What a store's answer to a put proves: the SHA-256 it names, and the MD5 that its ETag most often is.

Two witnesses, and neither is the client's word come back: a store that took other bytes would have to lie twice.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from storage.bucket.probe import sha256_base64
from storage.errors import StoreUnavailable

# One is in memory for each thread. S3 takes parts from 5 MiB.
PART_BYTES = 6 * 1024 * 1024
MAX_PARTS = 10_000  # S3's limit
READ_BYTES = 1024 * 1024
MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Evidence:
    """Of one put. `sum_agrees`: None = the store names no checksum. `etag_agrees`: None = its ETag is no MD5."""

    sum_agrees: bool | None
    etag_agrees: bool | None
    etag: str


def of_answer(answer: Mapping[str, Any], sha256: str, md5: str | None) -> Evidence:
    """`sha256`: as base64. `md5`: as hex, None where no ETag can be one."""
    told, etag = answer.get("ChecksumSHA256"), str(answer.get("ETag", ""))
    plain = etag.strip('"')
    # Under SSE-KMS an ETag looks like an MD5 and is none.
    says = md5 is not None and MD5.fullmatch(plain) and "kms" not in answer.get("ServerSideEncryption", "")
    return Evidence(None if told is None else told == sha256, plain == md5 if says else None, etag)


def md5_of(file: BinaryIO) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    file.seek(0)
    while block := file.read(READ_BYTES):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """One part of a file on its way. `arguments`: what `upload_part` and the completion say of it."""

    content: bytes
    arguments: Mapping[str, Any]
    sha256: str
    md5: str


def parts_of(file: BinaryIO, size: int, sha256: str) -> Iterator[Part]:
    """The file in parts, one in memory at a time. Raises `StoreUnavailable` at its end when it is not `sha256`'s."""
    part_bytes, whole = max(PART_BYTES, -(-size // MAX_PARTS)), hashlib.sha256()
    file.seek(0)
    for number in range(1, MAX_PARTS + 1):
        content = file.read(part_bytes)
        if not content:
            break
        whole.update(content)
        md5, digest = hashlib.md5(content, usedforsecurity=False).hexdigest(), sha256_base64(content)
        part = Part(content, {"PartNumber": number, "ChecksumSHA256": digest}, digest, md5)
        del content  # else it would be there beside the next while that is read
        yield part
        del part
    if whole.hexdigest() != sha256:  # nothing else ties the parts' sums to the whole file's
        raise StoreUnavailable("the file changed on our disk before it was stored")


def composite(sums: Sequence[str]) -> str:
    """The checksum of a whole made of parts, as S3 writes it: the sum of their sums, and how many."""
    return f"{sha256_base64(b''.join(base64.b64decode(each) for each in sums))}-{len(sums)}"
