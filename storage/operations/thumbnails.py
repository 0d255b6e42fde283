"""Small WebP copies of archived pictures, made at the first request and cached on disk.

request ─▶ on disk? ─▶ one of two threads: object ≤ 64 MiB, ≤ 50 million pixels ─▶ decoded, 480 pixels at most ─▶ file

The file's name is the SHA-256 of the picture, so a copy is never out of date.
"""

from __future__ import annotations

import io
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import structlog
from PIL import Image, UnidentifiedImageError

from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.errors import StoreUnavailable
from storage.local_folder import PrivateFolder
from storage.rows.models import Asset

log = structlog.get_logger()

SIDE_PIXELS = 480
QUALITY = 78
MAX_OBJECT_BYTES = 64 * 2**20
# 150 MB as RGB. Two threads decode, so at most 300 MB are used.
MAX_PIXELS = 50_000_000
THREADS = 2
# Requests beyond this many waiting ones are answered "not yet". A page of pictures makes a hundred.
MAX_WAITING = 400
WAIT_SECONDS = 20.0
# A picture that failed is not tried again for this long.
REMEMBERED_SECONDS, REMEMBERED = 600.0, 5_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
SUFFIX = ".webp"
# 480 x 480 pixels as RGBA have 921,600 bytes. A larger file in the folder is not ours.
MAX_KEPT_BYTES = 2**20


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
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[bytes | None]] = {}
        self._failed: dict[str, float] = {}
        self._size: int | None = None

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
                if len(self._under_way) >= MAX_WAITING:
                    return None
                future = self._under_way[name] = self._threads.submit(
                    self._make, name, asset.key or "", asset.size or 0
                )
        try:
            return future.result(WAIT_SECONDS)
        except TimeoutError:
            return None

    def _read(self, name: str) -> bytes | None:
        try:
            with self._folder.existing([name[:2], f"{name}{SUFFIX}"]) as file:
                if file is None:
                    return None
                os.utime(file.fileno())  # marks it as used now
                content = file.read(MAX_KEPT_BYTES + 1)
        except OSError:
            return None
        return content if len(content) <= MAX_KEPT_BYTES else None

    def _make(self, name: str, key: str, size: int) -> bytes | None:
        try:
            if not 0 < size <= MAX_OBJECT_BYTES:
                raise ValueError(f"{size} bytes are too many")
            content = shrink(self._bucket.read_bytes(key, MAX_OBJECT_BYTES))
        except (ValueError, OSError, SyntaxError, NoSuchObject, UnidentifiedImageError, Image.DecompressionBombError):
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


def shrink(content: bytes) -> bytes:
    """A WebP of at most 480 pixels a side. Raises ValueError for too many pixels, OSError and others for no picture."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many")
        picture.draft("RGB", (SIDE_PIXELS * 2, SIDE_PIXELS * 2))  # for JPEG: decodes at a smaller size
        has_alpha = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
        small = picture.convert("RGBA" if has_alpha else "RGB")
    small.thumbnail((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.LANCZOS)
    target = io.BytesIO()
    small.save(target, "WEBP", quality=QUALITY, method=2)
    return target.getvalue()
