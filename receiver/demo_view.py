"""What a person sees of the demo: what happens while it happens, what came of it, and where to look next."""

from __future__ import annotations

import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from sqlmodel import col, select

from receiver.wiring import Parts
from storage.events import EventName
from storage.models import Callback, Event, Task
from storage.states import ArchiveState, TaskState

HASH_CHARACTERS = 16  # of 64, enough to compare by eye


@dataclass(frozen=True)
class Wish:
    """One request of the demo: how many objects it must bring and how it must end."""

    external_task_id: str
    request: Mapping[str, Any]
    objects: int
    state: TaskState = TaskState.SUCCEEDED


class Compared(NamedTuple):
    """One picture: `served` and `stored` are SHA-256 as the provider sent it and as the bucket gave it back."""

    kind: str
    index: int
    size: int
    served: str
    stored: str | None


@dataclass(frozen=True)
class Outcome:
    """How a wish ended. `stored`: all objects under its id. `seconds`: callback to last object, None = no callback."""

    wish: Wish
    task: Task
    objects: tuple[Compared, ...]
    stored: int
    seconds: float | None

    @property
    def is_right(self) -> bool:
        wish = self.wish
        archive = ArchiveState.ARCHIVED if wish.objects else ArchiveState.NONE
        ended = (self.task.state, self.task.archive) == (wish.state, archive)
        equal = all(each.served == each.stored for each in self.objects)
        return ended and equal and len(self.objects) == self.stored == wish.objects


class News(NamedTuple):
    at: datetime
    task_id: uuid.UUID
    text: str


class Feed:
    """What is new in the rows since it was last read, in words and in order of time."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._last_event = self._last_callback = 0
        self.archived: dict[uuid.UUID, int] = {}

    def read(self) -> list[News]:
        with self._parts.database.read() as session:
            events = session.exec(select(Event).where(col(Event.id) > self._last_event)).all()
            callbacks = session.exec(select(Callback).where(col(Callback.id) > self._last_callback)).all()
        self._last_event = max((event.id or 0 for event in events), default=self._last_event)
        self._last_callback = max((each.id or 0 for each in callbacks), default=self._last_callback)
        for event in events:
            if event.name == EventName.ASSET_ARCHIVED and event.task_id:
                self.archived[event.task_id] = self.archived.get(event.task_id, 0) + 1
        news = [News(event.at, event.task_id, in_words(event)) for event in events if event.task_id]
        news += [News(each.received_at, each.task_id, self._delivery(each)) for each in callbacks if each.task_id]
        return sorted((each for each in news if each.text), key=lambda each: each.at)

    def _delivery(self, row: Callback) -> str:
        words = {"push": "callback", "poll": "asked the provider"}
        return f"{words[row.source]}: {self._parts.kling.parse(row.body).status}"


def in_words(event: Event) -> str:
    """The sentence for one fact; nothing for facts that the deliveries tell already."""
    named = f"{event.data.get('kind')} {event.data.get('index')}"
    return {
        EventName.TASK_CREATED: "request sent, its row first",
        EventName.ASSET_ARCHIVED: f"{named} is in the bucket",
        EventName.ASSET_FAILED: f"{named} failed: {event.data.get('error')}",
        EventName.TASK_ARCHIVED: "archived, with its manifest.json",
        EventName.TASK_INCOMPLETE: "incomplete",
        EventName.TASK_FAILED: f"failed: {event.data.get('error')}",
    }.get(EventName(event.name), "")


@contextmanager
def watching(
    console: Console, parts: Parts, wishes: Sequence[Wish], names: Mapping[uuid.UUID, str]
) -> Iterator[Callable[[], None]]:
    """Gives a function that shows what is new: in a table that changes in place on a terminal, elsewhere as lines."""
    feed, started = Feed(parts), time.monotonic()
    console.print()
    if not console.is_terminal:
        yield lambda: [_say_news(console, names, each, time.monotonic() - started) for each in feed.read()] and None
        return
    latest: dict[uuid.UUID, str] = {}
    with Live(console=console, refresh_per_second=10) as live:

        def show() -> None:
            latest.update({each.task_id: each.text for each in feed.read()})
            live.update(_progress(wishes, names, feed.archived, latest))

        yield show
