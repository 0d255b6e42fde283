"""The receiver as a Python library: submit, wait for the archived files, read events.

    with Receiver() as receiver:                                  # settings as the command line reads them
        task = receiver.submit({"model_name": "kling-v3-omni", "prompt": "a lighthouse"})
        for file in receiver.wait(task.external_task_id, timeout_seconds=3_600).files:
            print(file.uri, file.sha256)

Calls block; `AsyncReceiver(receiver)` wraps one and runs each call in a thread. This module only writes and reads rows:
`receiver serve` or `receiver work` does the work.
"""

from __future__ import annotations

import asyncio
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from receiver.app import process
from receiver.app.wiring import Parts
from receiver.base import config, telemetry
from receiver.events.cloudevents import event_id
from receiver.tasks import task_view
from storage.rows import events
from storage.rows.models import Asset, Event, Task
from storage.states import ArchiveState, AssetState, TaskState

# The same interval as the command line's. Each poll is one indexed read.
POLL_INTERVAL_SECONDS = 0.2
EVENTS_AT_ONCE = 500


class NotArchived(Exception):
    """The task is over and not all of its files are archived. `result`: its state, with the reasons."""

    def __init__(self, result: Result) -> None:
        self.result = result
        reason = result.error or result.note or f"the archive is {result.archive}"
        super().__init__(f"{result.external_task_id}: {reason}")

    def __reduce__(self) -> tuple[type[NotArchived], tuple[Result]]:
        """Python makes it again from its message otherwise. That fails, and a pool of processes waits for ever."""
        return NotArchived, (self.result,)


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
    """The state of a task.

    `state`: created < submitted < processing < failed < succeeded. `archive`: none, archiving, archived, incomplete.
    `error`: the provider's reason. `note`: ours.
    """

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
        """Whether every file that the provider named is archived."""
        return self.archive is ArchiveState.ARCHIVED


@dataclass(frozen=True)
class Fact:
    """One event. `seq` grows in the order of reading; keep it to continue after it.

    `id`: the same as in the CloudEvent that sinks get. It never changes, so it identifies duplicates.
    """

    seq: int
    id: str
    name: str
    at: datetime
    external_task_id: str | None
    data: Mapping[str, Any]


class Receiver:
    """Access to the receiver. Threads may share it. Close it, or use it in a `with`: otherwise it keeps its connections
    until Python removes it.
    """

    def __init__(self, **settings: Any) -> None:
        """`settings`: those that differ from the environment, in lower case and without the prefix `RECEIVER_`.

        Raises `SettingsInvalid` (one line per fault), `SchemaBehind` (the message says what to run), and like every
        call `DatabaseUnavailable`. All of them can be imported from `receiver`.
        """
        found = config.load(**settings)
        telemetry.configure(found.log_level, found.log_format, is_library=True)
        self._parts = Parts(found)
        weakref.finalize(self, self._parts.close).atexit = False  # a thread of the parts would keep them
        self._parts.database.keep_forks_out()
        process.ready_schema(self._parts.database, migrate=self._parts.settings.migrates_on_start)

    def submit(self, request: Mapping[str, Any], *, external_task_id: str | None = None) -> Result:
        """Commit a row for the request, then send it. A worker resolves an unclear answer.

        The same id with the same request sends nothing and returns the existing task, so a caller may repeat after a
        crash. `request`: the provider's fields, as in `receiver submit --request`. `external_task_id` None: a fresh
        UUID; a repeat is a new, paid task. Raises `RequestInvalid` (one line per fault), `Conflict` (another request
        has the id), `ValueError` (the form of the id), `SettingsInvalid` (no credentials of the provider).
        """
        submitted = self._parts.submitter.submit(request, external_task_id=external_task_id)
        return self.status(submitted.task.external_task_id)

    def status(self, external_task_id: str) -> Result:
        """The current state of the task. Raises `LookupError`."""
        task, assets, _ = task_view.find(self._parts.database, external_task_id)
        return self._result(task, assets)

    def wait(self, external_task_id: str, *, timeout_seconds: float) -> Result:
        """Block until all files of the task are archived.

        Raises `NotArchived` when it ends otherwise, `TimeoutError` (the task goes on), `LookupError`.
        """
        deadline = time.monotonic() + timeout_seconds
        while not (result := self.status(external_task_id)).is_over:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"{external_task_id}: {result.state} after {timeout_seconds:g} s; the task continues"
                )
            time.sleep(min(POLL_INTERVAL_SECONDS, left))
        if not result.is_archived:
            raise NotArchived(result)
        return result

    def url(self, file: File, *, expires_seconds: int = 3_600) -> str:
        """A presigned link to an archived file, valid 1 to 604,800 s for everyone who has it.

        Raises `ValueError` for a file that is not archived, `StoreUnavailable` without credentials for the bucket.
        """
        if file.key is None:
            raise ValueError(f"{file.kind} {file.index} is not archived")
        return self._parts.bucket.presigned_get(file.key, expires_seconds=expires_seconds)

    def events(self, *, after: int = 0, names: Collection[str] = (), follow: bool = False) -> Iterator[Fact]:
        """The events after a `seq`, in order. `names`: only these.

        `follow`: wait for more without end; otherwise stop after the last. Workers number events: without a worker
        there are none.
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
        """At most 500 events after a `seq`, in order; an empty list when there are none yet."""
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
    """A `Receiver` for async callers, made from one: `AsyncReceiver(Receiver())`. Close that one at the end.

    Each call runs in a thread; a cancelled call does not cancel the task.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    async def submit(self, request: Mapping[str, Any], *, external_task_id: str | None = None) -> Result:
        """See `Receiver.submit`. Pass an id of your own: a cancelled call may have sent the request."""
        return await asyncio.to_thread(self._receiver.submit, request, external_task_id=external_task_id)

    async def status(self, external_task_id: str) -> Result:
        """See `Receiver.status`."""
        return await asyncio.to_thread(self._receiver.status, external_task_id)

    async def wait(self, external_task_id: str, *, timeout_seconds: float) -> Result:
        """See `Receiver.wait`. Holds no thread while it waits."""
        result = await self.status(external_task_id)  # with a timeout of 0, too
        try:
            async with asyncio.timeout(timeout_seconds):
                while not result.is_over:
                    await asyncio.sleep(POLL_INTERVAL_SECONDS)
                    result = await self.status(external_task_id)
        except TimeoutError:
            raise TimeoutError(
                f"{external_task_id}: not over after {timeout_seconds:g} s; the task continues"
            ) from None
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
