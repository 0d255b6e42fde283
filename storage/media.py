"""What a file is, by its own bytes: never by its name or by what the sender says of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from storage import gif, iso_media, jpeg, mp3, png, riff, webm
from storage.errors import AssetDamaged, NotAnAsset
from storage.structure import Reader, Size

# Enough for every signature below and for the text of an error page to show itself.
HEAD_BYTES = 1_024


@dataclass(frozen=True)
class Media:
    """`width`, `height` in pixels, None for sound and where the file does not say. `verified`: found whole."""

    media_type: str
    extension: str
    width: int | None
    height: int | None
    verified: bool


WALKS: dict[str, Callable[[Reader], Size]] = {
    "png": png.walk_png,
    "jpg": jpeg.walk_jpeg,
    "webp": riff.walk_webp,
    "gif": gif.walk_gif,
    "avif": iso_media.walk_still_boxes,
    "heic": iso_media.walk_still_boxes,
    "mp4": iso_media.walk_movie_boxes,
    "mov": iso_media.walk_movie_boxes,
    "webm": webm.walk_webm,
    "mp3": mp3.walk_mp3,
    "wav": riff.walk_wav,
}
AVIF_BRANDS = frozenset({b"avif", b"avis"})
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
MP4_BRANDS = frozenset(
    {b"isom", b"mp41", b"mp42", b"avc1", b"dash", b"mmp4", b"MSNV", b"M4V ", b"M4VH", b"M4VP", b"f4v ", b"cmfc"}
    | {b"iso%d" % n for n in range(2, 10)}
    | {b"3gp%d" % n for n in range(4, 8)}
)


def sniff(head: bytes) -> tuple[str, str] | None:
    """(media type, extension) by the first HEAD_BYTES of a file; None when it is nothing we keep."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png", "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg", "jpg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif", "gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp", "webp"
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "audio/wav", "wav"
    if head[4:8] == b"ftyp":
        return _sniff_boxes(head)
    if head.startswith(b"\x1a\x45\xdf\xa3") and b"\x42\x82\x84webm" in head[:64]:
        return "video/webm", "webm"
    if head.startswith(b"ID3") or mp3.frame_bytes(head[:4]):
        return "audio/mpeg", "mp3"
    return None


def _sniff_boxes(head: bytes) -> tuple[str, str] | None:
    size = min(int.from_bytes(head[:4], "big"), 256)
    compatible = {head[at : at + 4] for at in range(16, size - 3, 4)}
    for brands in ({head[8:12]}, compatible):
        if brands & AVIF_BRANDS:
            return "image/avif", "avif"
        if brands & HEIC_BRANDS and not compatible & AVIF_BRANDS:
            return "image/heic", "heic"
        if b"qt  " in brands:
            return "video/quicktime", "mov"
        if brands & MP4_BRANDS:
            return "video/mp4", "mp4"
    return None


# What may stand before the first element. Possessive throughout: hostile text must not make a regex backtrack.
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


def _looks_like(head: bytes) -> str:
    for name, signatures in SIGNATURES:
        if head.startswith(signatures):
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


def inspect(file: BinaryIO) -> Media:
    """Walk `file` from beginning to end and say what it is.

    Memory is constant and time bounded (MAX_PIECES). Raises `NotAnAsset` naming what it looks like, and
    `AssetDamaged` when a file of a known format is cut short, contradicts itself, goes on after its end or is
    larger than MAX_PIXELS or longer than MAX_FRAMES.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if not head:
        raise NotAnAsset("the file is empty")
    sniffed = sniff(head)
    if sniffed is None:
        raise NotAnAsset(f"looks like {_looks_like(head)}")
    media_type, extension = sniffed
    reader = Reader(file)
    try:
        size = WALKS[extension](reader)
    except AssetDamaged as error:
        raise AssetDamaged(f"{extension}: {error}") from None
    return Media(media_type, extension, size.width, size.height, verified=True)
