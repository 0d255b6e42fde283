"""Irregular responses that still bring the file, and files received in several parts; over loopback."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import re
import socket
from collections.abc import Callable, Iterator

import pytest

from storage.errors import FetchInterrupted
from storage.fetch.client import MAX_RESUMES
from tests.loopback import Script
from tests.storage.fetch.test_client import GZIPPED, FileHost, answer, fetch, fetcher, opened, part, png


@pytest.fixture
def host() -> Iterator[FileHost]:
    server = FileHost()
    yield server
    server.close()
    while opened:
        opened.pop().close()


JUNK = ("5 malformed header lines",)
ODD: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "206": (part(png(), 0, len(png())), ("answered 206 with the whole file",)),
    "utf-8": (answer(png(), "Content-Encoding: UTF-8"), ("Content-Encoding names no coding",)),
    "aws": (answer(png(), "Content-Encoding: aws-chunked"), ("Content-Encoding names no coding",)),
    "identity": (answer(png(), "Content-Encoding: Identity"), ()),
    "empty": (answer(png(), "Content-Encoding:"), ()),
    "gzip": (answer(GZIPPED, "Content-Encoding: x-gzip"), ("decoded from gzip",)),
    "gzip in chunks": (
        answer(b"".join(b"1\r\n%c\r\n" % byte for byte in GZIPPED) + b"0\r\n\r\n",
               "Content-Encoding: gzip", "Transfer-Encoding: chunked", length=None),
        ("decoded from gzip",),
    ),
    "gzip in members": (
        answer(b"".join(gzip.compress(png()[at : at + 9]) for at in range(0, len(png()), 9)), "Content-Encoding: gzip"),
        ("decoded from gzip",),
    ),
    "not gzip": (answer(png(), "Content-Encoding: gzip"), ("coded only according to Content-Encoding",)),
    "junk": (answer(png(), "this is no header", " nor this", "X Y: z", ": b", "Z: \0"), JUNK),
    "folded": (answer(png(), "X: a", " b"), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_irregularities_that_browsers_accept_are_noted(host: FileHost, name: str) -> None:
    host.scripts["/"], notes = ODD[name]
    client, sink = fetcher(host), io.BytesIO()
    fetched = client.fetch(host.url, sink)
    assert (fetched.notes, fetched.sha256, fetched.size) == (notes, hashlib.sha256(png()).hexdigest(), len(png()))
    assert (sink.read(), fetched.verified) == (png(), True)


# Broken connections

LARGE = png(random.Random(5).randbytes(400_000))
STRONG = ('ETag: "a"', "Accept-Ranges: bytes")
DATED = ("Last-Modified: Sun, 01 Nov 2026 00:00:00 GMT", "Date: Sun, 01 Nov 2026 00:00:09 GMT", "Accept-Ranges: bytes")


def breaking(*headers: str, at: float = 0.6, ranged: Callable[[int], bytes] | None = None, host: FileHost) -> Script:
    """Sends the share `at` of the requested bytes and hangs up. `ranged`: the response to a range request instead."""

    def script(connection: socket.socket) -> None:
        asked = re.search(r"Range: bytes=(\d+)-", host.heads[-1])
        start = int(asked[1]) if asked else 0
        if asked and ranged:
            connection.sendall(ranged(start))
            return
        rest = LARGE[start:]
        whole = part(rest, start, len(LARGE), *headers) if asked else answer(rest, *headers)
        sent = len(rest) if len(rest) < 20_000 else int(at * len(rest))
        connection.sendall(whole[: len(whole) - len(rest) + sent])

    return script


@pytest.mark.parametrize(("headers", "validator"), [(STRONG, '"a"'), (DATED, "Sun, 01 Nov 2026 00:00:00 GMT")])
def test_transfer_that_breaks_at_sixty_percent_is_resumed_to_its_end(
    host: FileHost, headers: tuple[str, ...], validator: str
) -> None:
    host.scripts["/"] = breaking(*headers, host=host)
    client, sink = fetcher(host), io.BytesIO()
    fetched = client.fetch(host.url, sink)
    assert (sink.read(), fetched.sha256) == (LARGE, hashlib.sha256(LARGE).hexdigest())
    assert fetched.notes == ("received in 5 parts",)
    assert fetched.headers["content-length"] == str(len(LARGE))
    assert [f"If-Range: {validator}" in head for head in host.heads] == [False, True, True, True, True]


NO_DATES = [f"Sun, 01 Nov {year} 00:00:00 GMT" for year in ("10000", "9" * 20)]


@pytest.mark.parametrize(
    "headers",
    [
        (),
        STRONG[:1],
        ('ETag: W/"a"', *DATED),
        DATED[1:],
        (DATED[0], DATED[2]),
        *((f"Last-Modified: {date}", *DATED[1:]) for date in NO_DATES),
        *((DATED[0], f"Date: {date}", DATED[2]) for date in NO_DATES),
    ],
)
def test_broken_transfer_without_ranges_is_not_resumed(host: FileHost, headers: tuple[str, ...]) -> None:
    host.scripts["/"] = breaking(*headers, host=host)
    with pytest.raises(FetchInterrupted, match="broke off"):
        fetch(host)
    assert len(host.heads) == 1


RANGED: dict[str, tuple[Callable[[int], bytes], str]] = {
    "another range": (
        lambda start: part(LARGE[start + 1 :], start + 1, len(LARGE), STRONG[0]),
        "206 with another part",
    ),
    "another total": (lambda start: part(LARGE[start:], start, len(LARGE) + 1, STRONG[0]), "206 with another part"),
    "another file": (lambda start: part(LARGE[start:], start, len(LARGE), 'ETag: "b"'), "206 with another part"),
    "any file": (lambda start: part(LARGE[start:], start, len(LARGE)), "206 with another part"),
    "no range": (lambda start: answer(LARGE[start:], STRONG[0], status="206 Partial Content"), "206 with another part"),
    "an error": (lambda start: answer(b"", status="416 Range Not Satisfiable"), "416"),
    "nothing": (lambda start: b"", "broke off"),
    "all of it, broken": (lambda start: answer(LARGE, *STRONG)[:-9], "broke off"),
}


@pytest.mark.parametrize("name", RANGED)
def test_response_that_does_not_continue_the_file_is_refused(host: FileHost, name: str) -> None:
    ranged, reason = RANGED[name]
    host.scripts["/"] = breaking(*STRONG, ranged=ranged, host=host)
    with pytest.raises(FetchInterrupted, match=reason):
        fetch(host)
    assert len(host.heads) == 2


def test_changed_file_replaces_the_received_part(host: FileHost) -> None:
    host.scripts["/"] = breaking(*STRONG, ranged=lambda start: answer(png(), 'ETag: "b"'), host=host)
    client, sink = fetcher(host), io.BytesIO()
    fetched = client.fetch(host.url, sink)
    assert (sink.read(), fetched.sha256, fetched.notes) == (png(), hashlib.sha256(png()).hexdigest(), ())
    assert fetched.headers["etag"] == '"b"'


def test_resumes_are_bounded(host: FileHost) -> None:
    host.scripts["/"] = breaking(*STRONG, at=0.01, host=host)
    with pytest.raises(FetchInterrupted, match="broke off"):
        fetch(host)
    assert len(host.heads) == MAX_RESUMES + 1
