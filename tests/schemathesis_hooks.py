"""Hooks of `st run`: rules of a request that no schema can express."""

from __future__ import annotations

import uuid
from typing import Any

import schemathesis

from receiver.providers.kling.request import MAX_INPUTS, MODELS

ANY_MODELS_FIELDS = ("model_name", "prompt", "callback_url", "external_task_id")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """No id twice, not too many inputs together, and for an unknown model nothing that its provider might refuse."""
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(name := body.get("external_task_id"), str) and 0 < len(name) < 100:
        body = {**body, "external_task_id": f"{name}{uuid.uuid4().hex}"}
    if case.meta is not None and case.meta.generation.mode.is_positive:
        images, elements = body.get("image_list") or [], body.get("element_list") or []
        body = {**body, "element_list": elements[: MAX_INPUTS - len(images)]}
        if body.get("model_name") and body["model_name"] not in MODELS:
            body = {field: body[field] for field in ANY_MODELS_FIELDS if field in body}
    case.body = body
