"""The installation that the console shows and changes. The wiring makes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import structlog
from sqlmodel import Session, SQLModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from receiver.base.console_keys import ConsoleKey
from receiver.batch.batch import Batches
from receiver.providers.base import Estimate
from receiver.tasks.operate import Operator
from receiver.tasks.submit import Submitter
from storage.accounts.slots import Slots
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.rows import events

log = structlog.get_logger()

M = TypeVar("M", bound=SQLModel)
# Length of the id that a person acted on; an external id has at most 200 bytes.
MAX_SUBJECT_CHARS = 400
# Answers a GET with an archived file's bytes or a redirect to a presigned link: (request, id, download=…).
Files = Callable[..., Awaitable[Response]]


class CheckLine(NamedTuple):
    """One line of `receiver check`, without the secrets it offers to paste."""

    name: str
    status: str
    line: str
    advice: str


@dataclass(frozen=True)
class Installation:
    """`check`: runs `receiver check`, takes seconds. `settings`: names and values without secrets. `sinks`: the
    configured sinks. `has_made_key`: none was set, and `serve --store` made one. `deadline_seconds`: how close to their
    deletion the provider's files count as urgent.
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
    has_made_key: bool
    is_secure: bool
    thumbnail_folder: Path
    thumbnail_bytes: int


def note_act(
    of: Installation, person: str, action: str, subject: str, task_ids: Collection[UUID | None] = (None,), **data: Any
) -> int:
    """Log what a person did, and store it for the timelines of these tasks. Returns the id of the stored row."""
    log.info("console.action_performed", person=person, action=action, subject=subject)
    with of.database.write() as session:
        return events.record_act(session, person, action, subject[:MAX_SUBJECT_CHARS], task_ids or (None,), **data)


def id_of(text: str) -> UUID:
    """The id in an address or a form. Raises HTTPException 404."""
    try:
        return UUID(text)
    except ValueError:
        raise HTTPException(404) from None


def row_of(session: Session, model: type[M], text: str) -> M:
    """The row of that id. Raises HTTPException 404."""
    if (found := session.get(model, id_of(text))) is None:
        raise HTTPException(404)
    return found
