"""ISO base media (ISO/IEC 14496-12): boxes; AVIF and HEIC keep sizes in `ispe`, MP4 and MOV in `tkhd`."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from storage.errors import AssetDamaged
from storage.fetch.structure import NO_SIZE, Reader, Size, sized

# Nesting of boxes: the track header of MP4 is at level 2, the picture size of AVIF at level 3.
MAX_DEPTH = 4
# Boxes that are opened, with the bytes before their first inner box. QuickTime's `meta` differs and is not opened.
STILL_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0}
MOVIE_CONTAINERS = {b"moov": 0, b"trak": 0}


TYPE = re.compile(rb"[ -~\xa9]{4}")
TEXT = re.compile(rb"[\t\n\r -~]{8}")


def _boxes(reader: Reader, end: int, containers: dict[bytes, int], depth: int = 0) -> Iterator[tuple[bytes, bytes]]:
    """Every box up to `end`, with `containers` opened: (type, the first bytes of its content).

    At the top level the first bytes that begin no box end the file and stay unread.
    """
    while reader.at < end:
        start = reader.at
        header = reader.take(8)
        length, kind = struct.unpack(">I4s", header)
        if length == 1:
            length = int.from_bytes(reader.take(8), "big")
        stop = end if length == 0 else start + length
        no_box = not TYPE.fullmatch(kind) or stop < reader.at or (stop > end and TEXT.fullmatch(header))
        if no_box and depth == 0:
            reader.rewind(reader.at - start)
            return
        if no_box:
            raise AssetDamaged(f"no box at byte {start}")
        if stop > end:
            raise AssetDamaged(f"cut short inside {kind.decode('latin-1')}")
        before = containers.get(kind)
        first = reader.take(min(stop - reader.at, 96 if before is None else before))
        yield kind, first
        if before is not None and depth < MAX_DEPTH:
            yield from _boxes(reader, stop, containers, depth + 1)
        reader.skip(stop - reader.at)


def walk_still_boxes(reader: Reader) -> Size:
    kinds: set[bytes] = set()
    sizes: list[Size] = []
    for kind, first in _boxes(reader, reader.size, STILL_CONTAINERS):
        kinds.add(kind)
        if kind == b"ispe" and len(first) >= 12:
            sizes.append(sized(*struct.unpack(">4xII", first[:12])))
    if not (kinds & {b"meta", b"moov"} and kinds & {b"mdat", b"idat"} and sizes):
        raise AssetDamaged("no picture data")
    return max(sizes, key=lambda size: (size.width or 0) * (size.height or 0))


def walk_movie_boxes(reader: Reader) -> Size:
    kinds: set[bytes] = set()
    size = NO_SIZE
    for kind, first in _boxes(reader, reader.size, MOVIE_CONTAINERS):
        kinds.add(kind)
        if kind == b"tkhd" and size is NO_SIZE:
            size = _track_size(first)
    if not kinds >= {b"moov", b"mdat"}:
        raise AssetDamaged("no moov or no mdat")
    if reader.left and b"moof" in kinds:  # a fragmented film has no marked end; fragments may be missing
        raise AssetDamaged(f"no box at byte {reader.at}")
    return size


def _track_size(first: bytes) -> Size:
    """The size in a track header: its last 8 bytes, 16.16 fixed point; 0 × 0 for sound."""
    length = 96 if first[:1] == b"\x01" else 84
    if len(first) < length:
        return NO_SIZE
    width, height = (part >> 16 for part in struct.unpack(">II", first[length - 8 : length]))
    return sized(width, height) if width and height else NO_SIZE
