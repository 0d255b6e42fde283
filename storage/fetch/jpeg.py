"""JPEG (ITU T.81): segments, and entropy-coded data between SOS and the next marker."""

from __future__ import annotations

import re
import struct

from storage.errors import AssetDamaged
from storage.fetch.structure import BLOCK_BYTES, NO_SIZE, Reader, Size, sized

JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
CODED_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in coded data FF00 is a byte and FFD0 to FFD7 restarts
SEGMENT_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")  # between segments FF01 and FFD0 to FFD7 stand alone
# libjpeg, and so every browser, skips stray bytes between segments: a length that is wrong by a few bytes, padding to a
# memory page. More means that data is missing.
MAX_STRAY_BYTES = 4_096
# First read of coded data after a scan's header; each further read is twice as long.
FIRST_READ_BYTES = 4_096


def walk_jpeg(reader: Reader) -> Size:
    reader.take(2)
    size, scans = NO_SIZE, 0
    marker = _marker(reader)
    while marker != 0xD9:
        length = _length(reader, marker)
        if marker in JPEG_FRAMES:
            height, width = struct.unpack(">xHH", reader.take(5))
            size, length = sized(width, height), length - 5
        reader.skip(length - 2)
        scans += marker == 0xDA
        marker = _marker_after_scan(reader) if marker == 0xDA else _marker(reader)
    if not scans or size is NO_SIZE:
        raise AssetDamaged("no picture data before EOI")
    return size


def jpeg_header_size(reader: Reader) -> tuple[int, int]:
    """Width and height of the first frame header, whatever they are. Nothing behind it is read."""
    reader.take(2)
    while (marker := _marker(reader)) not in JPEG_FRAMES:
        reader.skip(_length(reader, marker) - 2)
    height, width = struct.unpack(">3xHH", reader.take(7))
    return width, height


def _length(reader: Reader, marker: int) -> int:
    """The length of the segment behind this marker, with its own two bytes."""
    length = int.from_bytes(reader.take(2), "big")
    if length < 2 or marker < 0xC0 or marker == 0xD8:
        raise AssetDamaged(f"no segment at byte {reader.at - 4}")
    return length


def _marker(reader: Reader) -> int:
    """The next segment's marker, after any fill bytes (FF) and a few stray bytes."""
    start = reader.at
    block = reader.take(2)
    if not SEGMENT_MARKER.match(block):
        reader.rewind(2)
        block = reader.take(min(reader.left, MAX_STRAY_BYTES + 2))
    found = SEGMENT_MARKER.search(block)
    if not found:
        raise AssetDamaged(f"no marker at byte {start}")
    if block[: found.start()].strip(b"\xff"):
        reader.note("stray bytes between segments")
    reader.rewind(len(block) - found.end())
    return block[found.end() - 1]


def _marker_after_scan(reader: Reader) -> int:
    """Skip coded data up to the next marker. A block's last byte is read again: it may be the marker's first half."""
    size = FIRST_READ_BYTES
    while reader.left:
        block = reader.take(min(reader.left, size))
        size = min(2 * size, BLOCK_BYTES)
        found = CODED_MARKER.search(block)
        if found:
            reader.rewind(len(block) - found.end())
            return block[found.end() - 1]
        if reader.left and block.endswith(b"\xff"):
            reader.rewind(1)
    raise AssetDamaged("cut short: no EOI")
