"""Full pages: with the most that each may hold they have less than 100 kB without pictures."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta
from uuid import uuid4

import pytest
from sqlmodel import Session, select

from receiver.app.wiring import Parts
from storage.rows.deliveries import Delivery, store
from storage.rows.events import EventName, record, record_act
from storage.rows.models import Asset, Batch, Callback, Dispatch, Event, Task
from storage.states import ArchiveState, AssetState, DispatchState, TaskState
from tests.archived_tasks import archive
from tests.console_reader import PAGES, Reader
from tests.pipeline import assets_of, insert_row
from tests.rows import LONG_AGO, new_task

pytestmark = pytest.mark.databases("sqlite")  # sizes and words
BOTH = pytest.mark.databases("sqlite", "postgresql")  # orders and keys of pages
PROMPT = "灯塔立于黄昏静海之上，" * 300
MOST = 100_000


def fill(parts: Parts) -> tuple[Task, Callback, Batch]:
    """More rows than a page holds of everything; one task has the most files that a task may have."""
    with parts.database.write() as session:
        now = parts.database.now()
        batch = Batch(name="spring campaign", created_at=now)
        session.add(batch)
        session.flush()
        for number in range(70):
            values = {"created_at": LONG_AGO + timedelta(seconds=number), "due_at": None, "state": TaskState.FAILED}
            values |= {"request": {"prompt": PROMPT}, "batch_id": batch.id, "batch_line": number, "error": PROMPT}
            new_task(session, **values)
        task = fill_gallery(session, now)
        for number in range(64):
            record(session, EventName.ASSET_ARCHIVED, task.id, {"kind": "image", "index": number, "sha256": "a" * 64})
        for number in range(60):
            record_act(session, "ann", "retry", task.external_task_id, [task.id])
            body = json.dumps({"task": number, "said": PROMPT}).encode()
            store(session, [Delivery("kling", "push", task.id, body)])
        for event in session.exec(select(Event).where(Event.task_id == task.id, Event.name == "asset.archived")).all():
            dead = {"state": DispatchState.DEAD, "error": PROMPT[:500], "created_at": now, "tries": 9}
            session.add(Dispatch(sink="client", event_id=event.id or 0, task_id=task.id, **dead))
        large = store(session, [Delivery("kling", "push", task.id, json.dumps([PROMPT] * 60).encode())])
        assert large is not None
        callback = session.exec(select(Callback).order_by(Callback.id.desc())).first()  # type: ignore[union-attr]
        assert callback is not None
        return task, callback, batch


def fill_gallery(session: Session, now: datetime) -> Task:
    """40 tasks with 9 files each, then one with the most files that a task may have. Returns that one."""
    for number in range(40):
        keeps(session, 9, created_at=LONG_AGO + timedelta(hours=number + 1))
    return keeps(session, 64, created_at=now)


def keeps(session: Session, files: int, **values: object) -> Task:
    """A task whose request alone exceeds a page, with archived files, which one statement inserts."""
    request = {"prompt": PROMPT, "model_name": "kling-image-o1", "image_list": [{"image": "A" * (MOST + 20_000)}]}
    values |= {"state": TaskState.SUCCEEDED, "archive": ArchiveState.ARCHIVED, "due_at": None}
    task = new_task(session, request=request, **values)
    kept = {"kind": "image", "sha256": "a" * 64, "size": 3_000_000, "media_type": "image/png"}
    kept |= {"width": 1024, "height": 768, "state": AssetState.ARCHIVED, "due_at": None, "created_at": LONG_AGO}
    folder = f"2026/11/29/{task.external_task_id}"
    session.add_all(
        Asset(id=uuid4(), task_id=task.id, index=index, source_url=f"https://a/{index}",
              key=f"{folder}/image-{index}-{'a' * 12}.png", **kept)
        for index in range(files)
    )  # fmt: skip
    session.flush()
    return task


def test_full_pages_have_less_than_100_kilobytes(parts: Parts, ann: Reader) -> None:
    task, callback, batch = fill(parts)
    own = (
        f"/tasks/{task.id}",
        f"/tasks/{task.id}?from=60&moment=0",
        f"/deliveries/{callback.id}",
        f"/batches/{batch.id}",
    )
    for path in (*PAGES, *own, "/gallery?before=", "/tasks?q=e"):
        assert len(ann.page(path).encode()) < MOST, (path, len(ann.page(path).encode()))


def test_links_to_further_parts_say_of_what_they_are(parts: Parts, ann: Reader) -> None:
    """A screen reader lists them by these names; files and timeline of a task had the same."""
    task, *_ = fill(parts)
    labels = re.findall('<nav class="more" aria-label="([^"]+)"', ann.page(f"/tasks/{task.id}"))
    assert labels == ["Further pages: Files", "Further pages: What happened"]


def test_gallery_pages_by_files_and_loses_none(parts: Parts, ann: Reader) -> None:
    with parts.database.write() as session:
        fill_gallery(session, parts.database.now())
    seen: list[str] = []
    path = "/gallery"
    while path:
        page = ann.page(path)
        found = page.split('class="tile')[1:]
        assert 0 < len(found) <= 64
        seen += [each.split('value="')[1][:36] for each in found]
        path = next_link(page)
    assert len(seen) == len(set(seen)) == 64 + 40 * 9


def next_link(page: str) -> str:
    _, mark, after = page.partition('rel="next"')
    return after.partition('href="')[2].partition('"')[0].replace("&amp;", "&").removeprefix("/console") if mark else ""


def test_a_timeline_has_tries_reads_and_what_sinks_answered(parts: Parts, ann: Reader) -> None:
    task = archive(parts, 1)[0]
    asset = assets_of(parts, task)[0]
    later = parts.database.now() + timedelta(minutes=5)
    with parts.database.write() as session:
        row = session.get_one(Asset, asset.id)
        row.state, row.error, row.due_at, row.attempts = AssetState.DUE, "the file host answered 503", later, 4
        row.failed_tries = [{"at": parts.database.now().isoformat(), "error": "the file host answered 502"}]
        [event] = session.exec(select(Event).where(Event.task_id == task.id, Event.name == "task.archived")).all()
        for sink, state, error in (
            ("webhook", DispatchState.DELIVERED, None),
            ("client", DispatchState.DEAD, "answered 500"),
        ):
            values = {"state": state, "error": error, "tries": 3, "created_at": parts.database.now()}
            session.add(Dispatch(sink=sink, event_id=event.id or 0, task_id=task.id, **values))
        poll = Delivery("kling", "poll", task.id, b'{"task_status": "succeed"}')
        store(session, [poll])
    page = ann.page(f"/tasks/{task.external_task_id}")
    assert "Picture 0, tried 4 times, is tried again: the file host answered 503" in page
    assert "Picture 0, a try failed: the file host answered 502" in page
    assert "client: answered 500 (3 tries)" in page and "webhook (3 tries)" in page
    assert ">Read, " in page and ">Callback, " in page
    with parts.database.write() as session:
        session.get_one(Asset, asset.id).unusable_since = later
    accept = 'name="accept"'
    assert accept not in page and accept in ann.page(f"/tasks/{task.external_task_id}"), "only of a damaged file"


@BOTH
def test_causes_come_before_their_effects_in_a_timeline(parts: Parts, ann: Reader) -> None:
    task = archive(parts, 1)[0]
    same = parts.database.now()
    with parts.database.write() as session:
        [sent] = session.exec(select(Event).where(Event.task_id == task.id, Event.name == "task.submitted")).all()
        sent.at = same
        for delivery in session.exec(select(Callback).where(Callback.task_id == task.id)):
            delivery.received_at = same
    page = ann.page(f"/tasks/{task.external_task_id}").partition('class="timeline"')[2]
    places = [
        page.find(words) for words in (">Created ", ">Sent to kling ", ">Callback, ", ">Accepted by the provider ")
    ]
    assert -1 not in places and places == sorted(places)


def test_a_list_says_why_a_task_failed_or_lacks_a_file(parts: Parts, ann: Reader) -> None:
    insert_row(parts, state=TaskState.FAILED, error="the prompt was refused", step=None, due_at=None)
    task = archive(parts, 1)[0]
    with parts.database.write() as session:
        row = session.get_one(Asset, assets_of(parts, task)[0].id)
        row.state, row.error = AssetState.FAILED, "a page instead of a picture"
    page = ann.page("/tasks")
    assert "the prompt was refused" in page and ">a page instead of a picture</small>" in page
