"""Recognises pages, archives and programs, as a whole file or after the end of a picture.

Cameras, phones and generators append a second picture (MPF, gain maps), a film, maker records, provenance or padding.
These are harmless and kept. Refused are appended bytes that make the file something else for another program: ZIP and
PDF readers start from the end, RAR and 7z readers search for their signature, PHP and HTML interpreters run code found
anywhere, and programs are smuggled past checks this way.
"""

from __future__ import annotations

import re

from storage.fetch.structure import Reader

# Text before the first element. All quantifiers are possessive, so that hostile text causes no backtracking.
PROLOGUE = re.compile(rb"(?:\s++|(?><!--.*?-->)|(?><\?.*?\?>)|(?><!doctype\s+svg[^>]*+>))*+", re.I | re.S)
MARKUP = (
    ("svg", re.compile(rb"<svg\b", re.I)),
    ("html", re.compile(rb"<(!doctype\s+html|html|head|body|script|style|title|meta|center|h1|p|div)\b", re.I)),
    ("xml", re.compile(rb"<[!?]?[a-z]", re.I)),
    ("json", re.compile(rb'\{\s*+["}]|\[\s*+[\[{"\]\d-]')),
)
SIGNATURES = (
    ("a zip archive", (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")),
    ("a gzip archive", (b"\x1f\x8b",)),
    ("an archive", (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"MSCF")),
    (
        "an executable",
        (b"\x7fELF", b"MZ", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"#!", b"\0asm"),
    ),
    ("a pdf", (b"%PDF",)),
)
TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]++\Z")
# Searched for anywhere after the end of a picture, so each is long enough not to occur by chance in compressed data:
# five bytes occur once in a million tails of 1 MB. Markup is compared in lower case.
HIDDEN = (
    ("a zip archive", (b"PK\x05\x06\0\0\0\0", b"PK\x03\x04\x14\0", b"PK\x03\x04\x0a\0", b"PK\x03\x04\x2d\0")),
    ("an archive", (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\xfd7zXZ\0", b"1AY&SY", b"ustar\0", b"ustar  ")),
    ("an executable", (b"\x7fELF\x01\x01\x01", b"\x7fELF\x02\x01\x01", b"\0asm\x01\0\0\0")),
    ("an executable", (b"\xcf\xfa\xed\xfe\x07\0\0\x01", b"\xcf\xfa\xed\xfe\x0c\0\0\x01", b"cannot be run in DOS mode")),
    ("a pdf", (b"%PDF-",)),
)
HIDDEN_MARKUP = (b"<!doctype", b"<html", b"<script", b"<svg ", b"<svg>", b"<svg\n", b"<?php")
# Bytes kept of each block, for a signature across two blocks. No signature is longer.
LONGEST = 32
# Padding before an appended record: zeros, FF, blank lines.
PADDING = b"\0\xff\t\n\r "


def looks_like(head: bytes) -> str:
    """Names the kind of a file that begins with `head` and is no asset."""
    name = _signature(head)
    if name:
        return name
    if head[257:262] == b"ustar":
        return "an archive"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16"
    text = head.removeprefix(b"\xef\xbb\xbf")
    prologue = PROLOGUE.match(text)
    element = text[prologue.end() :] if prologue else text
    for name, pattern in MARKUP:
        if pattern.match(element):
            return name
    if text.lstrip()[:5].lower() == b"<?xml":
        return "xml"
    return "text" if TEXT.match(text) else f"something unknown (first bytes {head[:8].hex(' ')})"


def hidden_in(rest: Reader) -> str | None:
    """The kind of unwanted content in the bytes after a picture; None = none found."""
    before, padding = b"", True
    for block in rest.blocks(rest.left):
        found = _signature(block.lstrip(PADDING)) if padding else None
        found = found or _hidden(before + block)
        if found:
            return found
        padding = padding and not block.strip(PADDING)
        before = block[-LONGEST:]
    return None


def _signature(head: bytes) -> str | None:
    return next((name for name, signatures in SIGNATURES if head.startswith(signatures)), None)


def _hidden(text: bytes) -> str | None:
    for name, signatures in HIDDEN:
        if any(signature in text for signature in signatures):
            return name
    small = text.lower() if b"<" in text else b""
    return "markup" if any(tag in small for tag in HIDDEN_MARKUP) else None
