"""Connections to one S3 store: boto3's clients, our own signed requests, and translation of errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import boto3
from botocore import exceptions as boto_errors
from botocore.config import Config
from botocore.parsers import ResponseParserError

from storage import forks
from storage.bucket.bounded_connections import bound
from storage.bucket.http_connections import TOO_SLOW
from storage.bucket.signed_requests import ConditionFailed, SignedRequests, TryAgain
from storage.bucket.store_errors import NoSuchObject, code, host, is_stale, no_listing, refusal, status, store_at
from storage.errors import StoreUnavailable, UserError
from storage.http_date import http_date
from storage.url_parts import is_on_loopback

CONNECT_SECONDS = 5
READ_SECONDS = 60
# The second try covers an idle connection that the store has closed. Longer outages are left to the row's backoff.
TRIES = 2
# Reading the credentials again takes 50 ms and perhaps a call of the cloud's metadata service.
RENEW_SECONDS = 10.0
# Refusals whose code a HEAD does not show, because its answer has no body.
UNTOLD = (400, 401, 403)
# Calls about one object, which a 404 without S3's code says is missing. To others a proxy without a route answers so.
OF_OBJECT = ("HeadObject", "GetObject")
# Where boto3 looks for an endpoint if it is given none.
BOTO3_ENDPOINTS = "AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's endpoint_url"

ChecksumMode = Literal["when_supported", "when_required", "never"]
Addressing = Literal["auto", "path", "virtual"]


class EndpointInvalid(UserError, ValueError):
    """An endpoint URL that boto3 refuses."""


class StoreConnection:
    """The clients of one bucket, created at their first use. Thread-safe. The arguments are those of `Bucket`."""

    def __init__(
        self,
        name: str,
        endpoint_url: str | None,
        public_endpoint_url: str | None,
        checksum_mode: ChecksumMode,
        addressing: Addressing,
        connections: int,
        keys: tuple[str, str] | None,
    ) -> None:
        self.name = name
        self._keys = keys
        self._endpoint_url = endpoint_url
        # What messages name. Without an endpoint of ours boto3 finds its own, for example in AWS_ENDPOINT_URL_S3.
        self._used_endpoint_url = endpoint_url
        self._public_endpoint_url = public_endpoint_url
        self._sends_checksums = checksum_mode != "never"
        self._config = Config(
            signature_version="s3v4",
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": TRIES},
            max_pool_connections=connections,
            tcp_keepalive=True,
            # A proxy's loopback is another machine. Go's clients never ask one for it, and boto3 only where NO_PROXY
            # lists it.
            proxies={} if endpoint_url and is_on_loopback(endpoint_url) else None,
            s3=None if addressing == "auto" else {"addressing_style": addressing},
            request_checksum_calculation="when_required" if checksum_mode == "never" else checksum_mode,
            response_checksum_validation="when_required",  # objects are hashed here while they are read, with SHA-256
        )
        self._renewed_at = float("-inf")
        self.begin_in_child()
        forks.renew_in_children(self)
        # This host's clock minus the Date of boto3's last response, for `receiver check`; None before the first.
        self.clock_ahead_seconds: float | None = None

    def begin_in_child(self) -> None:
        self._clients: dict[str | None, Any] = {}
        self._clients_lock = threading.Lock()
        self._signed: SignedRequests | None = None

    @property
    def is_reached_from_outside(self) -> bool:
        """Whether a presigned link works for outside readers: at AWS, or with a public endpoint."""
        return self._public_endpoint_url is not None or self._endpoint_url is None

    @property
    def host(self) -> str:
        return host(self._used_endpoint_url)

    @property
    def place(self) -> str:
        return f"{store_at(self._used_endpoint_url)} (bucket {self.name})"

    def _client(self, endpoint_url: str | None = None) -> Any:
        endpoint_url = endpoint_url or self._endpoint_url
        with self._clients_lock:
            if endpoint_url not in self._clients:
                session = boto3.Session(*self._keys, region_name="us-east-1") if self._keys else boto3.Session()
                try:
                    client = session.client("s3", endpoint_url=endpoint_url, config=self._config)
                except boto_errors.BotoCoreError:
                    raise
                except ValueError:  # for example a host name with an underscore, common in Compose files
                    where = "RECEIVER_S3_ENDPOINT_URL" if endpoint_url else BOTO3_ENDPOINTS
                    raise EndpointInvalid(
                        f"boto3 refuses the host in {where}; write https://HOST with a name without underscores"
                    ) from None
                bound(client)
                client.meta.events.register("after-call.s3", self._note_date)
                client.meta.events.register("before-parse.s3", self._refuse_no_listing)
                if not self._sends_checksums:
                    client.meta.events.register("provide-client-params.s3", without_checksums)
                if endpoint_url == self._endpoint_url:
                    self._used_endpoint_url = client.meta.endpoint_url
                    credentials = session.get_credentials()
                    self._signed = SignedRequests.for_client(client, credentials, self.name)
                self._clients[endpoint_url] = client
            return self._clients[endpoint_url]

    def _renew(self) -> None:
        """Read the credentials again at the next request, because the file may have a rotated session token.

        boto3 reads the shared credentials file once per session.
        """
        with self._clients_lock:
            if self._keys is None and time.monotonic() >= self._renewed_at + RENEW_SECONDS:
                self._renewed_at, self._clients = time.monotonic(), {}

    def _head_object(self, key: str, **options: str) -> Any:
        """boto3's `head_object`. A refusal is repeated as a GET, whose answer has a body and so the store's code."""
        try:
            return self._client().head_object(Bucket=self.name, Key=key, **options)
        except boto_errors.ClientError as error:
            if status(error) not in UNTOLD:
                raise
            try:
                self._client().get_object(Bucket=self.name, Key=key, Range="bytes=0-0")["Body"].close()
            except boto_errors.ClientError as told:
                if status(told) in UNTOLD:
                    told.operation_name = error.operation_name
                    raise told from error
            raise

    def _signed_requests(self) -> SignedRequests | None:
        """Sends the two commonest requests without boto3. None if only boto3 can. Created with the client."""
        if self._endpoint_url not in self._clients:
            self._client()
        return self._signed

    def _refuse_no_listing(self, operation_model: Any, response_dict: Mapping[str, Any], **_: Any) -> None:
        """Refuse the 200 of a proxy or a log-in page, which boto3 parses as the listing of an empty bucket."""
        if response_dict["status_code"] == 200 and (told := no_listing(operation_model.name, response_dict["body"])):
            raise StoreUnavailable(f"{store_at(self._used_endpoint_url)} {told} (bucket {self.name})")

    def _note_date(self, http_response: Any, **_: Any) -> None:
        sent_at = http_date(http_response.headers.get("date") or "")
        if sent_at is not None:
            self.clock_ahead_seconds = time.time() - sent_at

    @contextmanager
    def _errors(self, size: int | None = None, *, creates: bool = False) -> Iterator[None]:
        """Translate errors of boto3 and of our own requests.

        `size`: of the object that is being put. `creates`: raise `TryAgain` for 409, and `ConditionFailed` if an object
        exists or another process aborted the upload.
        """
        try:
            yield
        except (boto_errors.ClientError, boto_errors.BotoCoreError, ResponseParserError, *TOO_SLOW) as error:
            raise self._translated(error, size, creates=creates) from error

    def _translated(self, error: Exception, size: int | None, *, creates: bool) -> Exception:
        answer = (status(error), code(error)) if isinstance(error, boto_errors.ClientError) else (0, "")
        is_of_object = answer == (404, "404") and getattr(error, "operation_name", "") in OF_OBJECT
        if answer[1] in ("NoSuchKey", "NotFound") or is_of_object:
            return NoSuchObject("no object is stored under the key")
        if creates and (answer[0] in (409, 412) or answer[1] == "NoSuchUpload"):
            return (TryAgain if answer[0] == 409 else ConditionFailed)(answer[1])
        if is_stale(error):
            self._renew()
        return refusal(error, self.name, self._used_endpoint_url, size, sent_checksums=self._sends_checksums)


def without_checksums(params: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Arguments of a request without those that make boto3 send or request an `x-amz-checksum-…` header."""
    kept = {name: value for name, value in params.items() if not name.startswith("Checksum")}
    if parts := params.get("MultipartUpload", {}).get("Parts"):
        kept["MultipartUpload"] = {"Parts": [{name: part[name] for name in ("PartNumber", "ETag")} for part in parts]}
    return kept
