"""PNG (W3C PNG, third edition): chunks with their CRC, IHDR first, IEND last."""

from __future__ import annotations

import struct
import zlib

from storage.errors import AssetDamaged
from storage.fetch.structure import Reader, Size, check_frames, sized

PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


HEADER = struct.Struct(">I4s")
MAX_READ_BYTES = 32  # of a chunk's data: IHDR has 13, acTL 8


def walk_png(reader: Reader) -> Size:
    width, height, depth, colour = _header(reader)
    size = sized(width, height)
    if depth not in PNG_DEPTHS.get(colour, ()):
        raise AssetDamaged(f"colour type {colour} with {depth} bits does not exist")
    frames, data_bytes, kind = 0, 0, b""
    while kind != b"IEND":
        kind, length, body = _png_chunk(reader)
        if kind == b"IDAT":
            data_bytes += length
        elif kind in (b"acTL", b"fcTL"):
            frames += kind == b"fcTL"
            check_frames(max(frames, int.from_bytes(body[:4], "big") if kind == b"acTL" else 0))
    if not data_bytes or length:
        raise AssetDamaged("no picture data before IEND")
    return size


def png_header_size(reader: Reader) -> tuple[int, int]:
    """Width and height in the first chunk, whatever they are. Nothing behind it is read."""
    width, height, _, _ = _header(reader)
    return width, height


def _header(reader: Reader) -> tuple[int, int, int, int]:
    """Width, height, depth and colour type."""
    reader.take(8)
    kind, length, body = _png_chunk(reader)
    if kind != b"IHDR" or length != 13:
        raise AssetDamaged("IHDR is not the first chunk")
    width, height, depth, colour = struct.unpack(">IIBB", body[:10])
    return width, height, depth, colour


def _png_chunk(reader: Reader) -> tuple[bytes, int, bytes]:
    """One chunk with its CRC checked: type, length, and the first bytes of other data than the picture's. Encoders make
    hundreds of IDAT in a picture of 3 MB.
    """
    length, kind = HEADER.unpack(reader.take(8))
    if not kind.isalpha():
        raise AssetDamaged(f"no chunk at byte {reader.at - 8}")
    if length + 4 > reader.left:
        raise AssetDamaged(f"cut short inside {kind.decode('ascii')}")
    body = b"" if kind == b"IDAT" else reader.take(min(length, MAX_READ_BYTES))
    crc = reader.crc32(length - len(body), zlib.crc32(kind + body))
    if reader.take(4) != crc.to_bytes(4, "big"):
        raise AssetDamaged(f"wrong CRC in {kind.decode('ascii')}")
    return kind, length, body
