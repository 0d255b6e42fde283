"""The file of a long audit: findings and checkpoints, one line of JSON each, appended.

{"finding": {…}}   one finding
{"after": "…", "counts": {…}}   a checkpoint: the findings above are complete, the audit continues after that folder
{"ended": true}
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.archive.audit import Batch, Counts, Finding, FindingKind
from storage.errors import UserError
from storage.own_files import open_own

# How a file of an audit begins, also one whose first line was cut by a crash.
STARTS = (b'{"finding"', b'{"after"', b'{"ended"')


class AuditLog:
    """One audit in one file. An audit that had ended starts again, as does a file without a checkpoint.

    A crash may leave findings and half a line after the last checkpoint; they are cut off. Raises `UserError` for a
    file of something else, which would be emptied.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.after = ""
        self.counts = Counts()
        end = self._last_checkpoint()
        with os.fdopen(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
            file.truncate(end)

    def _last_checkpoint(self) -> int:
        end = 0
        if not self._path.exists():
            return end
        with os.fdopen(open_own(self._path, os.O_RDONLY), "rb") as file:
            if not any(start.startswith(file.peek()[: len(start)]) for start in STARTS):
                raise UserError(f"{self._path} is no file of an audit and was left as it is: name a new file")
            for line in iter(file.readline, b""):
                entry = _entry(line)
                if "ended" in entry:
                    self.after, self.counts, end = "", Counts(), 0
                    break
                if "after" in entry:
                    self.after, self.counts, end = entry["after"], Counts.from_json(entry["counts"]), file.tell()
        return end

    def findings(self) -> Iterator[Finding]:
        """The findings of earlier parts of this audit."""
        with os.fdopen(open_own(self._path, os.O_RDONLY), "rb") as file:
            for line in iter(file.readline, b""):
                if found := _entry(line).get("finding"):
                    asset_id = uuid.UUID(found["asset_id"]) if found["asset_id"] else None
                    yield Finding(**{**found, "kind": FindingKind(found["kind"]), "asset_id": asset_id})

    def add(self, batch: Batch) -> None:
        """Append one batch. It is on disk when this returns."""
        self.after = batch.after
        self.counts.add(batch.counts)
        entries: list[dict[str, Any]] = [{"finding": finding.as_json()} for finding in batch.findings]
        self._append(*entries, {"after": self.after, "counts": self.counts.as_json()})

    def end(self) -> None:
        self._append({"ended": True})

    def _append(self, *entries: dict[str, Any]) -> None:
        with os.fdopen(open_own(self._path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())


def _entry(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
