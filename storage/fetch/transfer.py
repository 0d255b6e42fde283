"""The body of a file: checks part, coding and length, hashes it and writes it.

It is received into the spool's memory, and into one buffer a thread if it does not fit there.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from storage.errors import FetchTooLarge, FetchUnusable
from storage.fetch import media_types
from storage.gzip_members import codings, without_codings
from storage.http.client import Block, Response, declared_length, in_few_pieces
from storage.http.connection import read_buffer
from storage.http_date import http_date
from storage.spool import spool_with_room

CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", re.I)


class Body:
    """One file, from one response, or from several if the connection breaks and the host supports ranges.

    `headers`: of the first response. `parts`: responses that it came from. `digest`: SHA-256 so far. `notes`: harmless
    irregularities.
    """

    def __init__(self, sink: BinaryIO, max_bytes: int) -> None:
        self._sink = sink
        self._max_bytes = max_bytes
        self.parts, self.size = 1, 0
        self._resumed_by: Mapping[str, str] = {}  # may hold a validator

    def _begin(self, headers: Mapping[str, str], total: int | None, *, is_resumable: bool) -> None:
        """Begin the file, or begin it again."""
        if self.size:
            self._sink.seek(0)
            self._sink.truncate()
        self.size, self._total = 0, total
        self.headers = headers
        self.notes: list[str] = []
        self.digest = hashlib.sha256()
        self._resumed_by = headers if is_resumable else {}

    @property
    def validator(self) -> str | None:
        """With which the rest of the file can be requested after a break; None: it cannot."""
        return _validator(self._resumed_by) if self.size else None

    def request_headers(self) -> dict[str, str]:
        """Headers that request the rest of the same file, or all of it if it has changed (RFC 9110 §13.1.5)."""
        validator = self.validator
        return {} if validator is None else {"Range": f"bytes={self.size}-", "If-Range": validator}

    def receive(self, response: Response) -> None:
        """Write one response's body into the sink.

        Raises `FetchUnusable`, `FetchTooLarge` and the errors of reading a block.
        """
        headers = response.headers
        declared, coded = response.length, bool(codings(headers.get("content-encoding", "")))
        if response.status == 206:
            self._begin_part(headers)
        else:  # After a break it is the whole file again, and this host's ranges are not used any more.
            self._begin(headers, declared, is_resumable=declared is not None and not coded and not self.size)
        if (self._total or 0) > self._max_bytes:
            raise FetchTooLarge(f"{self._total} bytes announced, {self._max_bytes} allowed")
        memory = None if "content-encoding" in headers else spool_with_room(self._sink, declared)
        blocks = response.blocks(read_buffer if memory is None else lambda: memory.free)
        if "content-encoding" in headers:
            blocks = _decoded(blocks, headers, self.notes)
        for block in in_few_pieces(blocks):
            self.size += len(block)
            if self.size > self._max_bytes:
                raise FetchTooLarge(f"more than the {self._max_bytes} bytes allowed")
            self.digest.update(block)
            if memory is None:
                self._sink.write(block)
            else:
                memory.keep(len(block))
        if not coded and self._total not in (None, self.size):
            raise FetchUnusable(f"received {self.size} of {self._total} announced bytes")
        if not response.finish():
            raise FetchUnusable("sent more bytes than its Content-Length says")
        if response.stream.junk_lines:
            self.notes.append(f"{response.stream.junk_lines} malformed header lines")
        if self.parts > 1:
            self.notes.append(f"received in {self.parts} parts")

    def _begin_part(self, headers: Mapping[str, str]) -> None:
        """Check that a 206 continues the file, or is the whole file."""
        part, validator = _part(headers), self.validator
        if validator is not None:
            # A host that ignores If-Range names no validator, or another one.
            same = validator in (headers.get("etag"), headers.get("last-modified"))
            if (
                part is None
                or part != (self.size, self._total)
                or not same
                or codings(headers.get("content-encoding", ""))
            ):
                raise FetchUnusable("answered 206 with another part than requested")
            self.parts += 1
            return
        if part is None or part[0] != 0:
            raise FetchUnusable("answered 206 with a part that was not requested")
        self._begin(headers, part[1], is_resumable=False)
        self.notes.append("answered 206 with the whole file")


def _part(headers: Mapping[str, str]) -> tuple[int, int] | None:
    """(first byte, size of the whole file) if the part reaches the file's end, else None."""
    found = CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
    first, last, total = (int(number) for number in found.groups()) if found else (0, 0, 0)
    if found is None or last != total - 1 or first > last or declared_length(headers) not in (None, total - first):
        return None
    return first, total


def _validator(headers: Mapping[str, str]) -> str | None:
    """The validator for resuming, if the host supports ranges: a strong ETag, or a Last-Modified at least one second
    before the Date (RFC 9110 §8.8.2.2)."""
    if headers.get("accept-ranges", "").strip().lower() != "bytes":
        return None
    etag = headers.get("etag", "")
    if etag.startswith('"') and etag.isascii():
        return etag
    modified, date = (http_date(headers.get(name, "")) for name in ("last-modified", "date"))
    if etag or modified is None or date is None:
        return None
    return headers["last-modified"] if date - modified >= 1 else None


def _decoded(blocks: Iterator[Block], headers: Mapping[str, str], notes: list[str]) -> Iterator[Block]:
    """The body without its content coding, although none was requested.

    gzip is decoded. A body that begins as a picture is taken as not coded, whatever the header says. After a wrong
    guess the file fails `media_types.inspect`.
    """
    content_encoding = headers.get("content-encoding", "").strip().lower()
    if content_encoding in ("", "identity"):
        yield from blocks
        return
    is_coded, head = bool(codings(content_encoding)), b""
    while is_coded and len(head) < media_types.HEAD_BYTES and (block := next(blocks, b"")):
        head += block
    blocks = itertools.chain([head], blocks)
    if not is_coded:
        notes.append("Content-Encoding names no coding")
        yield from blocks
    elif media_types.sniff(head):
        notes.append("coded only according to Content-Encoding")
        yield from blocks
    else:
        content = without_codings(blocks, content_encoding)
        notes.append("decoded from gzip")
        yield from content
