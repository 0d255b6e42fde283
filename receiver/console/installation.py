"""What the console shows and acts on. The wiring makes it."""

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

# A task's own note, and the last action by a person.
_NOTE = re.compile(r"(?:(?P<own>.*) · )?by (?P<deed>[^:]{1,40}: [a-z -]{1,40})", re.S)
MAX_NOTE_CHARS = 400
# Answers a GET with an archived file's bytes or a redirect to a presigned link.
Files = Callable[[Request, UUID], Awaitable[Response]]


class CheckLine(NamedTuple):
    """One line of `receiver check`, without the secrets it offers to paste."""

    name: str
    status: str
    line: str
    advice: str


@dataclass(frozen=True)
class Installation:
    """`check`: runs `receiver check`, takes seconds. `settings`: names and values without secrets. `sinks`: the
    configured sinks. `deadline_seconds`: how close to their deletion the provider's files count as urgent.
    """

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
    """The note of the work, and the last action by a person."""
    found = _NOTE.fullmatch(note or "")
    return (found["own"] or "", found["deed"]) if found else (note or "", "")


def note_person(session: Session, task: Task, person: str, deed: str) -> None:
    """Note a person's action in the task's row behind its own note, until the work writes another. For actions without
    a fact.
    """
    own = split_note(task.note)[0][:MAX_NOTE_CHARS]
    task.note = f"{own} · by {person}: {deed}" if own else f"by {person}: {deed}"
    session.flush()


def log_deed(person: str, deed: str, subject: str) -> None:
    """Log a person's action."""
    log.info("console.action_performed", person=person, deed=deed, subject=subject)
