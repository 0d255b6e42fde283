"""What a store's response to a put proves: by the SHA-256 it names, and by its ETag, which most often is the MD5.

The store computes both values itself. The MD5 counts only if the SHA-256 alone is no proof.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from storage import spool
from storage.bucket.probe import sha256_base64
from storage.errors import StoreUnavailable

# One part per thread is in memory. S3 requires at least 5 MiB.
PART_BYTES = 6 * 1024 * 1024
MAX_PARTS = 10_000  # S3's limit
CHANGED = "the file changed on our disk before it was stored; retrying"


class Evidence(NamedTuple):
    """From one put. `checksum_agrees`: None = the store names none. `etag_agrees`: None = it was not compared."""

    checksum_agrees: bool | None
    etag_agrees: bool | None
    etag: str


def evidence_of(answer: Mapping[str, Any], sha256: str, md5: str | None) -> Evidence:
    """Compare a store's answer with our checksums. `sha256`: base64. `md5`: hex, None where no ETag can be one."""
    named, etag = answer.get("ChecksumSHA256"), str(answer.get("ETag", ""))
    plain = etag.strip('"')
    # With SSE-KMS the ETag looks like an MD5 but is not one. Any other that is no MD5 may be that of a proxy's page.
    is_compared = md5 is not None and plain and "kms" not in answer.get("ServerSideEncryption", "")
    return Evidence(None if named is None else named == sha256, plain == md5 if is_compared else None, etag)


def md5_of(file: BinaryIO, sha256: str | None = None) -> str:
    """The file's MD5 as hex. `sha256`: checked in the same pass, where the MD5 alone ties the object to it.

    Raises `StoreUnavailable` when the file changed.
    """
    md5, whole = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    for block in spool.blocks(file):
        md5.update(block)
        if sha256 is not None:
            whole.update(block)
    if sha256 is not None and whole.hexdigest() != sha256:
        raise StoreUnavailable(CHANGED)
    return md5.hexdigest()


@dataclass(frozen=True)
class Part:
    """One part of a file. `arguments`: for `upload_part` and for the completion."""

    content: bytes
    arguments: Mapping[str, Any]
    sha256: str
    md5: str


def parts_of(file: BinaryIO, size: int, sha256: str) -> Iterator[Part]:
    """The file in parts, one in memory at a time. Raises `StoreUnavailable` at the end if its hash is not `sha256`."""
    part_bytes, whole = max(PART_BYTES, -(-size // MAX_PARTS)), hashlib.sha256()
    file.seek(0)
    for number in range(1, MAX_PARTS + 1):
        content = file.read(part_bytes)
        if not content:
            break
        whole.update(content)
        md5, digest = hashlib.md5(content, usedforsecurity=False).hexdigest(), sha256_base64(content)
        part = Part(content, {"PartNumber": number, "ChecksumSHA256": digest}, digest, md5)
        del content  # frees this part before the next one is read
        yield part
        del part
    if whole.hexdigest() != sha256:  # nothing else ties the parts' checksums to that of the file
        raise StoreUnavailable(CHANGED)


def composite(parts: Sequence[str]) -> str:
    """S3's checksum of a multipart object: the SHA-256 of the parts' SHA-256 values, `-`, the number of parts."""
    return f"{sha256_base64(b''.join(base64.b64decode(each) for each in parts))}-{len(parts)}"
