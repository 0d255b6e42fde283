"""Checks that a file is whole, by lengths and markers only. Nothing is decoded, so decompression bombs are harmless.

Each format has a walk function. It reads forward in constant memory and leaves its reader at the end of the picture. It
returns the picture's size and raises `AssetDamaged` if the file ends early, contradicts itself or declares absurd
dimensions. `storage.fetch.foreign` checks the bytes after the end.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from storage.errors import AssetDamaged
from storage.spool import memory_of

try:
    from isal.isal_zlib import crc32  # 0.05 ms for 3 MB, zlib's takes 0.69
except ImportError:  # not a dependency on this platform
    from zlib import crc32

BLOCK_BYTES = 256 * 1024
# Pillow refuses to open larger pictures by default (twice 89,478,485 pixels).
MAX_PIXELS = 178_956_970
# JPEG's own limit, the largest of the formats with one.
MAX_SIDE = 65_535
# An animation of 40 s at 25 frames a second.
MAX_FRAMES = 1_000
# Bound on pieces (reads of a chunk, segment, box or sub-block): FREE_PIECES plus one per BYTES_PER_PIECE bytes. The
# smallest pieces that real encoders fill are GIF's sub-blocks of 255 bytes; an animation of MAX_FRAMES tiny frames has
# 10,000. Without the bound a JPEG of 590,000 empty segments (2.4 MB) took 5 s of CPU.
FREE_PIECES = 16_384
BYTES_PER_PIECE = 192


class Size(NamedTuple):
    width: int | None
    height: int | None


NO_SIZE = Size(None, None)


class Reader:
    """Reads a file forward, never past its end, and counts the pieces."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._memory = memory_of(file)
        self.size = file.seek(0, io.SEEK_END)
        self.at = file.seek(0)
        self.notes: list[str] = []
        self._pieces_left = FREE_PIECES + self.size // BYTES_PER_PIECE

    @property
    def left(self) -> int:
        return self.size - self.at

    def note(self, text: str) -> None:
        """Note a harmless irregularity. Each text is noted once."""
        if text not in self.notes:
            self.notes.append(text)

    def take(self, count: int) -> bytes:
        """The next `count` bytes (small: headers); one piece."""
        self._pieces_left -= 1
        if self._pieces_left < 0:
            raise AssetDamaged("it consists of too many pieces")
        data = self._file.read(count) if self._memory is None else bytes(self._memory[self.at : self.at + count])
        self.at += len(data)
        if len(data) < count:
            raise AssetDamaged(f"cut short at byte {self.at}")
        return data

    def skip(self, count: int) -> None:
        if count < 0:
            raise AssetDamaged(f"a length before byte {self.at} is too small")
        if count > self.left:
            raise AssetDamaged(f"cut short: {count - self.left} bytes are missing at the end")
        self._move(count)

    def rewind(self, count: int) -> None:
        self._move(-count)

    def _move(self, count: int) -> None:
        self.at += count
        if self._memory is None:
            self._file.seek(self.at)

    def crc32(self, count: int, before: int) -> int:
        """The CRC-32 of the next `count` bytes, after that of the bytes `before` them; without a copy of a file in
        memory.
        """
        if self._memory is not None and count <= self.left:
            self.at += count
            return crc32(self._memory[self.at - count : self.at], before)
        for block in self.blocks(count):
            before = crc32(block, before)
        return before

    def blocks(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes in blocks."""
        while count > 0:
            block = self.take(min(count, BLOCK_BYTES))
            count -= len(block)
            yield block


def sized(width: int, height: int) -> Size:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise AssetDamaged(f"{width} × {height} pixels is not a picture size")
    check_pixels(width, height)
    return Size(width, height)


def check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise AssetDamaged(f"{width} × {height} pixels, more than {MAX_PIXELS} allowed")


def check_frames(frames: int) -> None:
    if frames > MAX_FRAMES:
        raise AssetDamaged(f"more than {MAX_FRAMES} frames")
