"""Bounds on what boto3 reads from a store or a queue, by a socket that counts bytes and waits.

botocore bounds each wait alone. http.client reads any number of `100 Continue`, and a body of a byte a second never
ends. The classes are urllib3's and botocore's; only their socket differs. Answers are read here, because botocore's
parser makes of XML entities 100 times their bytes, and of empty elements 40 times.
"""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import urllib3
from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.exceptions import HTTPClientError

from storage.bucket.http_connections import MIN_BYTES_PER_SECOND
from storage.http.connection import MAX_HEAD_BYTES

# A page of a listing has at most 1,000 keys of 1 kB, each byte as `%XX` at most, and 400 bytes of XML around each.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
# S3's errors are below 1 kB, and the pages of proxies below 20.
MAX_ERROR_BYTES = 64 * 1024
# 1,000 versions of objects have 22,000 tags.
MAX_TAGS = 200_000
# No answer of S3 has a document type, in which entities are declared.
DOCUMENT_TYPE = b"<!DOCTYPE"
# A redirect without a region leads to no store: to https, or to a log-in page. boto3 would ask for the region by a HEAD
# that is redirected too, for which it asks again: 110 requests, and a RecursionError.
REDIRECTS, REGION_HEADER = frozenset({301, 302, 303, 307, 308}), "x-amz-bucket-region"
PLACE = re.compile(r"(https?)://(?:[^/?#]*@)?([A-Za-z0-9.:\[\]-]{1,255})(?=[/?#]|\Z)")


class UnusableAnswer(HTTPClientError):  # type: ignore[misc]
    fmt = "the store's answer is no XML of S3"


class Redirected(HTTPClientError):  # type: ignore[misc]
    fmt = "redirected to {place}"


def member(answer: Mapping[str, Any], name: str) -> str:
    """What every answer of S3 to this request has. Raises `UnusableAnswer`."""
    if name not in answer:
        raise UnusableAnswer
    return str(answer[name])


def bound(client: Any) -> None:
    """Replace a boto3 client's connections by bounded ones, also those through a proxy, which shares the classes."""
    session = client._endpoint.http_session
    session._pool_classes_by_scheme.update(http=_HttpPool, https=_HttpsPool)
    session.send = partial(_send, session.send)


def _send(send: Callable[[Any], Any], request: Any) -> Any:
    """Send a request, and read an answer that will be parsed. Of an error that is no XML of S3 the status is left."""
    response = send(request)
    is_error = response.status_code >= 300
    if request.stream_output and not is_error:
        return response
    try:
        content = response.content
    except (urllib3.exceptions.HTTPError, OSError) as error:  # botocore does not translate those of a streamed answer
        raise HTTPClientError(error=error) from error
    if response.status_code in REDIRECTS and REGION_HEADER not in response.headers and b"<Error" not in content:
        to = PLACE.match(response.headers.get("location", ""))
        raise Redirected(place=f"{to[1]}://{to[2]}" if to else "another path")
    text = content.replace(b"\0", b"")  # which UTF-16 puts between the letters
    if DOCUMENT_TYPE in text or text.count(b"<") > MAX_TAGS:
        if not is_error:
            raise UnusableAnswer
        response._content = b""
    return response


class _Socket:
    """A connected socket whose reads may wait for `seconds`, and longer in proportion to the bytes received.

    A byte of the body adds 1/MIN_BYTES_PER_SECOND, up to `seconds`; a byte of the head adds nothing.
    """

    def __init__(self, connection: Any, seconds: float) -> None:
        self._connection = connection
        self.expect_head(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def makefile(self, mode: str, buffering: int = -1) -> io.RawIOBase | io.BufferedReader:
        raw = _File(self, self._connection.makefile(mode, 0))
        return raw if buffering == 0 else io.BufferedReader(raw)

    def expect_head(self, seconds: float) -> None:
        """Begin a response: all of its heads, including those of status 1xx."""
        self._seconds = self._seconds_left = seconds
        self._bytes_left, self._in_body = float(MAX_HEAD_BYTES), False

    def expect_body(self, max_bytes: float) -> None:
        self._seconds_left, self._bytes_left, self._in_body = self._seconds, max_bytes, True

    def read_into(self, buffer: Any, file: Any) -> int:
        if self._seconds_left <= 0:
            raise TimeoutError("the store sends too slowly")
        self._connection.settimeout(self._seconds_left)
        started = time.monotonic()
        count: int = file.readinto(buffer)
        paid = count / MIN_BYTES_PER_SECOND if self._in_body else 0.0
        self._seconds_left = min(self._seconds, self._seconds_left - (time.monotonic() - started) + paid)
        self._bytes_left -= count
        # botocore reads the lines after a 100 until an empty one, even after the end of the connection.
        if self._bytes_left < 0 or not (count or self._in_body):
            raise ConnectionAbortedError("the store's response is too long, or its head is incomplete")
        return count


class _File(io.RawIOBase):
    def __init__(self, connection: _Socket, file: Any) -> None:
        self._connection = connection
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._connection.read_into(buffer, self._file)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Bounded:
    """A connection that bounds each response. `timeout` is urllib3's, to connect and then to read."""

    sock: Any
    timeout: float

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self.sock = _Socket(self.sock, self.timeout)

    def request(self, method: str, url: str, *args: Any, **options: Any) -> None:
        if self.sock is not None:
            self.sock.expect_head(self.timeout)
        self._reads_object = method == "GET" and "?" not in url  # a listing has a query
        super().request(method, url, *args, **options)  # type: ignore[misc]

    def getresponse(self) -> Any:
        connection = self.sock  # None afterwards if the response ends the connection
        connection.expect_head(self.timeout)
        response = super().getresponse()  # type: ignore[misc]
        if response.status >= 300:
            connection.expect_body(MAX_ERROR_BYTES)
        else:
            connection.expect_body(math.inf if self._reads_object else MAX_ANSWER_BYTES)
        return response


class _HttpConnection(_Bounded, AWSHTTPConnection):  # type: ignore[misc]
    pass


class _HttpsConnection(_Bounded, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _HttpPool(AWSHTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HttpConnection


class _HttpsPool(AWSHTTPSConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HttpsConnection
