"""What the sandbox received and did, for tests and people to compare with."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# (the caller's id or else the task's own; image, series or watermark; index)
AssetKey = tuple[str, str, int]


@dataclass
class Create:
    """One create request. `raw`: the body as received (b"" once too many newer ones are stored). `body`: parsed, or
    None.

    `code`: of the answer (0 = created, -1 = a damaged answer). `task_id`: of the task that the create made, or that
    exists under its id.
    """

    raw: bytes
    body: Any
    at_ms: int
    code: int = 0
    task_id: str | None = None


@dataclass
class Attempt:
    """One try to deliver. `http_status` None: there was no answer, and `error` is the exception's name."""

    at_ms: int
    http_status: int | None
    error: str | None = None


@dataclass
class Callback:
    """One callback with all its attempts. `dropped`: never sent, on purpose."""

    task_id: str
    external_task_id: str | None
    url: str
    status: str
    body: bytes
    webhook_id: str
    dropped: bool = False
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def delivered(self) -> bool:
        return any(attempt.http_status == 200 for attempt in self.attempts)


@dataclass(frozen=True)
class Asset:
    """One result file. `path`: its URL on the sandbox, without the query. `hits`: requests with a valid signature,
    redirected ones too.

    `served`: how many of those got the whole file.
    """

    external_task_id: str
    task_id: str
    kind: str
    index: int
    sha256: str
    size: int
    path: str
    hits: int
    served: int

    @property
    def key(self) -> AssetKey:
        return self.external_task_id, self.kind, self.index


@dataclass(frozen=True)
class TaskEntry:
    """One task as it is: `status` is submitted, processing, succeed or failed."""

    task_id: str
    external_task_id: str | None
    status: str
    created_ms: int
    updated_ms: int
    assets: tuple[Asset, ...]


@dataclass(frozen=True)
class Ledger:
    """`counts`: how often each thing happened: queries, `fault:<kind>`, `cdn:<status>` and so on.

    `slots_held`: pictures in progress now. `slots_peak`: the most at the same time.
    """

    creates: tuple[Create, ...]
    tasks: tuple[TaskEntry, ...]
    callbacks: tuple[Callback, ...]
    counts: Counter[str]
    slots_held: int = 0
    slots_peak: int = 0

    @property
    def assets(self) -> dict[AssetKey, Asset]:
        """Every result file by (external_task_id, kind, index)."""
        return {asset.key: asset for task in self.tasks for asset in task.assets}

    @property
    def sha256(self) -> dict[AssetKey, str]:
        """The SHA-256 of every result file by (external_task_id, kind, index), as 64 hex digits."""
        return {key: asset.sha256 for key, asset in self.assets.items()}

    def task(self, name: str) -> TaskEntry:
        """The task with this external id or task id. Raises KeyError."""
        for task in self.tasks:
            if name in (task.external_task_id, task.task_id):
                return task
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        return {
            "creates": [_create_json(create) for create in self.creates],
            "tasks": [{**vars(task), "assets": [vars(asset) for asset in task.assets]} for task in self.tasks],
            "callbacks": [_callback_json(callback) for callback in self.callbacks],
            "counts": dict(sorted(self.counts.items())),
            "slots_held": self.slots_held,
            "slots_peak": self.slots_peak,
        }


def _create_json(create: Create) -> dict[str, Any]:
    return {**vars(create), "raw": base64.b64encode(create.raw).decode("ascii")}


def _callback_json(callback: Callback) -> dict[str, Any]:
    attempts = [vars(attempt) for attempt in callback.attempts]
    text = callback.body.decode("utf-8")
    return {**vars(callback), "body": text, "attempts": attempts, "delivered": callback.delivered}
