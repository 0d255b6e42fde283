"""PNG (W3C PNG, third edition): chunks with their CRC, IHDR first, IEND last."""

from __future__ import annotations

import struct
import zlib

from storage.errors import AssetDamaged
from storage.fetch.structure import Reader, Size, check_frames, sized

PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def walk_png(reader: Reader) -> Size:
    reader.take(8)
    kind, body = _png_chunk(reader)
    if kind != b"IHDR" or len(body) != 13:
        raise AssetDamaged("IHDR is not the first chunk")
    width, height, depth, colour = struct.unpack(">IIBB", body[:10])
    size = sized(width, height)
    if depth not in PNG_DEPTHS.get(colour, ()):
        raise AssetDamaged(f"colour type {colour} with {depth} bits does not exist")
    frames, has_data = 0, False
    while kind != b"IEND":
        kind, body = _png_chunk(reader)
        has_data = has_data or (kind == b"IDAT" and bool(body))
        frames += kind == b"fcTL"
        check_frames(max(frames, int.from_bytes(body[:4], "big") if kind == b"acTL" else 0))
    if not has_data or body:
        raise AssetDamaged("no picture data before IEND")
    return size


def _png_chunk(reader: Reader) -> tuple[bytes, bytes]:
    """One chunk with its CRC checked: (type, the first bytes of its data)."""
    length, kind = struct.unpack(">I4s", reader.take(8))
    if not kind.isalpha():
        raise AssetDamaged(f"no chunk at byte {reader.at - 8}")
    if length + 4 > reader.left:
        raise AssetDamaged(f"cut short inside {kind.decode('ascii')}")
    crc, first = zlib.crc32(kind), b""
    for block in reader.views(length):
        crc = zlib.crc32(block, crc)
        first = first or bytes(block[:32])
    if reader.take(4) != crc.to_bytes(4, "big"):
        raise AssetDamaged(f"wrong CRC in {kind.decode('ascii')}")
    return kind, first
