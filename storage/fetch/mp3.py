"""MP3 (ISO 11172-3, 13818-3): an ID3v2 tag (id3.org), then frames without a mark at their end.

Every frame is walked. What follows the last one (ID3v1, APE and Lyrics3 tags, padding, junk) is not part of the sound.
"""

from __future__ import annotations

import struct

from storage.errors import AssetDamaged
from storage.fetch.structure import NO_SIZE, Reader, Size

KBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}


def frame_bytes(header: bytes) -> int:
    """The length of the layer III frame with this header (4 bytes); 0 if it is no frame header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, bit_rate, rate, padding = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or bit_rate in (0, 15) or rate == 3:
        return 0
    samples = 144 if version == 3 else 72
    return samples * KBITS[3 if version == 3 else 2][bit_rate] * 1_000 // RATES[version][rate] + padding


def walk_mp3(reader: Reader) -> Size:
    header = reader.take(4)
    if header[:3] == b"ID3":
        flags, *parts = struct.unpack(">xB4B", reader.take(6))
        if max(parts) > 0x7F:
            raise AssetDamaged("the ID3 tag has no length")
        reader.skip(sum(part << 7 * (3 - at) for at, part in enumerate(parts)) + (10 if flags & 0x10 else 0))
        header = reader.take(4)
    start = reader.at - 4
    while length := frame_bytes(header):
        reader.skip(length - 4)
        header = reader.take(min(4, reader.left))
    reader.rewind(len(header))
    if reader.at == start:
        raise AssetDamaged(f"no sound frame at byte {start}")
    return NO_SIZE
