"""The console in a real browser: a person's way from log-in to log-out, and that no injected script runs."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from receiver.app.wiring import Parts
from receiver.console.access import COOKIE
from storage.operations import rollups
from storage.rows.events import record_act
from storage.rows.models import Asset, Batch, Dispatch, Event, Task
from storage.states import ArchiveState, AssetState, DispatchState, TaskState
from tests import axe, webdriver
from tests.archived_tasks import archive
from tests.console_reader import PAGES, READ_KEY, Reader
from tests.pipeline import Web, Wired, assets_of, callbacks_of, deliver, insert_row, task_of, working
from tests.receiver.console.test_axe import ALL_BUT_COLOURS, UNUSABLE, seen_by_axe
from tests.receiver.console.test_safety import hostile, own_pages
from tests.webdriver import Browser, wait_until

pytestmark = pytest.mark.skipif(not webdriver.is_installed() and "CI" not in os.environ, reason=webdriver.MISSING)
GOOD = '{"model_name": "kling-image-o1", "prompt": "a boat"}\n'
WIDTHS = (360, 768, 1280, 3840, 1440) if "CI" in os.environ else (360, 1280, 1440)
UNFOLD = "for (const each of document.querySelectorAll('details:not(.menu)')) each.open = true;"
# Outside CI axe-core runs here alone. No template but the three layouts (page, log-in, error) knows of the language.
AXE = axe.script().read_text() if axe.script().exists() else ""
OF_AXE = ("/login", "/tasks/none", "/language/zh?next=/console/ask", "/language/en?next=/console/gallery")
CHECKS = (Path(__file__).parent / "page_checks.js").read_text()


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """The pages' own tests run on both databases; a browser sees no difference."""
    return str(request.param)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(opened: Browser, web: Web) -> Browser:
    """The browser, with a session of a person who may act. Each test opens the page that it wants."""
    opened.resize(1440, 900)
    opened.scheme("light")
    with Reader(web.url) as ann:  # two pages of a browser take 0.2 s of CPU; `log_in` has tests of its own
        opened.set_cookie(web.url, COOKIE, ann.http.cookies[COOKIE], "/console")
    opened.console_log(web.url)
    return opened


def log_in(browser: Browser, web: Web, key: str) -> None:
    browser.open(f"{web.url}/console/login")
    browser.type("input[name=key]", key)
    browser.press("Enter")
    browser.waits_for("Needs you")


def switch_language_and_back(browser: Browser, chinese: str) -> None:
    browser.click(".rail [lang=zh]")
    browser.waits_for(chinese)
    browser.click(".rail [lang=en]")
    browser.waits_for("Log out")


def test_a_live_task_is_followed_from_the_form_to_the_picture(parts: Parts, browser: Browser, web: Web) -> None:
    browser.open(f"{web.url}/console/ask")
    browser.fill("textarea[name=prompt]", "a red kite over dunes")
    browser.click("button[value=price]")
    browser.waits_for("0.028 USD")
    switch_language_and_back(browser, "价格")
    assert browser.run("return document.querySelector('textarea').value") == "a red kite over dunes"
    browser.type("[name=model_name]", "-none")
    browser.press("Enter")  # asks for the price anew: the first button of the form is the language's
    browser.waits_for("kling-image-o1-none")
    assert "zh" not in browser.run("return document.documentElement.lang")
    browser.fill("[name=model_name]", "kling-image-o1")
    browser.click("button[value=price]")
    browser.waits_for("0.028 USD")
    browser.click("button[value=send]")
    browser.waits_for("Submitted. The picture appears here")
    browser.click("#dismiss summary")
    browser.type("[name=reason]", "a wish")
    with working(parts):
        browser.waits_for("Archived whole")
    buttons = "return [...document.querySelectorAll('.page .actions > *')].map((e) => e.innerText.split('\\n')[0])"
    assert "archived" in browser.run("return document.querySelector('header .chips').innerText")
    assert browser.run(buttons) == ["Read now", "Send again as a new task", "Delete", "Dismiss"]
    assert browser.run("return document.activeElement.value") == "a wish"
    assert "except what you write in" in browser.text
    browser.run("document.activeElement.value = ''; document.activeElement.blur()")
    wait_until(lambda: browser.run(buttons) == ["Read now", "Send again as a new task", "Delete"], seconds=5)
    shown = "return [...document.querySelectorAll('.shot img')].map((e) => e.complete && e.naturalWidth)"
    assert wait_until(lambda: (found := browser.run(shown)) and all(found) and found)
    assert browser.console_log(web.url) == []


# Focuses a task's link and selects its text. Returns whether that is still so, and the number of rows.
USE = """window.used = document.querySelector("a[href$=first-one]");
    used.focus(); getSelection().selectAllChildren(used);"""
USED = "return [document.activeElement === used, `${getSelection()}`, document.querySelectorAll('tbody tr').length]"


def test_rows_come_while_somebody_uses_the_list(parts: Parts, browser: Browser, web: Web) -> None:
    """The page hears of no change, so that one fetch is due, and the next after 65 s."""
    insert_row(parts, external_task_id="first-one")
    with browser.before_pages("window.EventSource = class { addEventListener() {} close() {} };"):
        browser.open(f"{web.url}/console/tasks")
    browser.run(USE)
    insert_row(parts, external_task_id="second-one")
    browser.run("renew()")
    wait_until(lambda: browser.run(USED)[2] == 2, seconds=5)
    assert browser.run(USED) == [True, "first-one", 2]
    for number in range(50):
        insert_row(parts, external_task_id=f"later-{number}", created_at=parts.database.now())
    browser.run("setInterval(() => { wanted = true; }, 1000)")  # the page of a moment ago is shared for three seconds
    wait_until(lambda: browser.run(USED) == [True, "first-one", 51], seconds=10)  # a full page, and the row in use
    assert "Older" in browser.text
    browser.run("getSelection().empty()")
    wait_until(lambda: browser.run(USED) == [False, "", 50], seconds=5)
    later = 'new Response("", {status: 503, headers: {"Retry-After": "3"}})'
    browser.run(f"window.asked = 0; window.fetch = async () => {{ asked++; return {later}; }}; renew();")
    wait_until(lambda: browser.run("return asked") > 1)


def test_open_overview_looks_again_when_its_figures_are_read_anew(browser: Browser, web: Web) -> None:
    """A double of the timers, because real ones take half a minute. It lists those that wait."""
    heard = (
        "window.heard = {}; window.EventSource = class { addEventListener(name, f) { heard[name] = f; } close() {} };"
    )
    timers = """window.waits = {}; let made = 0; window.clearTimeout = (each) => { delete waits[each]; };
        window.setTimeout = (f, ms) => { if (f.name === "renew") waits[++made] = ms / 1000; return made; };"""
    change = "heard.change({data: arguments[0] * 1000}); return Object.values(waits).sort((a, b) => a - b)"
    with browser.before_pages(heard + timers):
        browser.open(f"{web.url}/console")
    late = rollups.FRESH_SECONDS + 5
    assert browser.run("heard.hello(); return Object.values(waits)") == [late]
    for _ in range(2):
        assert browser.run(change.replace("arguments[0]", "3")) == [4, late]
    assert browser.run(change.replace("arguments[0]", "60")) == [61]


def test_filter_is_part_of_the_url(parts: Parts, browser: Browser, web: Web) -> None:
    insert_row(parts, external_task_id="red-one", request={"prompt": "a red kite"})
    insert_row(parts, external_task_id="blue-one", request={"prompt": "a blue kite"})
    browser.open(f"{web.url}/console/tasks")
    browser.fill("input[type=search]", "red")
    browser.press("Enter")
    browser.waits_for("Clear")
    assert browser.url == f"{web.url}/console/tasks?q=red"
    assert "red-one" in browser.text and "blue-one" not in browser.text


def test_an_unmatched_delivery_is_replayed(parts: Parts, browser: Browser, web: Web) -> None:
    deliver(parts, None, {"task_id": "unknown", "task_status": "succeed"})
    browser.open(f"{web.url}/console")
    browser.waits_for("1 delivery matches no task")
    browser.click('a[href="/console/deliveries?state=unmatched"]')
    browser.click("tbody a.row")
    browser.click("header button.main")
    browser.waits_for("1 delivery waits for a worker; it was unmatched.")
    assert callbacks_of(parts)[0].state == "received"


def test_a_failed_file_is_retried(parts: Parts, browser: Browser, web: Web) -> None:
    task = archive(parts, 1)[0]
    with parts.database.write() as session:
        asset = session.get_one(Asset, assets_of(parts, task)[0].id)
        asset.state, asset.error = AssetState.FAILED, "broken inside"
        session.get_one(Task, task.id).archive = ArchiveState.INCOMPLETE
    browser.open(f"{web.url}/console/tasks/{task.external_task_id}")
    assert "broken inside" in browser.text
    browser.click("header .actions button.main")
    with working(parts):
        browser.waits_for("Archived whole")


def test_a_dead_event_is_sent_again(parts: Parts, browser: Browser, web: Web) -> None:
    task = insert_row(parts)
    with parts.database.write() as session:
        event = session.exec(select(Event).where(Event.task_id == task.id)).one()
        values: dict[str, Any] = {
            "state": DispatchState.DEAD,
            "error": "answered 500",
            "created_at": parts.database.now(),
        }
        session.add(Dispatch(sink="client", event_id=event.id or 0, task_id=task.id, **values))
    browser.open(f"{web.url}/console/events?state=dead")
    browser.click("section:last-of-type tbody button")
    browser.waits_for("1 event is sent again")


def test_a_batch_with_a_fault_in_line_three_and_then_a_good_one(
    parts: Parts, browser: Browser, web: Web, tmp_path: Path
) -> None:
    file = tmp_path / "spring.jsonl"
    faulty = (GOOD * 2 + '{"prompt": 7}\n', "line 3", "第 3 行")
    for content, said, chinese in (faulty, (GOOD * 3, "3 requests are new", "新请求")):
        file.write_text(content)
        browser.open(f"{web.url}/console/batches/new")
        browser.type("input[type=file]", str(file))
        browser.click("form.fields button.main")
        browser.waits_for(said)
        switch_language_and_back(browser, chinese)
        browser.waits_for(said)
    browser.click("button[value=send]")
    browser.waits_for("3 tasks are queued")
    with working(parts):
        browser.waits_for("3 of 3 are over", seconds=40)


# Ticks the first files of the gallery. Returns whether the button can be pressed, and the number beside it.
TICK = """const ticks = [...document.querySelectorAll('.tile input')], picked = document.querySelector('.picked');
    ticks.forEach((each, n) => { if (each.checked !== (n < arguments[0])) each.click(); });
    const isSeen = picked.checkVisibility(), number = picked.querySelector('[data-number]').textContent;
    return [isSeen && !picked.querySelector('[data-most]').disabled, isSeen ? number : '']"""


def test_gallery_can_be_used_by_keyboard(parts: Parts, browser: Browser, web: Web) -> None:
    archive(parts, 1, n=3, prompt="three red kites")
    browser.open(f"{web.url}/console/gallery")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    browser.press("Enter")
    browser.waits_for("three red kites")
    first = browser.run("return document.querySelector('dialog img').src")
    browser.press("ArrowRight")
    assert browser.run("return document.querySelector('dialog img').src") != first
    browser.press("Escape")
    assert browser.run(
        "return [document.querySelector('dialog').open, document.activeElement.matches('.tile > a')]"
    ) == [False, True]
    for ticks in (0, 1, 2, 1, 0):  # the zip can be asked for while something is chosen
        assert browser.run(TICK, ticks) == [ticks > 0, str(ticks) if ticks else ""]


def test_slash_focuses_the_search_and_the_focus_is_seen(parts: Parts, browser: Browser, web: Web) -> None:
    archive(parts, 1)
    outlined = """const style = getComputedStyle(document.activeElement);
        return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2"""
    for path in ("", "/tasks", "/gallery", "/deliveries"):
        browser.open(f"{web.url}/console{path}")
        browser.press("/")
        assert browser.run("return document.activeElement.type") == "search", path
        assert browser.run(outlined), path
    browser.open(f"{web.url}/console/gallery")
    for _ in range(24):
        browser.press("Tab")
        assert browser.run(outlined), browser.run("return document.activeElement.outerHTML.slice(0, 90)")


def test_a_task_is_deleted_by_typing_its_id(parts: Parts, browser: Browser, web: Web) -> None:
    task = archive(parts, 1)[0]
    browser.open(f"{web.url}/console/tasks/{task.external_task_id}")
    browser.click("summary.danger")
    browser.type("input[name=typed]", task.external_task_id)
    browser.press("Enter")
    browser.waits_for("Deleted, with 2 objects")
    assert task_of(parts, task.external_task_id).deleted_at is not None


def test_language_switches_and_the_session_ends(browser: Browser, web: Web) -> None:
    browser.open(f"{web.url}/console")
    browser.click("a[lang=zh]")
    browser.waits_for("需要您处理")
    browser.click("a[lang=en]")
    browser.waits_for("Needs you")
    browser.click(".rail footer button")
    browser.waits_for("Your key")
    browser.open(f"{web.url}/console/tasks")
    assert "/console/login" in browser.url


def test_the_menu_of_a_phone_opens(browser: Browser, web: Web) -> None:
    browser.resize(360, 780)
    browser.open(f"{web.url}/console/settings")
    browser.click(".rail .open")
    assert browser.run(CHECKS + "return beyond();") == []
    browser.press("Escape")
    browser.click(".rail .open")
    browser.click('#menu a[href="/console/gallery"]')
    assert browser.url.endswith("/console/gallery")


def test_filters_of_a_phone_are_shown_when_they_are_asked_for(browser: Browser, web: Web) -> None:
    shown = "return document.querySelector('select[name=state]').getClientRects().length"
    browser.resize(390, 780)
    for path, fields in (("/tasks", 0), ("/deliveries", 0), ("/tasks?state=failed", 1)):
        browser.open(f"{web.url}/console{path}")
        assert browser.run(shown) == fields, path
    browser.open(f"{web.url}/console/tasks")
    browser.click(".toggle input")
    assert browser.run(shown) == 1


@pytest.mark.parametrize("meanwhile", ["nothing", "an error page"])
def test_open_page_continues_when_the_server_is_back(parts: Parts, browser: Browser, web: Web, meanwhile: str) -> None:
    browser.open(f"{web.url}/console/tasks")
    browser.waits_for("Live")
    web.__exit__()
    browser.waits_for("Not live")
    if meanwhile == "an error page":  # like a proxy in front of an unreachable server
        with error_pages(web) as asked:
            wait_until(lambda: len(asked) > 1, seconds=30)
    insert_row(parts, external_task_id="came-meanwhile")
    with closing(Wired(parts.settings, bucket=parts.bucket)) as fresh, Web(fresh):
        browser.waits_for("came-meanwhile", seconds=60)
        wait_until(lambda: "Not live" not in browser.text, seconds=60)


@contextmanager
def error_pages(web: Web) -> Iterator[list[str]]:
    """502 for everything, at the address of a server that has ended."""
    asked: list[str] = []

    class Away(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(502)

        def log_message(self, *_: object) -> None: ...

    host, _, port = web.url.removeprefix("http://").partition(":")
    server = ThreadingHTTPServer((host, int(port)), Away)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_pictures_that_come_or_go_wait_behind_a_button_while_the_page_is_scrolled_down(
    parts: Parts, browser: Browser, web: Web
) -> None:
    task = archive(parts, 4, n=4)[0]
    browser.resize(900, 500)
    browser.open(f"{web.url}/console/gallery?size=l")
    browser.waits_for("Live")
    browser.run("scrollTo(0, 400)")
    before = browser.run("return document.querySelectorAll('.tile').length")
    with Reader(web.url) as ann:
        ann.post("/act/delete", task=str(task.id), typed=task.external_task_id)
    wait_until(lambda: browser.run("return !document.querySelector('.fresh').hidden"), seconds=30)
    assert browser.run("return document.querySelectorAll('.tile').length") == before
    browser.click(".fresh")
    wait_until(lambda: browser.run("return document.querySelectorAll('.tile').length") == before - 4, seconds=30)


def test_a_reader_sees_and_cannot_act(parts: Parts, browser: Browser, web: Web) -> None:
    task = archive(parts, 1)[0]
    browser.open(f"{web.url}/console")
    browser.click(".rail footer button")
    browser.waits_for("Your key")
    log_in(browser, web, READ_KEY)
    browser.open(f"{web.url}/console/tasks/{task.external_task_id}")
    assert "may look, not act" in browser.text and "Retry" not in browser.text
    sent = """const done = arguments[0]; fetch("/console/act/retry", {method: "POST", body: new URLSearchParams({csrf:
              document.querySelector("[name=csrf]").value})}).then((answer) => done(answer.status));"""
    assert browser.run_async(sent) == 403


def pages_of_rows(parts: Parts) -> tuple[list[str], list[str]]:
    """All kinds of pages with a menu, and those of rows that are an attacker's. Lists have rows of both."""
    whole = archive(parts, 1, n=2)[0]
    callback = deliver(parts, insert_row(parts), b"{}")
    unknown = deliver(parts, None, {"task_id": "unknown", "task_status": "succeed"})
    with parts.database.write() as session:
        number = record_act(session, "ann", "replay", "a delivery", [None], before={unknown.id: "unmatched"})
        batch = Batch(name="spring", created_at=parts.database.now())
        session.add(batch)
        session.flush()
        batch_id = batch.id
    insert_row(parts, batch_id=batch_id, state=TaskState.FAILED)
    plain = [*PAGES, f"/tasks/{whole.external_task_id}", f"/deliveries/{callback.id}", f"/batches/{batch_id}"]
    plain += [f"/deliveries/{unknown.id}?of={number}", f"/ask?again={whole.id}", "/deliveries?state=unmatched"]
    return [*plain, *UNUSABLE], own_pages(parts, *hostile(parts))


def layouts(browser: Browser) -> dict[object, list[str]]:
    found = {}
    for width in WIDTHS:
        browser.resize(width, 900)
        looks = "[...brokenLayout(), ...beyond()]" if width < 800 else "brokenLayout()"
        found[width] = browser.run(f"{CHECKS}return {looks};")
    return found


def contrasts(browser: Browser) -> dict[object, list[str]]:
    light = browser.run(CHECKS + "return [...nameless(), ...poorContrast()];")
    browser.scheme("dark")
    dark = browser.run(CHECKS + "return poorContrast();")
    browser.scheme("light")
    return {"light": light, "dark": dark}


def test_no_page_runs_an_injected_script_breaks_its_layout_or_lacks_names_or_contrast(
    parts: Parts, browser: Browser, web: Web
) -> None:
    """Where axe-core is installed, it runs on the same pages, without its rules of colours: `contrasts` is quicker."""
    plain, evil = pages_of_rows(parts)
    faults: dict[tuple[str, object], list[str]] = {}
    with browser.before_pages(AXE):
        for path in plain:
            browser.open(f"{web.url}/console{path}")  # an open alert would make this call fail
            browser.run(UNFOLD)
            found = {**layouts(browser), **contrasts(browser), "axe": AXE and seen_by_axe(browser, ALL_BUT_COLOURS)}
            faults |= {(path, kind): each for kind, each in found.items()}
        for path in OF_AXE if AXE else ():
            browser.open(f"{web.url}/console{path}")
            faults[path, "axe"] = seen_by_axe(browser, {}, lightbox=path.endswith("/gallery"))
    for path in evil:
        browser.open(f"{web.url}/console{path}")
        browser.run(UNFOLD)
        faults |= {(path, kind): each for kind, each in layouts(browser).items()}
    assert {where: each for where, each in faults.items() if each} == {}
    log = [line for line in browser.console_log(web.url) if not re.search("a status of 40[04]", line)]  # as expected
    assert [line for line in log if "Content Security Policy" in line or "error" in line.lower()] == []


def test_pages_hold_less_than_100_kilobytes_without_pictures(parts: Parts, browser: Browser, web: Web) -> None:
    archive(parts, 1, n=2)
    browser.open(f"{web.url}/console/tasks")
    found = json.loads(
        browser.run("""return JSON.stringify(performance.getEntries().filter((e) => e.decodedBodySize)
        .map((e) => [e.name, e.decodedBodySize]))""")
    )
    assert sum(size for name, size in found if "/thumbnails/" not in name) < 100_000
    assert all(name.startswith(web.url) for name, _ in found)
