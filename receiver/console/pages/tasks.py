"""`/console/tasks`: the table. `/console/tasks/{id}`: one task, its pictures and its timeline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from urllib.parse import quote

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.responses import Response

from receiver.base.visible import cut, seen, short
from receiver.console import words
from receiver.console.installation import Installation
from receiver.console.visit import Visit, part
from receiver.tasks.task_view import can_retry, is_over, model_of, next_step, prompt_of, request_of, why_not
from storage import filters
from storage.operations import lists
from storage.rows import events, tasks
from storage.rows.aliases import aliases_of
from storage.rows.events import EventName
from storage.rows.models import Asset, Batch, Callback, Dispatch, Event, Task
from storage.rows.task_conditions import is_dismissed
from storage.states import ArchiveState, AssetState, CallbackState, DispatchState, TaskState

PLAIN_ID = re.compile(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,199}")
# The newest deliveries of a task; the page of deliveries has the others. A page has less than 100 kB.
SHOWN_DELIVERIES = 60
FILES_A_PAGE, MOMENTS_A_PAGE = 20, 80
MAX_PROMPT_CHARS, MAX_REQUEST_CHARS = 4_000, 8_000
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
DISPATCH_KINDS = {DispatchState.DUE: "run", DispatchState.DELIVERED: "ok", DispatchState.DEAD: "bad"}
# Fields that the timeline leaves out, because the line itself or the list of files shows them.
TOLD = ("external_task_id", "by", "key", "kind", "index", "error", "reason", "note", "sha256", "size", "media_type")


@dataclass(frozen=True)
class Moment:
    """One line of the timeline. `detail`: text of others, shown on demand. `link`: a page with more. `out`: (kind,
    words) of each sink that gets the event. `order`: among moments of the same time, causes come before effects.
    """

    at: datetime
    kind: str
    says: str
    since: str = ""
    detail: str = ""
    link: str = ""
    out: Sequence[tuple[str, str]] = ()
    order: int = 2


def path_of(task: Task) -> str:
    """The URL of a task's page. An id that is no plain path segment is replaced by our own id."""
    name = task.external_task_id
    return f"/console/tasks/{quote(name) if PLAIN_ID.fullmatch(name) else task.id}"


class Tasks:
    """The pages without actions; `actions` has those."""

    def __init__(self, of: Installation) -> None:
        self._of = of

    def table(self, visit: Visit) -> Response:
        wanted = filters.read_filter(filters.TaskFilter, visit.query, provider=self._of.providers)
        with self._of.database.read() as session:
            if found := lists.exact(session, wanted.q, self._of.providers):
                return visit.redirect(path_of(found))
            lead, before = self._of.deadline_seconds, visit.query.get("before")
            page = lists.newest_tasks(session, wanted, before, lead_seconds=lead)
            files = tasks.assets_of_all(session, [task.id for task in page.rows])
            names = lists.batch_names(session, page.rows)
        return visit.page(
            "tasks.html", wanted=wanted, rows=page, files=files, batch_names=names, path_of=path_of,
            prompt_of=prompt_of, model_of=model_of, states=list(TaskState), archives=list(ArchiveState),
            providers=self._of.providers, is_kept=lists.is_kept, files_of_filter=filters.FILES, why_not=why_not,
        )  # fmt: skip

    def show(self, visit: Visit) -> Response:
        with self._of.database.read() as session:
            task = lists.exact(session, visit.path("id"), self._of.providers)
            if task is None:
                raise HTTPException(404)
            assets = tasks.assets_of(session, task.id)
            facts = events.of_task(session, task.id)
            deliveries = lists.deliveries_of(session, task, SHOWN_DELIVERIES)
            acts = events.acts_of(session, task.id)
            out = lists.dispatches_of(session, facts)
            aliases = aliases_of(session, task.id)
            batch = session.get(Batch, task.batch_id) if task.batch_id else None
        moments = timeline(visit, task, facts, deliveries, out)
        moments += [_of_act(visit, act) for act in acts]
        moments += [each for asset in assets for each in _of_tries(visit, asset)]
        ordered = in_order(moments, task.created_at, visit.language)
        return visit.page(
            "task.html", task=task, files=part(visit, "from", assets, FILES_A_PAGE), count=len(assets), batch=batch,
            aliases=aliases, next=next_step(self._of.database, task, assets), is_over=is_over(task),
            path=path_of(task), is_kept=lists.is_kept, ratio=words.ratio_class, uri=self._of.bucket.uri,
            request=request_of(task, MAX_REQUEST_CHARS), model=model_of(task), can_retry=can_retry(task, assets),
            timeline=part(visit, "moment", ordered, MOMENTS_A_PAGE, newest=True), is_dismissed=is_dismissed(task),
            prompt=seen(cut(str(task.request.get("prompt") or ""), MAX_PROMPT_CHARS)),
        )  # fmt: skip


def timeline(
    visit: Visit,
    task: Task,
    facts: Sequence[Event],
    deliveries: Sequence[tuple[Callback, int]],
    out: Mapping[int, Sequence[Dispatch]],
) -> list[Moment]:
    """The timeline: all events, deliveries, tries and acts that are stored for the task."""
    found = [_of_fact(visit, task, fact, out.get(fact.id or 0, ())) for fact in facts]
    found += [_of_delivery(visit, *each) for each in deliveries]
    if task.sent_at and not task.adopt:
        found.append(Moment(task.sent_at, "idle", visit.text("timeline.sent", provider=task.provider), order=1))
    if task.deleted_at:
        found.append(Moment(task.deleted_at, "bad", visit.text("timeline.deleted")))
    return found


def in_order(found: Sequence[Moment], start: datetime, language: str) -> list[Moment]:
    """Oldest first, each with the time since the first."""
    ordered = sorted(found, key=lambda moment: (moment.at, moment.order))
    start = ordered[0].at if ordered else start
    return [replace(each, since=f"+{words.seconds((each.at - start).total_seconds(), language)}") for each in ordered]


def _because(visit: Visit, says: str, why: object) -> str:
    return Markup("{}: {}").format(says, visit.cause(str(why))) if why else says


def _of_tries(visit: Visit, asset: Asset) -> Iterator[Moment]:
    """The failed tries of a file, and when it is tried again."""
    name = f"{visit.word('kind', asset.kind)} {asset.index}"
    for each in asset.failed_tries or ():
        says = visit.text("timeline.try", name=name)
        yield Moment(datetime.fromisoformat(each["at"]), "wait", _because(visit, says, each["error"]))
    if asset.state is AssetState.DUE and asset.due_at and asset.error:
        says = visit.text("timeline.tries", name=name, n=max(asset.attempts, asset.unusable_tries, 1))
        yield Moment(asset.due_at, "next", _because(visit, says, asset.error))


def _of_dispatch(visit: Visit, row: Dispatch) -> tuple[str, str]:
    """A sink, whether it accepted the event, and otherwise its last answer."""
    says = short(row.sink, 40)
    if row.state is not DispatchState.DELIVERED:
        says = _because(visit, says, row.error or visit.word("dispatch", row.state))
    tries = visit.text("events.tried", n=row.tries)
    return DISPATCH_KINDS[row.state], Markup("{} ({})").format(says, tries) if row.tries > 1 else says


def _of_fact(visit: Visit, task: Task, fact: Event, out: Sequence[Dispatch]) -> Moment:
    known, data = visit.word("event", fact.name), fact.data
    if fact.name.startswith("asset."):
        kind = visit.word("kind", short(str(data.get("kind", "")), 20))
        known = f"{known}: {kind} {short(str(data.get('index', '')), 8)}"
    why = data.get("reason") or data.get("error") or data.get("note")
    says = _because(visit, known, why)
    if person := data.get("by"):
        says = Markup("{} · {}").format(says, visit.text("timeline.by", name=short(str(person), 40)))
    rest = {name: value for name, value in data.items() if name not in TOLD}
    detail = seen(json.dumps(rest, indent=1, ensure_ascii=False, default=str)[:2_000]) if rest else ""
    told = [_of_dispatch(visit, each) for each in out]
    at, order = fact.at, 3
    if fact.name == EventName.TASK_CREATED:  # recorded some milliseconds after the row's own times
        at, order = fact.at if task.adopt else min(fact.at, task.sent_at or fact.at), 0
    return Moment(at, KINDS.get(fact.name, "idle"), says, detail=detail, out=told, order=order)


def _of_act(visit: Visit, act: Event) -> Moment:
    """An act of a person: the name, the action, and the reason or result."""
    data = {name: short(str(value), 200) for name, value in act.data.items()}
    says = f"{data.get('by', '')}: {visit.word('person', data.get('action', ''))}"
    why = data.get("reason") or data.get("refused") or visit.word("found", data.get("found", ""))
    return Moment(act.at, "bad" if data.get("refused") else "idle", _because(visit, says, why))


def _of_delivery(visit: Visit, row: Callback, body_bytes: int) -> Moment:
    state = visit.text(f"delivery.{row.state}")
    key = "timeline.callback" if row.source == "push" else "timeline.read"
    says = visit.text(key, state=state, size=words.size(body_bytes))
    link = f"/console/deliveries/{row.id}" if row.source == "push" else ""
    return Moment(row.received_at, DELIVERY_KINDS[row.state], _because(visit, says, row.reason), link=link)
