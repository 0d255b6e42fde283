"""`/console/tasks`: the table. `/console/tasks/{id}`: one task, its pictures and its timeline."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote

from sqlalchemy import func
from sqlalchemy.orm import defer
from sqlmodel import Session, col, select
from starlette.exceptions import HTTPException
from starlette.responses import Response

from receiver.console import catalogue, words
from receiver.console.installation import Installation
from receiver.console.visit import Visit
from receiver.tasks.task_view import is_over
from storage.operations import lists
from storage.rows import events, tasks
from storage.rows.aliases import aliases_of
from storage.rows.models import Asset, Batch, Callback, Event, Task
from storage.states import ArchiveState, AssetState, CallbackState, TaskState

PLAIN_ID = re.compile(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,199}")
# The newest deliveries of a task; the page of deliveries has the others.
SHOWN_DELIVERIES = 200
KINDS = {
    "task.created": "idle", "task.submitted": "run", "task.processing": "run", "task.succeeded": "ok",
    "task.failed": "bad", "task.contradicted": "wait", "task.deadline_near": "bad", "task.archived": "ok",
    "task.incomplete": "bad", "asset.archived": "ok", "asset.failed": "bad", "callback.rejected": "bad",
    "callback.unmatched": "wait",
}  # fmt: skip
DELIVERY_KINDS = {
    CallbackState.APPLIED: "ok", CallbackState.RECEIVED: "run", CallbackState.UNMATCHED: "wait",
    CallbackState.REJECTED: "bad", CallbackState.UNREADABLE: "bad",
}  # fmt: skip
# Fields of a fact that its line does not show.
TOLD = ("external_task_id", "by", "key", "kind", "index", "error", "reason", "note")


@dataclass(frozen=True)
class Moment:
    """One line of the timeline. `detail`: a stranger's text, shown on demand. `link`: a page with more."""

    at: datetime
    kind: str
    says: str
    since: str = ""
    detail: str = ""
    link: str = ""


def path_of(task: Task) -> str:
    """The URL of a task's page. An id that is no plain path segment is replaced by our own id."""
    name = task.external_task_id
    return f"/console/tasks/{quote(name) if PLAIN_ID.fullmatch(name) else task.id}"


class Tasks:
    """The pages without actions; `actions` has those."""

    def __init__(self, of: Installation) -> None:
        self._of = of

    def table(self, visit: Visit) -> Response:
        wanted = lists.read_filter(visit.query)
        with self._of.database.read() as session:
            if found := lists.exact(session, wanted.q, self._of.providers):
                return visit.redirect(path_of(found))
            lead, before = self._of.deadline_seconds, visit.query.get("before")
            page = lists.newest_tasks(session, wanted, before, lead_seconds=lead)
            files = lists.files_of(session, page.rows)
            names = _batch_names(session, page.rows)
        return visit.page(
            "tasks.html", wanted=wanted, rows=page, files=files, batch_names=names, path_of=path_of,
            prompt_of=words.prompt_of, model_of=words.model_of, states=list(TaskState), archives=list(ArchiveState),
            providers=self._of.providers, is_kept=lists.is_kept, files_of_filter=lists.FILES,
        )  # fmt: skip

    def show(self, visit: Visit) -> Response:
        with self._of.database.read() as session:
            task = lists.exact(session, visit.path("id"), self._of.providers)
            if task is None:
                raise HTTPException(404)
            assets = tasks.assets_of(session, task.id)
            facts, deliveries = events.of_task(session, task.id), _deliveries_of(session, task)
            acts = events.acts_of(session, task.id)
            aliases = aliases_of(session, task.id)
            batch = session.get(Batch, task.batch_id) if task.batch_id else None
        return visit.page(
            "task.html", task=task, assets=assets, batch=batch, aliases=aliases, note=task.note,
            is_over=is_over(task), path=path_of(task), is_kept=lists.is_kept, ratio=words.ratio_class,
            timeline=timeline(visit, task, facts, deliveries, acts), uri=self._of.bucket.uri,
            request=words.pretty(task.request) or "", prompt=words.seen(str(task.request.get("prompt") or "")[:20_000]),
            model=words.model_of(task), can_retry=can_retry(task, assets),
        )  # fmt: skip


def can_retry(task: Task, assets: Sequence[Asset]) -> bool:
    """Whether `retry` would do anything."""
    if task.deleted_at is not None or task.archive is ArchiveState.ARCHIVED:
        return False
    failed = any(asset.state is not AssetState.ARCHIVED for asset in assets)
    return failed or task.step is not None or task.archive is ArchiveState.INCOMPLETE or task.state is TaskState.FAILED


def timeline(
    visit: Visit,
    task: Task,
    facts: Sequence[Event],
    deliveries: Sequence[tuple[Callback, int]],
    acts: Sequence[Event],
) -> list[Moment]:
    """Everything known to have happened, oldest first, each with the time since the first."""
    found = [_of_fact(visit, fact) for fact in facts] + [_of_delivery(visit, *each) for each in deliveries]
    found += [_of_act(visit, act) for act in acts]
    if task.sent_at and not task.adopt:
        found.append(Moment(task.sent_at, "idle", visit.text("timeline.sent", provider=task.provider)))
    if task.deleted_at:
        found.append(Moment(task.deleted_at, "bad", visit.text("timeline.deleted")))
    found.sort(key=lambda moment: moment.at)
    start = found[0].at if found else task.created_at
    return [
        Moment(
            each.at,
            each.kind,
            each.says,
            f"+{words.seconds((each.at - start).total_seconds())}",
            each.detail,
            each.link,
        )
        for each in found
    ]


def _of_fact(visit: Visit, fact: Event) -> Moment:
    known, data = visit.text(f"event.{fact.name}"), fact.data
    if fact.name.startswith("asset."):
        known = f"{known}: {words.short(str(data.get('kind', '')), 20)} {words.short(str(data.get('index', '')), 8)}"
    why = data.get("reason") or data.get("error") or data.get("note")
    says = f"{known}: {words.short(str(why))}" if why else known
    if person := data.get("by"):
        says = f"{says} · " + visit.text("timeline.by", name=words.short(str(person), 40))
    rest = {name: value for name, value in data.items() if name not in TOLD}
    detail = words.seen(json.dumps(rest, indent=1, ensure_ascii=False, default=str)[:20_000]) if rest else ""
    return Moment(fact.at, KINDS.get(fact.name, "idle"), says, detail=detail)


def _of_act(visit: Visit, act: Event) -> Moment:
    """What a person did: the name, the action, and the reason or result."""
    data = {name: words.short(str(value), 200) for name, value in act.data.items()}
    says = f"{data.get('by', '')}: {catalogue.word(visit.language, 'person', data.get('action', ''))}"
    why = data.get("reason") or data.get("refused") or catalogue.word(visit.language, "found", data.get("found", ""))
    return Moment(act.at, "bad" if data.get("refused") else "idle", f"{says}: {why}" if why else says)


def _of_delivery(visit: Visit, row: Callback, body_bytes: int) -> Moment:
    state = visit.text(f"delivery.{row.state}")
    key = "timeline.callback" if row.source == "push" else "timeline.read"
    says = visit.text(key, state=state, size=words.size(body_bytes))
    says = f"{says}: {words.short(row.reason)}" if row.reason else says
    link = f"/console/deliveries/{row.id}" if row.source == "push" else ""
    return Moment(row.received_at, DELIVERY_KINDS[row.state], says, link=link)


def _deliveries_of(session: Session, task: Task) -> list[tuple[Callback, int]]:
    body = Callback.body
    found = select(Callback, func.length(Callback.body)).options(defer(body, raiseload=True))  # type: ignore[arg-type]
    found = found.where(col(Callback.task_id) == task.id).order_by(col(Callback.id).desc()).limit(SHOWN_DELIVERIES)
    return [(row, size) for row, size in session.execute(found)]


def _batch_names(session: Session, rows: Sequence[Task]) -> dict[object, str]:
    ids = {row.batch_id for row in rows if row.batch_id}
    return dict(session.execute(select(Batch.id, Batch.name).where(col(Batch.id).in_(ids))).all()) if ids else {}
