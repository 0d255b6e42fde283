"""RIFF (WebP: RFC 9649; WAV): one list of chunks."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from storage.errors import AssetDamaged
from storage.fetch.structure import NO_SIZE, Reader, Size, check_frames, sized


def _riff_chunks(reader: Reader) -> Iterator[tuple[bytes, bytes]]:
    """(type, first bytes) of every chunk up to the declared end of the list."""
    end = struct.unpack("<4xI4x", reader.take(12))[0] + 8
    if end == 0xFFFF_FFFF + 8:  # a WAV written to a pipe has no length
        end = reader.size
    if end > reader.size:
        raise AssetDamaged(f"cut short: {end - reader.size} bytes are missing at the end")
    while reader.at < end:
        kind, length = struct.unpack("<4sI", reader.take(8))
        length = reader.left if length == 0xFFFF_FFFF else length
        first = reader.take(min(length, 32))
        reader.skip(length - len(first))
        reader.skip(min(length & 1, max(0, end - reader.at)))
        if reader.at > end:
            raise AssetDamaged(f"the chunk that ends at byte {reader.at} continues after the end")
        yield kind, first


def walk_webp(reader: Reader) -> Size:
    size, frames = NO_SIZE, 0
    for kind, first in _riff_chunks(reader):
        read_size = WEBP_SIZES.get(kind)
        if read_size is not None and len(first) >= 10 - 5 * (kind == b"VP8L"):
            found = sized(*read_size(first))
            size = found if size is NO_SIZE else size
        frames += kind in (b"VP8 ", b"VP8L", b"ANMF")
        check_frames(frames)
    if size is NO_SIZE or not frames:
        raise AssetDamaged("no picture data")
    return size


def _vp8_size(first: bytes) -> tuple[int, int]:
    if first[3:6] != b"\x9d\x01\x2a":
        raise AssetDamaged("no key frame in VP8")
    width, height = struct.unpack("<HH", first[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _vp8l_size(first: bytes) -> tuple[int, int]:
    if first[0] != 0x2F:
        raise AssetDamaged("no signature in VP8L")
    bits = int.from_bytes(first[1:5], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _vp8x_size(first: bytes) -> tuple[int, int]:
    return int.from_bytes(first[4:7], "little") + 1, int.from_bytes(first[7:10], "little") + 1


WEBP_SIZES: dict[bytes, Callable[[bytes], tuple[int, int]]] = {
    b"VP8 ": _vp8_size,
    b"VP8L": _vp8l_size,
    b"VP8X": _vp8x_size,
}


def walk_wav(reader: Reader) -> Size:
    kinds = {kind for kind, _ in _riff_chunks(reader)}
    if not kinds >= {b"fmt ", b"data"}:
        raise AssetDamaged("no sound data")
    return NO_SIZE
