"""Lists: their filters, their paging by key, their cost; the figures; thumbnails; the zip; live updates."""

from __future__ import annotations

import asyncio
import html
import io
import os
import re
import socket
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import event
from sqlmodel import Session, select
from starlette.types import Message
from structlog.testing import capture_logs

from receiver.app.wiring import Parts
from receiver.console import visit
from receiver.console.access import COOKIE
from receiver.console.live import MAX_OPEN
from receiver.console.pages.gallery import MAX_ZIPS
from receiver.console.shares import Streamed
from receiver.console.words import ratio_class, relative, size
from storage.archive.delete import delete
from storage.filters import DeliveryFilter, TaskFilter
from storage.operations import attention, lists, rollups
from storage.operations.lists import newest_deliveries, newest_tasks
from storage.operations.rollups import Rollups
from storage.rows.models import Batch, Dispatch, Event, Task
from storage.states import ArchiveState, CallbackState, DispatchState, TaskState
from storage.thumbnails.thumbnails import Thumbnails
from tests.archived_tasks import archive
from tests.console_reader import LISTS, READ_KEY, Reader
from tests.harness import wait_until
from tests.pipeline import Web, assets_of, callbacks_of, deliver, insert_row
from tests.plans import plans, scans
from tests.rows import LONG_AGO

# Nothing that a database decides: refusals, words, numbers of statements, files.
ON_SQLITE = pytest.mark.databases("sqlite")
Found = list[str]


def names(parts: Parts, **wanted: str) -> Found:
    with parts.database.read() as session:
        return [task.external_task_id for task in newest_tasks(session, TaskFilter(**wanted), None).rows]


def test_tasks_page_by_key_and_none_comes_twice(parts: Parts) -> None:
    for number in range(7):
        insert_row(parts, external_task_id=f"t{number}", created_at=LONG_AGO + timedelta(seconds=number // 3))
    seen: Found = []
    cursor = None
    with parts.database.read() as session:
        while True:
            page = newest_tasks(session, TaskFilter(), cursor, 2)
            seen += [task.external_task_id for task in page.rows]
            cursor = page.further
            if cursor is None:
                break
    assert sorted(seen) == [f"t{number}" for number in range(7)] and seen[0] == "t6"


def test_tasks_are_filtered_by_state_model_time_and_text(parts: Parts) -> None:
    insert_row(parts, external_task_id="one", request={"prompt": "A Red kite 100%", "model_name": "m1"})
    insert_row(parts, external_task_id="two", state=TaskState.FAILED, created_at=LONG_AGO - timedelta(days=9))
    insert_row(parts, external_task_id="ids", archive=ArchiveState.INCOMPLETE, request={"prompt": 7})
    assert names(parts, q="red KITE") == names(parts, model="m1") == names(parts, q="100%") == ["one"]
    assert names(parts, state="failed") == names(parts, until="2019-12-25") == ["two"]
    assert names(parts, archive="incomplete") == names(parts, q="id") == ["ids"]
    assert names(parts, q="%") == ["one"]
    assert len(names(parts, provider="kling")) == 3


def test_filter_without_an_index_stops_at_its_bound_and_continues_on_the_next_page(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "SCANNED", 3)
    for number in range(5):
        state = TaskState.PROCESSING if number == 0 else TaskState.SUBMITTED
        insert_row(parts, external_task_id=f"t{number}", state=state, created_at=LONG_AGO + timedelta(seconds=number))
    with parts.database.read() as session:
        first = newest_tasks(session, TaskFilter(state="processing"), None)
        second = newest_tasks(session, TaskFilter(state="processing"), first.further)
    assert list(first.rows) == [] and first.looked_until == LONG_AGO + timedelta(seconds=2)
    assert [task.external_task_id for task in second.rows] == ["t0"] and second.further is None


def test_deliveries_are_filtered_and_paged_by_key(parts: Parts) -> None:
    task = insert_row(parts)
    ids = [deliver(parts, task, f"no json {number}".encode()).id for number in range(3)]
    deliver(parts, None, {"task_id": "unknown", "task_status": "succeed"})
    with parts.database.read() as session:
        page = newest_deliveries(session, DeliveryFilter(state="unreadable"), None, 2)
        rest = newest_deliveries(session, DeliveryFilter(task=task.external_task_id, cause="JSON"), page.further)
    assert [row.id for row, *_ in page.rows] == ids[:0:-1] and [row.id for row, *_ in rest.rows] == ids[:1]
    assert page.rows[0][1:] == (9, task.external_task_id, task.id)


def test_an_exact_id_leads_to_its_task(parts: Parts, ann: Reader) -> None:
    task = archive(parts, 1)[0]
    odd = insert_row(parts, external_task_id="../x/?#%2F")
    for words in (task.external_task_id, str(task.provider_task_id), str(task.id)):
        assert ann.get("/tasks", params={"q": words}).url.path == f"/console/tasks/{task.external_task_id}"
        assert ann.get("/gallery", params={"q": words}).text.count('class="tile') == 1, words
    assert ann.get("/tasks", params={"q": odd.external_task_id}).url.path == f"/console/tasks/{odd.id}"


@ON_SQLITE
@pytest.mark.parametrize(("language", "since"), [("en", "From (UTC)"), ("zh", "从（UTC）")])
def test_days_say_that_they_are_utc(parts: Parts, web: Web, language: str, since: str) -> None:
    archive(parts, 1)
    with Reader(web.url, language=language) as reader:
        assert all(since in reader.page(path) for path in ("/tasks", "/gallery", "/deliveries"))
        assert re.search(r"<h2[^>]*>[0-9-]{10} <[^>]*>UTC<", reader.page("/gallery"))


def test_batches_page_by_key(parts: Parts) -> None:
    with parts.database.write() as session:
        session.add_all(Batch(name=f"b{n}", created_at=LONG_AGO + timedelta(seconds=n // 2)) for n in range(5))
    seen, cursor = Found(), None
    with parts.database.read() as session:
        while not seen or cursor:
            page = lists.newest_batches(session, cursor, 2)
            seen, cursor = [*seen, *(batch.name for batch in page.rows)], page.further
    assert sorted(seen) == [f"b{n}" for n in range(5)] and seen[0] == "b4"


NO_CURSOR = ("x", "1~2", "9999-12-31T23:59:59~x", "9" * 40, "9999-12-31T23:59:59-14:00~5", "2020-01-01~")
# Of each list: a field, a value that it cannot have, and words of what it may be.
NOT_UNDERSTOOD = [
    *((path, "before", value, "is no page") for path in LISTS for value in NO_CURSOR),
    *((path, "stat", "failed", "This page has no filter “stat”") for path in LISTS[:-1]),
    *((path, "state", "nope", "created, submitted") for path in ("/tasks", "/gallery")),
    *((path, "archive", "nope", "archived, incomplete") for path in ("/tasks", "/gallery")),
    *((path, "files", "nope", "failed (Given up), waiting") for path in ("/tasks", "/gallery")),
    *((path, "provider", "%00", "kling") for path in ("/tasks", "/gallery", "/deliveries", "/deliveries/replay")),
    *((path, "batch", "nope", "Write the whole name") for path in ("/tasks", "/gallery")),
    *((path, "q", value, "200 characters") for path in ("/tasks", "/gallery") for value in ("x" * 500, "%00")),
    *((path, "since", value, "is no date") for path in LISTS[:3] for value in ("garbage", "20260131", "0001-01-01")),
    *((path, "until", "9999-12-31", "is no date") for path in LISTS[:3]),
    *((path, "state", "succeeded", "unreadable, rejected (refused)") for path in ("/deliveries", "/deliveries/replay")),
    ("/deliveries", "task", "nope", "Write the whole name"), ("/deliveries", "cause", "%00", "200 characters"),
    ("/events", "state", "nope", "due (on its way), delivered"), ("/events", "sink", "nope", "Write the whole name"),
    *((path, "since=2026-02-01&until", "2026-01-31", "2026-01-31 is before 2026-02-01") for path in LISTS[:3]),
    *((path, "state=failed&state", "succeeded", "State is given twice") for path in ("/tasks", "/gallery")),
    ("/events", "state=due&state", "due", "State is given twice"), ("/batches", "after", "x", "has no filters"),
    ("/gallery", "size", "xl", "s (Small), m"), ("", "span", "7d", "24h, 30d"),
]  # fmt: skip


@ON_SQLITE
def test_a_filter_that_is_not_understood_is_named_and_no_row_is_shown(parts: Parts, ann: Reader) -> None:
    """A list that ignores it shows rows that nobody asked for as if they were what was asked for."""
    archive(parts, 1)
    wrong = []
    for path, name, value, may_be in NOT_UNDERSTOOD:
        answer = ann.get(f"{path}?{name}={value}")
        shown = html.unescape(answer.text)
        shows_rows = any(
            mark in shown for mark in ('class="row', "<figure", 'data-live="tasks', "<tbody", 'class="tile')
        )
        if answer.status_code != 400 or may_be not in shown or shows_rows:
            wrong.append((path, name, value, answer.status_code, shown[shown.find("<main") :][:900]))
    assert wrong == []


@ON_SQLITE
def test_a_filter_that_is_not_understood_can_be_mended_or_left_out(parts: Parts, ann: Reader) -> None:
    archive(parts, 1)
    answer = ann.get("/tasks?state=nope&archive=archived&since=garbage&self=1&before=x")
    fields = dict(re.findall(r'<(?:input|select)[^>]* name="(\w+)"(?: value="([^"]*)")?', answer.text))
    assert fields.keys() >= {"state", "archive", "since"} and fields["archive"] == "archived"
    assert '<option value="failed">failed</option>' in answer.text
    links = [html.unescape(link) for link in re.findall('<a class="button" href="([^"]*)"', answer.text)]
    assert links == ["/console/tasks?archive=archived", "/console/tasks"]
    assert [ann.http.get(link).status_code for link in links] == [200, 200]


@ON_SQLITE
@pytest.mark.parametrize("language", ["en", "zh"])
def test_page_of_a_filter_that_is_not_understood_is_escaped_small_and_in_the_language(web: Web, language: str) -> None:
    many = "&".join(f"x{n}={'y' * 40}" for n in range(30))
    with Reader(web.url, READ_KEY, language) as ben:
        answer = ben.get(f"/tasks?state=<script>x</script>&<b>=1&_Context__self=1&{many}")
        assert (answer.status_code, "<script>x" in answer.text, "<b>" in answer.text) == (400, False, False)
        assert len(answer.text) < 30_000 and "&lt;script&gt;" in answer.text
        assert ("无法识别" in answer.text) == (language == "zh")


def fields_of(page: str) -> dict[str, str]:
    """What a browser sends when the form of the filters is sent as it stands."""
    form = page[page.index('<form class="filters"') :].partition("</form>")[0]
    sent = dict(re.findall(r'<input[^>]*name="(\w+)"[^>]*value="([^"]*)"', form))
    chosen = re.findall(r'<select name="(\w+)"(?:(?!</select>).)*<option value="([^"]*)" selected', form)
    return {name: html.unescape(value) for name, value in (sent | dict(chosen)).items() if value}


@ON_SQLITE
@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/gallery", {"size": "l", "archive": "none", "files": "failed", "provider": "kling", "q": "x"}),
        ("/tasks", {"state": "failed", "files": "waiting", "provider": "kling", "since": "2026-01-31", "model": "m"}),
        ("/deliveries", {"state": "refused", "provider": "kling", "cause": "x", "until": "2026-01-31"}),
        ("/events", {"sink": "gone", "state": "delivered"}),
    ],
)
def test_the_form_of_the_filters_shows_and_keeps_all_of_them(
    parts: Parts, ann: Reader, path: str, given: dict[str, str]
) -> None:
    archive(parts, 1)
    with parts.database.write() as session:
        told = session.exec(select(Event)).first()
        assert told is not None
        session.add(Dispatch(event_id=told.id, sink="gone", state=DispatchState.DELIVERED, created_at=LONG_AGO))
    assert fields_of(ann.get(path, params=given).text) == given


@ON_SQLITE
def test_the_page_of_a_task_and_of_a_batch_refuse_a_part_that_is_no_number(parts: Parts, ann: Reader) -> None:
    name = archive(parts, 1)[0].external_task_id
    with parts.database.write() as session:
        session.add(batch := Batch(name="b", created_at=LONG_AGO))
        session.flush()
        path = f"/batches/{batch.id}"
    for address in (f"/tasks/{name}?from=x", f"/tasks/{name}?moment=-1", f"{path}?from=1.5"):
        answer = ann.get(address)
        assert (answer.status_code, "is no page of this list" in answer.text) == (400, True), address


@ON_SQLITE
def test_live_page_of_a_filter_that_is_not_understood_is_answered_alike(parts: Parts, ann: Reader) -> None:
    for _ in range(2):
        answer = ann.get("/tasks?state=nope", headers={"X-Live": "1"})
        assert answer.status_code == 400 and "data-unread" in answer.text


@ON_SQLITE
def test_a_replay_with_a_filter_that_is_not_understood_replays_nothing(parts: Parts, ann: Reader) -> None:
    delivery = deliver(parts, None, {"task_id": "unknown", "task_status": "succeed"})
    assert ann.post("/act/replay", state="nope").status_code == 400
    assert ann.get("/deliveries/replay").status_code == 400  # its button would be refused
    assert ann.post("/act/replay", state="unmatched", since="garbage").status_code == 400
    assert callbacks_of(parts)[0].state is delivery.state is CallbackState.UNMATCHED


def test_an_id_with_a_nul_finds_no_task(ann: Reader) -> None:
    assert ann.get("/tasks/%00").status_code == 404


@ON_SQLITE
def test_page_runs_a_fixed_number_of_queries(parts: Parts, ann: Reader) -> None:
    asked: list[str] = []
    event.listen(parts.database.reader, "before_cursor_execute", lambda *given: asked.append(given[2]))

    def questions(path: str) -> int:
        ann.page(path)
        asked.clear()
        ann.page(path)
        return len(asked)

    before = [questions(path) for path in ("/tasks", "/gallery", "/deliveries")]
    archive(parts, 4, n=2)
    assert [questions(path) for path in ("/tasks", "/gallery", "/deliveries")] <= [each + 3 for each in before]


@ON_SQLITE
def test_failures_of_a_batch_are_asked_for_at_once(parts: Parts, ann: Reader) -> None:
    with parts.database.write() as session:
        batch = Batch(name="large", created_at=LONG_AGO)
        session.add(batch)
        session.flush()
        path = f"/batches/{batch.id}"
        new = {"state": TaskState.FAILED, "batch_id": batch.id, "due_at": None}
    for number in range(20):
        insert_row(parts, external_task_id=f"t{number}.", batch_line=number, **new)
    wait_until(lambda: "t19." in ann.page(path), seconds=60, every=0.1)
    asked: list[str] = []
    event.listen(parts.database.reader, "before_cursor_execute", lambda *given: asked.append(given[2]))
    assert "t19." in ann.page(path)
    assert len([each for each in asked if "task.request" in each]) <= 2


@pytest.fixture
def fresh_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of this hour are read anew at each page, and not after half a minute."""
    monkeypatch.setattr(rollups, "FRESH_SECONDS", 0.1)
    monkeypatch.setattr("storage.operations.kept_results.PAUSE_SECONDS", 0.0)


@pytest.mark.usefixtures("fresh_figures")
def test_overview_says_of_how_many_tasks_it_knows_the_units(parts: Parts, ann: Reader) -> None:
    """Callbacks without a signature report none that are believed."""
    one, _ = archive(parts, 2, n=1)
    assert wait_until(lambda: "known of 0 of 2 tasks" in ann.page(""), seconds=60)
    rows = Rollups(parts.database)
    with parts.database.write() as session:
        session.get_one(Task, one.id).units = "16"
    assert wait_until(lambda: rows.span(24).total.priced == 1, seconds=60)
    rows.close()


def test_figures_sum_ended_tasks_and_callbacks(parts: Parts) -> None:
    tasks = archive(parts, 2, n=2)
    deliver(parts, insert_row(parts), b"no json")
    with parts.database.write() as session:
        session.get_one(Task, tasks[0].id).units = "16"
        session.get_one(Task, tasks[1].id).units = "none"
    counted = Rollups(parts.database)
    day = wait_until(lambda: (found := counted.span(24)).whole and found, seconds=60)
    sizes = sum(asset.size or 0 for task in tasks for asset in assets_of(parts, task))
    assert (day.total.pictures, day.total.bytes, day.total.units, day.whole) == (4, sizes, 16.0, True)
    assert (day.total.succeeded, day.total.priced) == (len(tasks), 1)
    assert day.total.callbacks >= 1 and len(day.series["pictures"]) == 24 and day.series["pictures"][-1] == 4
    counted.close()


def test_latencies_are_a_bounded_sample_with_the_ranks_of_all(parts: Parts) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
    times = {"completed_at": hour, "end_called_back_at": hour, "step": None, "due_at": None}
    for number in range(150):
        insert_row(parts, archived_at=hour + timedelta(seconds=number), **times)
    with parts.database.read() as session:
        found = rollups.read_hour(session, hour).seconds
        assert not scans(parts.database, lambda session: rollups.read_hour(session, hour))
    assert len(found) == rollups.KEPT and found == tuple(sorted(found))
    assert abs((rollups._rank(found, 0.5) or 0) - 75) <= 3 and abs((rollups._rank(found, 0.95) or 0) - 142) <= 3


@ON_SQLITE
def test_overview_has_eight_charts(parts: Parts, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.operations.kept_results.PAUSE_SECONDS", 0.0)
    archive(parts, 2)
    with Reader(web.url) as ann:
        for path in ("?span=24h", "?span=30d"):
            page = wait_until(
                lambda path=path: (seen := ann.page(path)) and "data-counting" not in seen and seen,  # type: ignore[misc]
                seconds=90,
                every=0.3,
            )
            names = re.findall(r'aria-label="([^"]+) over time"', page)
            assert len(names) == 8 and page.count("<rect") >= 4, (path, names)
            assert all(each in page for each in ("Bytes archived", "p95", "USD", "Callbacks lost")), path


@pytest.mark.usefixtures("fresh_figures")
def test_overview_says_that_callbacks_of_the_last_minutes_are_not_due(parts: Parts, ann: Reader, web: Web) -> None:
    over = {"state": TaskState.SUCCEEDED, "callback_url": "https://a/b", "step": None, "due_at": None}
    for minutes in (1, 6):
        insert_row(parts, completed_at=parts.database.now() - timedelta(minutes=minutes), **over)
    with Reader(web.url, language="zh") as zhang:
        for reader, says in (
            (ann, "1 task that ended over 5 min ago"),
            (zhang, "1 个任务要求回调（结束已超过 5 分钟）"),
        ):
            wait_until(lambda reader=reader, says=says: says in reader.page(""), seconds=60)  # type: ignore[misc]


def test_many_days_are_counted_beside_the_page(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.operations.kept_results.PAUSE_SECONDS", 0.0)
    then = datetime.now(UTC) - timedelta(days=4)
    insert_row(parts, state=TaskState.FAILED, completed_at=then, step=None, due_at=None)
    counted = Rollups(parts.database)
    days = wait_until(lambda: (found := counted.span(6 * 24)).whole and found, seconds=60)
    assert days.total.failures == 1 and len(days.series["failures"]) == 6
    counted.close()


@ON_SQLITE
def test_hours_that_a_page_has_no_time_to_read_are_read_by_a_thread(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.operations.kept_results.AT_ONCE_SECONDS", 0.0)
    counted = Rollups(parts.database)
    assert not counted.span(24).whole
    assert wait_until(lambda: counted.span(24).whole, seconds=60)
    counted.close()


def test_stopped_batches_are_found_by_an_index(parts: Parts) -> None:
    def look(session: Session) -> object:
        return list(attention.still_batches(session))

    assert not scans(parts.database, look)
    assert not parts.database.is_sqlite or "task_batch" not in plans(parts.database, look)


@pytest.fixture
def thumbnails(parts: Parts, tmp_path: Path) -> Iterator[Callable[..., Thumbnails]]:
    with ExitStack() as cleanup:
        yield lambda folder=tmp_path / "t", most=20_000: cleanup.enter_context(
            closing(Thumbnails(parts.bucket, folder, most))
        )


@ON_SQLITE
def test_thumbnails_stay_below_their_bound(parts: Parts, tmp_path: Path, thumbnails: Callable[..., Thumbnails]) -> None:
    assets = [each for task in archive(parts, 3, n=2) for each in assets_of(parts, task)]
    kept = thumbnails()
    contents = [kept.get(each) for each in assets]
    sizes = [file.stat().st_size for file in (tmp_path / "t").glob("*/*.webp")]
    assert all(contents) and sum(sizes) <= 20_000 < sum(len(each or b"") for each in contents)
    assert not list((tmp_path / "t").rglob("*.part"))


@ON_SQLITE
@pytest.mark.parametrize("kind", ["writable", "symlink"])
def test_thumbnail_folder_of_another_user_is_not_used(
    parts: Parts, tmp_path: Path, thumbnails: Callable[..., Thumbnails], kind: str
) -> None:
    assets = [each for task in archive(parts, 1, n=2) for each in assets_of(parts, task)]
    theirs, folder = tmp_path / "theirs", tmp_path / "t"
    (theirs if kind == "symlink" else folder).mkdir()
    folder.symlink_to(theirs) if kind == "symlink" else folder.chmod(0o777)
    digest = str(assets[0].sha256)
    (folder / digest[:2]).mkdir()
    (folder / digest[:2] / f"{digest}.webp").write_bytes(b"poison")
    kept = thumbnails(folder, 10**6)
    with capture_logs() as lines:
        assert all((kept.get(each) or b"")[8:12] == b"WEBP" for each in assets)
    [line] = [each for each in lines if each["event"] == "thumbnail.not_stored"]
    assert line["setting"] == "RECEIVER_CONSOLE_THUMBNAIL_DIR"
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 1


@ON_SQLITE
def test_fifo_or_symlink_for_a_thumbnail_is_replaced(
    parts: Parts, tmp_path: Path, thumbnails: Callable[..., Thumbnails]
) -> None:
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    folder, victim = tmp_path / "t" / str(asset.sha256)[:2], tmp_path / "victim"
    victim.write_text("mine")
    folder.mkdir(parents=True)
    (tmp_path / "t").chmod(0o755)  # as earlier releases made it
    name = folder / f"{asset.sha256}.webp"
    for plant in (lambda: os.mkfifo(name), lambda: name.symlink_to(victim), lambda: name.write_bytes(bytes(2**21))):
        name.unlink(missing_ok=True)
        plant()
        assert (thumbnails(most=10**6).get(asset) or b"")[8:12] == b"WEBP"
        assert name.is_file() and not name.is_symlink() and name.stat().st_mode & 0o777 == 0o600
    assert victim.read_text() == "mine" and (tmp_path / "t").stat().st_mode & 0o777 == 0o700


@ON_SQLITE
def test_a_vanished_object_has_no_thumbnail_and_is_read_once(
    parts: Parts, tmp_path: Path, thumbnails: Callable[..., Thumbnails]
) -> None:
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    parts.bucket.delete(str(asset.key))
    kept = thumbnails(most=10**6)
    assert kept.get(asset) is None and kept.get(asset) is None and len(kept._failed) == 1


def test_aspect_ratios_have_a_class_of_the_stylesheet() -> None:
    sheet = (visit.HERE / "static" / "ratios.css").read_text()
    classes = {
        ratio_class(width, height) for width, height in ((1, 1), (16, 9), (9, 16), (1, 100), (100, 1), (None, 5))
    }
    assert classes == {"r70", "r99", "r41", "r0", "r140"} and all(f".{each}{{" in sheet for each in classes)


@ON_SQLITE
def test_chosen_files_come_as_one_zip(parts: Parts, ben: Reader) -> None:
    assets = [each for task in archive(parts, 2, n=2) for each in assets_of(parts, task)]
    answer = ben.get("/gallery/zip", params={"id": [str(each.id) for each in assets]})
    with zipfile.ZipFile(io.BytesIO(answer.content)) as found:
        assert found.testzip() is None
        sizes = {entry.filename.rpartition("/")[2]: entry.file_size for entry in found.infolist()}
    assert sizes == {str(each.key).rpartition("/")[2]: each.size for each in assets} or len(sizes) < len(assets)
    assert ben.get("/gallery/zip", params={"id": ["x"]}).status_code == 404


@ON_SQLITE
@pytest.mark.parametrize(("language", "words"), [("en", "Tick the files in the gallery"), ("zh", "在图库中勾选文件")])
def test_zip_of_nothing_says_how_to_choose(web: Web, language: str, words: str) -> None:
    with Reader(web.url, READ_KEY, language) as ben:
        answer = ben.get("/gallery/zip")
        assert answer.status_code == 400 and words in answer.text and 'href="/console/gallery"' in answer.text


@ON_SQLITE
def test_a_zip_names_the_files_that_it_lacks(parts: Parts, ben: Reader) -> None:
    """Another person deleted one, and the store lost one."""
    tasks = archive(parts, 3, n=1)
    kept, deleted, lost = (assets_of(parts, task)[0] for task in tasks)
    delete(parts.database, parts.bucket, tasks[1].external_task_id)
    parts.bucket.delete(str(lost.key))
    ids = [str(each) for each in (kept.id, deleted.id, lost.id, UUID(int=7))]
    with zipfile.ZipFile(io.BytesIO(ben.get("/gallery/zip", params={"id": ids}).content)) as found:
        assert found.testzip() is None and len(found.namelist()) == 2
        missing = found.read("MISSING.txt").decode()
    assert f"file {deleted.id}: not archived, or deleted since" in missing
    assert f"{lost.key}: not in the store" in missing and str(UUID(int=7)) in missing and str(kept.key) not in missing
    assert ben.get("/gallery/zip", params={"id": ids[1:2]}).status_code == 404


@ON_SQLITE
def test_zip_of_too_many_files_names_the_export(ben: Reader) -> None:
    answer = ben.get("/gallery/zip", params={"id": [str(UUID(int=0))] * 46})
    assert answer.status_code == 413 and "receiver export" in answer.text


@ON_SQLITE
def test_one_person_holds_half_of_the_live_streams(web: Web, ann: Reader, ben: Reader) -> None:
    """Counted over all sessions of a person. A place is free again when its page is closed."""

    def follow(reader: Reader, held: ExitStack) -> int:
        cookies = {COOKIE: reader.http.cookies[COOKIE]}
        return held.enter_context(
            httpx.stream("GET", f"{web.url}/console/live", cookies=cookies, timeout=20)
        ).status_code

    with Reader(web.url) as ann_again, ExitStack() as held:
        codes = [follow(reader, held) for reader in [ann, ann_again] * (MAX_OPEN // 4)]
        assert codes == [200] * (MAX_OPEN // 2)
        assert {follow(ann, held), follow(ann_again, held)} == {503} and follow(ben, held) == 200
        held.close()
        wait_until(lambda: follow(ann, held) == 200)


@ON_SQLITE
def test_a_head_takes_no_place_of_a_stream(parts: Parts, ann: Reader) -> None:
    """Each HEAD of the live updates held one."""
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    for path, most in (("/live", MAX_OPEN), (f"/gallery/zip?id={asset.id}", MAX_ZIPS)):
        answers = [ann.http.head(f"/console{path}", timeout=5) for _ in range(most // 2 + 1)]
        assert {(each.status_code, each.content) for each in answers} == {(200, b"")}, path


@ON_SQLITE
def test_one_person_holds_half_of_the_zips(parts: Parts, web: Web, ann: Reader, ben: Reader) -> None:
    """Also if each reader leaves at once."""
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    large = 16 * 2**20
    parts.bucket._client().put_object(Bucket=parts.bucket.name, Key=asset.key, Body=bytes(large))
    host, port = web.url.removeprefix("http://").split(":")

    def fetch(reader: Reader, held: ExitStack) -> bytes:
        raw = held.enter_context(socket.create_connection((host, int(port)), timeout=20))
        cookie = f"Cookie: {COOKIE}={reader.http.cookies[COOKIE]}"
        raw.sendall(f"GET /console/gallery/zip?id={asset.id} HTTP/1.1\r\nHost: x\r\n{cookie}\r\n\r\n".encode())
        return raw.recv(12)[9:]

    for _ in range(3):
        with ExitStack() as held:
            wait_until(lambda: fetch(ann, held) == b"200")
            wait_until(lambda: fetch(ann, held) == b"200")
            assert (fetch(ann, held), fetch(ben, held)) == (b"503", b"200")


async def leave_after_a_piece(content: Iterator[bytes]) -> None:
    """Read the answer as a browser that is closed after its first piece."""
    piece = asyncio.Event()

    async def receive() -> Message:
        await piece.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body"):
            piece.set()

    await Streamed(content)({"type": "http", "method": "GET"}, receive, send)


def test_a_stream_whose_reader_leaves_is_closed() -> None:
    """At once, and not when its objects are collected: it holds a connection to the store."""
    is_closed = list[bool]()

    def endless() -> Iterator[bytes]:
        with ExitStack() as closing:
            closing.callback(is_closed.append, True)
            while True:
                yield b"a piece"

    content = endless()
    asyncio.run(leave_after_a_piece(content))
    assert is_closed == [True]


@pytest.mark.parametrize(
    ("count", "shown"), [(None, "–"), (0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (2 * 10**9, "2.0 GB")]
)
def test_sizes_have_three_digits(count: Any, shown: str) -> None:
    assert size(count) == shown


def test_times_are_relative_in_both_directions() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert relative(now - timedelta(minutes=3), now, "en") == "3 min ago"
    assert relative(now + timedelta(hours=5), now, "zh") == "5 小时后"
    assert relative(now, now, "en") == "now"
