"""Many archived files as one zip, streamed: memory is bounded by a chunk, whatever is in it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from itertools import chain

import structlog

from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.rows.models import Asset

log = structlog.get_logger()


class _Chunks:
    """A file that cannot seek: what was written is taken away by the reader."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, content: bytes) -> int:
        self._parts.append(bytes(content))
        return len(content)

    def flush(self) -> None:
        """Nothing waits here."""

    def take(self) -> bytes:
        content = b"".join(self._parts)
        self._parts.clear()
        return content


def zip_stream(bucket: Bucket, assets: Sequence[Asset]) -> Iterator[bytes]:
    """A zip of these files, not compressed: pictures are already. One that is gone is left out and logged."""
    target = _Chunks()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for asset in assets:
            made = asset.archived_at or asset.created_at
            entry = zipfile.ZipInfo("/".join(str(asset.key).split("/")[-2:]), made.timetuple()[:6])
            try:
                chunks = bucket.read(str(asset.key))
                first = next(chunks, b"")
            except NoSuchObject:
                log.error("zip.object_not_found", key=asset.key)
                continue
            with archive.open(entry, "w", force_zip64=True) as file:
                for chunk in chain([first], chunks):
                    file.write(chunk)
                    yield target.take()
            yield target.take()
    yield target.take()
