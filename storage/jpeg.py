"""JPEG (ITU T.81): segments, and entropy-coded data between SOS and the next marker."""

from __future__ import annotations

import re
import struct

from storage.errors import AssetDamaged
from storage.structure import BLOCK_BYTES, NO_SIZE, Reader, Size, sized

JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in coded data FF00 is a byte and FFD0 to FFD7 restarts


def walk_jpeg(reader: Reader) -> Size:
    reader.take(2)
    size, scans = NO_SIZE, 0
    marker = _jpeg_marker(reader)
    while marker != 0xD9:
        length = int.from_bytes(reader.take(2), "big")
        if length < 2 or marker < 0xC0 or 0xD0 <= marker <= 0xD8:
            raise AssetDamaged(f"no segment at byte {reader.at - 4}")
        if marker in JPEG_FRAMES:
            height, width = struct.unpack(">xHH", reader.take(5))
            size, length = sized(width, height), length - 5
        reader.skip(length - 2)
        scans += marker == 0xDA
        marker = _jpeg_after_scan(reader) if marker == 0xDA else _jpeg_marker(reader)
    if not scans or size is NO_SIZE:
        raise AssetDamaged("no picture data before EOI")
    reader.end()
    return size


def _jpeg_marker(reader: Reader) -> int:
    if reader.take(1) != b"\xff":
        raise AssetDamaged(f"no marker at byte {reader.at - 1}")
    while (marker := reader.take(1)[0]) == 0xFF:
        pass
    return marker


def _jpeg_after_scan(reader: Reader) -> int:
    """Skip coded data up to the next marker. A block's last byte is read again: it may be the marker's first half."""
    while reader.left:
        block = reader.take(min(reader.left, BLOCK_BYTES))
        found = JPEG_MARKER.search(block)
        if found:
            reader.rewind(len(block) - found.end())
            return block[found.end() - 1]
        if reader.left and block.endswith(b"\xff"):
            reader.rewind(1)
    raise AssetDamaged("cut short: no EOI")
