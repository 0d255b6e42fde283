"""The two requests that every file needs, HEAD and PUT: signed here and sent over connections of our own.

boto3 spends most of its time on parameters, endpoint rules, hooks and parsing. botocore's signer and urllib3, which
this module used before, spend theirs on header objects and on blocks of 64 KiB. Storing 100 KB took 2.0 ms of CPU with
those two, a HEAD and an MD5, and takes 0.5 ms by one PUT from here. 3 MB took 8.5 ms and take 1.2 ms (eight threads,
medians of three interleaved rounds on a loaded machine). This module only sends. On any unexpected response the caller
repeats the request with boto3, which interprets it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import ssl
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from botocore import exceptions as boto_errors
from botocore.httpsession import get_cert_path

from storage import spool
from storage.bucket.http_connections import HttpConnections, UnexpectedResponse
from storage.http.client import Response

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
# The only signature of boto3 that is supported here: no access point, no S3 Express, no v4a.
SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/]+/[0-9]{8}/(?P<region>[a-z0-9-]+)/s3/aws4_request,.*")
# Refusals of the request itself: another region, another kind of signature, an unknown header.
REFUSALS = frozenset({301, 302, 307, 308, 400, 401, 403, 501})
MAX_REFUSALS = 2

# Members of boto3's `put_object` response, and the headers they come from.
RESPONSE_HEADERS = {
    "ETag": "etag",
    "ChecksumSHA256": "x-amz-checksum-sha256",
    "ServerSideEncryption": "x-amz-server-side-encryption",
}


class ConditionFailed(Exception):
    """The store did not create the object because one exists or is being written, or because the upload was aborted."""


class TryAgain(ConditionFailed):
    """409: another request for the same key was under way. S3 wants the put repeated."""


# Of puts that only create.
REFUSED = {409: TryAgain, 412: ConditionFailed}


class Signer:
    """AWS Signature Version 4 of requests to one host whose body's SHA-256 is known, as botocore makes it. Thread-safe.

    botocore takes 0.15 ms of CPU a put, most of it for header objects; this takes 0.013 ms. The key is derived once a
    day and for each set of credentials. A test compares every header.
    """

    def __init__(self, credentials: Any, region: str, host: str) -> None:
        self._credentials = credentials
        self._region = region
        self._host = host
        self._derived: tuple[tuple[str, str], hmac.HMAC] | None = None

    def headers(
        self, method: str, path: str, sha256: str, more: Mapping[str, str], now: datetime | None = None
    ) -> dict[str, str]:
        """`more` with the headers that sign it. `path`: quoted, without a query. `more`: lower-case names; all are
        signed.
        """
        found = self._credentials.get_frozen_credentials()
        moment = f"{now or datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        scope = f"{moment[:8]}/{self._region}/s3/aws4_request"
        headers = {"host": self._host, "x-amz-content-sha256": sha256, "x-amz-date": moment, **more}
        if found.token:
            headers["x-amz-security-token"] = found.token
        names = sorted(headers)
        signed = ";".join(names)
        lines = "".join([f"{name}:{' '.join(headers[name].split())}\n" for name in names])
        canonical = hashlib.sha256(f"{method}\n{path}\n\n{lines}\n{signed}\n{sha256}".encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{canonical}"
        derived = self._derived
        if derived is None or derived[0] != (found.secret_key, moment[:8]):
            key = b"AWS4" + found.secret_key.encode()
            for word in scope.split("/"):
                key = hmac.digest(key, word.encode(), "sha256")
            self._derived = derived = (found.secret_key, moment[:8]), hmac.new(key, digestmod="sha256")
        mac = derived[1].copy()  # `hmac.digest` would let another thread take the interpreter
        mac.update(text.encode())
        signer = f"Credential={found.access_key}/{scope}, SignedHeaders={signed}"
        return {**headers, "authorization": f"AWS4-HMAC-SHA256 {signer}, Signature={mac.hexdigest()}"}


class SignedRequests:
    """Sends requests to one bucket. Thread-safe. Retries none. Raises UNEXPECTED and TOO_SLOW (http_connections)."""

    def __init__(self, client: Any, signer: Signer, connections: HttpConnections, base_path: str) -> None:
        self._signer = signer
        self._connections = connections
        self._base_path = base_path
        members = client.meta.service_model.operation_model("PutObject").input_shape.members
        self._header_names = {
            name: str(member.serialization["name"]).lower()
            for name, member in members.items()
            if member.serialization.get("location") == "header"
        }
        self._user_agent = client.meta.config.user_agent
        self._refusals = Counter[str]()  # in a row, by method

    @classmethod
    def for_client(cls, client: Any, credentials: Any, bucket: str) -> SignedRequests | None:
        """Requests to the URL that boto3 uses. None if boto3 signs with anything but Signature Version 4, or connects
        through a proxy, with a certificate of its own or without checking the store's.
        """
        sample = None if credentials is None else _request_of_boto3(client, bucket)
        if sample is None:
            return None
        signature = sample.headers.get("Authorization", "")
        scope = SCOPE.fullmatch(signature.decode() if isinstance(signature, bytes) else signature)
        if not scope or not sample.url.endswith("/k"):
            return None
        connections = _connections(client, sample.url)
        if connections is None:
            return None
        signer = Signer(credentials, scope["region"], connections.authority)
        return cls(client, signer, connections, urlsplit(sample.url).path[:-1])

    @property
    def is_refused(self) -> bool:
        """Whether the store keeps refusing our requests. One refusal may pass, for example expired credentials."""
        return max(self._refusals.values(), default=0) >= MAX_REFUSALS

    def is_missing(self, key: str) -> bool:
        """Whether there is no object under `key`."""
        answer = self._send("HEAD", key, {}, EMPTY_SHA256)
        if answer.status not in (200, 404):
            raise UnexpectedResponse(f"HTTP {answer.status}")
        return answer.status == 404

    def put(self, arguments: Mapping[str, Any], file: BinaryIO, *, sha256: str, size: int) -> dict[str, str]:
        """Put the whole file. Returns the store's response under boto3's names.

        `arguments`: those of `put_object`. Raises `ConditionFailed`. After any other error the object may or may not
        exist.
        """
        headers = {f"x-amz-meta-{name.lower()}": value for name, value in arguments["Metadata"].items()}
        headers |= {
            self._header_names[name]: arguments[name] for name in arguments.keys() - {"Bucket", "Key", "Metadata"}
        }
        answer = self._send("PUT", arguments["Key"], headers, sha256, file, size)
        if not 200 <= answer.status < 300:
            raise REFUSED.get(answer.status, UnexpectedResponse)(f"HTTP {answer.status}")
        return {name: answer.headers[header] for name, header in RESPONSE_HEADERS.items() if header in answer.headers}

    def _send(
        self,
        method: str,
        key: str,
        headers: Mapping[str, str],
        sha256: str,
        file: BinaryIO | None = None,
        size: int = 0,
    ) -> Response:
        path = self._base_path + quote(key, safe="/~")  # boto3's own quoting
        signed = self._signer.headers(method, path, sha256, headers)
        signed |= {"user-agent": self._user_agent} | ({"content-length": str(size)} if file else {})
        answer = self._connections.send(method, path, signed, (lambda: spool.blocks(file)) if file else None)
        self._refusals[method] = self._refusals[method] + 1 if answer.status in REFUSALS else 0
        return answer


def _connections(client: Any, url: str) -> HttpConnections | None:
    """Connections with the settings of boto3's own. None if these are more than timeouts and trusted roots."""
    session, config, place = client._endpoint.http_session, client.meta.config, urlsplit(url)
    if session._proxy_config.proxy_url_for(url) or session._cert_file or not session._verify or not place.hostname:
        return None
    try:
        roots = ssl.create_default_context(cafile=get_cert_path(session._verify)) if place.scheme == "https" else None
    except OSError:  # the file of roots cannot be read: boto3 names it
        return None
    return HttpConnections(
        place.hostname,
        place.port,
        roots,
        most=config.max_pool_connections,
        connect_seconds=config.connect_timeout,
        read_seconds=config.read_timeout,
    )


def _request_of_boto3(client: Any, bucket: str) -> Any:
    """boto3's signed HEAD request for the object `k`, without sending it; None if boto3 makes none.

    A presigned URL is no substitute: at AWS it names another host than requests do.
    """
    client.meta.events.register_first("before-send.s3", _intercept)
    try:
        client.head_object(Bucket=bucket, Key="k")
    except _Intercepted as intercepted:
        return intercepted.request if intercepted.request.method == "HEAD" else None
    except (boto_errors.ClientError, boto_errors.BotoCoreError):
        pass  # the next real request raises it again
    finally:
        client.meta.events.unregister("before-send.s3", _intercept)
    return None


class _Intercepted(Exception):
    """Ends a call of boto3 before the request is sent."""

    def __init__(self, request: Any) -> None:
        self.request = request


def _intercept(request: Any, **_: Any) -> None:
    raise _Intercepted(request)
