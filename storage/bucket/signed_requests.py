"""Two requests of our own, HEAD and PUT, that every file needs: signed by botocore, sent over boto3's own connections.

boto3 spends most of its time on parameters, endpoint rules, hooks and parsing, hashes a body that goes over plain HTTP
once more, and sends a file in pieces of 16 KiB. Signing takes 0.07 ms. Measured, CPU of both requests: 5.1 ms by boto3
and 2.7 ms so for 100 KB, 14.7 and 9.9 for 3 MB (4 of them MD5). Only the way there is gained: whatever answer is not
the expected one is not judged here, the caller asks boto3 again.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO
from urllib.parse import quote

from botocore import exceptions as boto_errors
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

NOTHING = hashlib.sha256(b"").hexdigest()
# urllib3 gives each block the connect timeout to leave within: 5 s, so a connection must carry 13 kB/s. Blocks of 1 MiB
# would save another 0.9 ms of CPU in 3 MB, and broke off where eight connections share an uplink of 10 Mbit/s.
BLOCK_BYTES = 64 * 1024
# What boto3 must sign for us to sign likewise: no access point, no S3 Express, no v4a.
SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/]+/[0-9]{8}/(?P<region>[a-z0-9-]+)/s3/aws4_request,.*")
# The store understood us and would not have it from us: another region, another signature, a header it does not know.
REFUSALS = frozenset({301, 302, 307, 308, 400, 401, 403, 501})
ENOUGH_REFUSALS = 2

# What `put_object` tells, and the headers it is told by.
TOLD = {
    "ETag": "ETag",
    "ChecksumSHA256": "x-amz-checksum-sha256",
    "ServerSideEncryption": "x-amz-server-side-encryption",
}


class ConditionFailed(Exception):
    """The store did not create the object because of another that is there, or is being written."""


class Unexpected(Exception):
    """Neither what was hoped for nor a time-out: boto3 is to ask again."""


class _Signer(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """Signs over a SHA-256 of the body that is known already. Over https too, where boto3 leaves the body unsigned."""

    def payload(self, request: Any) -> str:
        return str(request.context["sha256"])


class _Body:
    """A file that is read, and so sent, in blocks of our size, whatever the sender asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, _size: int = -1) -> bytes:
        return self._file.read(BLOCK_BYTES)


class Signed:
    """Sends requests to one bucket. Thread-safe. Time-outs are raised as boto3 would; they are not tried again."""

    def __init__(self, client: Any, credentials: Any, base_url: str, region: str, note: Callable[..., object]) -> None:
        self._http = client._endpoint.http_session
        self._credentials = credentials
        self._base_url = base_url
        self._region = region
        self._note = note
        members = client.meta.service_model.operation_model("PutObject").input_shape.members
        self._header_names = {
            name: str(member.serialization["name"])
            for name, member in members.items()
            if member.serialization.get("location") == "header"
        }
        self._user_agent = client.meta.config.user_agent
        self._refusals = Counter[str]()  # in a row, by method

    @classmethod
    def of(cls, client: Any, credentials: Any, bucket: str, note: Callable[..., object]) -> Signed | None:
        """For the place that boto3 itself asks; None where it signs with anything but plain Signature Version 4.

        `note` is called with every answer, as boto3's hook `after-call` is: `http_response=…`.
        """
        asked = None if credentials is None else _asked_by_boto3(client, bucket)
        scope = asked and SCOPE.fullmatch(_text(asked.headers.get("Authorization", "")))
        if not asked or not scope or not asked.url.endswith("/k"):
            return None
        return cls(client, credentials, asked.url[:-1], scope["region"], note)

    @property
    def is_refused(self) -> bool:
        """Whether the store keeps refusing what we send; one refusal may pass, as of credentials that just ended."""
        return max(self._refusals.values(), default=0) >= ENOUGH_REFUSALS

    def is_missing(self, key: str) -> bool:
        """Whether nothing is stored under `key`. False: there is something. Raises `Unexpected`, time-outs."""
        answer = self._send("HEAD", key, {}, NOTHING, None)
        if answer.status_code not in (200, 404):
            raise Unexpected(f"HTTP {answer.status_code}")
        return bool(answer.status_code == 404)

    def put(self, arguments: Mapping[str, Any], file: BinaryIO, *, sha256: str, size: int) -> dict[str, str]:
        """Put the whole file. Returns what the store says of it, under boto3's names.

        `arguments`: as `put_object` takes them. Raises `ConditionFailed`; `Unexpected` and time-outs, after which
        nobody knows whether the object is there.
        """
        headers = {"Content-Length": str(size), **self._headers(arguments)}
        file.seek(0)
        answer = self._send("PUT", arguments["Key"], headers, sha256, _Body(file) if size else None)
        if answer.status_code in (409, 412):
            raise ConditionFailed(f"HTTP {answer.status_code}")
        if not 200 <= answer.status_code < 300:
            raise Unexpected(f"HTTP {answer.status_code}")
        return {name: answer.headers[header] for name, header in TOLD.items() if header in answer.headers}

    def _headers(self, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Raises `Unexpected` for an argument that boto3 must put into words: a time."""
        headers = {f"x-amz-meta-{name}": value for name, value in arguments["Metadata"].items()}
        for name, value in arguments.items():
            if name in ("Bucket", "Key", "Metadata"):
                continue
            if not isinstance(value, str) or name not in self._header_names:
                raise Unexpected(name)
            headers[self._header_names[name]] = value
        return headers

    def _send(self, method: str, key: str, headers: Mapping[str, str], sha256: str, body: _Body | None) -> Any:
        url = self._base_url + quote(key, safe="/~")  # as boto3 does
        request = AWSRequest(method, url, headers={"User-Agent": self._user_agent, **headers}, data=body)
        request.context["sha256"] = sha256
        _Signer(self._credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
        try:
            answer = self._http.send(request.prepare())
        except (boto_errors.ReadTimeoutError, boto_errors.ConnectTimeoutError):
            raise
        except boto_errors.BotoCoreError as error:  # most often a connection that the store had closed while it idled
            raise Unexpected(type(error).__name__) from error
        self._refusals[method] = self._refusals[method] + 1 if answer.status_code in REFUSALS else 0
        self._note(http_response=answer)
        return answer


def _asked_by_boto3(client: Any, bucket: str) -> Any:
    """The request with which boto3 would look for the object `k`, signed, and not sent; None when it makes none.

    A presigned link would not do: at AWS those go to another host than requests.
    """
    client.meta.events.register_first("before-send.s3", _keep)
    try:
        client.head_object(Bucket=bucket, Key="k")
    except _Kept as kept:
        return kept.request if kept.request.method == "HEAD" else None
    except (boto_errors.ClientError, boto_errors.BotoCoreError):
        pass  # it will be said again when it matters
    finally:
        client.meta.events.unregister("before-send.s3", _keep)
    return None


class _Kept(Exception):
    """Breaks off a call of boto3 before anything is sent."""

    def __init__(self, request: Any) -> None:
        self.request = request


def _keep(request: Any, **_: Any) -> None:
    raise _Kept(request)


def _text(header: str | bytes) -> str:
    return header.decode() if isinstance(header, bytes) else header
