"""Small WebP copies of archived pictures, made at the first request and cached on disk.

request ─▶ on disk? ─▶ one of two threads: object ≤ 64 MiB ─▶ a process: ≤ 50 million pixels, 480 at most ─▶ file

The file's name is the SHA-256 of the picture, so a copy is never out of date. Pictures are decoded in processes of
their own, because one that is valid can take minutes and gigabytes: 500 kB of a JPEG's refinement scans take three.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import structlog

from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.errors import StoreUnavailable
from storage.local_folder import PrivateFolder
from storage.rows.models import Asset
from storage.thumbnails.decoder import MAX_THUMBNAIL_BYTES, Decoder, NoThumbnail

log = structlog.get_logger()

MAX_OBJECT_BYTES = 64 * 2**20
THREADS = 2
# Requests beyond this many waiting ones are answered "not yet". A page of pictures makes a hundred.
MAX_WAITING = 400
WAIT_SECONDS = 20.0
# A picture that failed is not tried again for this long.
REMEMBERED_SECONDS, REMEMBERED = 600.0, 5_000
SUFFIX = ".webp"


class Thumbnails:
    """`folder`: accessible to this user alone, otherwise nothing is cached. `max_bytes`: its limit; the longest unused
    go first.
    """

    def __init__(self, bucket: Bucket, folder: Path, max_bytes: int) -> None:
        self._bucket = bucket
        self._folder = PrivateFolder(folder)
        self._fault: str | None = None
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="thumbnail")
        self.decoders = [Decoder() for _ in range(THREADS)]
        self._free = SimpleQueue[Decoder]()
        for decoder in self.decoders:
            self._free.put(decoder)
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[bytes | None]] = {}
        self._failed: dict[str, float] = {}
        self._size: int | None = None
        self._is_closed = False

    def get(self, asset: Asset) -> bytes | None:
        """The small picture; None if none can be made within 20 s."""
        name = asset.sha256 or ""
        if not name.isalnum() or not (asset.media_type or "").startswith("image/"):
            return None
        if (kept := self._read(name)) is not None:
            return kept
        with self._lock:
            if self._failed.get(name, 0.0) > time.monotonic():
                return None
            future = self._under_way.get(name)
            if future is None:
                if len(self._under_way) >= MAX_WAITING or self._is_closed:
                    return None
                future = self._under_way[name] = self._threads.submit(
                    self._make, name, asset.key or "", asset.size or 0
                )
        try:
            return future.result(WAIT_SECONDS)
        except (TimeoutError, CancelledError):
            return None

    def close(self) -> None:
        """Make no more, and end what is being decoded: otherwise the process waits for it at its end."""
        with self._lock:
            self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self.decoders:
            decoder.close()

    def _read(self, name: str) -> bytes | None:
        try:
            with self._folder.existing([name[:2], f"{name}{SUFFIX}"]) as file:
                if file is None:
                    return None
                os.utime(file.fileno())  # marks it as used now
                content = file.read(MAX_THUMBNAIL_BYTES + 1)  # a larger file is not ours
        except OSError:
            return None
        return content if len(content) <= MAX_THUMBNAIL_BYTES else None

    def _make(self, name: str, key: str, size: int) -> bytes | None:
        try:
            if not 0 < size <= MAX_OBJECT_BYTES:
                raise ValueError(f"{size} bytes are too many")
            content = self._shrink(self._bucket.read_bytes(key, MAX_OBJECT_BYTES))
        except (ValueError, NoSuchObject, NoThumbnail):
            self._fail(name)
            return None
        except StoreUnavailable as error:
            log.info("thumbnail.store_not_reached", error=str(error))
            return None
        else:
            self._keep(name, content)
            return content
        finally:
            with self._lock:
                self._under_way.pop(name, None)

    def _shrink(self, content: bytes) -> bytes:
        decoder = self._free.get()
        try:
            return decoder.shrink(content)
        finally:
            self._free.put(decoder)

    def _fail(self, name: str) -> None:
        """Do not try this picture again for a while."""
        with self._lock:
            if len(self._failed) >= REMEMBERED:
                self._failed.clear()
            self._failed[name] = time.monotonic() + REMEMBERED_SECONDS

    def _keep(self, name: str, content: bytes) -> None:
        """Cache it, and make room. On a full disk nothing is cached and nothing fails."""
        try:
            with self._folder.writing([name[:2], f"{name}{SUFFIX}"]) as file:
                file.write(content)
        except OSError as error:
            if self._fault != error.strerror:  # logged once, not for every picture
                log.warning("thumbnail.not_stored", error=error.strerror, setting="RECEIVER_CONSOLE_THUMBNAIL_DIR")
            self._fault = error.strerror
            return
        self._fault = None
        with self._lock:
            if self._size is None:
                self._size = sum(size for _, size, _ in self._folder.files(f"*/*{SUFFIX}"))
            else:
                self._size += len(content)
            if self._size > self._max_bytes:
                self._make_room()

    def _make_room(self) -> None:
        """Remove the longest unused copies, down to nine tenths, so that not every new one causes it."""
        files = self._folder.files(f"*/*{SUFFIX}")
        self._size = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._size <= self._max_bytes * 0.9:
                break
            path.unlink(missing_ok=True)
            self._size -= size
