"""The receiver from Python: ask, wait for what was archived, read the facts.

    with Receiver() as receiver:                                  # settings as the command line reads them
        task = receiver.submit({"model_name": "kling-v3-omni", "prompt": "a lighthouse"})
        for file in receiver.wait(task.external_task_id, timeout_seconds=3_600).files:
            print(file.uri, file.sha256)

Everything blocks; `AsyncReceiver` is the same with each call in a thread. `receiver serve` (or `work`) does the work
meanwhile: this module writes rows and reads them.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from receiver.app import process
from receiver.app.wiring import Parts
from receiver.base import config
from receiver.events.cloudevents import event_id
from receiver.tasks import task_view
from storage.rows import events
from storage.rows.models import Asset, Event, Task
from storage.states import ArchiveState, AssetState, TaskState

# As often as the command line looks; one indexed read each.
POLL_INTERVAL_SECONDS = 0.2
EVENTS_AT_ONCE = 500


class NotArchived(Exception):
    """The task is over and not everything it named is in the bucket. `result`: how it stands, with the reasons."""

    def __init__(self, result: Result) -> None:
        self.result = result
        reason = result.error or result.note or f"the archive is {result.archive}"
        super().__init__(f"{result.external_task_id}: {reason}")


@dataclass(frozen=True)
class File:
    """One produced file. `kind`: image, series, watermark, video, audio. `uri`, `key`: None until it is archived.

    `sha256`: 64 hex digits over the bytes as the provider delivered them; `size` in bytes. `error`: why it is not
    archived.
    """

    id: uuid.UUID
    kind: str
    index: int
    state: AssetState
    key: str | None
    uri: str | None
    sha256: str | None
    size: int | None
    media_type: str | None
    error: str | None


@dataclass(frozen=True)
class Result:
    """How a task stands. `state`: created < submitted < processing < failed < succeeded; `archive`: none, archiving,
    archived, incomplete. `error`: the provider's reason; `note`: ours."""

    external_task_id: str
    task_id: uuid.UUID
    provider_task_id: str | None
    state: TaskState
    archive: ArchiveState
    expected: int | None
    error: str | None
    note: str | None
    files: tuple[File, ...]
    is_over: bool

    @property
    def is_archived(self) -> bool:
        """Whether every file the provider named is in the bucket."""
        return self.archive is ArchiveState.ARCHIVED


@dataclass(frozen=True)
class Fact:
    """One event. `seq` rises in the order in which readers may see facts; keep it to go on from there.

    `id`: the fact's own for ever, the same as in the CloudEvents that sinks get; who acts twice on one id acts once.
    """

    seq: int
    id: str
    name: str
    at: datetime
    external_task_id: str | None
    data: Mapping[str, Any]


class Receiver:
    """One process's access to the receiver. Safe to share between threads; close it, or use it in a `with`."""

    def __init__(self, **settings: Any) -> None:
        """`settings`: what differs from the environment, named like `RECEIVER_…` in lower case without the prefix.

        Raises `SettingsInvalid` (a line per fault), `SchemaBehind` (run `receiver migrate`), `DatabaseUnavailable`.
        """
        self._parts = Parts(config.load(**settings))
        process.ready_schema(self._parts.database, migrate=self._parts.settings.migrates_on_start)

    def submit(self, request: Mapping[str, Any], *, external_task_id: str | None = None) -> Result:
        """Commit a row for the request, then ask the provider. An unclear answer is resolved by a worker.

        `request`: the provider's fields, as in `receiver submit --request`. The same id with the same request sends
        nothing and returns the task that exists, so a caller that crashed may simply repeat. `external_task_id` None:
        a fresh UUID, and a repeat pays again. Raises `RequestInvalid` (a line per fault), `Conflict` (the id is
        another request's), `ValueError` (the id's form).
        """
        submitted = self._parts.submitter.submit(request, external_task_id=external_task_id)
        return self.status(submitted.task.external_task_id)

    def status(self, external_task_id: str) -> Result:
        """How the task stands now. Raises `LookupError`."""
        task, assets, _ = task_view.find(self._parts.database, external_task_id)
        return self._result(task, assets)

    def wait(self, external_task_id: str, *, timeout_seconds: float) -> Result:
        """Block until everything the task named is archived.

        Raises `NotArchived` when it ended otherwise, `TimeoutError` (the task goes on), `LookupError`.
        """
        deadline = time.monotonic() + timeout_seconds
        while not (result := self.status(external_task_id)).is_over:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{external_task_id}: {result.state} after {timeout_seconds:g} s; it goes on")
            time.sleep(min(POLL_INTERVAL_SECONDS, left))
        if not result.is_archived:
            raise NotArchived(result)
        return result

    def url(self, file: File, *, expires_seconds: int = 3_600) -> str:
        """A presigned link to an archived file (1 to 604,800 s); whoever has it may read that file.

        Raises `ValueError` for a file that is not archived.
        """
        if file.key is None:
            raise ValueError(f"{file.kind} {file.index} is not archived")
        return self._parts.bucket.presigned_get(file.key, expires_seconds=expires_seconds)

    def events(self, *, after: int = 0, names: Collection[str] = (), follow: bool = False) -> Iterator[Fact]:
        """The facts after a `seq`, in order, per task and over all. `names`: only these (see DESIGN: event names).

        `follow`: go on for ever, else until there are no more. A worker gives the numbers: without one nothing comes.
        """
        while True:
            found = self.next_events(after)
            for fact in found:
                after = fact.seq
                if not names or fact.name in names:
                    yield fact
            if not found and not follow:
                return
            if not found:
                time.sleep(POLL_INTERVAL_SECONDS)

    def next_events(self, after: int) -> list[Fact]:
        """At most 500 facts after a `seq`, in order; an empty list when there are none yet."""
        with self._parts.database.read() as session:
            return [_fact(event, external_id) for event, external_id in events.after(session, after, EVENTS_AT_ONCE)]

    def _result(self, task: Task, assets: list[Asset]) -> Result:
        return Result(
            external_task_id=task.external_task_id,
            task_id=task.id,
            provider_task_id=task.provider_task_id,
            state=task.state,
            archive=task.archive,
            expected=task.expected,
            error=task.error,
            note=task.note,
            files=tuple(self._file(asset) for asset in assets),
            is_over=task_view.is_over(task),
        )

    def _file(self, asset: Asset) -> File:
        key = asset.key if asset.state is AssetState.ARCHIVED else None
        return File(
            id=asset.id,
            kind=asset.kind,
            index=asset.index,
            state=asset.state,
            key=key,
            uri=self._parts.bucket.uri(key) if key else None,
            sha256=asset.sha256,
            size=asset.size,
            media_type=asset.media_type,
            error=asset.error,
        )

    def close(self) -> None:
        """Close the connections."""
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fact(event: Event, external_task_id: str | None) -> Fact:
    assert event.seq is not None
    return Fact(event.seq, event_id(event), event.name, event.at, external_task_id, event.data)


class AsyncReceiver:
    """`Receiver` for async callers: each call runs in a thread; cancelling a call leaves the task going on."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    async def submit(self, request: Mapping[str, Any], *, external_task_id: str | None = None) -> Result:
        """See `Receiver.submit`. Give an id of your own: a cancelled call may have asked already."""
        return await asyncio.to_thread(self._receiver.submit, request, external_task_id=external_task_id)

    async def status(self, external_task_id: str) -> Result:
        """See `Receiver.status`."""
        return await asyncio.to_thread(self._receiver.status, external_task_id)

    async def wait(self, external_task_id: str, *, timeout_seconds: float) -> Result:
        """See `Receiver.wait`. Holds no thread while it waits."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while not (result := await self.status(external_task_id)).is_over:
                    await asyncio.sleep(POLL_INTERVAL_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"{external_task_id}: not over after {timeout_seconds:g} s; it goes on") from None
        if not result.is_archived:
            raise NotArchived(result)
        return result

    async def url(self, file: File, *, expires_seconds: int = 3_600) -> str:
        """See `Receiver.url`."""
        return await asyncio.to_thread(self._receiver.url, file, expires_seconds=expires_seconds)

    async def events(self, *, after: int = 0, names: Collection[str] = (), follow: bool = False) -> AsyncIterator[Fact]:
        """See `Receiver.events`."""
        while True:
            found = await asyncio.to_thread(self._receiver.next_events, after)
            for fact in found:
                after = fact.seq
                if not names or fact.name in names:
                    yield fact
            if not found and not follow:
                return
            if not found:
                await asyncio.sleep(POLL_INTERVAL_SECONDS)
