"""`/console/ask`: one request from a form, or that of a task again. Its price is shown before it is sent."""

from __future__ import annotations

import base64
import json
import re
import uuid
from typing import Any

from starlette.responses import Response

from receiver.base.visible import short
from receiver.console.installation import Installation, note_act, row_of
from receiver.console.pages.tasks import path_of
from receiver.console.visit import Visit
from receiver.providers.base import ProviderRequest, RequestInvalid
from receiver.tasks.submit import Conflict
from receiver.tasks.task_view import request_of
from storage.rows import events
from storage.rows.models import Task

PLAIN = ("model_name", "prompt", "negative_prompt", "resolution", "aspect_ratio", "result_type")
NUMBERS = ("n", "series_amount")
OTHER = ("images", "more", "external_task_id", "again", "once", "priced")
MAX_REQUEST_CHARS = 8_000


class Ask:
    """The form. The first POST shows the price; the same fields with `step=send` send the request.

    `again`: the id of a task whose request is sent, without a form. `once`: made with the form, so that it sends one
    request once, however often its button is pressed. `priced`: the request whose price was shown; another is not sent.
    """

    def __init__(self, of: Installation) -> None:
        self._of = of

    def form(self, visit: Visit) -> Response:
        if visit.query.get("again") and not visit.query.get("once"):
            return visit.redirect(visit.link(once=uuid.uuid4().hex))  # Back leads to this address, not to a new form
        given = {"once": uuid.uuid4().hex, **visit.query}
        return self._priced(visit, given, []) if given.get("again") else _page(visit, given)

    def send(self, visit: Visit) -> Response:
        given = {name: visit.form.get(name, "").strip() for name in (*PLAIN, *NUMBERS, *OTHER)}
        return self._priced(visit, given, [each.content for each in visit.uploads.values() if each.content])

    def _priced(self, visit: Visit, given: dict[str, str], pictures: list[bytes]) -> Response:
        """Show the price of the request, or send it if this price was shown."""
        task, is_sent = self._task(given), visit.form.get("step") == "send"
        try:
            if is_sent and visit.form.get("uploaded", str(len(pictures))) != str(len(pictures)):
                raise RequestInvalid([visit.text("ask.choose_again")])  # no page can fill a browser's file field
            request = self._of.submitter.parse(task.request if task else fields(given, pictures))
        except RequestInvalid as error:
            return _page(visit, given, task=task, faults=error.faults)
        made_id = str(uuid.uuid5(uuid.NAMESPACE_OID, given["once"] + request.canonical_hash()))
        if is_sent and given["priced"] == made_id:
            return self._send(visit, given, task, request, given.get("external_task_id") or made_id)
        estimate = self._of.estimate([request.wire()])
        warnings = [short(each, 300) for each in request.warnings()]
        warnings += [visit.text("ask.choose_again")] if pictures else []
        given |= {"uploaded": str(len(pictures)), "priced": made_id}
        return _page(visit, given, task=task, estimate=estimate, warnings=warnings)

    def _send(
        self, visit: Visit, given: dict[str, str], task: Task | None, request: ProviderRequest, external_task_id: str
    ) -> Response:
        """Send it with the person's name in its first fact, unless it was sent before."""
        try:
            with events.by(visit.session.name):
                done = self._of.submitter.submit(request, external_task_id=external_task_id)
        except (RequestInvalid, Conflict, ValueError) as error:
            return _page(visit, given, task=task, faults=[str(error)])
        if done.new:
            note_act(self._of, visit.session.name, "submit", done.task.external_task_id, [done.task.id])
        if done.new and task:
            note_act(self._of, visit.session.name, "again", done.task.external_task_id, [task.id])
        visit.say(visit.text("act.submitted" if done.new else "act.submitted_before"))
        return visit.redirect(path_of(done.task))

    def _task(self, given: dict[str, str]) -> Task | None:
        with self._of.database.read() as session:
            return row_of(session, Task, given["again"]) if given.get("again") else None


def _page(visit: Visit, given: dict[str, str], *, faults: list[str] | tuple[str, ...] = (), **shown: Any) -> Response:
    shown = {"task": None, "estimate": None, "warnings": [], **shown}
    shown["request"] = request_of(shown["task"], MAX_REQUEST_CHARS) if shown["task"] else ""
    said = [short(fault, 300) for fault in faults]
    return visit.page("ask.html", status=422 if faults else 200, given=given, faults=said, path_of=path_of, **shown)


def fields(given: dict[str, str], pictures: list[bytes]) -> dict[str, Any]:
    """The form as a request's fields, without empty ones. `pictures`: uploaded ones. Raises `RequestInvalid`."""
    found: dict[str, Any] = {name: given[name] for name in PLAIN if given[name]}
    for name in filter(given.get, NUMBERS):
        found[name] = int(given[name]) if re.fullmatch("[0-9]{1,8}", given[name]) else given[name]
    uploaded = [base64.b64encode(each).decode() for each in pictures]
    if images := given["images"].split() + uploaded:
        found["image_list"] = [{"image": one} for one in images]
    if given["more"]:
        try:
            more = json.loads(given["more"])
        except (ValueError, RecursionError):
            more = None
        if not isinstance(more, dict):
            raise RequestInvalid(["more fields: write a JSON object, {…}"])
        found |= more
    return found
