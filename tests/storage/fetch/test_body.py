"""Irregular responses that still bring the file, and files received in several parts; over loopback."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from storage.errors import FetchInterrupted, FetchUnusable
from storage.fetch.client import MAX_RESUMES
from storage.spool import Spool, memory_of, spool
from tests.loopback import Script
from tests.storage.fetch.test_client import GZIPPED, FileHost, answer, fetch, fetcher, opened, part, png


@pytest.fixture
def host() -> Iterator[FileHost]:
    server = FileHost()
    yield server
    server.close()
    while opened:
        opened.pop().close()


# Memory with room for each body, with exactly the room of one, and with too little.
SINKS: dict[str, Callable[[Path], BinaryIO]] = {
    "file": lambda _: io.BytesIO(),
    "memory": lambda _: spool(None),
    "full": lambda place: spool(place, memory_bytes=len(LARGE)),
    "disk": lambda place: spool(place, memory_bytes=10),
}


@pytest.fixture(params=SINKS)
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BinaryIO]:
    with spool(None) as before:
        before.write(b"x" * 1_000)
    with SINKS[request.param](tmp_path) as file:
        yield file


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
def test_irregularities_that_browsers_accept_are_noted(host: FileHost, name: str, sink: BinaryIO) -> None:
    host.scripts["/"], notes = ODD[name]
    client = fetcher(host)
    fetched = client.fetch(host.url, sink)
    assert (fetched.notes, fetched.sha256, fetched.size) == (notes, hashlib.sha256(png()).hexdigest(), len(png()))
    assert (sink.read(), fetched.verified) == (png(), True)


@pytest.mark.parametrize("more", [b"", b"\0", b"x" * 600_000])
def test_length_is_exact_whatever_the_body_is_received_into(host: FileHost, sink: BinaryIO, more: bytes) -> None:
    host.scripts["/"] = answer(LARGE + more, length=len(LARGE))
    if more:
        with pytest.raises(FetchUnusable, match="more bytes than its Content-Length"):
            fetcher(host).fetch(host.url, sink)
    else:
        fetched = fetcher(host).fetch(host.url, sink)
        assert (sink.read(), fetched.size) == (LARGE, len(LARGE))


def test_body_that_fits_into_memory_is_not_copied(host: FileHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.scripts["/"] = answer(LARGE)
    monkeypatch.delattr(Spool, "write")
    with spool(None) as sink:
        fetcher(host).fetch(host.url, sink)
        assert memory_of(sink) == LARGE


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
    host: FileHost, headers: tuple[str, ...], validator: str, sink: BinaryIO
) -> None:
    host.scripts["/"] = breaking(*headers, host=host)
    client = fetcher(host)
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


def test_changed_file_replaces_the_received_part(host: FileHost, sink: BinaryIO) -> None:
    host.scripts["/"] = breaking(*STRONG, ranged=lambda start: answer(png(), 'ETag: "b"'), host=host)
    client = fetcher(host)
    fetched = client.fetch(host.url, sink)
    assert (sink.read(), fetched.sha256, fetched.notes) == (png(), hashlib.sha256(png()).hexdigest(), ())
    assert fetched.headers["etag"] == '"b"'


def test_resumes_are_bounded(host: FileHost) -> None:
    host.scripts["/"] = breaking(*STRONG, at=0.01, host=host)
    with pytest.raises(FetchInterrupted, match="broke off"):
        fetch(host)
    assert len(host.heads) == MAX_RESUMES + 1
