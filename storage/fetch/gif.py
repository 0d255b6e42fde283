"""GIF (CompuServe, 1990): blocks of sub-blocks up to the trailer."""

from __future__ import annotations

import struct

from storage.errors import AssetDamaged
from storage.fetch.structure import Reader, Size, check_frames, check_pixels, sized


def walk_gif(reader: Reader) -> Size:
    width, height, flags = struct.unpack("<6xHHBxx", reader.take(13))
    size, frames = sized(width, height), 0
    _skip_colours(reader, flags)
    while (block := _next_block(reader)) != b"\x3b":
        if block == b"\x2c":
            left, top, width, height, colours = struct.unpack("<HHHHB", reader.take(9))
            check_pixels(left + width, top + height)  # a decoder enlarges the picture for a frame beyond it
            _skip_colours(reader, colours)
            reader.take(1)
            frames += 1
            check_frames(frames)
        elif block == b"\x21":
            reader.take(1)
        else:
            raise AssetDamaged(f"no block at byte {reader.at - 1}")
        while length := reader.take(1)[0]:
            reader.skip(length)
    if not frames:
        raise AssetDamaged("no picture data before the trailer")
    return size


def _next_block(reader: Reader) -> bytes:
    """The next block's first byte. Some encoders write zero bytes between blocks, which decoders skip."""
    zeros = 0
    while (block := reader.take(1)) == b"\0":
        zeros += 1
    if zeros:
        reader.note("zero bytes between blocks")
    return block


def _skip_colours(reader: Reader, flags: int) -> None:
    if flags & 0x80:
        reader.skip(3 << ((flags & 7) + 1))
