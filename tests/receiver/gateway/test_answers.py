"""Rows in Kling's format: the shapes of its recorded answers, and each status sent once."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from receiver.gateway.answers import ResponseFormat, Results, callback_body, created, new_record, record, status_of
from receiver.gateway.client_callback import events
from receiver.providers.kling.report import read_report
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState, TaskState
from tests.harness import PAYLOADS

RECORDED = PAYLOADS
AT = datetime(2026, 11, 23, 5, 0, tzinfo=UTC)
URL = "https://p4-fdl.klingai.com/s.png?Signature=x"
ALL_ARCHIVED = [
    "task.created",
    "task.submitted",
    "task.processing",
    "task.succeeded",
    "asset.archived",
    "task.archived",
]


def response_format(results: Results = "archived", *, public: bool = True) -> ResponseFormat:
    return ResponseFormat(
        results, lambda asset: f"https://me.example/assets/{asset.kind}-{asset.index}" if public else None
    )


def task(state: TaskState = TaskState.SUCCEEDED, archive: ArchiveState = ArchiveState.ARCHIVED, **values: Any) -> Task:
    start = {"external_task_id": "order-1", "provider": "kling", "provider_task_id": "901", "created_at": AT}
    return Task(**{**start, "id": uuid.UUID(int=7), "state": state, "archive": archive, **values})


def asset(index: int = 0, state: AssetState = AssetState.ARCHIVED, kind: str = "image", original: str = "") -> Asset:
    key = f"{kind}-{index}.png" if state is AssetState.ARCHIVED else None
    return Asset(
        id=uuid.uuid4(), task_id=uuid.UUID(int=7), kind=kind, index=index, original=original, source_url=URL,
        state=state, key=key, created_at=AT,
    )  # fmt: skip


def bodies(names: list[str], results: Results = "archived", row: Task | None = None) -> dict[int, dict[str, Any]]:
    """The status of each event's callback, by the event's position."""
    shown = (
        callback_body(row or task(), [asset()], name, at=AT + timedelta(seconds=place), earlier=names[:place],
                      response_format=response_format(results))
        for place, name in enumerate(names)
    )  # fmt: skip
    return {place: json.loads(body) for place, body in enumerate(shown) if body is not None}


def statuses(names: list[str], results: Results = "archived", row: Task | None = None) -> dict[int, str]:
    return {place: body["task_status"] for place, body in bodies(names, results, row).items()}


# -- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single", "series-watermarked", "failed", "processing"])
def test_record_has_the_shape_of_the_recorded_answer(name: str) -> None:
    wanted = json.loads((RECORDED / f"callback-{name}.json").read_text())
    ended = {"single": TaskState.SUCCEEDED, "failed": TaskState.FAILED, "processing": TaskState.PROCESSING}
    series = name.startswith("series")
    row = task(
        ended.get(name, TaskState.SUCCEEDED), external_task_id=wanted["task_info"]["external_task_id"], series=series,
        error=wanted["task_status_msg"] or None, units=wanted.get("final_unit_deduction"),
    )  # fmt: skip
    pictures = wanted["task_result"].get("series_images" if series else "images", [])
    kind = "series" if series else "image"
    assets = [asset(each["index"], kind=kind) for each in pictures]
    assets += [asset(each["index"], kind="watermark", original=kind) for each in pictures if "watermark_url" in each]
    shown = record(row, assets[::-1], response_format())
    assert set(shown) - {"receiver"} == set(wanted) - {"watermark_info"}
    # Fields of Kling's own queries, which the recorded callback lacks.
    more = {"result_type": "single", "series_images": []} if name == "single" else {}
    assert shape(shown["task_result"]) == shape({**wanted["task_result"], **more})
    same = ("task_status", "task_status_msg", "task_info")
    assert {field: shown[field] for field in same} == {field: wanted[field] for field in same}


def test_new_shape_has_the_same_contents_and_is_parsed_by_our_reader() -> None:
    row = task(series=True, units="16", completed_at=AT)
    assets = [asset(0, kind="series"), asset(1, kind="series"), asset(0, kind="watermark", original="series")]
    shown = new_record(row, assets, response_format())
    report = read_report(shown)
    assert (report.provider_task_id, report.external_task_id) == (str(row.id), "order-1")
    assert (report.status, report.units, len(report.outputs)) == (TaskState.SUCCEEDED, "16", 2)
    assert [output["url"].rsplit("/", 1)[1] for output in shown["outputs"]] == ["series-0", "series-1"]
    assert shown["outputs"][0]["watermark_url"].endswith("/watermark-0")
    assert {output["group_id"] for output in shown["outputs"]} == {str(row.id)}


def shape(document: Any) -> Any:
    if isinstance(document, dict):
        return {name: shape(value) for name, value in document.items()}
    if isinstance(document, list):
        return [shape(value) for value in document]
    return document if isinstance(document, int) else type(document)


def test_our_own_fields_are_under_one_key() -> None:
    shown = record(task(), [asset()], response_format())
    assert shown["receiver"] == {"provider_task_id": "901", "archive": "archived"}
    assert (shown["task_id"], created(task())["task_id"]) == (str(uuid.UUID(int=7)),) * 2


@pytest.mark.parametrize("state", [AssetState.DUE, AssetState.FAILED])
def test_a_picture_that_is_not_kept_has_the_providers_address(state: AssetState) -> None:
    shown = record(task(archive=ArchiveState.INCOMPLETE), [asset(0), asset(1, state)], response_format())
    urls = [picture["url"] for picture in shown["task_result"]["images"]]
    assert urls == ["https://me.example/assets/image-0", URL]


def test_the_providers_addresses_stay_without_a_public_url() -> None:
    shown = record(task(), [asset()], response_format(public=False))
    assert shown["task_result"]["images"][0]["url"] == URL


def test_an_id_that_is_the_rows_own_is_not_shown() -> None:
    assert record(task(external_task_id=str(uuid.UUID(int=7))), [], response_format())["task_info"] == {}


ARCHIVING, FINISHED = ArchiveState.ARCHIVING, {"archive": ArchiveState.ARCHIVED, "archived_at": AT}


@pytest.mark.parametrize(
    ("row", "archived", "provider"),
    [
        (task(TaskState.CREATED, ArchiveState.NONE), "submitted", "submitted"),
        (task(TaskState.PROCESSING, ArchiveState.NONE), "processing", "processing"),
        (task(archive=ARCHIVING), "processing", "succeed"),
        (task(archive=ArchiveState.INCOMPLETE), "succeed", "succeed"),
        (task(**FINISHED), "succeed", "succeed"),
        (task(archive=ARCHIVING, archived_at=AT), "succeed", "succeed"),  # after a repair it never goes back
        (task(archive=ArchiveState.NONE, deleted_at=AT), "succeed", "succeed"),
        (task(TaskState.FAILED, ArchiveState.INCOMPLETE), "failed", "failed"),  # dismissed
    ],
    ids=["new", "in progress", "archiving", "incomplete", "archived", "in repair", "deleted", "dismissed"],
)
def test_query_is_processing_until_the_pictures_are_archived(row: Task, archived: str, provider: str) -> None:
    assert (status_of(row, "archived"), status_of(row, "provider")) == (archived, provider)
    shown = record(row, [asset()], response_format())
    assert bool(shown["task_result"]) == (archived == "succeed")


# -- callbacks --------------------------------------------------------------------------------------------------------


def test_each_status_is_sent_once_and_success_once_archived() -> None:
    assert statuses(ALL_ARCHIVED) == {1: "submitted", 2: "processing", 5: "succeed"}
    assert statuses(ALL_ARCHIVED, "provider") == {1: "submitted", 2: "processing", 3: "succeed"}


def test_second_end_of_the_archive_sends_no_callback() -> None:
    repaired = [*ALL_ARCHIVED[:-1], "task.incomplete", "asset.archived", "task.archived", "task.archived"]
    assert list(statuses(repaired)) == [1, 2, 5]


def test_success_without_processing_is_preceded_by_a_processing_callback() -> None:
    assert statuses(["task.created", "task.succeeded", "task.archived"]) == {1: "processing", 2: "succeed"}


def test_a_failure_is_sent_with_its_reason() -> None:
    names = ["task.created", "task.submitted", "task.failed"]
    shown = bodies(names, row=task(TaskState.FAILED, error="risk control"))
    assert shown[2] | {"updated_at": 0, "receiver": 0} == {
        "task_id": str(uuid.UUID(int=7)), "task_status": "failed", "task_status_msg": "risk control",
        "task_info": {"external_task_id": "order-1"}, "created_at": round(AT.timestamp() * 1000), "updated_at": 0,
        "task_result": {}, "receiver": 0,
    }  # fmt: skip
    assert shown[2]["updated_at"] - shown[1]["updated_at"] == 1_000


def test_a_late_success_outranks_a_failure_and_a_dismissal_is_not_a_success() -> None:
    dismissed = ["task.created", "task.submitted", "task.failed", "task.incomplete"]
    assert statuses(dismissed) == {1: "submitted", 2: "failed"}
    assert statuses([*dismissed, "task.succeeded", "task.archived"])[5] == "succeed"


def test_an_id_sent_again_after_a_refusal_has_all_its_callbacks() -> None:
    again = ["task.created", "task.failed", "task.created", "task.submitted", "task.failed"]
    assert {3: "submitted", 4: "failed"}.items() <= statuses(again).items()


def test_late_callback_body_has_the_status_of_its_event() -> None:
    """The body is made when it is sent, perhaps long after its event."""
    shown = bodies(ALL_ARCHIVED)[1]
    assert (shown["task_status"], shown["task_result"]) == ("submitted", {})


@pytest.mark.parametrize("results", ["archived", "provider"])
def test_no_end_of_an_archive_is_queued_for_a_client_that_got_the_success_before(results: Results) -> None:
    queued = events(results)
    assert {ALL_ARCHIVED[place] for place in statuses(ALL_ARCHIVED, results)} <= queued
    assert ("task.archived" in queued) is (results == "archived")


def test_same_event_makes_the_same_bytes() -> None:
    row, kept = task(), [asset(1), asset(0)]
    shown = {
        callback_body(row, order, "task.archived", at=AT, earlier=ALL_ARCHIVED[:-1], response_format=response_format())
        for order in (kept, kept[::-1])
    }
    assert len(shown) == 1
