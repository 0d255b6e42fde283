"""What a store's refusals mean, in words for a person: boto3's errors as one line each, without URLs and secrets."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions as boto_errors

from storage.errors import StoreUnavailable

# What to tell a person, by the store's error code; a HEAD has no body and says only the number.
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


def diagnose(error: Exception, bucket: str, endpoint_url: str | None) -> str:
    """Why the store did not do it."""
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
    """The store's own error code behind it (`NoSuchBucket`), else the name of what went wrong on the way."""
    cause = error.__cause__
    return code(cause) if isinstance(cause, boto_errors.ClientError) else type(cause or error).__name__


def status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))[:60]


def _host(url: str | None) -> str:
    """The host and port alone: people put passwords into URLs."""
    return urlsplit(url).netloc.rpartition("@")[2] if url else "AWS"
