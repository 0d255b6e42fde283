"""WebM (RFC 8794, RFC 9559): the EBML header, then one Segment, whose elements are walked to its end."""

from __future__ import annotations

import io

from storage.errors import AssetDamaged
from storage.fetch.structure import NO_SIZE, Reader, Size

SEGMENT, CLUSTER = 0x18538067, 0x1F43B675
# An id has at most four bytes, a length eight.
MAX_HEAD_BYTES = 12


def walk_webm(reader: Reader) -> Size:
    reader.take(4)
    reader.skip(_ebml_length(reader) or 0)
    if int.from_bytes(reader.take(4), "big") != SEGMENT:
        raise AssetDamaged("no Segment after the header")
    length = _ebml_length(reader)
    if length is not None and length > reader.left:
        raise AssetDamaged(f"cut short: {length - reader.left} bytes are missing at the end")
    end = reader.size if length is None else reader.at + length
    has_cluster = False
    while reader.at < end:
        element, length = _element(reader)
        has_cluster = has_cluster or element == CLUSTER
        if length is None and element != CLUSTER:
            raise AssetDamaged(f"no length at byte {reader.at}")
        if (length or 0) > end - reader.at:
            raise AssetDamaged(f"cut short: {(length or 0) - (end - reader.at)} bytes are missing at the end")
        reader.skip(length or 0)  # of a live stream's cluster, which has no length, the elements are walked like others
    if not has_cluster:
        raise AssetDamaged("no Cluster")
    return NO_SIZE


def _element(reader: Reader) -> tuple[int, int | None]:
    """Id and length of the next element, which count as one piece."""
    start = reader.at
    head = io.BytesIO(reader.take(min(reader.left, MAX_HEAD_BYTES)))
    inner = Reader(head)
    try:
        found = _ebml_id(inner), _ebml_length(inner)
    except AssetDamaged:
        raise AssetDamaged(f"no element at byte {start}") from None
    reader.rewind(inner.left)
    return found


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
