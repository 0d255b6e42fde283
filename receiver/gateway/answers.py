"""Our rows as Kling's records: the answers of the gateway, and the bodies of client callbacks.

Pure functions without I/O and clock. Fields that Kling does not have are under the one key `receiver`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from storage.errors import AccountRefused, ProviderRejected, ProviderThrottled
from storage.rows.events import EventName
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState, TaskState

Status = Literal["submitted", "processing", "succeed", "failed"]
Results = Literal["archived", "provider"]

STATUS_OF_STATE: dict[TaskState, Status] = {
    TaskState.CREATED: "submitted",
    TaskState.SUBMITTED: "submitted",
    TaskState.PROCESSING: "processing",
    TaskState.FAILED: "failed",
    TaskState.SUCCEEDED: "succeed",
}
# As in storage.states: only a late success may contradict an earlier status.
RANK: dict[Status, int] = {"submitted": 0, "processing": 1, "failed": 2, "succeed": 3}
RETRY_AFTER_SECONDS = 5
USUAL_CODES = {401: 1002, 402: 1102, 403: 1103, 404: 1203}
# Events that the provider reported.
STATUS_OF_EVENT: dict[str, Status] = {
    EventName.TASK_SUBMITTED: "submitted",
    EventName.TASK_PROCESSING: "processing",
    EventName.TASK_SUCCEEDED: "succeed",
    EventName.TASK_FAILED: "failed",
}
# Events that happen again after a retry or a repair, and when a task is dismissed that never succeeded.
ENDS_OF_ARCHIVE = frozenset({EventName.TASK_ARCHIVED, EventName.TASK_INCOMPLETE})


@dataclass(frozen=True)
class ResponseFormat:
    """The form of results.

    `results`: `archived` = a task is `processing` until its pictures are archived; `provider` = it succeeds when the
    provider says so. `link`: the lasting link to an archived file; None without a public URL.
    """

    results: Results
    link: Callable[[Asset], str | None]


def record(task: Task, assets: Sequence[Asset], response_format: ResponseFormat) -> dict[str, Any]:
    """The task as a query answers it, from its current rows. It contains result links, so it is a secret."""
    status = status_of(task, response_format.results)
    return _record(task, assets, status, _changed_at(task, status, response_format.results), response_format)


def new_record(task: Task, assets: Sequence[Asset], response_format: ResponseFormat) -> dict[str, Any]:
    """The task as `/tasks` answers it: the contents of `record` in Kling's new shape (KLING §4)."""
    old = record(task, assets, response_format)
    done = old["task_status"] == "succeed"
    told: dict[str, Any] = {
        "id": old["task_id"],
        "status": "succeeded" if done else old["task_status"],
        "message": old["task_status_msg"],
        "create_time": old["created_at"],
        "update_time": old["updated_at"],
        "outputs": list(_outputs(task, old["task_result"])),
        "receiver": old["receiver"],
    }
    if old["task_info"]:
        told["external_id"] = old["task_info"]["external_task_id"]
    if "final_unit_deduction" in old:
        told["billing"] = [{"charge_type": "unit", "package_type": "image", "amount": old["final_unit_deduction"]}]
    return told


def _outputs(task: Task, result: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The pictures in order, without their index. Those of a series have `group_id`."""
    group = {"group_id": str(task.id)} if task.series else {}
    for picture in (*result.get("images", ()), *result.get("series_images", ())):
        yield {"type": "image", **{name: text for name, text in picture.items() if name != "index"}, **group}


def created(task: Task, status: Status = "submitted") -> dict[str, Any]:
    """`data` of the answer to a create. Kling always answers `submitted`, however quick the task is."""
    made_ms = _ms(task.created_at)
    return {
        "task_id": str(task.id),
        "task_status": status,
        "task_info": _info(task),
        "created_at": made_ms,
        "updated_at": made_ms,
        "receiver": _ours(task),
    }


def callback_body(
    task: Task,
    assets: Sequence[Asset],
    event_name: str,
    *,
    at: datetime,
    earlier: Sequence[str],
    response_format: ResponseFormat,
) -> bytes | None:
    """The body of the callback about one event; None if the event tells the client nothing new.

    It is a bare record of the old shape (KLING §4) with the status of the event, whatever has happened since. Each
    status is sent once and in rising order, so a repair's second `task.archived` sends nothing. With `results`
    archived, `task.succeeded` is sent as `processing`, and the one `succeed` is `task.archived` or `task.incomplete`.

    `at`: when the event happened. `earlier`: the names of all earlier events of this task, oldest first. `assets`: in
    their current state. The bytes contain result links: never log them. The same arguments give the same bytes.
    """
    *before, status = _statuses_told([*_since_created(earlier), event_name], response_format.results)
    if status is None or RANK[status] <= max((RANK[told] for told in before if told), default=-1):
        return None
    return json.dumps(_record(task, assets, status, at, response_format), ensure_ascii=False).encode()


def _since_created(event_names: Sequence[str]) -> Sequence[str]:
    """The events since the last create under this id, without those of an earlier, refused create."""
    created_at = [number for number, name in enumerate(event_names) if name == EventName.TASK_CREATED]
    return event_names[created_at[-1] :] if created_at else event_names


def _statuses_told(event_names: Sequence[str], results: Results) -> Iterator[Status | None]:
    """The status that each event reports to a client; None if none."""
    succeeded = False
    for name in event_names:
        succeeded = succeeded or name == EventName.TASK_SUCCEEDED
        if name in ENDS_OF_ARCHIVE:
            yield "succeed" if succeeded else None
        elif name == EventName.TASK_SUCCEEDED and results == "archived":
            yield "processing"
        else:
            yield STATUS_OF_EVENT.get(name)


def status_of(task: Task, results: Results) -> Status:
    """The status of the task's rows. It never goes back: a task that was archived once stays `succeed` during a
    repair.
    """
    if task.state is TaskState.SUCCEEDED and results == "archived" and not _is_settled(task):
        return "processing"
    return STATUS_OF_STATE[task.state]


def _is_settled(task: Task) -> bool:
    ended = task.archive in (ArchiveState.ARCHIVED, ArchiveState.INCOMPLETE)
    return ended or task.archived_at is not None or task.deleted_at is not None


def _changed_at(task: Task, status: Status, results: Results) -> datetime:
    moments = {
        "submitted": task.submitted_at,
        "processing": task.completed_at or task.reported_at,
        "succeed": (task.archived_at if results == "archived" else None) or task.completed_at,
        "failed": task.completed_at,
    }
    return moments[status] or task.created_at


def _record(
    task: Task, assets: Sequence[Asset], status: Status, changed_at: datetime, response_format: ResponseFormat
) -> dict[str, Any]:
    done = status == "succeed"
    told: dict[str, Any] = {
        "task_id": str(task.id),
        "task_status": status,
        "task_status_msg": (task.error or "") if status == "failed" else "",
        "task_info": _info(task),
        "created_at": _ms(task.created_at),
        "updated_at": _ms(changed_at),
        "task_result": _result(task, assets, response_format) if done else {},
        "receiver": _ours(task, assets),
    }
    if done and task.units is not None:
        told["final_unit_deduction"] = task.units
    return told


def _info(task: Task) -> dict[str, str]:
    """Kling gives no external id if the caller gave none. Ours is the task's own id then (see receiver.gateway)."""
    own = task.external_task_id == str(task.id)
    return {} if own else {"external_task_id": task.external_task_id}


def _ours(task: Task, assets: Sequence[Asset] = ()) -> dict[str, Any]:
    """`waiting`: present while unusable files are tried again. Without it an incomplete archive is final."""
    ours: dict[str, Any] = {"provider_task_id": task.provider_task_id, "archive": task.archive.value}
    waiting = [(asset.unusable_since, asset.due_at) for asset in assets if asset.unusable_since and asset.due_at]
    if waiting:
        since, next_try_at = (_ms(min(moments)) for moments in zip(*waiting, strict=True))
        ours["waiting"] = {"files": len(waiting), "since": since, "next_try_at": next_try_at}
    return ours


def _result(task: Task, assets: Sequence[Asset], response_format: ResponseFormat) -> dict[str, Any]:
    kind = "series" if task.series else "image"
    watermarked = {asset.index: asset for asset in assets if asset.kind == "watermark" and asset.original == kind}
    pictures = [
        _picture(asset, watermarked.get(asset.index), response_format)
        for asset in sorted(assets, key=lambda each: each.index)
        if asset.kind == kind
    ]
    others: dict[str, Any] = {"videos": [], "audios": []}
    if task.series:
        return {"result_type": "series", "images": [], "series_images": pictures, **others}
    return {"result_type": "single", "images": pictures, "series_images": [], **others}


def _picture(asset: Asset, watermarked: Asset | None, response_format: ResponseFormat) -> dict[str, Any]:
    told: dict[str, Any] = {"index": asset.index, "url": _url(asset, response_format)}
    if watermarked is not None:
        told["watermark_url"] = _url(watermarked, response_format)
    return told


def _url(asset: Asset, response_format: ResponseFormat) -> str:
    """Our link for an archived file, else the provider's."""
    link = response_format.link(asset) if asset.state is AssetState.ARCHIVED and asset.key else None
    return link or asset.source_url


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


# -- envelopes (KLING §2, §6) -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """One HTTP answer. `after`: seconds until the client should send it again."""

    http_status: int
    body: dict[str, Any] = field(repr=False)
    after: int | None = None


class Refused(Exception):
    """The gateway's refusal in Kling's format. `by_provider`: the message is the provider's own."""

    def __init__(
        self, http_status: int, code: int, message: str, *, after: int | None = None, by_provider: bool = False
    ) -> None:
        super().__init__(f"{code} {message}")
        self.http_status, self.code, self.message = http_status, code, message
        self.after, self.by_provider = after, by_provider

    def reply(self, request_id: str) -> Reply:
        body: dict[str, Any] = {"code": self.code, "message": self.message, "request_id": request_id}
        if self.by_provider:
            body["receiver"] = {"refused_by": "provider"}
        return Reply(self.http_status, body, self.after)


def success(data: Any, request_id: str) -> Reply:
    return Reply(200, {"code": 0, "message": "SUCCEED", "request_id": request_id, "data": data})


def bad_parameter(message: str) -> Refused:
    return Refused(400, 1201, message)


def away(why: str = "") -> Refused:
    """No row was made, as far as we know. `why`: the reason, if the client may see it."""
    return Refused(503, 5001, f"Server temporarily unavailable{why and ': '}{why}", after=RETRY_AFTER_SECONDS)


def too_fast(message: str) -> Refused:
    """Nothing was made. The client may send it again soon."""
    return Refused(429, 1302, message, after=1)


def already_exists(external_task_id: str) -> Refused:
    return bad_parameter(f"External_task_id {external_task_id} already exists")


def passed_on(refusal: ProviderRejected | ProviderThrottled) -> Refused:
    """The provider's refusal with its HTTP status and code. Without a code, the closest one of KLING §6."""
    status, code = refusal.http_status, refusal.code
    if status is None:  # Not the provider's answer: we have no credentials for it.
        return Refused(401, 1000, str(refusal))
    # A 403 that refuses the account is of an empty balance, like a 402.
    is_balance = status == 403 and isinstance(refusal, AccountRefused)
    usual = 1302 if status == 429 else USUAL_CODES.get(402 if is_balance else status, 1201)
    after = math.ceil(refusal.after) if isinstance(refusal, ProviderThrottled) and refusal.after else None
    return Refused(status, code or usual, refusal.said or str(refusal), after=after, by_provider=True)
