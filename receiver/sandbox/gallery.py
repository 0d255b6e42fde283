"""The pictures of all tasks: drawn at the first request, kept while there is room; their hashes are always kept."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import NamedTuple

from receiver.sandbox import pictures
from receiver.sandbox.tasks import Name, Task

MAX_CACHED_BYTES = 64 * 1024 * 1024


class Facts(NamedTuple):
    sha256: str
    size: int


class Gallery:
    """Safe for threads. Pictures are drawn outside the lock, so at worst one is drawn twice."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._cached: OrderedDict[tuple[str, Name], bytes] = OrderedDict()
        self._cached_bytes = 0
        self._facts: dict[tuple[str, Name], Facts] = {}

    def data(self, task: Task, name: Name) -> bytes:
        """The PNG file."""
        key = (task.id, name)
        with self._lock:
            if key in self._cached:
                self._cached.move_to_end(key)
                return self._cached[key]
        data = pictures.draw(self._picture(task, name))
        facts = Facts(hashlib.sha256(data).hexdigest(), len(data))
        with self._lock:
            self._facts[key] = facts
            self._cache(key, data)
        return data

    def facts(self, task: Task, name: Name) -> Facts:
        """Hash and size of the PNG file."""
        known = self._facts.get((task.id, name))
        if known is None:
            self.data(task, name)
            known = self._facts[task.id, name]
        return known

    def _cache(self, key: tuple[str, Name], data: bytes) -> None:
        if key in self._cached:
            return
        self._cached[key] = data
        self._cached_bytes += len(data)
        while self._cached_bytes > MAX_CACHED_BYTES and len(self._cached) > 1:
            _, oldest = self._cached.popitem(last=False)
            self._cached_bytes -= len(oldest)

    def _picture(self, task: Task, name: Name) -> pictures.Picture:
        word = "watermarked image" if name.kind == "watermark" else name.kind
        return pictures.Picture(
            prompt=task.wanted.prompt,
            name=task.key,
            label=f"{word} {name.index}",
            noise=f"{self._seed} {task.key} {name.index}",  # a watermarked copy shows the same picture
            resolution=task.wanted.resolution,
            aspect_ratio=task.wanted.aspect_ratio,
            watermark=name.kind == "watermark",
            bytes_wanted=task.picture_bytes,
        )
