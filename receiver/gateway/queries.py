"""The gateway's queries, answered from our rows alone. The provider is not asked."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from sqlmodel import Session

from receiver.gateway.answers import Refused, ResponseFormat, bad_parameter, record
from receiver.providers.base import is_storable, plain
from receiver.providers.kling.client import Kling
from storage.database.sessions import Database
from storage.rows import aliases, tasks
from storage.rows.models import Task

# KLING §3. The default of 30 is ours; Kling's is not documented.
MAX_PAGE, MAX_PAGE_SIZE, PAGE_SIZE = 1_000, 500, 30


class Queries:
    """Reads of one database. Safe for threads."""

    def __init__(self, database: Database, response_format: ResponseFormat) -> None:
        self._database = database
        self._response_format = response_format

    def one(self, name: str, of_client: str | None) -> dict[str, Any]:
        """The task with this `task_id` (ours) or `external_task_id`, or Kling's `task_id` of one that was adopted.

        Slashes around the name are a client's own, unless a task is called so. `of_client`: only a task that this
        client asked for; None: any. Raises `Refused`.
        """
        with self._database.read() as session:
            task = _find(session, name) or _find(session, name.strip("/")) if is_storable(name) else None
            if task is None or of_client not in (None, task.client):
                raise _unknown(name)
            return record(task, tasks.assets_of(session, task.id), self._response_format)

    def page(self, params: Mapping[str, str], of_client: str | None) -> list[dict[str, Any]]:
        """One page of the tasks, newest first; past the end it is empty. `of_client`: see `one`. Raises `Refused`."""
        number = _whole(params, "pageNum", MAX_PAGE, 1)
        size = _whole(params, "pageSize", MAX_PAGE_SIZE, PAGE_SIZE)
        with self._database.read() as session:
            found = tasks.newest(session, size, skip=(number - 1) * size, of_client=of_client)
            assets = tasks.assets_of_all(session, [task.id for task in found])
        return [record(task, assets[task.id], self._response_format) for task in found]


def _find(session: Session, name: str) -> Task | None:
    try:
        task_id = uuid.UUID(name)
    except ValueError:
        task_id = None
    is_ours = task_id is not None and str(task_id) == name  # the first spelling counts
    task = session.get(Task, task_id) if is_ours else None
    return task or tasks.by_external_id(session, name) or _adopted(session, name)


def _adopted(session: Session, name: str) -> Task | None:
    """A task that was made before its client used the gateway. The client knows only Kling's id."""
    owner = aliases.by_provider_id(session, Kling.name, name)
    task = session.get(Task, owner) if owner else None
    return task if task is not None and task.adopt else None


def _unknown(name: str) -> Refused:
    return bad_parameter(f"Task not found by id/external id: {plain(name, 200)}")


def _whole(params: Mapping[str, str], name: str, most: int, default: int) -> int:
    """A whole number from 1. An empty one counts as left out."""
    text = params.get(name) or str(default)
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(most)) else 0
    if not 1 <= number <= most:
        raise bad_parameter(f"{name}: must be a whole number from 1 to {most}")
    return number
