"""Multipart upload of a large file, with one part in memory. Works on a boto3 client that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from storage.bucket import checksums
from storage.bucket.bounded_connections import member
from storage.bucket.checksums import Evidence
from storage.bucket.listings import entries
from storage.bucket.put_options import Put


def upload(client: Any, bucket: str, put: Put, md5: Callable[[str], Mapping[str, str]]) -> Evidence:
    """Upload the whole file and complete it; abort the upload on any failure.

    `md5`: the argument of `upload_part` for a part's MD5, or none. Returns what the answers prove together. Raises
    boto3's errors, and `StoreUnavailable` when the file changed.
    """
    started = client.create_multipart_upload(**put.options, ChecksumAlgorithm="SHA256")
    place = {"Bucket": bucket, "Key": put.key, "UploadId": member(started, "UploadId")}
    try:
        sent, sha256s, etags_agree = [], [], None
        for part in checksums.parts_of(put.file, put.size, put.sha256):
            answer = client.upload_part(**place, **part.arguments, **md5(part.md5), Body=part.content)
            sent.append({**part.arguments, "ETag": member(answer, "ETag")})
            sha256s.append(part.sha256)
            if checksums.evidence_of(answer, part.sha256, part.md5).etag_agrees is False:
                etags_agree = False
            del part  # frees it before the next part is read: eight threads with two parts each took 256 MB
        answer = client.complete_multipart_upload(**place, **put.condition, MultipartUpload={"Parts": sent})
        return checksums.evidence_of(answer, checksums.composite(sha256s), None)._replace(etag_agrees=etags_agree)
    except BaseException:
        with suppress(Exception):  # report the first failure, not that of the abort
            client.abort_multipart_upload(**place)
        raise


def unfinished(client: Any, bucket: str, prefix: str, before: float) -> Iterator[dict[str, str]]:
    """Unfinished uploads that began before `before` (Unix time), as arguments for the abort."""
    for each in entries(client, "list_multipart_uploads", Bucket=bucket, Prefix=prefix):
        if each["Initiated"].timestamp() <= before:
            yield {"Bucket": bucket, "Key": each["Key"], "UploadId": each["UploadId"]}
