"""The JSON of a create, up to 130 MB of pictures in Base64. Its structure is bounded before it is parsed.

Parsed directly, 130 MB of `[[],[],…` took 4.8 GB and held the interpreter for 10 s. So long texts are taken out first,
each is decoded by itself, and the parser gets at most a mebibyte. A body of 64 KiB or more is checked while it arrives,
so that one beyond the limits is refused before the rest is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from receiver.gateway.answers import Refused

Buffer = bytes | bytearray

# An honest create has under 200 brackets, commas and colons outside its texts: 12 fields, 10 inputs.
MAX_TOKENS = 1_000
# Escaped quotes inside texts. A prompt of 2,500 characters may consist of them.
MAX_QUOTES = 20_000
MAX_BACKSLASHES_IN_A_ROW = 8_192
# Texts from this length on are taken out. Everything else has to fit into a mebibyte.
LONG_BYTES = 64 * 1024
MAX_REST_BYTES = 2**20
# KLING §2: a picture has up to 10 MB, 14.0 in Base64, 15.9 where PHP or .NET escapes `/` or `+` and MIME breaks lines.
MAX_TEXT_BYTES = 16 * 2**20
# An escape takes the parser 90 ns, fifty times as long as a plain character. Chinese in escapes (`\u751f`) has a sixth.
LONG_BYTES_AN_ESCAPE = 5
# A body is checked in pieces of this size while it arrives. A shorter one is checked once it is complete.
PIECE_BYTES = 64 * 1024
GZIP = b"\x1f\x8b"
TOO_MANY_TOKENS = f"more than {MAX_TOKENS} brackets, commas and colons"
TOO_MANY_QUOTES = f"more than {MAX_QUOTES} quotes"
TOO_LONG_REST = f"more than {MAX_REST_BYTES} bytes beside its long texts"
STRUCTURE = (b"{", b"[", b",", b":")


def read_fields(body: Buffer) -> dict[str, Any]:
    """The JSON object in `body`. Needs about the size of `body` in memory, whatever it contains. Raises `Refused`."""
    _check_plain(body)
    rest, long_texts = _without_long_texts(body)
    try:
        # Each `NaN` stands for the next long text; `_without_long_texts` refuses any other.
        document = json.loads(
            rest.decode("utf-8-sig"),
            parse_float=_float,
            parse_constant=lambda _: json.loads(body[slice(*next(long_texts))].decode()),
        )
    except (ValueError, RecursionError):
        raise not_json() from None
    if not isinstance(document, dict):
        raise Refused(400, 1200, "Request body must be a JSON object")
    return document


class ArrivingBody:
    """Checks the structure of a body in the event loop while it arrives. A piece of a picture takes it 0.03 ms, and any
    other at most 0.7.

    Refuses only what `read_fields` refuses in the end, with the same status and code. Of several faults it names the
    first that arrived. `piece_bytes`: 2 or more.
    """

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        self._piece_bytes = piece_bytes
        self._checked = self._tokens = self._quotes = self._escaped_quotes = self._rest_bytes = 0

    def check(self, body: bytearray) -> None:
        """Check the pieces of `body` that are new since the last call. Raises `Refused`."""
        _check_plain(body)
        while len(body) - self._checked >= self._piece_bytes:
            piece = bytes(memoryview(body)[self._checked : self._checked + self._piece_bytes])
            if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # an escape belongs to one piece
                piece = piece[:-1]
            self._checked += len(piece)
            self._check_piece(piece)

    def _check_piece(self, piece: bytes) -> None:
        is_in_text = self._quotes % 2
        if is_in_text and b'"' not in piece:  # of a picture: two searches instead of four passes
            return
        # Outside texts a backslash is no JSON. So whatever this removes there, the body is refused in the end.
        unpaired = piece.replace(b"\\\\", b"")
        piece = unpaired.replace(b'\\"', b"")
        self._escaped_quotes += (len(unpaired) - len(piece)) // 2
        self._quotes += piece.count(b'"')
        # MAX_TOKENS allow a tenth as many texts.
        if max(self._quotes, self._escaped_quotes) > MAX_QUOTES:
            raise _too_much(TOO_MANY_QUOTES)
        outside = b"".join(piece.split(b'"')[is_in_text::2])
        self._tokens += _count_structure(outside, 0, len(outside))
        self._rest_bytes += len(outside)
        if self._tokens > MAX_TOKENS:
            raise _too_much(TOO_MANY_TOKENS)
        if self._rest_bytes > MAX_REST_BYTES:
            raise _too_much(TOO_LONG_REST)


def _check_plain(body: Buffer) -> None:
    if body.startswith(GZIP):
        raise Refused(400, 1200, "Request body is compressed (gzip): send it as plain JSON")


def not_json() -> Refused:
    return Refused(400, 1200, "Request body is not valid JSON")


def _too_much(what: str) -> Refused:
    return Refused(400, 1200, f"Request body: {what}")


def _without_long_texts(body: Buffer) -> tuple[bytearray, Iterator[tuple[int, int]]]:
    """`body` with `NaN` in place of each long text, and the positions of those texts. Raises `Refused`."""
    rest, long_texts, tokens, done = bytearray(), [], 0, 0
    for start, end in _texts(body):
        _take(rest, body, done, start)
        tokens += _count_structure(body, done, start)
        if end - start > LONG_BYTES:
            _check_long(body, start, end)
            long_texts.append((start, end))
            rest += b"NaN"
        else:
            _take(rest, body, start, end)
        done = end
        if tokens > MAX_TOKENS:
            break
    else:
        _take(rest, body, done, len(body))
        tokens += _count_structure(body, done, len(body))
    if tokens > MAX_TOKENS:
        raise _too_much(TOO_MANY_TOKENS)
    return rest, iter(long_texts)


def _check_long(body: Buffer, start: int, end: int) -> None:
    if end - start > MAX_TEXT_BYTES:
        raise _too_much(f"a text is longer than {MAX_TEXT_BYTES} bytes")
    if body.count(b"\\", start, end) * LONG_BYTES_AN_ESCAPE > end - start:
        raise _too_much("a long text has too many escapes")


def _take(rest: bytearray, body: Buffer, start: int, end: int) -> None:
    if len(rest) + end - start > MAX_REST_BYTES:
        raise _too_much(TOO_LONG_REST)
    rest += body[start:end]


def _count_structure(body: Buffer, start: int, end: int) -> int:
    """Bound brackets, commas and colons. Also refuses the parser's NaN and Infinity, which are no JSON: no other word
    outside a text contains N or I.
    """
    if body.find(b"N", start, end) >= 0 or body.find(b"I", start, end) >= 0:
        raise not_json()
    return sum(body.count(token, start, end) for token in STRUCTURE)


def _texts(body: Buffer) -> Iterator[tuple[int, int]]:
    """Start and end of each text, with its quotes. Takes one step for each quote, none for other bytes."""
    start = body.find(b'"')
    quotes = 1
    while start >= 0:
        end = body.find(b'"', start + 1)
        while end >= 0 and _is_escaped(body, start + 1, end):
            end = body.find(b'"', end + 1)
            quotes += 1
            if quotes > MAX_QUOTES:
                raise _too_much(TOO_MANY_QUOTES)
        if end < 0:
            raise not_json()
        yield start, end + 1
        start = body.find(b'"', end + 1)
        quotes += 2


def _is_escaped(body: Buffer, start: int, quote: int) -> bool:
    """Whether an odd number of backslashes precedes the quote."""
    if body[quote - 1 : quote] != b"\\":
        return False
    before = body[max(start, quote - MAX_BACKSLASHES_IN_A_ROW) : quote]
    backslashes = len(before) - len(before.rstrip(b"\\"))
    if backslashes == MAX_BACKSLASHES_IN_A_ROW:
        raise _too_much(f"{MAX_BACKSLASHES_IN_A_ROW} backslashes in a row")
    return backslashes % 2 == 1


def _float(digits: str) -> float | int:
    """A float that equals a whole number as that number: 5.0 is 5, because JSON has one kind of number."""
    number = float(digits)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
