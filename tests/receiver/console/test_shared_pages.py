"""Live updates are sent to consoles, further apart beside many deliveries. Those with the same view share one
rendering, without anything that belongs to one reader.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import SimpleNamespace
from typing import cast
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import event
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Message
from structlog.testing import capture_logs

from receiver.app.wiring import Parts
from receiver.console import live
from receiver.console.access import COOKIE, SESSION_SECONDS, Access, Session
from receiver.console.application import Guard, Policy
from receiver.console.live import Pace
from receiver.console.needs import Needs
from receiver.console.shared_pages import SharedPages
from receiver.console.visit import Notices, Visit, environment
from storage.background import CONNECTION, MOST_TURNS
from storage.database.sessions import Database
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Asset
from tests.archived_tasks import archive
from tests.console_reader import ACT_KEY, CSRF, READ_KEY, Reader
from tests.harness import wait_until
from tests.pipeline import Web, assets_of, insert_row
from tests.receiver.console.test_access import ANN, BEN, Clock

LIVE = {"X-Live": "1"}
pytestmark = pytest.mark.databases("sqlite")  # who gets which page is asked of no database
BOTH = pytest.mark.databases("sqlite", "postgresql")  # the numbers that tell of a change


def test_ten_consoles_at_one_view_cost_one_rendering(parts: Parts, web: Web) -> None:
    archive(parts, 2)
    asked: list[str] = []
    with ExitStack() as opened, ThreadPoolExecutor(10) as threads:
        readers = [opened.enter_context(Reader(web.url)) for _ in range(10)]
        event.listen(parts.database.reader, "before_cursor_execute", lambda *given: asked.append(given[2]))
        pages = list(threads.map(lambda reader: reader.get("/tasks?state=succeeded", headers=LIVE).text, readers))
    # The whole rows of the list. What needs a person is counted by itself, every three seconds.
    assert len([each for each in asked if "task.callback_reads" in each]) == 1
    assert len({CSRF.sub("", page) for page in pages}) == 1


def test_live_pages_are_rendered_with_rests_between_them(parts: Parts, web: Web, ann: Reader) -> None:
    starts: list[float] = []

    def note_and_take_long(*given: object) -> None:
        if "task.archive" in str(given[2]):
            starts.append(time.monotonic())
            time.sleep(0.05)

    event.listen(parts.database.reader, "before_cursor_execute", note_and_take_long)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: ann.get(f"/tasks?model={number}", headers=LIVE), range(4)))
    assert starts[-1] - starts[0] > 3 * 0.4


@pytest.fixture
def rendered(parts: Parts) -> Iterator[tuple[list[str], threading.Event]]:
    """The models that lists of tasks were filtered by. A list of the model "held" waits for the event."""
    models, is_released = list[str](), threading.Event()

    def note_and_hold(*given: object) -> None:
        found = re.findall(r"held|live-\d+", str(given[3]))
        models.extend(found[:1])
        if "held" in found:
            is_released.wait(60)

    event.listen(parts.database.reader, "before_cursor_execute", note_and_hold)
    yield models, is_released
    is_released.set()


def fetch_live(web: Web, reader: Reader, model: str) -> socket.socket:
    """Send a live request and read nothing yet."""
    host, port = web.url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), timeout=60)
    fields = f"Host: x\r\nX-Live: 1\r\nCookie: {COOKIE}={reader.http.cookies[COOKIE]}"
    raw.sendall(f"GET /console/tasks?model={model} HTTP/1.1\r\n{fields}\r\n\r\n".encode())
    return raw


def test_live_pages_of_readers_who_left_are_not_rendered(
    rendered: tuple[list[str], threading.Event], web: Web, ann: Reader, ben: Reader
) -> None:
    models, is_released = rendered
    sent = [fetch_live(web, ben, "held")]
    wait_until(lambda: models[:1] == ["held"])
    sent += [fetch_live(web, ben, f"live-{number}") for number in range(20)]
    wait_until(lambda: web.requests_under_way == 21)
    for each in sent:
        each.close()
    wait_until(lambda: web.requests_under_way == 0)
    is_released.set()
    assert ann.get("/tasks?model=live-99", headers=LIVE).status_code == 200
    assert set(models) == {"held", "live-99"}


def test_one_person_has_half_of_the_live_pages_that_wait(
    rendered: tuple[list[str], threading.Event], web: Web, ann: Reader, ben: Reader
) -> None:
    models, is_released = rendered
    with ExitStack() as held:
        for number in range(MOST_TURNS // 2):
            held.enter_context(fetch_live(web, ben, f"live-{number}" if number else "held"))
            wait_until(lambda number=number: web.requests_under_way == number + 1)
            wait_until(lambda: models[:1] == ["held"])
        refused = ben.get("/tasks?model=live-98", headers=LIVE)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")
        assert "live-98" not in models and ben.get("/tasks?model=live-98").status_code == 200
        with ThreadPoolExecutor(1) as threads:
            page = threads.submit(ann.get, "/tasks?model=live-99", headers=LIVE)
            wait_until(lambda: web.requests_under_way == MOST_TURNS // 2 + 1)
            is_released.set()
            assert page.result().status_code == 200
        assert len(set(models) - {"live-98", "live-99"}) < MOST_TURNS // 2, "hers waited for one of his, not for all"


def test_a_page_that_a_person_opens_waits_for_no_live_page(parts: Parts, ann: Reader) -> None:
    is_shown = threading.Event()

    def wait_if_live(*given: object) -> None:
        if "held" in str(given[3]):
            is_shown.wait(30)

    event.listen(parts.database.reader, "before_cursor_execute", wait_if_live)
    with ThreadPoolExecutor(1) as threads:
        live = threads.submit(ann.get, "/tasks?model=held", headers=LIVE)
        ann.page("/tasks")
        assert not live.done()
        is_shown.set()
        assert live.result().status_code == 200


def test_a_shared_page_has_the_readers_own_token_rights_and_language(parts: Parts, web: Web, ann: Reader) -> None:
    task = archive(parts, 1)[0]
    path = f"/tasks/{task.external_task_id}"
    with Reader(web.url) as other, Reader(web.url, READ_KEY) as ben, Reader(web.url, language="zh") as zhang:
        pages = [each.get(path, headers=LIVE).text for each in (ann, other, ben, zhang)]
        tokens = [set(CSRF.findall(page)) for page in pages]
        assert tokens == [{each.csrf} for each in (ann, other, ben, zhang)]
        assert ["/act/delete" in page for page in pages] == [True, True, False, True]
        assert "档" in pages[3] and "档" not in pages[0]


def test_the_stand_in_for_a_readers_token_is_replaced_at_each_status(ann: Reader) -> None:
    """The page of a filter that is not understood showed it."""
    answer = ann.get("/tasks?state=zz", headers=LIVE)
    assert (answer.status_code, set(CSRF.findall(answer.text))) == (400, {ann.csrf})
    assert ann.get("/tasks?state=zz").headers.keys() == answer.headers.keys()


def test_a_text_with_the_stand_in_never_becomes_the_readers_token() -> None:
    shared = SharedPages(int)
    scope = {"type": "http", "method": "GET", "path": "/console", "query_string": b"", "headers": [(b"host", b"x")]}
    visit = Visit(Request(scope), Session("ann", True, b"", "c" * 32), "en", environment(), Notices())
    text = f'{shared._token} name="csrf" value="{shared._token}"'
    source = '{% from "parts.html" import csrf %}{{ csrf(session) }}<p title="{{ text }}">{{ text }}</p>'

    def make(anyone: Visit) -> Response:
        return HTMLResponse(environment().from_string(source).render(session=anyone.session, text=text))

    async def never() -> Message:
        return await asyncio.Future()

    visit.request._receive = never
    body = bytes(asyncio.run(shared.answer(visit, make)).body).decode()
    assert (body.count("c" * 32), body.count(shared._token)) == (1, 4)


def test_next_live_page_after_an_action_is_new(parts: Parts, ann: Reader) -> None:
    task = insert_row(parts)
    path = f"/tasks/{task.external_task_id}"
    assert "an old wish" not in ann.get(path, headers=LIVE).text
    ann.post("/act/dismiss", task=str(task.id), reason="an old wish")
    assert "an old wish" in ann.get(path, headers=LIVE).text


def test_a_page_that_a_person_opens_is_never_an_old_one(parts: Parts, ann: Reader) -> None:
    assert "just now" not in ann.get("/tasks", headers=LIVE).text
    insert_row(parts, external_task_id="just now")
    assert "just now" in ann.page("/tasks")


def test_a_file_is_never_shared(parts: Parts, ann: Reader) -> None:
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    answers = [ann.get("/gallery/zip", params={"id": str(asset.id)}, headers=LIVE) for _ in range(2)]
    assert all(len(each.content) > (asset.size or 0) for each in answers)


@BOTH
def test_open_page_is_informed_of_changes(parts: Parts, ann: Reader, web: Web) -> None:
    cookies = {COOKIE: ann.http.cookies[COOKIE]}
    with httpx.stream("GET", f"{web.url}/console/live", cookies=cookies, timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith("event:")) == "event: hello"
        insert_row(parts)
        assert next(line for line in lines if line.startswith("event:")) == "event: change"


@pytest.mark.databases("sqlite")
def test_live_updates_go_on_after_a_look_that_got_no_thread(
    parts: Parts, ann: Reader, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_thread, failed = live.run_in_threadpool, threading.Event()

    async def without_thread(look: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("can't start new thread")
        return await in_thread(look)

    monkeypatch.setattr(live, "run_in_threadpool", without_thread)
    monkeypatch.setattr(live, "HEARTBEAT_SECONDS", 4.0)
    cookies = {COOKIE: ann.http.cookies[COOKIE]}
    with httpx.stream("GET", f"{web.url}/console/live", cookies=cookies, timeout=20) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("event:"))
        assert next(lines) == "event: hello" and failed.wait(5)
        time.sleep(2)  # the state under test: the next look has been made
        insert_row(parts)
        assert "event: change" in islice(lines, 3)


def test_open_stream_ends_within_a_heartbeat_of_the_log_out(
    ann: Reader, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "HEARTBEAT_SECONDS", 0.2)
    cookies = {COOKIE: ann.http.cookies[COOKIE]}
    with httpx.stream("GET", f"{web.url}/console/live", cookies=cookies, timeout=20) as answer:
        lines = answer.iter_lines()
        assert "event: still" in lines
        ann.post("/logout")
        with pytest.raises(httpx.RemoteProtocolError):
            assert len(list(islice(lines, 60))) == 60


@pytest.mark.parametrize("end", ["key removed", "session over"])
def test_no_message_follows_the_end_of_a_session(end: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HEARTBEAT_SECONDS", 0.01)
    clock = Clock()
    guard = Guard(Access([ANN, BEN], clock), Policy(lambda: None), cast(Needs, None), int)
    cookie = f"{COOKIE}={guard.access.log_in(ACT_KEY)}".encode()
    aborted = list[str]()
    extensions = {CONNECTION: SimpleNamespace(abort=lambda: aborted.append(end))}
    request = Request({"type": "http", "headers": [(b"cookie", cookie)], "extensions": extensions}, left)
    stream = guard._while_logged_in(request, live.Live(database)._tell())

    async def messages() -> None:
        assert [await anext(stream) for _ in range(3)] == [live.HELLO, live.STILL, live.STILL]
        if end == "key removed":
            guard.access = Access([BEN], clock)
        else:
            clock.now += SESSION_SECONDS
        assert [each async for each in stream] == []

    asyncio.run(messages())
    assert aborted == [end]


async def left() -> Message:
    return {"type": "http.disconnect"}


@pytest.mark.parametrize("path", ["gallery/zip?id={}", "files/{}"])
def test_a_download_ends_with_its_session_and_does_not_seem_whole(
    path: str, parts: Parts, web: Web, ann: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it followed the log-out, up to the buffers of the connection."""
    caplog.set_level("ERROR")
    large = 24 * 2**20
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    parts.bucket._client().put_object(Bucket=parts.bucket.name, Key=asset.key, Body=bytes(large))
    with parts.database.write() as session:
        session.get_one(Asset, asset.id).size = large
    cookies = {COOKIE: ann.http.cookies[COOKIE]}
    url = f"{web.url}/console/{path.format(asset.id)}"
    with capture_logs() as lines, httpx.stream("GET", url, cookies=cookies, timeout=20) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        ann.post("/logout")
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
    assert answer.status_code == 200 and answer.num_bytes_downloaded < large // 2
    wait_until(lambda: web.requests_under_way == 0)
    assert caplog.records == [] and [line for line in lines if line["log_level"] == "error"] == []


@BOTH
def test_changes_are_announced_less_often_while_many_deliveries_arrive(
    parts: Parts, ann: Reader, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In seconds instead of half minutes. The real numbers have tests of their own, below."""
    monkeypatch.setattr(live, "PACES", ((150.0, 2.0), (-math.inf, 1.0)))
    cookies = {COOKIE: ann.http.cookies[COOKIE]}
    with httpx.stream("GET", f"{web.url}/console/live", cookies=cookies, timeout=60) as answer:
        lines = answer.iter_lines()
        insert_row(parts)
        assert "data: 1000" in lines
        with flood(parts):
            assert "data: 2000" in islice(lines, 60)


@contextmanager
def flood(parts: Parts) -> Iterator[None]:
    """Hundreds of deliveries a second. Ends after a minute in any case."""
    is_over, ends = threading.Event(), time.monotonic() + 60

    def store_many() -> None:
        while not is_over.wait(0.1) and time.monotonic() < ends:
            with parts.database.write() as session:
                store(session, [Delivery("kling", "push", None, uuid4().bytes) for _ in range(50)])

    with ThreadPoolExecutor(1) as threads:
        storing = threads.submit(store_many)
        try:
            yield
        finally:
            is_over.set()
    storing.result()


def told_at(deliveries: Callable[[int], int], seconds: int) -> list[int]:
    """The seconds at which live updates are sent, when `deliveries` have come by each second."""
    pace = Pace()
    return [now for now in range(seconds) if pace.is_due((7, deliveries(now)), 1_000.0 + now)]


def test_live_changes_are_spaced_by_the_rate_of_deliveries() -> None:
    assert told_at(lambda now: now, 9) == [1, 4, 7]
    assert told_at(lambda now: now * 21, 30) == [7, 17, 27]
    assert told_at(lambda now: now * 200, 70) == [27, 57]
    assert told_at(lambda now: now * 2_000, 130) == [57, 117]


def test_a_second_in_which_the_disk_stalls_announces_no_change_early() -> None:
    assert told_at(lambda now: now * 2_000 - (1_700 if now == 40 else 0), 70) == [57]


def test_last_change_after_many_deliveries_is_announced_within_two_seconds() -> None:
    assert told_at(lambda now: min(now, 20) * 2_000, 70) == [22]


def test_a_change_after_quiet_is_announced_at_the_next_check() -> None:
    assert told_at(lambda now: int(now >= 20), 70) == [1, 20]
