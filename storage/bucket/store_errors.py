"""Translates boto3's errors into ours, each with one line for an operator that holds no URL path and no secret."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions as boto_errors

from storage.errors import ObjectForbidden, ObjectRefused, StoreUnavailable

# By the store's error code. The answer to a HEAD has no body, so its code is the HTTP status.
REASONS = {
    "InvalidAccessKeyId": "does not know the access key",
    "SignatureDoesNotMatch": "says the secret key is wrong",
    "ExpiredToken": "says the session token has expired",
    "RequestTimeTooSkewed": "says this machine's clock is wrong",
    "AccessDenied": "refuses these credentials",
    "403": "refuses these credentials (looking for a missing object needs s3:ListBucket)",
    "NoSuchBucket": "has no such bucket",
    "BadDigest": "says the bytes are not those of the checksum",
    "XAmzContentSHA256Mismatch": "says the bytes are not those of the checksum",
    "SlowDown": "asks to slow down",
    "PermanentRedirect": "is in another region",
    "AuthorizationHeaderMalformed": "is in another region",
    "SecondLevelDomainForbidden": "wants the bucket in the host name (RECEIVER_S3_ADDRESSING=virtual)",
}
# Refusals of one object that say nothing about others. A proxy in front answers 413 without an S3 error code.
TOO_LARGE = "EntityTooLarge"
OF_ONE_OBJECT = {"InvalidRequest", "InvalidArgument"}
FORBIDDEN = {"AccessDenied", "403"}


class NoSuchObject(LookupError):
    """No object is stored under the key."""


def refusal(error: Exception, bucket: str, endpoint_url: str | None, size: int | None = None) -> StoreUnavailable:
    """Our error for one of boto3's. `size`: bytes of the object that was being put, None for other requests."""
    message = _message(error, bucket, endpoint_url)
    if not isinstance(error, boto_errors.ClientError):
        return StoreUnavailable(message)
    if size is not None and (status(error) == 413 or code(error) == TOO_LARGE):
        return ObjectRefused(_too_large(error, bucket, _host(endpoint_url), size))
    if size is not None and code(error) in OF_ONE_OBJECT:
        return ObjectRefused(message)
    return ObjectForbidden(message) if code(error) in FORBIDDEN else StoreUnavailable(message)


def _too_large(error: Exception, bucket: str, host: str, size: int) -> str:
    what = f"an object of {size:,} bytes (bucket {bucket}, HTTP {status(error)})"
    if code(error) == TOO_LARGE:
        return f"the store at {host} refuses {what}: raise its limit for one object"
    return (
        f"a limit in front of the store at {host} refuses {what}: raise the request limit of the proxy there "
        "(nginx: client_max_body_size) to RECEIVER_MAX_ASSET_BYTES"
    )


def _message(error: Exception, bucket: str, endpoint_url: str | None) -> str:
    store = f"the store at {_host(endpoint_url)}"
    if isinstance(error, boto_errors.ClientError):
        found = code(error)
        return f"{store} {REASONS.get(found, 'failed')} (bucket {bucket}, {found}, HTTP {status(error)})"
    if isinstance(error, boto_errors.NoCredentialsError | boto_errors.PartialCredentialsError):
        return "no credentials for the bucket: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, boto_errors.HTTPClientError | boto_errors.ConnectionError):
        return f"{store} cannot be reached ({type(error).__name__})"
    return f"{store} could not be used ({type(error).__name__})"


def reason_code(error: StoreUnavailable) -> str:
    """The store's error code (`NoSuchBucket`), else the class of the transport error."""
    cause = error.__cause__
    return code(cause) if isinstance(cause, boto_errors.ClientError) else type(cause or error).__name__


def status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))[:60]


def _host(url: str | None) -> str:
    """Host and port only, because a URL may hold a password."""
    return urlsplit(url).netloc.rpartition("@")[2] if url else "AWS"
