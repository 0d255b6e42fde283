"""A large file in parts: one of them in memory, the upload aborted on any failure. Knows boto3's client, not boto3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from storage.bucket import checksums
from storage.bucket.checksums import Evidence
from storage.bucket.put_options import Put


def upload(client: Any, bucket: str, put: Put, md5: Callable[[str], Mapping[str, str]]) -> Evidence:
    """Send the whole file and complete it. `md5`: what is sent of a part's MD5. Raises boto3's errors."""
    started = client.create_multipart_upload(**put.options, ChecksumAlgorithm="SHA256")
    place = {"Bucket": bucket, "Key": put.key, "UploadId": started["UploadId"]}
    try:
        return _send(client, place, put, md5)
    except BaseException:
        with suppress(Exception):  # the first failure is the one that counts
            client.abort_multipart_upload(**place)
        raise


def _send(client: Any, place: Mapping[str, str], put: Put, md5: Callable[[str], Mapping[str, str]]) -> Evidence:
    """Send the parts and complete them; what the answers prove together."""
    sent, sums = [], []
    proofs = []
    for part in checksums.parts_of(put.file, put.size, put.sha256):
        answer = client.upload_part(**place, **part.arguments, **md5(part.md5), Body=part.content)
        sent.append({**part.arguments, "ETag": answer["ETag"]})
        sums.append(part.sha256)
        proofs.append(checksums.of_answer(answer, part.sha256, part.md5))
        del part  # it goes before the next is read: eight threads with two parts each were 256 MB
    answer = client.complete_multipart_upload(**place, **put.condition, MultipartUpload={"Parts": sent})
    found = checksums.of_answer(answer, checksums.composite(sums), None)
    etags_agree = False if any(each.etag_agrees is False for each in proofs) else None
    return replace(found, etag_agrees=etags_agree)


def unfinished(client: Any, bucket: str, prefix: str, before: float) -> Iterator[dict[str, str]]:
    """Where uploads lie that began before (seconds since 1970) and are not complete, as the abort takes it."""
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        for each in page.get("Uploads", ()):
            if each["Initiated"].timestamp() <= before:
                yield {"Bucket": bucket, "Key": each["Key"], "UploadId": each["UploadId"]}
