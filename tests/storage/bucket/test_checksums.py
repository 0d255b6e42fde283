"""What a store's response proves; pure, on responses of real stores."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest

from storage.bucket import checksums
from storage.bucket.checksums import Evidence
from storage.bucket.probe import sha256_base64
from storage.errors import StoreUnavailable

CONTENT = b"twelve bytes"
SUM = sha256_base64(CONTENT)
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize(
    ("answer", "checksum_agrees", "etag_agrees"),
    [
        ({"ChecksumSHA256": SUM, "ETag": f'"{MD5}"'}, True, True),
        ({"ChecksumSHA256": "other", "ETag": f'"{"0" * 32}"'}, False, False),
        ({}, None, None),
        ({"ETag": '"0123456789abcdef0123456789abcdef-3"'}, None, False),
        ({"ETag": f'"{"0" * 32}"', "ServerSideEncryption": "aws:kms"}, None, None),
        ({"ETag": f'"{"0" * 32}"', "ServerSideEncryption": "AES256"}, None, False),
    ],
    ids=["both agree", "both contradict", "silent", "of parts", "KMS", "SSE-S3"],
)
def test_response_agrees_contradicts_or_names_no_checksum(
    answer: dict[str, Any], checksum_agrees: bool | None, etag_agrees: bool | None
) -> None:
    assert checksums.evidence_of(answer, SUM, MD5) == Evidence(checksum_agrees, etag_agrees, answer.get("ETag", ""))


def test_parts_and_their_composite_checksum_follow_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "PART_BYTES", 5)
    parts = list(checksums.parts_of(io.BytesIO(CONTENT), len(CONTENT), hashlib.sha256(CONTENT).hexdigest()))
    assert [part.content for part in parts] == [b"twelv", b"e byt", b"es"]
    assert [part.arguments["PartNumber"] for part in parts] == [1, 2, 3]
    whole = b"".join(hashlib.sha256(part.content).digest() for part in parts)
    assert checksums.composite([part.sha256 for part in parts]) == f"{sha256_base64(whole)}-3"


def test_file_with_another_hash_raises_after_its_last_part() -> None:
    with pytest.raises(StoreUnavailable, match="changed on our disk"):
        list(checksums.parts_of(io.BytesIO(CONTENT), len(CONTENT), "0" * 64))


def test_file_has_at_most_the_number_of_parts_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "PART_BYTES", 1)
    monkeypatch.setattr(checksums, "MAX_PARTS", 4)
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert [part.content for part in checksums.parts_of(io.BytesIO(CONTENT), len(CONTENT), digest)] == [
        b"twe", b"lve", b" by", b"tes",
    ]  # fmt: skip
