"""What the console shows and acts on, put together by the wiring."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import structlog
from sqlmodel import Session
from starlette.requests import Request
from starlette.responses import Response

from receiver.base.console_keys import ConsoleKey
from receiver.batch.batch import Batches
from receiver.providers.base import Estimate
from receiver.tasks.operate import Operator
from receiver.tasks.submit import Submitter
from storage.accounts.slots import Slots
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.rows.models import Task

log = structlog.get_logger()

# A task's own note, and who did what last.
_NOTE = re.compile(r"(?:(?P<own>.*) · )?by (?P<deed>[^:]{1,40}: [a-z -]{1,40})", re.S)
MAX_NOTE_CHARS = 400
# Answers a GET with an archived file's bytes, or with a redirect to a presigned link.
Files = Callable[[Request, UUID], Awaitable[Response]]


class CheckLine(NamedTuple):
    """One line of `receiver check`, without what it says to paste."""

    name: str
    status: str
    line: str
    advice: str


@dataclass(frozen=True)
class Installation:
    """`check`: what `receiver check` says, takes seconds. `settings`: names and values, no secret among them.
    `sinks`: where events are configured to go. `deadline_seconds`: how near the end of a provider's files is near."""

    database: Database
    bucket: Bucket
    operator: Operator
    batches: Batches
    submitter: Submitter
    slots: Slots
    keys: Sequence[ConsoleKey]
    estimate: Callable[[Iterable[Mapping[str, Any]]], Estimate]
    check: Callable[[], Sequence[CheckLine]]
    settings: Mapping[str, str]
    sinks: Collection[str]
    providers: Sequence[str]
    deadline_seconds: float
    usd_per_unit: float
    is_secure: bool
    thumbnail_folder: Path
    thumbnail_bytes: int


def split_note(note: str | None) -> tuple[str, str]:
    """The note as the work left it, and who did what last."""
    found = _NOTE.fullmatch(note or "")
    return (found["own"] or "", found["deed"]) if found else (note or "", "")


def note_person(session: Session, task: Task, person: str, deed: str) -> None:
    """Keep with a task who did what, where no fact says so: behind its own note, until the work writes another."""
    own = split_note(task.note)[0][:MAX_NOTE_CHARS]
    task.note = f"{own} · by {person}: {deed}" if own else f"by {person}: {deed}"
    session.flush()


def log_deed(person: str, deed: str, subject: str) -> None:
    """One line for each thing that a person did."""
    log.info("console.deed", person=person, deed=deed, subject=subject)
