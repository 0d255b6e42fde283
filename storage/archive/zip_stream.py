"""Many archived files as one streamed zip. Memory is bounded by a chunk, whatever the number and size of the files."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain

import structlog

from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.local_folder import portable
from storage.rows.models import Asset

log = structlog.get_logger()

MISSING = "MISSING.txt"


class _Chunks:
    """A file that cannot seek. The reader takes the written bytes away."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, content: bytes) -> int:
        self._parts.append(bytes(content))
        return len(content)

    def flush(self) -> None:
        """Does nothing, because nothing is buffered here."""

    def take(self) -> bytes:
        content = b"".join(self._parts)
        self._parts.clear()
        return content


def zip_stream(bucket: Bucket, assets: Sequence[Asset], absent: Sequence[str] = ()) -> Iterator[bytes]:
    """A zip of these files without compression, because pictures are compressed.

    Each file is in its task's folder. Names are valid and distinct on every disk. `MISSING.txt` names the files whose
    object is missing, which are logged, and those of `absent`. It comes last, after all objects were asked for.
    """
    target, places, missing = _Chunks(), places_of([str(asset.key) for asset in assets]), list(absent)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for asset in assets:
            made = asset.archived_at or asset.created_at
            entry = zipfile.ZipInfo(places[str(asset.key)], made.timetuple()[:6])
            with closing(bucket.read(str(asset.key))) as chunks:
                try:
                    first = next(chunks, b"")
                except NoSuchObject:
                    log.error("zip.object_not_found", key=asset.key)
                    missing.append(f"{asset.key}: not in the store")
                    continue
                with archive.open(entry, "w", force_zip64=True) as file:
                    for chunk in chain([first], chunks):
                        file.write(chunk)
                        yield target.take()
            yield target.take()
        if missing:
            archive.writestr(MISSING, "\n".join(["Not in this archive:", *missing, ""]))
    yield target.take()


def places_of(keys: Sequence[str]) -> dict[str, str]:
    """Folder and file of each key within the zip."""
    ends = {key: key.split("/")[-2:] for key in keys}
    folders = {folder for folder, *_ in ends.values()}
    spellings = Counter(folder.lower() for folder in folders)
    spelt = {folder: portable(folder, folds_case=spellings[folder.lower()] > 1) for folder in folders}
    return {
        key: "/".join([spelt[folder], *(portable(step, folds_case=False) for step in rest)])
        for key, (folder, *rest) in ends.items()
    }
