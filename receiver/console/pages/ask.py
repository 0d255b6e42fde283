"""`/console/ask`: one request from a form, or that of a task again. Its price is shown before it is sent."""

from __future__ import annotations

import base64
import hmac
import json
import re
import uuid
from typing import Any

from starlette.responses import Response

from receiver.base.visible import short
from receiver.console.installation import Installation, note_act, row_of
from receiver.console.pages.tasks import MAX_REQUEST_CHARS, path_of
from receiver.console.visit import Visit, is_short
from receiver.providers.base import ProviderRequest, RequestInvalid
from receiver.tasks.submit import Conflict
from receiver.tasks.task_view import lost_pictures, request_of, with_pictures
from storage.rows import events
from storage.rows.models import Task

PLAIN = ("model_name", "prompt", "negative_prompt", "resolution", "aspect_ratio", "result_type")
NUMBERS = ("n", "series_amount")
FIELDS = (*PLAIN, *NUMBERS, "images", "more", "external_task_id")
MAX_KEPT_CHARS = 200  # of each field, where all together are too long for a page


class Ask:
    """The form. The first POST shows the price; the same fields with `step=send` send the request.

    `again`: the id of a task whose request is sent, without a form. `once`: made with the form, so that it sends one
    request once, however often its button is pressed. `priced`: the request and the id whose price was shown; others
    are not sent.
    """

    def __init__(self, of: Installation) -> None:
        self._of = of

    def form(self, visit: Visit) -> Response:
        again, once = visit.query.get("again", ""), visit.query.get("once", "")
        if again and not hmac.compare_digest(once.encode(), _once(visit, once[:32]).encode()):
            return visit.redirect(visit.link(once=_once(visit)))  # Back leads to this address, not to a new form
        given = {name: visit.query.get(name, "") for name in FIELDS} | {"once": once if again else _once(visit)}
        return self._priced(visit, given | {"again": again}, []) if again else _page(visit, given)

    def send(self, visit: Visit) -> Response:
        given = {name: visit.form.get(name, "").strip() for name in (*FIELDS, "again", "once", "priced")}
        if not is_short(*given.values()):
            kept = {name: value if len(value) <= MAX_KEPT_CHARS else "" for name, value in given.items()}
            return _page(visit, kept, faults=[visit.text("ask.too_long")])
        pictures = [base64.b64encode(each.content).decode() for each in visit.uploads.values() if each.content]
        return self._priced(visit, given, pictures)

    def _priced(self, visit: Visit, given: dict[str, str], pictures: list[str]) -> Response:
        """Show the price of the request, or send it if this price was shown."""
        is_sent = visit.form.get("step") == "send"
        with self._of.database.read() as session:
            task = row_of(session, Task, given["again"]) if given["again"] else None
        try:
            count = str(len(pictures))
            if visit.form.get("uploaded", count) != count and (is_sent or not pictures):
                raise RequestInvalid([visit.text("ask.choose_again")])  # no page can fill a browser's file field
            if task and lost_pictures(task.request) != len(pictures):
                raise RequestInvalid([visit.text("ask.not_kept", n=lost_pictures(task.request))])
            wanted = with_pictures(task.request, pictures) if task else fields(given, pictures)
            request = self._of.submitter.parse(wanted)
        except RequestInvalid as error:
            return _page(visit, given, task=task, faults=error.faults)
        what = "\n".join((given["once"], given["external_task_id"], request.canonical_hash()))
        made_id = str(uuid.uuid5(uuid.NAMESPACE_OID, what))
        if is_sent and given["priced"] == made_id:
            return self._send(visit, given, task, request, given["external_task_id"] or made_id)
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
        visit.say(visit.text("act.submitted" if done.new else "act.submitted_before", n=done.task.expected or 2))
        return visit.redirect(path_of(done.task))


def _page(visit: Visit, given: dict[str, str], *, faults: list[str] | tuple[str, ...] = (), **shown: Any) -> Response:
    shown = {"task": None, "estimate": None, "warnings": [], **shown}
    task = shown["task"]
    shown |= {"request": request_of(task, MAX_REQUEST_CHARS), "lost": lost_pictures(task.request)} if task else {}
    said = [short(fault, 300) for fault in faults]
    return visit.page("ask.html", status=422 if faults else 200, given=given, faults=said, path_of=path_of, **shown)


def _once(visit: Visit, nonce: str = "") -> str:
    """A value for one request of this session. That of another person's link is not taken over."""
    nonce = nonce or uuid.uuid4().hex
    return nonce + hmac.digest(visit.session.csrf.encode(), nonce.encode(), "sha256").hex()


def fields(given: dict[str, str], pictures: list[str]) -> dict[str, Any]:
    """The form as a request's fields, without empty ones. `pictures`: in Base64. Raises `RequestInvalid`."""
    found: dict[str, Any] = {name: given[name] for name in PLAIN if given[name]}
    for name in filter(given.get, NUMBERS):
        found[name] = int(given[name]) if re.fullmatch("[0-9]{1,8}", given[name]) else given[name]
    if images := given["images"].split() + pictures:
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
