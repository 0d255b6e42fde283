"""The gateway's queries, answered from our rows alone. The provider is not asked."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from sqlmodel import Session

from receiver.gateway.answers import Refused, ResponseFormat, bad_parameter, new_record, record
from receiver.providers.base import is_storable, plain
from receiver.providers.kling.client import Kling
from storage.database.sessions import Database
from storage.rows import aliases, tasks
from storage.rows.models import Task

# KLING §3. The default of 30 is ours; Kling's is not documented.
MAX_PAGE, MAX_PAGE_SIZE, PAGE_SIZE = 1_000, 500, 30
MAX_IDS = 20  # the most ids of one query of `/tasks`


class Queries:
    """Reads of one database. Safe for threads."""

    def __init__(self, database: Database, response_format: ResponseFormat) -> None:
        self._database = database
        self._response_format = response_format

    def one(self, name: str, of_client: str | None) -> dict[str, Any]:
        """The task with this `task_id` (ours) or `external_task_id`, or Kling's `task_id` of an adopted one.

        Slashes around the name are the client's own, unless an id has them. `of_client`: only a task that this client
        asked for; None: any. Raises `Refused`.
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

    def several(self, params: Mapping[str, str], of_client: str | None) -> list[dict[str, Any]]:
        """The tasks of `task_ids`, or of `external_task_ids`, in the order asked for. Unknown ids are left out.

        `of_client`: see `one`. Raises `Refused`.
        """
        by_id, by_external = params.get("task_ids", ""), params.get("external_task_ids", "")
        if bool(by_id) == bool(by_external):
            raise bad_parameter("task_ids or external_task_ids: exactly one of them must be given")
        names = [name for name in dict.fromkeys((by_id or by_external).split(",")) if name and is_storable(name)]
        if len(names) > MAX_IDS:
            raise bad_parameter(f"{'task_ids' if by_id else 'external_task_ids'}: at most {MAX_IDS} ids")
        find = _by_task_id if by_id else tasks.by_external_id
        with self._database.read() as session:
            found = [task for task in (find(session, name) for name in names) if task is not None]
            seen = [task for task in found if of_client in (None, task.client)]
            assets = tasks.assets_of_all(session, [task.id for task in seen])
        return [new_record(task, assets[task.id], self._response_format) for task in seen]


def _find(session: Session, name: str) -> Task | None:
    return _ours(session, name) or tasks.by_external_id(session, name) or _adopted(session, name)


def _by_task_id(session: Session, name: str) -> Task | None:
    return _ours(session, name) or _adopted(session, name)


def _ours(session: Session, name: str) -> Task | None:
    try:
        task_id = uuid.UUID(name)
    except ValueError:
        return None
    return session.get(Task, task_id) if str(task_id) == name else None  # the first spelling counts


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
