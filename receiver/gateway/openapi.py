"""The gateway's OpenAPI 3.1 document. Its limits are the constants that the code uses."""

from __future__ import annotations

from typing import Any

from receiver.gateway.creates import DEFAULT_MODEL
from receiver.gateway.queries import MAX_IDS
from receiver.providers.kling.request import (
    ASPECT_RATIOS,
    MAX_INPUTS,
    MAX_ITEMS,
    MAX_PICTURES,
    MAX_PROMPT_CHARS,
    MODELS,
    Model,
)
from receiver.providers.kling.request_images import MAX_URL_CHARS
from storage.states import MAX_FILES

PATH = "/kling/v1/images/omni-image"
TASKS = "/kling/tasks"
Schema = dict[str, Any]


def document(version: str, public_url: str | None) -> dict[str, Any]:
    """`version`: of this program. `public_url`: the server's address, None = the host that served the document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kling-receiver gateway",
            "version": version,
            "description": "Kling's omni-image calls; `code` decides, not the HTTP status. "
            "Everything that Kling itself does not say stands under the key `receiver`.",
        },
        "servers": [{"url": public_url or "/"}],
        "security": [{"key": []}],
        "paths": {
            PATH: {"post": _create(), "get": _list()},
            f"{PATH}/{{id}}": {"get": _one()},
            TASKS: {"get": _several()},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": SCHEMAS,
            "responses": REFUSALS,
        },
    }


def _create() -> dict[str, Any]:
    return {
        "operationId": "createOmniImage",
        "summary": "Ask for pictures",
        "description": "The row is committed first; then the provider's answer is waited for, up to 20 s. "
        "Without a clear one the answer is `submitted`, and the task goes on from its row.",
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "For 24 hours the same key with the same body gets the first answer again.",
                "schema": {"type": "string", "maxLength": 255},
            }
        ],
        "requestBody": {"required": True, "content": _json(_ref("Request"))},
        "responses": _responses("Created", 400, 401, 408, 409, 413, 429, 500, 503, "default", links={"task": THE_TASK}),
    }


def _one() -> dict[str, Any]:
    return {
        "operationId": "getOmniImage",
        "summary": "One task, from our rows",
        "parameters": [
            {
                "name": "id",
                "in": "path",
                "required": True,
                "description": "`task_id` as we gave it, or `external_task_id`",
                "schema": {"type": "string", "minLength": 1},
            }
        ],
        "responses": _responses("Told", 400, 401, 500, 503),
    }


def _list() -> dict[str, Any]:
    return {
        "operationId": "listOmniImages",
        "summary": "All tasks, newest first",
        "parameters": [_number("pageNum", 1_000, 1), _number("pageSize", 500, 30)],
        "responses": _responses("Page", 400, 401, 500, 503),
    }


def _several() -> dict[str, Any]:
    return {
        "operationId": "listTasksById",
        "summary": f"Up to {MAX_IDS} tasks in Kling's new shape; unknown ids are left out",
        "description": "Exactly one of the two is given; an empty one counts as left out. Ids are separated by commas.",
        "parameters": [{"name": name, "in": "query", "schema": STRING} for name in ("task_ids", "external_task_ids")],
        "responses": _responses("Several", 400, 401, 500, 503),
    }


def _number(name: str, most: int, default: int) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return {"name": name, "in": "query", "schema": schema}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _responses(schema: str, *refusals: int | str, **more: Any) -> dict[str, Any]:
    told = {str(status): {"$ref": f"#/components/responses/{status}"} for status in (*refusals, 414, 431)}
    return {"200": {"description": "as asked", "content": _json(_ref(schema)), **more}, **told}


def _refusal(description: str) -> dict[str, Any]:
    return {"description": description, "content": _json(_ref("Refusal"))}


THE_TASK = {"operationId": "getOmniImage", "parameters": {"id": "$response.body#/data/task_id"}}
REFUSALS = {
    "400": _refusal("1200 no JSON object; 1201 a bad parameter, a task not found, or an id that already exists"),
    "401": _refusal("1001 no key; 1002 not a key of this server; 1003 a JWT before, 1004 after its time"),
    "408": _refusal("1200 the body came too slowly"),
    "409": _refusal("1201 the Idempotency-Key was used with another body"),
    "413": _refusal("1201 the body is too long"),
    "414": {"description": "the URL is longer than 2 KiB"},
    "431": {"description": "the head is longer than 16 KiB"},
    "429": _refusal("1302 too fast, 1303 no slots are free: nothing was made, send it again"),
    "500": _refusal("5000 an internal error: look the task up before asking again"),
    "503": _refusal("5001 the database is down or its disk is nearly full: look the task up before asking again"),
    "default": _refusal("a refusal of the provider, passed on with its HTTP status and code"),
}


def _object(required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties}


def _closed(required: str, **properties: Schema) -> Schema:
    """A schema that refuses unknown fields, because they would not be sent upstream."""
    return {**_object(required, **properties), "additionalProperties": False}


def _one_of(words: tuple[str, ...]) -> Schema:
    return {"type": "string", "enum": list(words)}


INTEGER: Schema = {"type": "integer"}
STRING: Schema = {"type": "string"}
# Neither blank nor with NUL.
WORDS: Schema = {"type": "string", "pattern": r"^[^\x00]*[^\x00\s][^\x00]*$"}
MILLISECONDS: Schema = {"type": "integer", "minimum": 0}
DIGITS: Schema = {"type": "string", "pattern": "^[2-9]$"}
# The provider's own example sends unused fields so.
EMPTY: Schema = {"const": ""}
IMAGE: Schema = {
    "type": "string",
    "pattern": r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,4})?(/[!-~]*)?$",
    "maxLength": MAX_URL_CHARS,
    "description": "a URL, or (not in this pattern) a jpg or png picture in Base64: up to 10 MB, sides from 300 px, "
    "ratio 1:2.5 to 2.5:1",
}
CALLBACK_URL: Schema = {
    "type": "string",
    "pattern": r"^https://([a-z0-9]{1,20}\.){1,3}(com|net|org|example)(/[!-~]*)?$",
    "maxLength": MAX_URL_CHARS,
    "description": "public and https (more hosts by RECEIVER_PRIVATE_CALLBACK_HOSTS): is called back in Kling's words",
}


def _optional(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, EMPTY, {"type": "null"}]}


def _inputs(item: Schema, most: int) -> Schema:
    return _optional({"type": "array", "items": item, "maxItems": most})


def _between(low: int, high: int) -> Schema:
    return {**INTEGER, "minimum": low, "maximum": high}


def _request(model: Schema, rules: Model | None) -> Schema:
    """`rules` None: an unknown model, of which only the types and our own bounds are checked."""
    fields = {
        "model_name": model,
        "prompt": {**WORDS, "maxLength": MAX_PROMPT_CHARS} if rules else WORDS,
        "image_list": _inputs(_closed("image", image=IMAGE), MAX_INPUTS if rules else MAX_ITEMS),
        "element_list": _inputs(
            _closed("element_id", element_id=_between(1, 2**63 - 1)), MAX_INPUTS if rules else MAX_ITEMS
        ),
        "resolution": _optional(_one_of(rules.resolutions) if rules else WORDS),
        "n": _optional(_between(1, MAX_PICTURES) if rules else {**INTEGER, "maximum": MAX_FILES}, DIGITS),
        "result_type": _optional(_one_of(rules.result_types) if rules else WORDS),
        "series_amount": _optional(
            _between(2, MAX_PICTURES) if rules else {**INTEGER, "maximum": MAX_FILES}, DIGITS, {"const": "auto"}
        ),
        "aspect_ratio": _optional(_one_of(ASPECT_RATIOS) if rules else WORDS),
        "watermark_info": _optional(_closed("enabled", enabled={"type": "boolean"})),
        "callback_url": _optional(CALLBACK_URL),
        "external_task_id": _optional({"type": "string", "pattern": "^[A-Za-z0-9._~-]{1,200}$"}),
    }
    required = "prompt" if rules is MODELS[DEFAULT_MODEL] else "model_name prompt"
    return {**_object(required, **fields), "additionalProperties": {"enum": ["", [], {}, None]}}


REQUEST: Schema = {
    "description": "image_list and element_list together: at most 10. Empty strings and lists count as left out. "
    f"Without `model_name` it is `{DEFAULT_MODEL}`.",
    "anyOf": [
        _request(_optional({"const": name}) if name == DEFAULT_MODEL else {"const": name}, rules)
        for name, rules in MODELS.items()
    ]
    + [_request({**WORDS, "not": {"enum": list(MODELS)}}, None)],
}

ENVELOPE: dict[str, Schema] = {"code": {"const": 0}, "message": STRING, "request_id": STRING}
STATUS = _one_of(("submitted", "processing", "succeed", "failed"))
WAITING = _object("files since next_try_at", files=INTEGER, since=MILLISECONDS, next_try_at=MILLISECONDS)
OURS = _object(
    "provider_task_id archive", provider_task_id={"type": ["string", "null"]}, archive=STRING, waiting=WAITING
)
TASK: dict[str, Schema] = {
    "task_id": {"type": "string", "format": "uuid"},
    "task_status": STATUS,
    "task_info": _object("", external_task_id=STRING),
    "created_at": MILLISECONDS,
    "updated_at": MILLISECONDS,
    "receiver": OURS,
}
OUTPUT = _object("type url", type={"const": "image"}, url=STRING, watermark_url=STRING, group_id=STRING)
BILL = _object(
    "charge_type package_type amount", charge_type={"const": "unit"}, package_type={"const": "image"}, amount=STRING
)
NEW_TASK = _object(
    "id status message create_time update_time outputs receiver",
    id={"type": "string", "format": "uuid"},
    status=_one_of(("submitted", "processing", "succeeded", "failed")),
    message=STRING, create_time=MILLISECONDS, update_time=MILLISECONDS, external_id=STRING, receiver=OURS,
    outputs={"type": "array", "items": OUTPUT}, billing={"type": "array", "items": BILL},
)  # fmt: skip
PICTURES = {"type": "array", "items": _object("index url", index=INTEGER, url=STRING, watermark_url=STRING)}
RESULT = _object("", result_type=STRING, images=PICTURES, series_images=PICTURES)

SCHEMAS = {
    "Request": REQUEST,
    "Task": _object(
        "task_id task_status task_status_msg task_info created_at updated_at task_result receiver",
        **TASK, task_status_msg=STRING, final_unit_deduction=STRING, task_result=RESULT,
    ),
    "Created": _object(
        "code message request_id data",
        **ENVELOPE, data=_object("task_id task_status task_info created_at updated_at receiver", **TASK),
    ),
    "Told": _object("code message request_id data", **ENVELOPE, data=_ref("Task")),
    "Page": _object("code message request_id data", **ENVELOPE, data={"type": "array", "items": _ref("Task")}),
    "Several": _object("code message request_id data", **ENVELOPE, data={"type": "array", "items": NEW_TASK}),
    "Refusal": _object(
        "code message request_id",
        code={"type": "integer", "minimum": 1_000}, message=STRING, request_id=STRING,
        receiver=_object("refused_by", refused_by={"const": "provider"}),
    ),
}  # fmt: skip
