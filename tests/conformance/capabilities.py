"""The capabilities of a store, each a case by its name. A missing one is reported, and is no failure."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import httpx

from storage.bucket.probe import sha256_base64
from storage.errors import StoreUnavailable
from tests.conformance.stage import CONTENT, Case, Lacks, Stage

# Keys of ids with every kind of character, and of prefixes that people use.
ODD_NAMES = ("a%2Fb%20c/x.png", "%25%2525/x.png", "..%2E/x.png", "a+b=c&d/x.png", "~tilde-_./x.png", "%E5%9B%BE/x.png")
MIB = 2**20
RACERS = 16


def plain(stage: Stage) -> None:
    """put, get, head, list, delete"""
    stage.put("plain.bin", ContentType="image/png")
    head = stage.client.head_object(**stage.place("plain.bin"))
    assert stage.get("plain.bin") == CONTENT, "other bytes came back"
    assert (head["ContentLength"], head["ContentType"]) == (len(CONTENT), "image/png"), head
    assert stage.is_there("plain.bin"), "not in the listing"
    stage.client.delete_object(**stage.place("plain.bin"))
    assert not stage.is_there("plain.bin") and stage.bucket.head(stage.key("plain.bin")) is None, "still there"


def odd_keys(stage: Stage) -> None:
    """keys with % and odd characters"""
    for name in ODD_NAMES:
        stage.put(f"odd/{name}", name.encode())
    listed = {each.key for each in stage.bucket.list(stage.key("odd/"))}
    lost = [
        name
        for name in ODD_NAMES
        if stage.key(f"odd/{name}") not in listed or stage.get(f"odd/{name}") != name.encode()
    ]
    if lost:
        raise Lacks(f"changed or lost: {lost}")


def create_only(stage: Stage) -> None:
    """create-only put (If-None-Match)"""
    stage.put("once.bin", b"one")
    refused = stage.refusal(lambda: stage.put("once.bin", b"two", IfNoneMatch="*"))
    if stage.get("once.bin") != b"one":
        raise Lacks("overwritten")
    if refused is None or not refused.startswith("412"):
        raise Lacks(f"answered {refused or 200}")
    if fresh := stage.refusal(lambda: stage.put("once-new.bin", IfNoneMatch="*")):
        raise Lacks(f"refuses it for a new object too: {fresh}")


def create_only_raced(stage: Stage) -> None:
    """create-only put, 16 racing"""
    won = _race(lambda number: stage.refusal(lambda: stage.put("raced.bin", b"%d" % number, IfNoneMatch="*")))
    if len(won) != 1:
        raise Lacks(f"{len(won)} of {RACERS} were told that they created it")
    assert stage.get("raced.bin") == b"%d" % won[0], "the loser's bytes stand"


def _race(attempt: Callable[[int], str | None]) -> list[int]:
    together = threading.Barrier(RACERS, timeout=60)

    def run(number: int) -> str | None:
        together.wait()
        return attempt(number)

    with ThreadPoolExecutor(RACERS) as threads:
        refusals = list(threads.map(run, range(RACERS)))
    return [number for number, refused in enumerate(refusals) if refused is None]


def wrong_checksum(stage: Stage) -> None:
    """wrong SHA-256 refused"""
    refused = stage.refusal(lambda: stage.put("wrong.bin", ChecksumSHA256=sha256_base64(b"other")))
    if stage.is_there("wrong.bin"):
        raise Lacks("stored it" + (f" though it answered {refused}" if refused else ""))
    if not refused:
        raise Lacks("no refusal, and no object")


def wrong_md5(stage: Stage) -> None:
    """wrong Content-MD5 refused"""
    refused = stage.refusal(lambda: stage.put("wrong-md5.bin", ContentMD5="1B2M2Y8AsgTpgAmY7PhCfg=="))
    if not refused or stage.is_there("wrong-md5.bin"):
        raise Lacks("stored it")


def names_checksum(stage: Stage) -> None:
    """SHA-256 named by put and by head"""
    right = sha256_base64(CONTENT)
    told = stage.put("summed.bin", ChecksumSHA256=right).get("ChecksumSHA256")
    head = stage.client.head_object(**stage.place("summed.bin"), ChecksumMode="ENABLED").get("ChecksumSHA256")
    if (told, head) != (right, right):
        raise Lacks(f"put: {'right' if told == right else told}, head: {'right' if head == right else head}")


def etag_is_md5(stage: Stage) -> None:
    """ETag of a put is its MD5"""
    told = stage.put("etag.bin")["ETag"].strip('"')
    if told != hashlib.md5(CONTENT, usedforsecurity=False).hexdigest():
        raise Lacks("it is not")


def metadata(stage: Stage) -> str | None:
    """metadata kept"""
    stage.put("meta.bin", Metadata={"sha256": "ab" * 32, "task-id": "a%20b"}, CacheControl="max-age=60")
    head = stage.client.head_object(**stage.place("meta.bin"))
    found = {name.lower(): value for name, value in head["Metadata"].items()}
    if found != {"sha256": "ab" * 32, "task-id": "a%20b"}:
        raise Lacks(f"{found}")
    if head.get("CacheControl") != "max-age=60":
        raise Lacks("but Cache-Control is not")
    return None if found == head["Metadata"] else "with other capitals"


def tags(stage: Stage) -> None:
    """tags"""
    if refused := stage.refusal(lambda: stage.put("tags.bin", Tagging="team=a%20b")):
        raise Lacks(refused)
    try:
        found = stage.client.get_object_tagging(**stage.place("tags.bin"))["TagSet"]
    except stage.client.exceptions.ClientError as error:
        raise Lacks(str(error)[:80]) from error
    if found != [{"Key": "team", "Value": "a b"}]:
        raise Lacks(f"kept {found}")


def storage_class(stage: Stage) -> None:
    """storage class"""
    if refused := stage.refusal(lambda: stage.put("class.bin", StorageClass="STANDARD_IA")):
        raise Lacks(refused)
    found = stage.client.head_object(**stage.place("class.bin")).get("StorageClass")
    if found != "STANDARD_IA":
        raise Lacks(f"taken, told {found}")


def sse(stage: Stage) -> None:
    """encryption (SSE-S3)"""
    if refused := stage.refusal(lambda: stage.put("sse.bin", ServerSideEncryption="AES256")):
        raise Lacks(refused)
    found = stage.client.head_object(**stage.place("sse.bin")).get("ServerSideEncryption")
    if found != "AES256" or stage.get("sse.bin") != CONTENT:
        raise Lacks(f"taken, told {found}")


def lock(stage: Stage) -> None:
    """Object Lock (in this bucket)"""
    until = datetime.now(UTC) + timedelta(days=1)
    options = {"ObjectLockMode": "GOVERNANCE", "ObjectLockRetainUntilDate": until}
    if refused := stage.refusal(lambda: stage.put("locked.bin", ChecksumSHA256=sha256_base64(CONTENT), **options)):
        raise Lacks(refused)
    version = stage.client.head_object(**stage.place("locked.bin")).get("VersionId")
    place = stage.place("locked.bin") | ({"VersionId": version} if version else {})
    stage.refusal(lambda: stage.client.delete_object(**place))
    if stage.refusal(lambda: stage.client.head_object(**place)):
        raise Lacks("taken, and deleted all the same")


def multipart(stage: Stage) -> None:
    """multipart upload, composite checksum"""
    content = os.urandom(5 * MIB) + b"the rest"
    answer = _in_parts(stage, "parts.bin", [content[: 5 * MIB], content[5 * MIB :]])
    assert stage.get("parts.bin") == content, "other bytes came back"
    sums = b"".join(hashlib.sha256(each).digest() for each in (content[: 5 * MIB], content[5 * MIB :]))
    if answer.get("ChecksumSHA256") != f"{sha256_base64(sums)}-2":
        raise Lacks(f"parts yes, checksum {answer.get('ChecksumSHA256')}")


def create_only_parts(stage: Stage) -> None:
    """create-only multipart completion"""
    stage.put("parts-once.bin", b"one")
    refused = stage.refusal(lambda: _in_parts(stage, "parts-once.bin", [b"two"], IfNoneMatch="*"))
    if stage.get("parts-once.bin") != b"one":
        raise Lacks("overwritten")
    if not (refused or "").startswith("412"):
        raise Lacks(f"answered {refused or 200}")


def create_only_parts_raced(stage: Stage) -> None:
    """create-only multipart completion, 16 racing"""
    won = _race(
        lambda number: stage.refusal(lambda: _in_parts(stage, "raced-parts.bin", [b"%d" % number], IfNoneMatch="*"))
    )
    if len(won) != 1:
        raise Lacks(f"{len(won)} of {RACERS} were told that they created it")


def wrong_part(stage: Stage) -> None:
    """wrong SHA-256 of a part refused"""
    if not stage.refusal(lambda: _in_parts(stage, "wrong-part.bin", [b"one"], checksum=sha256_base64(b"other"))):
        raise Lacks("stored it")


def abort(stage: Stage) -> None:
    """multipart uploads listed and aborted"""
    stage.client.create_multipart_upload(**stage.place("aborted.bin"))
    if refused := stage.refusal(lambda: stage.client.list_multipart_uploads(Bucket=stage.bucket.name)):
        raise Lacks(f"not listed: {refused}")
    aborted = stage.bucket.abort_uploads(stage.key("aborted.bin"))
    if (aborted, stage.bucket.abort_uploads(stage.key("aborted.bin"))) != (1, 0):
        raise Lacks(f"{aborted} of 1 listed and aborted")


def _in_parts(stage: Stage, name: str, parts: list[bytes], checksum: str | None = None, **condition: str) -> Any:
    client, place = stage.client, stage.place(name)
    place["UploadId"] = client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")["UploadId"]
    try:
        sent = []
        for number, content in enumerate(parts, 1):
            part = {"PartNumber": number, "ChecksumSHA256": checksum or sha256_base64(content)}
            sent.append(part | {"ETag": client.upload_part(**place, **part, Body=content)["ETag"]})
        return client.complete_multipart_upload(**place, **condition, MultipartUpload={"Parts": sent})
    except BaseException:
        with suppress(Exception):
            client.abort_multipart_upload(**place)
        raise


def presigned(stage: Stage) -> None:
    """presigned GET"""
    stage.put("link a.bin")
    link = stage.bucket.presigned_get(stage.key("link a.bin"), expires_seconds=60)
    answer = httpx.get(link)
    if (answer.status_code, answer.content) != (200, CONTENT):
        raise Lacks(f"answered {answer.status_code}")
    if httpx.get(link.partition("?")[0]).status_code == 200:
        raise Lacks("and without a signature too: the bucket is public")


def paging(stage: Stage) -> str | None:
    """listing in pages"""
    names = [f"many/{number:04}" for number in range(stage.keys)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: stage.put(name, b"x"), names))
    found = [each.key for each in stage.bucket.list(stage.key("many/"))]
    if sorted(found) != [stage.key(name) for name in names]:
        raise Lacks(f"{len(found)} of {len(names)} listed, {len(set(found))} different")
    behind = [each.key for each in stage.bucket.list(stage.key("many/"), after=stage.key(names[10]))]
    if sorted(behind) != [stage.key(name) for name in names[11:]]:
        raise Lacks(f"start-after gives {len(behind)} of {len(names) - 11}")
    return f"{len(names):,} keys"


def order(stage: Stage) -> None:
    """keys listed in the order of their bytes"""
    names = ["a/x", "a-b/x", "a.b", "B", "a%2Fb/x", "a0/x"]
    for name in names:
        stage.put(f"order/{name}", b"x")
    found = [each.key for each in stage.bucket.list(stage.key("order/"))]
    if found != sorted(found):
        raise Lacks("in another order")


def wrong_key_words(stage: Stage) -> None:
    """wrong credentials are named"""
    with mock.patch.dict(os.environ, {"AWS_SECRET_ACCESS_KEY": "wrong"}):
        _says(stage, "secret key is wrong")


def wrong_clock_words(stage: Stage) -> None:
    """a wrong clock is named"""
    early = datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=2)
    with mock.patch("botocore.auth.get_current_datetime", return_value=early):
        _says(stage, "clock is wrong")


def wrong_region_words(stage: Stage) -> None:
    """a wrong region is named"""
    with mock.patch.dict(os.environ, {"AWS_DEFAULT_REGION": "eu-north-7", "AWS_REGION": "eu-north-7"}):
        _says(stage, "another region")


def _says(stage: Stage, words: str) -> None:
    other = copy.copy(stage.bucket)
    other._clients = {}  # a new client reads the environment again
    try:
        list(other.list(stage.key("nothing")))
    except StoreUnavailable as error:
        if words not in str(error):
            raise Lacks(str(error).partition("(")[2].rstrip(")")) from error
        return
    raise Lacks("takes it")


# Nothing works without these two.
NEEDED = (plain, paging)
CASES = tuple(
    Case(str(each.__doc__), each in NEEDED, each)
    for each in (
        plain, odd_keys, paging, order, create_only, create_only_raced, wrong_checksum, wrong_md5, names_checksum,
        etag_is_md5, metadata, multipart, create_only_parts, create_only_parts_raced, wrong_part, abort, presigned,
        tags, storage_class, sse, lock, wrong_key_words, wrong_clock_words, wrong_region_words,
    )
)  # fmt: skip
