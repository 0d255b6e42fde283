"""Checked files of batches that wait to be sent, in memory for some minutes.

Their page names them by their hash, so it neither holds a file of many MB nor sends it back. A restart forgets them.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import NamedTuple

from receiver.base.forms import Upload
from receiver.batch.batch_file import Format

SECONDS = 30 * 60.0
MAX_BYTES, MAX_FILES = 64 * 2**20, 200
# Of one person. Two pages may be open beside each other.
FILES_A_PERSON = 2


class CheckedFile(NamedTuple):
    """A batch's file as it was given. `is_file_name`: nobody typed the name, it is the file's. `is_pasted`: its lines
    come from a text field.
    """

    name: str = ""
    content: bytes = b""
    format: Format = "jsonl"
    is_file_name: bool = False
    is_pasted: bool = True


def given_file(form: Mapping[str, str], upload: Upload | None) -> CheckedFile:
    """The uploaded file of a form, or without one its pasted lines (`content`, `format`). `name`: of the batch."""
    name = form.get("name", "").strip()
    if upload is None or not upload.content:
        pasted = form.get("content", "").encode()
        return CheckedFile(name, pasted, "csv" if form.get("format") == "csv" else "jsonl")
    path = PurePath(upload.name)
    format: Format = "csv" if path.suffix.lower() == ".csv" else "jsonl"
    return CheckedFile(name or path.stem, upload.content, format, is_file_name=not name, is_pasted=False)


class CheckedFiles:
    """Safe for threads. The oldest files leave first, by their age, and where a bound is passed."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._kept: OrderedDict[tuple[str, str], tuple[float, CheckedFile]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, person: str, file: CheckedFile) -> str:
        """Keep the file for this person. Returns its key: SHA-256 of all of it, 64 hex digits."""
        head = "\0".join((file.format, str(file.is_file_name), str(file.is_pasted), file.name, ""))
        key = hashlib.sha256(head.encode("utf-8", "surrogatepass") + file.content).hexdigest()
        with self._lock:
            self._kept.pop((person, key), None)
            self._kept[person, key] = self._now(), file
            own = [each for each in self._kept if each[0] == person]
            for each in own[:-FILES_A_PERSON]:
                del self._kept[each]
            self._forget()
        return key

    def get(self, person: str, key: str) -> CheckedFile | None:
        """The file that this person checked; None if it is not kept any more."""
        with self._lock:
            self._forget()
            _, found = self._kept.get((person, key), (0.0, None))
        return found

    def _forget(self) -> None:
        size = sum(len(file.content) for _, file in self._kept.values())
        for each, (kept_at, file) in list(self._kept.items()):
            if kept_at > self._now() - SECONDS and size <= MAX_BYTES and len(self._kept) <= MAX_FILES:
                return
            del self._kept[each]
            size -= len(file.content)
