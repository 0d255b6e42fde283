"""The demo's output: events while they happen, the results, and the next commands to try."""

from __future__ import annotations

import os
import shlex
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import SecretStr
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from sqlmodel import col, select

from receiver.app.wiring import Parts
from receiver.base.console_keys import parse as parse_console_keys
from receiver.console.access import one_time_token
from storage.rows.events import PERSON_ACTED, EventName
from storage.rows.models import Callback, Event, Task
from storage.states import ArchiveState, TaskState

HASH_CHARACTERS = 16  # the first of 64 digits, enough to compare by eye
README_SECTION = 'README.md, "First real use"'


@dataclass(frozen=True)
class Wish:
    """One request of the demo: the number of objects it must bring, and how it must end."""

    external_task_id: str
    request: Mapping[str, Any]
    objects: int
    state: TaskState = TaskState.SUCCEEDED


@dataclass(frozen=True)
class Compared:
    """One picture. `served` and `stored`: its SHA-256 as the provider sent it and as read from the bucket."""

    kind: str
    index: int
    size: int
    served: str
    stored: str | None

    @property
    def is_equal(self) -> bool:
        return self.served == self.stored


@dataclass(frozen=True)
class Outcome:
    """How a request ended. `stored`: all objects under its id. `seconds`: from callback to last object, None = no
    callback.
    """

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
        equal = all(each.is_equal for each in self.objects)
        return ended and equal and len(self.objects) == self.stored == wish.objects


class News(NamedTuple):
    at: datetime
    external_task_id: str
    text: str


class Feed:
    """New rows since the last read, as sentences in order of time. The demo's database starts empty."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._last_event = self._last_callback = 0
        self._names: dict[uuid.UUID | None, str] = {}
        self.archived: Counter[str] = Counter()

    def read(self) -> list[News]:
        with self._parts.database.read() as session:
            facts = session.exec(select(Event).where(col(Event.id) > self._last_event).order_by(col(Event.id))).all()
            rows = session.exec(select(Callback).where(col(Callback.id) > self._last_callback)).all()
        self._last_event = max((fact.id or 0 for fact in facts), default=self._last_event)
        self._last_callback = max((row.id or 0 for row in rows), default=self._last_callback)
        facts_of_tasks = [fact for fact in facts if fact.name != PERSON_ACTED]
        news = [*map(self._fact, facts_of_tasks), *map(self._delivery, rows)]
        return sorted((each for each in news if each.text), key=lambda each: each.at)

    def _fact(self, fact: Event) -> News:
        if fact.name == EventName.TASK_CREATED:
            self._names[fact.task_id] = fact.data["external_task_id"]
        name = self._names.get(fact.task_id, "")
        self.archived[name] += fact.name == EventName.ASSET_ARCHIVED
        return News(fact.at, name, _in_words(fact))

    def _delivery(self, row: Callback) -> News:
        how = "asked the provider" if row.source == "poll" else "callback"
        return News(row.received_at, self._names.get(row.task_id, ""), f"{how}: {reported(self._parts, row)}")


def reported(parts: Parts, row: Callback) -> TaskState | None:
    """The status in a delivery."""
    return parts.kling.parse(row.body).status


def _in_words(fact: Event) -> str:
    """One event as a sentence; empty for events that deliveries show already."""
    data = fact.data
    file = f"{data.get('kind')} {data.get('index')}"
    sentences = {
        EventName.TASK_CREATED: "request: row committed, then sent",
        EventName.ASSET_ARCHIVED: f"{file} is in the bucket",
        EventName.ASSET_FAILED: f"{file} failed: {data.get('error')}",
        EventName.TASK_ARCHIVED: "archived",
        EventName.TASK_INCOMPLETE: "incomplete",
        EventName.TASK_FAILED: f"failed: {data.get('error')}",
    }
    return sentences.get(EventName(fact.name), "")


class Watch:
    """Shows new rows: on a terminal in a table that changes in place, elsewhere line by line."""

    def __init__(self, console: Console, parts: Parts, wishes: Sequence[Wish]) -> None:
        self._console = console
        self._wishes = wishes
        self._feed = Feed(parts)
        self._started: datetime | None = None
        self._latest: dict[str, str] = {}
        self._live = Live(console=console, refresh_per_second=10)

    def __enter__(self) -> Self:
        print_line(self._console)
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self) -> None:
        """Show what has happened since the last call."""
        for news in self._feed.read():
            self._latest[news.external_task_id] = news.text
            self._started = self._started or news.at
            if not self._console.is_terminal:
                seconds = (news.at - self._started).total_seconds()
                print_line(self._console, f"{seconds:5.1f} s  {news.external_task_id:<18}  {news.text}")
        if self._console.is_terminal:
            self._live.update(self._board())

    def _board(self) -> Table:
        board = Table.grid(padding=(0, 2))
        for wish in self._wishes:
            name = wish.external_task_id
            kept = self._feed.archived[name]
            squares = f"[green]{'■' * kept}[/green]{'□' * (wish.objects - kept)}"
            board.add_row(name, squares, escape(self._latest.get(name, "")))
        return board


def print_line(console: Console, text: str = "") -> None:
    """One line, never wrapped, so that it can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    """All objects with their two hashes, then the tasks."""
    for table in (_object_table(outcomes), _task_table(outcomes)):
        print_line(console)
        console.print(table)
    objects = [each for outcome in outcomes for each in outcome.objects]
    equal, size = sum(each.is_equal for each in objects), sum(each.size for each in objects) / 1e6
    verdict = "every SHA-256 equals" if equal == len(objects) else f"only {equal} SHA-256 equal"
    print_line(console)
    print_line(console, f"{len(objects)} objects, {size:.1f} MB, read back: {verdict} what the provider served.")


def _table(*headings: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=True)
    return table


def _object_table(outcomes: Sequence[Outcome]) -> Table:
    table = _table("object", "SHA-256 served", "SHA-256 in S3", "")
    for outcome in outcomes:
        for each in outcome.objects:
            name = f"{outcome.wish.external_task_id}/{each.kind}-{each.index}"
            stored = (each.stored or "missing")[:HASH_CHARACTERS]
            verdict = "[green]equal[/green]" if each.is_equal else "[red]DIFFERENT[/red]"
            table.add_row(name, each.served[:HASH_CHARACTERS], stored, verdict)
    return table


def _task_table(outcomes: Sequence[Outcome]) -> Table:
    numbers = ("objects", "bytes", "callback to object")
    table = _table("external id", "state", *numbers, right=numbers)
    for outcome in outcomes:
        size = sum(each.size for each in outcome.objects)
        name = outcome.wish.external_task_id
        table.add_row(name, _state(outcome), str(outcome.stored), f"{size:,}", _seconds(outcome))
    return table


def _state(outcome: Outcome) -> str:
    task = outcome.task
    state = str(task.state if task.archive is ArchiveState.NONE else task.archive)
    if not outcome.is_right:
        return f"[red]{state}: WRONG[/red]"
    return f"{state}, as meant" if task.state is TaskState.FAILED else state


def _seconds(outcome: Outcome) -> str:
    if not outcome.objects:
        return "–"
    return "polled" if outcome.seconds is None else f"{outcome.seconds:.2f} s"


def print_kept(console: Console, program: str, settings: Mapping[str, str], log: Path) -> None:
    """Print what can be done while everything stays up, and how to end it."""
    print_line(console, "\nAll of it stays up. Look at it in a browser; the link works once, for ten minutes:\n")
    print_line(console, console_link(settings))
    print_line(console, "\nTo use it from another terminal, paste there:\n")
    for name, value in settings.items():
        print_line(console, f"export {name}={shlex.quote(value)}")
    steps = {
        "one task's timeline": f"{program} status demo-series",
        "one more picture": f"{program} submit --model-name kling-image-o1 --prompt 'a red kite' --wait",
        "the receiver's log": f"tail -f {shlex.quote(str(log))}",
        "the provider's knobs": f"curl {settings['RECEIVER_KLING_BASE_URL']}/sandbox/knobs",
        "with a real key": README_SECTION,
    }
    _print_steps(console, steps)
    print_line(console, f"\nCtrl-C here, or kill {os.getpid()}, ends it.")


def console_link(settings: Mapping[str, str]) -> str:
    """A one-time link that logs in to the console."""
    [key] = parse_console_keys([SecretStr(settings["RECEIVER_CONSOLE_KEYS"])])
    return f"{settings['RECEIVER_PUBLIC_URL']}/console/login?once={one_time_token(key)}"


def print_end(console: Console, directory: Path | None) -> None:
    """Print the end. `directory`: where files were left, None = nowhere."""
    left = f"its log, rows and objects are in {directory}" if directory else "nothing is left"
    print_line(console, f"\nAll of it has ended; {left}.")


def print_next_steps(console: Console, program: str) -> None:
    """Print a newcomer's next steps after a demo that has ended."""
    steps = {
        "look closer": f"{program} demo --keep   (then: the log, {Path(program).name} status)",
        "the provider alone": f"{program} sandbox",
        "with a real key": README_SECTION,
    }
    _print_steps(console, steps)


def _print_steps(console: Console, steps: Mapping[str, str]) -> None:
    print_line(console, "\nNext:")
    width = max(map(len, steps))
    for meaning, step in steps.items():
        print_line(console, f"  {meaning:<{width}}   {step}")
