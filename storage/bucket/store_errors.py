"""Translates boto3's errors into ours. Each message is one line for an operator, without a URL path or a secret."""

from __future__ import annotations

import re
from typing import Any

from botocore import exceptions as boto_errors
from botocore.parsers import ResponseParserError

from storage.bucket.bounded_connections import Redirected, UnusableAnswer
from storage.bucket.http_connections import TOO_SLOW
from storage.errors import ObjectForbidden, ObjectRefused, StoreUnavailable
from storage.url_parts import host_and_port

# Messages by the store's error code. The answer to a HEAD has no body, so its code is the HTTP status.
REASONS = {
    "InvalidAccessKeyId": "does not know the access key",
    "SignatureDoesNotMatch": "says the secret key is wrong",
    "ExpiredToken": "says the session token has expired",
    "InvalidToken": "does not know the session token",
    "RequestTimeTooSkewed": "says this machine's clock is wrong",
    "AccessDenied": "refuses these credentials",
    "403": "refuses these credentials",
    "NoSuchBucket": "has no such bucket",
    "404": "answers without a code of S3; a proxy in front of it may have no route",
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
# Refusals that other credentials end. Those in the chain may have changed since they were read.
STALE = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
# The permission that AWS requires for each call. A key that may not list gets 403 for a missing object.
PERMISSIONS = {
    "PutObject": "s3:PutObject",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject, and s3:ListBucket to look for a missing object",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
}
# What AWS says of a refusal that it explains. The permission may be of another service, such as the key's in KMS.
DENIED = re.compile(r"not authorized to perform: ([a-z0-9-]+:[A-Za-z]+)")
# Refusals that name the bucket's region, in the body or in a header. AWS sends the header with others, too.
OF_REGION = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "301", "307"}
REGION = re.compile(r"[a-z0-9-]{1,40}")
OF_KMS = "KMS."  # the beginning of its codes
# The beginnings of our messages, by which stored errors are recognised, and the words of the one about a single object.
MESSAGES = (
    *("the store at ", "a limit in front of the store at ", "the proxy that "),
    *("no credentials for the bucket", "the credentials of the bucket "),
)
OBJECT_SIZE = re.compile(r"an object of [0-9,]+ bytes")
# The root elements of listings. gofakes3, which other stores are built on, has its own for versions.
LISTINGS = {
    "ListObjectsV2": ("ListBucketResult",),
    "ListObjectVersions": ("ListVersionsResult", "ListBucketVersionsResult"),
}
ROOT = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?[^>]*>\s*)?<(?:[\w.-]+:)?([\w.-]+)")
WITHOUT_CHECKSUMS = "RECEIVER_S3_CHECKSUMS=never"
CHECKSUMS_HINT = f"; if it takes no checksum headers, set {WITHOUT_CHECKSUMS}"
MAX_WORDS_CHARS = 200
INVALID_HEADER = "Invalid header value"  # what http.client says of a header


class NoSuchObject(LookupError):
    """No object is stored under the key."""


def refusal(
    error: Exception, bucket: str, endpoint_url: str | None, size: int | None = None, *, sent_checksums: bool = False
) -> StoreUnavailable:
    """Our error for one of boto3's or of TOO_SLOW.

    `size`: bytes of the object that was being put, None for other requests. `sent_checksums`: whether puts carry
    checksum headers, which some stores refuse.
    """
    message = _message(error, bucket, endpoint_url)
    if sent_checksums and may_refuse_checksums(error):
        message += CHECKSUMS_HINT
    if not isinstance(error, boto_errors.ClientError):
        return StoreUnavailable(message)
    if size is not None and (status(error) == 413 or code(error) == TOO_LARGE):
        return ObjectRefused(_too_large(error, bucket, endpoint_url, size))
    if size is not None and code(error) in OF_ONE_OBJECT:
        return ObjectRefused(message)
    return ObjectForbidden(message) if code(error) in FORBIDDEN else StoreUnavailable(message)


def _too_large(error: Exception, bucket: str, endpoint_url: str | None, size: int) -> str:
    what = f"an object of {size:,} bytes (bucket {bucket}, HTTP {status(error)})"
    if code(error) == TOO_LARGE:
        return f"{store_at(endpoint_url)} refuses {what}: raise its limit for one object"
    return (
        f"a limit in front of {store_at(endpoint_url)} refuses {what}: raise the request limit of the proxy there "
        "(nginx: client_max_body_size) to RECEIVER_MAX_ASSET_BYTES"
    )


def _message(error: Exception, bucket: str, endpoint_url: str | None) -> str:
    store = store_at(endpoint_url)
    if isinstance(error, boto_errors.ClientError):
        return f"{store} {_reason(error)} (bucket {bucket}, {code(error)}, HTTP {status(error)})"
    if isinstance(error, boto_errors.NoCredentialsError | boto_errors.PartialCredentialsError):
        return "no credentials for the bucket: export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (.env does not count)"
    if is_untrusted(error):
        return f"{store} has a certificate that is not trusted: set AWS_CA_BUNDLE to the file of the CA that signed it"
    if isinstance(error, boto_errors.ProxyConnectionError):
        return f"the proxy that HTTPS_PROXY or HTTP_PROXY names for {store} cannot be reached"
    if isinstance(error, Redirected):
        place = error.kwargs["place"]
        return f"{store} redirects to {place}: set RECEIVER_S3_ENDPOINT_URL to the store's own address"
    if isinstance(error, UnusableAnswer | ResponseParserError):
        return f"{store} answered with what is no XML of S3; a proxy or a log-in page may be in front of it"
    if isinstance(error, boto_errors.PaginationError):
        return f"{store} sends pages of a listing that name no further object"
    if isinstance(error, TOO_SLOW):
        return f"{store} cannot be reached (timeout)"
    if has_line_end(error):
        return (
            "the credentials of the bucket hold a line end or another control character: "
            "export AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN without it"
        )
    if not is_of_boto3(error):
        return f"{store} cannot be reached ({type(error).__name__})"
    return f'{store} could not be used: boto3 says "{_in_one_line(str(error))}" ({type(error).__name__})'


def _reason(error: Any) -> str:
    reason, needed, place = REASONS.get(code(error)), permission(error), region(error)
    if place:
        return f"is in another region, {place}"
    if reason:
        return f"{reason} (needs {needed})" if needed else reason
    words = _in_one_line(str(error.response.get("Error", {}).get("Message", "")))
    return f'failed: "{words}"' if words else "failed"


def _in_one_line(said: str) -> str:
    return "".join(filter(str.isprintable, " ".join(said.split())))[:MAX_WORDS_CHARS]


def is_of_boto3(error: BaseException | None) -> bool:
    """Whether boto3 itself refuses to send a request, mostly for its configuration: a profile that does not exist, a
    session of single sign-on that has expired.
    """
    is_of_network = isinstance(error, boto_errors.HTTPClientError | boto_errors.ConnectionError)
    return isinstance(error, boto_errors.BotoCoreError) and not is_of_network


def permission(error: Any) -> str | None:
    """The permission that a key lacks for the call, as the store names it, else as AWS requires it; None for other
    errors.
    """
    if not isinstance(error, boto_errors.ClientError) or code(error) not in FORBIDDEN:
        return None
    named = DENIED.search(str(error.response["Error"].get("Message", "")))
    return named[1] if named else PERMISSIONS.get(error.operation_name)


def region(error: Any) -> str | None:
    """The region of a bucket that is elsewhere, if the store names it."""
    if not isinstance(error, boto_errors.ClientError) or code(error) not in OF_REGION:
        return None
    sent = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
    found = str(sent or error.response["Error"].get("Region", ""))
    return found if REGION.fullmatch(found) else None


def is_explained(error: Any) -> bool:
    """Whether the store says in words of its own why it refuses the request."""
    has_words = isinstance(error, boto_errors.ClientError) and error.response["Error"].get("Message")
    # Of an answer without a code boto3 makes one of the status, and words of its phrase.
    return bool(has_words) and 400 <= status(error) < 500 and code(error) != str(status(error))


def no_listing(operation: str, body: bytes) -> str | None:
    """What is wrong with the body of a 200 for `operation`; None for a listing, and where none is expected."""
    if operation not in LISTINGS:
        return None
    found = ROOT.match(body)
    root = found[1].decode(errors="replace")[:40] if found else ""
    if root in LISTINGS[operation]:
        return None
    sent = f"an element {root}" if root else "no XML"
    return f"answers a listing with what is not one: HTTP 200, {sent}; a proxy or a log-in page may be in front of it"


def is_stale(error: Exception) -> bool:
    """Whether reading the credentials again may end the refusal."""
    if isinstance(error, boto_errors.ClientError):
        return code(error) in STALE
    return isinstance(error, boto_errors.NoCredentialsError | boto_errors.PartialCredentialsError)


def is_untrusted(error: BaseException | None) -> bool:
    """Whether the store's certificate is signed by a CA that we do not know. Other TLS faults count as faults of the
    network.
    """
    return isinstance(error, boto_errors.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error)


def has_line_end(error: BaseException | None) -> bool:
    """Whether a credential cannot stand in a header. The error's text shows it, so no message quotes that."""
    return isinstance(error, boto_errors.HTTPClientError) and INVALID_HEADER in str(error)


def may_refuse_checksums(error: BaseException | None) -> bool:
    """Whether a put was refused for a header or an argument that a store without checksums does not know."""
    if not isinstance(error, boto_errors.ClientError) or PERMISSIONS.get(error.operation_name) != "s3:PutObject":
        return False
    is_other = code(error) in {*REASONS, TOO_LARGE} or code(error).startswith(OF_KMS)
    return status(error) == 501 or (status(error) == 400 and not is_other)


def reason_code(error: StoreUnavailable) -> str:
    """The store's error code (`NoSuchBucket`), else the class of the transport error."""
    cause = error.__cause__
    return code(cause) if isinstance(cause, boto_errors.ClientError) else type(cause or error).__name__


def status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))[:60]


def store_at(endpoint_url: str | None) -> str:
    return f"the store at {host(endpoint_url)}"


def host(url: str | None) -> str:
    """Host and port only, because a URL may hold a password. None: no client has been made for boto3's own endpoint."""
    return host_and_port(url) if url else "AWS"
