"""Whether a file is whole: walks it by lengths and markers alone. Nothing is decoded, so no bomb goes off.

A walk reads from the first byte to the last in constant memory, whatever the file promises. It returns the picture's
size and raises `AssetDamaged` where the file ends early, contradicts itself, promises absurd dimensions or goes on
after its end, where a second file may hide.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from storage.errors import AssetDamaged

BLOCK_BYTES = 256 * 1024
# What Pillow refuses to open by default (twice 89,478,485): a picture nobody can look at is not archived unseen.
MAX_PIXELS = 178_956_970
# JPEG's own limit, the largest of the formats with one.
MAX_SIDE = 65_535
# An animation of 40 s at 25 frames a second.
MAX_FRAMES = 1_000
# Pieces (chunks, boxes, sub-blocks) walked before giving up: a 256 MiB GIF in full sub-blocks has 1.05 million.
MAX_PIECES = 1_200_000
# Boxes in boxes; MP4 needs 2 down to the track header, AVIF 3 down to the picture size.
MAX_DEPTH = 4


class Size(NamedTuple):
    width: int | None
    height: int | None


NO_SIZE = Size(None, None)


class Reader:
    """Reads a file forward, never past its end, and counts the pieces."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        self.at = file.seek(0)
        self._pieces = 0

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, count: int) -> bytes:
        """The next `count` bytes (small: headers); one piece."""
        self._pieces += 1
        if self._pieces > MAX_PIECES:
            raise AssetDamaged("made of too many pieces")
        data = self._file.read(count)
        self.at += len(data)
        if len(data) < count:
            raise AssetDamaged(f"cut short at byte {self.at}")
        return data

    def skip(self, count: int) -> None:
        if count < 0:
            raise AssetDamaged(f"a length before byte {self.at} is too small")
        if count > self.left:
            raise AssetDamaged(f"cut short: {count - self.left} bytes are missing at the end")
        self.at = self._file.seek(self.at + count)

    def rewind(self, count: int) -> None:
        self.at = self._file.seek(self.at - count)

    def blocks(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, a block at a time."""
        while count > 0:
            block = self.take(min(count, BLOCK_BYTES))
            count -= len(block)
            yield block

    def end(self) -> None:
        if self.left:
            raise AssetDamaged(f"{self.left} bytes after the end")


def _sized(width: int, height: int) -> Size:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise AssetDamaged(f"{width} × {height} pixels is no picture size")
    if width * height > MAX_PIXELS:
        raise AssetDamaged(f"{width} × {height} pixels, more than {MAX_PIXELS} allowed")
    return Size(width, height)


def _check_frames(frames: int) -> None:
    if frames > MAX_FRAMES:
        raise AssetDamaged(f"more than {MAX_FRAMES} frames")


# PNG (W3C PNG, third edition): chunks with their CRC, IHDR first, IEND last.
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def _walk_png(reader: Reader) -> Size:
    reader.take(8)
    kind, body = _png_chunk(reader)
    if kind != b"IHDR" or len(body) != 13:
        raise AssetDamaged("IHDR is not the first chunk")
    width, height, depth, colour = struct.unpack(">IIBB", body[:10])
    size = _sized(width, height)
    if depth not in PNG_DEPTHS.get(colour, ()):
        raise AssetDamaged(f"colour type {colour} with {depth} bits does not exist")
    frames, has_data = 0, False
    while kind != b"IEND":
        kind, body = _png_chunk(reader)
        has_data = has_data or (kind == b"IDAT" and bool(body))
        frames += kind == b"fcTL"
        _check_frames(max(frames, int.from_bytes(body[:4], "big") if kind == b"acTL" else 0))
    if not has_data or body:
        raise AssetDamaged("no picture data before IEND")
    reader.end()
    return size


def _png_chunk(reader: Reader) -> tuple[bytes, bytes]:
    """One chunk with its CRC checked: (type, the first bytes of its data)."""
    length, kind = struct.unpack(">I4s", reader.take(8))
    if not kind.isalpha():
        raise AssetDamaged(f"no chunk at byte {reader.at - 8}")
    if length + 4 > reader.left:
        raise AssetDamaged(f"cut short inside {kind.decode('ascii')}")
    crc, first = zlib.crc32(kind), b""
    for block in reader.blocks(length):
        crc = zlib.crc32(block, crc)
        first = first or block[:32]
    if reader.take(4) != crc.to_bytes(4, "big"):
        raise AssetDamaged(f"wrong CRC in {kind.decode('ascii')}")
    return kind, first


# JPEG (ITU T.81): segments, and entropy-coded data between SOS and the next marker.
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in coded data FF00 is a byte and FFD0 to FFD7 restarts


def _walk_jpeg(reader: Reader) -> Size:
    reader.take(2)
    size, scans = NO_SIZE, 0
    marker = _jpeg_marker(reader)
    while marker != 0xD9:
        length = int.from_bytes(reader.take(2), "big")
        if length < 2 or marker < 0xC0 or 0xD0 <= marker <= 0xD8:
            raise AssetDamaged(f"no segment at byte {reader.at - 4}")
        if marker in JPEG_FRAMES:
            height, width = struct.unpack(">xHH", reader.take(5))
            size, length = _sized(width, height), length - 5
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


# GIF (CompuServe, 1990): blocks of sub-blocks up to the trailer.
def _walk_gif(reader: Reader) -> Size:
    width, height, flags = struct.unpack("<6xHHBxx", reader.take(13))
    size, frames = _sized(width, height), 0
    _skip_colours(reader, flags)
    while (block := reader.take(1)) != b"\x3b":
        if block == b"\x2c":
            _skip_colours(reader, reader.take(9)[8])
            reader.take(1)
            frames += 1
            _check_frames(frames)
        elif block == b"\x21":
            reader.take(1)
        else:
            raise AssetDamaged(f"no block at byte {reader.at - 1}")
        while length := reader.take(1)[0]:
            reader.skip(length)
    if not frames:
        raise AssetDamaged("no picture data before the trailer")
    reader.end()
    return size


def _skip_colours(reader: Reader, flags: int) -> None:
    if flags & 0x80:
        reader.skip(3 << ((flags & 7) + 1))


# RIFF (WebP: RFC 9649; WAV): one list of chunks that fills the file.
def _riff_chunks(reader: Reader) -> Iterator[tuple[bytes, bytes]]:
    """Every chunk's (type, first bytes), after checking that the list is as long as the file."""
    declared = struct.unpack("<4xI4x", reader.take(12))[0] + 8
    if declared > reader.size and declared != 0xFFFF_FFFF + 8:  # a WAV written to a pipe has no length
        raise AssetDamaged(f"cut short: {declared - reader.size} bytes are missing at the end")
    if declared < reader.size:
        raise AssetDamaged(f"{reader.size - declared} bytes after the end")
    while reader.left:
        kind, length = struct.unpack("<4sI", reader.take(8))
        length = reader.left if length == 0xFFFF_FFFF else length
        first = reader.take(min(length, 32))
        reader.skip(length - len(first))
        reader.skip(min(length & 1, reader.left))
        yield kind, first


def _walk_webp(reader: Reader) -> Size:
    size, frames = NO_SIZE, 0
    for kind, first in _riff_chunks(reader):
        read_size = WEBP_SIZES.get(kind)
        if read_size is not None and len(first) >= 10 - 5 * (kind == b"VP8L"):
            found = _sized(*read_size(first))
            size = found if size is NO_SIZE else size
        frames += kind in (b"VP8 ", b"VP8L", b"ANMF")
        _check_frames(frames)
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


def _walk_wav(reader: Reader) -> Size:
    kinds = {kind for kind, _ in _riff_chunks(reader)}
    if not kinds >= {b"fmt ", b"data"}:
        raise AssetDamaged("no sound data")
    return NO_SIZE


# ISO base media (ISO/IEC 14496-12): boxes; AVIF and HEIC keep sizes in `ispe`, MP4 and MOV in `tkhd`.
# Boxes that are opened, with the bytes before their first inner box (QuickTime's `meta` has none: it stays shut).
STILL_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0}
MOVIE_CONTAINERS = {b"moov": 0, b"trak": 0}


def _boxes(reader: Reader, end: int, containers: dict[bytes, int], depth: int = 0) -> Iterator[tuple[bytes, bytes]]:
    """Every box up to `end`, `containers` opened: (type, the first bytes of its content)."""
    while reader.at < end:
        start = reader.at
        length, kind = struct.unpack(">I4s", reader.take(8))
        if length == 1:
            length = int.from_bytes(reader.take(8), "big")
        stop = end if length == 0 else start + length
        if not re.fullmatch(rb"[ -~\xa9]{4}", kind) or stop < reader.at:
            raise AssetDamaged(f"no box at byte {start}: cut, or bytes after the end")
        if stop > end:
            raise AssetDamaged(f"cut short inside {kind.decode('latin-1')}")
        before = containers.get(kind)
        first = reader.take(min(stop - reader.at, 96 if before is None else before))
        yield kind, first
        if before is not None and depth < MAX_DEPTH:
            yield from _boxes(reader, stop, containers, depth + 1)
        reader.skip(stop - reader.at)


def _walk_still_boxes(reader: Reader) -> Size:
    kinds: set[bytes] = set()
    sizes: list[Size] = []
    for kind, first in _boxes(reader, reader.size, STILL_CONTAINERS):
        kinds.add(kind)
        if kind == b"ispe" and len(first) >= 12:
            sizes.append(_sized(*struct.unpack(">4xII", first[:12])))
    if not (kinds & {b"meta", b"moov"} and kinds & {b"mdat", b"idat"} and sizes):
        raise AssetDamaged("no picture data")
    return max(sizes, key=lambda size: (size.width or 0) * (size.height or 0))


def _walk_movie_boxes(reader: Reader) -> Size:
    kinds: set[bytes] = set()
    size = NO_SIZE
    for kind, first in _boxes(reader, reader.size, MOVIE_CONTAINERS):
        kinds.add(kind)
        if kind == b"tkhd" and size is NO_SIZE:
            size = _track_size(first)
    if not kinds >= {b"moov", b"mdat"}:
        raise AssetDamaged("no moov or no mdat")
    return size


def _track_size(first: bytes) -> Size:
    """From a track header: 16.16 fixed point, the last 8 bytes; a sound track has 0 × 0."""
    length = 96 if first[:1] == b"\x01" else 84
    if len(first) < length:
        return NO_SIZE
    width, height = (part >> 16 for part in struct.unpack(">II", first[length - 8 : length]))
    return _sized(width, height) if width and height else NO_SIZE


# WebM (RFC 8794, RFC 9559): the EBML header, then one Segment that fills the file.
SEGMENT, CLUSTER = 0x18538067, 0x1F43B675


def _walk_webm(reader: Reader) -> Size:
    reader.take(4)
    reader.skip(_ebml_length(reader) or 0)
    if int.from_bytes(reader.take(4), "big") != SEGMENT:
        raise AssetDamaged("no Segment after the header")
    length = _ebml_length(reader)
    if length is not None and length > reader.left:
        raise AssetDamaged(f"cut short: {length - reader.left} bytes are missing at the end")
    if length is not None and length < reader.left:
        raise AssetDamaged(f"{reader.left - length} bytes after the end")
    while reader.left:
        element = _ebml_id(reader)
        length = _ebml_length(reader)
        if element == CLUSTER and (length is None or length <= reader.left):
            return NO_SIZE
        reader.skip(reader.left if length is None else length)
    raise AssetDamaged("no Cluster")


def _ebml_id(reader: Reader) -> int:
    first = reader.take(1)
    more = 8 - first[0].bit_length()
    if more > 3:
        raise AssetDamaged(f"no element at byte {reader.at - 1}")
    return int.from_bytes(first + reader.take(more), "big")


def _ebml_length(reader: Reader) -> int | None:
    """A variable-length size; None = unknown (all ones), as live streams have."""
    first = reader.take(1)
    more = 8 - first[0].bit_length()
    if more > 7:
        raise AssetDamaged(f"no length at byte {reader.at - 1}")
    value = int.from_bytes(first + reader.take(more), "big") & ((1 << 7 * (more + 1)) - 1)
    return None if value == (1 << 7 * (more + 1)) - 1 else value


# MP3 (ISO 11172-3, 13818-3): an ID3v2 tag (id3.org), then frames. Two in a row are asked for, not all of them.
MP3_KBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}


def mp3_frame_bytes(header: bytes) -> int:
    """The length of the layer III frame that `header` (4 bytes) begins; 0 when it begins none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, bit_rate, rate, padding = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or bit_rate in (0, 15) or rate == 3:
        return 0
    samples = 144 if version == 3 else 72
    return samples * MP3_KBITS[3 if version == 3 else 2][bit_rate] * 1_000 // MP3_RATES[version][rate] + padding


def _walk_mp3(reader: Reader) -> Size:
    header = reader.take(4)
    if header[:3] == b"ID3":
        flags, *parts = struct.unpack(">xB4B", reader.take(6))
        if max(parts) > 0x7F:
            raise AssetDamaged("the ID3 tag has no length")
        reader.skip(sum(part << 7 * (3 - at) for at, part in enumerate(parts)) + (10 if flags & 0x10 else 0))
        header = reader.take(4)
    for _ in range(2):
        length = mp3_frame_bytes(header)
        if not length:
            raise AssetDamaged(f"no sound frame at byte {reader.at - 4}")
        reader.skip(length - 4)
        if not reader.left:
            return NO_SIZE
        header = reader.take(4)
    return NO_SIZE


WALKS: dict[str, Callable[[Reader], Size]] = {
    "png": _walk_png,
    "jpg": _walk_jpeg,
    "webp": _walk_webp,
    "gif": _walk_gif,
    "avif": _walk_still_boxes,
    "heic": _walk_still_boxes,
    "mp4": _walk_movie_boxes,
    "mov": _walk_movie_boxes,
    "webm": _walk_webm,
    "mp3": _walk_mp3,
    "wav": _walk_wav,
}
