"""`/console/ask`: one request from a form. The price is shown before it is sent, the task after it."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from starlette.responses import Response

from receiver.console import words
from receiver.console.installation import Installation
from receiver.console.pages.actions import submit
from receiver.console.pages.tasks import path_of
from receiver.console.visit import Visit
from receiver.providers.base import RequestInvalid

PLAIN = ("model_name", "prompt", "negative_prompt", "resolution", "aspect_ratio", "result_type")
NUMBERS = ("n", "series_amount")
OTHER = ("images", "more", "external_task_id")


class Ask:
    """The form. The first POST shows the price; the same fields with `step=send` send the request."""

    def __init__(self, of: Installation) -> None:
        self._of = of

    def form(self, visit: Visit) -> Response:
        return visit.page("ask.html", given=visit.query, faults=[], estimate=None, warnings=[])

    def send(self, visit: Visit) -> Response:
        given = {name: visit.form.get(name, "").strip() for name in (*PLAIN, *NUMBERS, *OTHER)}
        pictures = [each.content for each in visit.uploads.values() if each.content]
        is_sent = visit.form.get("step") == "send"
        try:
            if is_sent and visit.form.get("uploaded", str(len(pictures))) != str(len(pictures)):
                raise RequestInvalid([visit.text("ask.choose_again")])  # no page can fill a browser's file field
            request = self._of.submitter.parse(fields(given, pictures))
        except RequestInvalid as error:
            faults = [words.short(fault, 300) for fault in error.faults]
            return visit.page("ask.html", status=422, given=given, faults=faults, estimate=None, warnings=[])
        if is_sent:
            made = submit(self._of, visit, request, given["external_task_id"] or None)
            return visit.redirect(path_of(made) if made else "/console/ask")
        estimate = self._of.estimate([request.wire()])
        warnings = [words.short(each, 300) for each in request.warnings()]
        warnings += [visit.text("ask.choose_again")] if pictures else []
        given["uploaded"] = str(len(pictures))
        return visit.page("ask.html", given=given, faults=[], estimate=estimate, warnings=warnings)


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
