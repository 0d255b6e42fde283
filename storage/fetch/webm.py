"""WebM (RFC 8794, RFC 9559): the EBML header, then one Segment."""

from __future__ import annotations

from storage.errors import AssetDamaged
from storage.fetch.structure import NO_SIZE, Reader, Size

SEGMENT, CLUSTER = 0x18538067, 0x1F43B675


def walk_webm(reader: Reader) -> Size:
    reader.take(4)
    reader.skip(_ebml_length(reader) or 0)
    if int.from_bytes(reader.take(4), "big") != SEGMENT:
        raise AssetDamaged("no Segment after the header")
    length = _ebml_length(reader)
    if length is not None and length > reader.left:
        raise AssetDamaged(f"cut short: {length - reader.left} bytes are missing at the end")
    end = reader.size if length is None else reader.at + length
    while reader.at < end:
        element = _ebml_id(reader)
        length = _ebml_length(reader)
        if element == CLUSTER and (length is None or length <= end - reader.at):
            reader.skip(end - reader.at)
            return NO_SIZE
        reader.skip(end - reader.at if length is None else length)
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
