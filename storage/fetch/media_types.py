"""The type of a file from its own bytes, never from its name or from headers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from storage.errors import AssetDamaged, NotAnAsset
from storage.fetch import foreign, gif, iso_media, jpeg, mp3, png, riff, webm
from storage.fetch.structure import Reader, Size

# Enough for every signature below and to recognise an error page.
HEAD_BYTES = 1_024


@dataclass(frozen=True)
class Media:
    """`width`, `height` in pixels, None for sound and if unknown. `verified`: the structure is whole.

    `trailing_bytes`: bytes after the end of the content. `notes`: harmless irregularities.
    """

    media_type: str
    extension: str
    width: int | None
    height: int | None
    verified: bool
    trailing_bytes: int = 0
    notes: tuple[str, ...] = ()


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


# The beginnings of files that are told apart by a few fixed bytes.
SIGNATURES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), ("image/png", "png")),
    (re.compile(rb"\xff\xd8\xff"), ("image/jpeg", "jpg")),
    (re.compile(rb"GIF8[79]a"), ("image/gif", "gif")),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), ("image/webp", "webp")),
    (re.compile(rb"RIFF.{4}WAVE", re.DOTALL), ("audio/wav", "wav")),
    (re.compile(rb"\x1a\x45\xdf\xa3.{,53}\x42\x82\x84webm", re.DOTALL), ("video/webm", "webm")),
)


def sniff(head: bytes) -> tuple[str, str] | None:
    """(media type, extension) from the first HEAD_BYTES of a file; None for a type that is not archived."""
    for signature, found in SIGNATURES:
        if signature.match(head):
            return found
    if head[4:8] == b"ftyp":
        return _sniff_boxes(head)
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


def inspect(file: BinaryIO, *, accept_unverified: bool = False) -> Media:
    """Check `file` from beginning to end and describe it.

    Memory is constant, and time is linear in the size (BYTES_PER_PIECE). Raises `NotAnAsset`, which names the kind of
    file, and `AssetDamaged` if a file of a known format is cut short, contradicts itself, has a page, an archive or a
    program after its end, or exceeds MAX_PIXELS or MAX_FRAMES. `accept_unverified`: describe such a file by its type
    alone, with `verified` False.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if not head:
        raise NotAnAsset("the file is empty")
    sniffed = sniff(head)
    if sniffed is None:
        raise NotAnAsset(f"looks like {foreign.looks_like(head)}")
    media_type, extension = sniffed
    reader = Reader(file)
    try:
        size = WALKS[extension](reader)
        trailing_bytes = reader.left
        if trailing_bytes and (hidden := foreign.hidden_in(reader)):
            raise AssetDamaged(f"{trailing_bytes} bytes after the end hold {hidden}")
    except AssetDamaged as error:
        if accept_unverified:
            return Media(media_type, extension, None, None, verified=False)
        raise AssetDamaged(f"{extension}: {error}") from None
    return Media(media_type, extension, *size, True, trailing_bytes, tuple(reader.notes))
