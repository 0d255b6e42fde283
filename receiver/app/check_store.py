"""The bucket checks of `receiver check`: one line with the verdict, the details behind `--verbose`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

from sqlalchemy import func, or_
from sqlmodel import col, select

from receiver.app.findings import SYNCHRONISE, Result, Status, refused, start_command
from receiver.app.wiring import Parts
from storage.bucket.bucket import PROBE_FOLDER
from storage.bucket.probe import Capabilities
from storage.bucket.store_connection import BOTO3_ENDPOINTS, EndpointInvalid
from storage.bucket.store_errors import (
    CHECKSUMS_HINT,
    OF_KMS,
    WITHOUT_CHECKSUMS,
    has_line_end,
    is_explained,
    is_of_boto3,
    is_untrusted,
    may_refuse_checksums,
    permission,
    reason_code,
    region,
)
from storage.errors import ObjectRefused, StoreUnavailable
from storage.operations import heartbeats
from storage.operations.counted import counted
from storage.rows.models import Asset
from storage.states import AssetState

# Larger than the body limit of a proxy with default settings (nginx: 1 MiB). Takes 4 s over an uplink of 4 Mbit/s.
LARGE_BYTES = 2 * 2**20
LIST = "s3:ListBucket"
SET_REGION = "set AWS_DEFAULT_REGION to the bucket's region"
# Advice by the store's error code, or by the name of boto3's exception if no answer came from a store.
ADVICE = {
    "InvalidAccessKeyId": "correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "correct AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "fetch new credentials",
    "InvalidToken": "fetch new credentials, or unset AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": SYNCHRONISE,
    "SlowDown": "files are tried again by themselves; lower what else asks this bucket",
    "NoSuchBucket": "create it, or correct RECEIVER_S3_BUCKET",
    "PermanentRedirect": SET_REGION,
    "AuthorizationHeaderMalformed": SET_REGION,
    "NoRegionError": SET_REGION,
    "NoCredentialsError": "",  # the message is the advice
    "PartialCredentialsError": "",
    "Redirected": "",
    "ProxyConnectionError": "correct that variable, or list the store's host in NO_PROXY",
}
PROOFS = {
    "sha256": "a put is proven by its SHA-256",
    "md5": "a put is proven by its MD5",
    "read": "every object is read back after a put, at twice the traffic",
}
# The consequence of each capability that the store lacks. None of them loses a picture.
WITHOUT = {
    "conditional_put": "objects are checked for before and after they are written; let nothing else write there",
    "refuses_wrong_checksum": "every object is read back and hashed after it was written; expect twice the traffic",
    "returns_checksum": "an object that exists already is read back and compared; nothing to do",
    "keeps_metadata": "the source of a picture is in manifest.json alone; nothing to do",
    "multipart": "files over 64 MiB go in one request; allow multipart uploads if they fail",
    "refuses_wrong_part": "large objects are read back and hashed after they were written; expect twice the traffic",
    "conditional_multipart": "large objects are checked for before they are written; let nothing else write there",
    "delete": "grant s3:DeleteObject, or remove .receiver-probe/ by hand",
}


def bucket(parts: Parts) -> Iterator[Result]:
    """Check whether the bucket can be written, read and listed, and which other capabilities it has."""
    name = f"s3://{parts.bucket.name}/{parts.bucket.prefix}"
    try:
        can = parts.bucket.probe(LARGE_BYTES)
        parts.bucket.head(f"{parts.bucket.prefix}{PROBE_FOLDER}{secrets.token_hex(8)}")  # AWS: 403 if it may not list
    except StoreUnavailable as error:
        status = refused(reason_code(error), parts.bucket.clock_ahead_seconds)
        advice = _advice(parts, error)
        line = str(error).removesuffix(CHECKSUMS_HINT) if WITHOUT_CHECKSUMS in advice else str(error)
        yield Result("bucket", status, line, advice)
        return
    # an error text that no S3 store sends, or an address that boto3 cannot connect to
    except (LookupError, ValueError) as error:
        line = f"the server at {parts.bucket.host} is not an S3 store"
        if isinstance(error, EndpointInvalid):
            line = str(error)
        yield Result("bucket", Status.FAULT, line, f"correct {_endpoint_setting(parts)}")
        return
    lacks = sum(not getattr(can, ability) for ability in WITHOUT)
    more = f"; it lacks {lacks} of {len(WITHOUT)} capabilities (`receiver check --verbose`)" if lacks else ""
    line = f"{name} at {parts.bucket.host} was written, listed and read back; {PROOFS[can.proof]}{more}"
    yield Result("bucket", Status.OK, line)
    yield from _capabilities(can)


def _advice(parts: Parts, error: StoreUnavailable) -> str:
    needed = permission(error.__cause__)
    if needed and LIST in needed:
        return (
            f"grant {LIST} on the bucket itself (arn:aws:s3:::{parts.bucket.name}, without /*): "
            "no picture is archived until a missing object can be told from a refusal"
        )
    if needed:
        return f"grant {needed}, or use another key"
    if may_refuse_checksums(error.__cause__) and _works_without_checksums(parts):
        return f"set {WITHOUT_CHECKSUMS}: the store works without checksum headers"
    if is_untrusted(error.__cause__) or has_line_end(error.__cause__) or isinstance(error, ObjectRefused):
        return ""  # the message is the advice
    if place := region(error.__cause__):
        return f"set AWS_DEFAULT_REGION to {place}"
    if reason_code(error).startswith(OF_KMS):
        return "mend the key there, or name another one in RECEIVER_S3_KMS_KEY_ID or in the bucket's default encryption"
    unknown = "" if is_explained(error.__cause__) else f"check {_endpoint_setting(parts)}, and that the store runs"
    if is_of_boto3(error.__cause__):
        unknown = "correct the AWS_… variables of the environment, or ~/.aws/config and ~/.aws/credentials"
    return ADVICE.get(reason_code(error), unknown)


def _endpoint_setting(parts: Parts) -> str:
    if parts.store_address[0] is not None:
        return "RECEIVER_S3_ENDPOINT_URL"
    return f"RECEIVER_S3_ENDPOINT_URL, which is not set, and boto3's own ({BOTO3_ENDPOINTS})"


def _works_without_checksums(parts: Parts) -> bool:
    if parts.settings.s3_checksums == "never":
        return False
    try:
        Parts(parts.settings.model_copy(update={"s3_checksums": "never"})).bucket.probe()
    except (StoreUnavailable, LookupError, ValueError):
        return False
    return True


def _capabilities(can: Capabilities) -> Iterator[Result]:
    for ability, advice in WITHOUT.items():
        if not can.multipart and ability in ("refuses_wrong_part", "conditional_multipart"):
            continue
        if can.proof == "md5" and ability in ("refuses_wrong_checksum", "refuses_wrong_part"):
            advice = "it refuses a wrong MD5, which is sent instead; nothing to do"
        status = Status.OK if getattr(can, ability) else Status.NOTE
        line, advice = ("yes", "") if status is Status.OK else ("no", advice)
        detail = status is Status.OK or ability != "delete"  # running checks leave objects behind
        yield Result(f"bucket: {ability.replace('_', ' ')}", status, line, advice, detail=detail)


def of_workers(parts: Parts, results: Sequence[Result], started_store: bool) -> Iterator[Result]:
    """Check whether running workers have the store that this command reached.

    It may refuse them while it accepts this command's credentials, or run for this command alone (`started_store`).
    """
    good = {result.name for result in results if result.status is Status.OK}
    if not {"bucket", "database"} <= good or not (alive := heartbeats.count_alive(parts.database)):
        return
    if started_store:
        workers = counted(alive, "worker is alive", "workers are alive")
        line = f"the store ran for this check alone, and {workers} without it: nothing is archived"
        yield Result("bucket: workers", Status.FAULT, line, f"end them, and start `{start_command(parts.settings)}`")
        return
    told = or_(col(Asset.error).startswith("the store at "), col(Asset.error).startswith("no credentials for "))
    found = select(Asset.error, func.count()).where(told, Asset.state == AssetState.DUE, col(Asset.due_at).is_not(None))
    with parts.database.read() as session:
        latest = session.exec(found.group_by(col(Asset.error)).order_by(func.max(Asset.due_at).desc()).limit(1)).first()
    if latest is not None:
        line = (
            f"{counted(latest[1], 'file waits', 'files wait')} because a running worker was told otherwise: {latest[0]}"
        )
        advice = "if that stays, give the workers this command's environment and credentials, and restart them"
        yield Result("bucket: workers", Status.NOTE, line, advice)
