"""A task of the sandbox, and the shapes in which the provider describes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from receiver.sandbox.checks import Wanted

Status = Literal["submitted", "processing", "succeed", "failed"]
UNITS_PER_PICTURE = {"1k": 8, "2k": 8, "4k": 16}


@dataclass(frozen=True)
class Name:
    """One result file of a task. `kind`: image, series or watermark."""

    kind: str
    index: int


@dataclass
class Task:
    """`slots`: concurrency that it holds until it ends. `alias`: the task_id that a gateway invented for the create
    answer.

    `revision` counts the sets of URLs handed out; `live_from` is the first whose URLs work. `visible_ms`: queries find
    it from then on. `expires`: when the newest links expire, in seconds since 1970.
    """

    id: str
    wanted: Wanted
    origin: str
    slots: int
    fails: bool
    created_ms: int
    updated_ms: int
    visible_ms: int
    picture_bytes: int | None = None
    alias: str | None = None
    status: Status = "submitted"
    message: str = ""
    pictures: int = 0
    expires: int = 0
    revision: int = 0
    live_from: int = 0

    @property
    def key(self) -> str:
        """The caller's id, else the task's own."""
        return self.wanted.external_task_id or self.id

    @property
    def ended(self) -> bool:
        return self.status in ("succeed", "failed")

    def files(self) -> list[Name]:
        kind = "series" if self.wanted.series else "image"
        kinds = [kind, "watermark"] if self.wanted.watermark else [kind]
        return [Name(kind, index) for index in range(self.pictures) for kind in kinds]


# (task, file) → the file's absolute URL
Link = Callable[[Task, Name], str]


def old_record(task: Task, link: Link, *, task_info: bool = True, bare: bool = False) -> dict[str, Any]:
    """The record of `/v1/images/omni-image`. `bare`: without series_images, result_type and watermark_url."""
    record: dict[str, Any] = {
        "task_id": task.id,
        "task_status": task.status,
        "task_status_msg": task.message,
        "created_at": task.created_ms,
        "updated_at": task.updated_ms,
    }
    if task.status == "succeed":
        record["final_unit_deduction"] = units(task)
    if task_info:
        record["task_info"] = info(task)
    if task.status == "succeed" and task.wanted.watermark:
        record["watermark_info"] = {"enabled": True}
    record["task_result"] = _old_result(task, link, bare) if task.status == "succeed" else {}
    return record


def _old_result(task: Task, link: Link, bare: bool) -> dict[str, Any]:
    pictures = [{"index": index, **_urls(task, index, link, with_watermark=not bare)} for index in range(task.pictures)]
    others: dict[str, Any] = {"videos": [], "audios": []}
    if not task.wanted.series:
        return {"images": pictures, **others}
    if bare:
        return {"images": pictures[:1], **others}
    return {"result_type": "series", "images": [], "series_images": pictures, **others}


def _urls(task: Task, index: int, link: Link, *, with_watermark: bool = True) -> dict[str, str]:
    urls = {"url": link(task, Name("series" if task.wanted.series else "image", index))}
    if task.wanted.watermark and with_watermark:
        urls["watermark_url"] = link(task, Name("watermark", index))
    return urls


def new_record(task: Task, link: Link) -> dict[str, Any]:
    """The record of `/tasks`: no index, no series marker."""
    done = task.status == "succeed"
    record: dict[str, Any] = {
        "id": task.id,
        "status": "succeeded" if done else task.status,
        "message": task.message,
        "create_time": task.created_ms,
        "update_time": task.updated_ms,
    }
    if task.wanted.external_task_id:
        record["external_id"] = task.wanted.external_task_id
    count = task.pictures if done else 0
    record["outputs"] = [{"type": "image", **_urls(task, index, link), "group_id": "g1"} for index in range(count)]
    if done:
        record["billing"] = [{"charge_type": "unit", "package_type": "image", "amount": units(task)}]
    return record


def callback_body(task: Task, link: Link, *, shape: str, task_info: bool, bare: bool) -> dict[str, Any]:
    """The body of a callback. `shape`: as in the knob `callback_shape`."""
    if shape == "new":
        return new_record(task, link)
    record = old_record(task, link, task_info=task_info, bare=bare)
    if shape == "old":
        return record
    record.pop("final_unit_deduction", None)
    if shape == "no_task_info":
        return {**record, "task_info": {}}
    filled = {name: value for name, value in record["task_result"].items() if value}
    return {"code": 0, "message": "SUCCEED", "data": {**record, "task_result": filled}}


def create_data(task: Task, *, task_info: bool) -> dict[str, Any]:
    """`data` of the answer to a create."""
    data: dict[str, Any] = {"task_id": task.alias or task.id}
    if task_info:
        data["task_info"] = info(task)
    return {**data, "task_status": "submitted", "created_at": task.created_ms, "updated_at": task.created_ms}


def info(task: Task) -> dict[str, str]:
    return {"external_task_id": task.wanted.external_task_id} if task.wanted.external_task_id else {}


def units(task: Task) -> str:
    return str(UNITS_PER_PICTURE[task.wanted.resolution] * task.pictures)
