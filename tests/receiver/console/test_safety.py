"""Text of others is shown and never trusted: markup, URLs, secrets, sizes, and frames."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from pydantic import SecretStr
from sqlmodel import select

from receiver.app.console_parts import shown_settings
from receiver.app.wiring import Parts
from receiver.base import visible
from receiver.base.config import Settings
from receiver.console import visit
from storage.accounts import pauses
from storage.errors import ModelRefused
from storage.operations import outbox
from storage.rows.events import EventName, record, record_act
from storage.rows.models import Batch, Callback, Dispatch, Event, RollingAudit, Task, Worker
from storage.states import ArchiveState, AssetState, DispatchState, TaskState
from tests.archived_tasks import archive
from tests.console_reader import PAGES, Reader
from tests.pipeline import assets_of, deliver, insert_row
from tests.rows import new_asset

pytestmark = pytest.mark.databases("sqlite")  # a page shows what a row has
BOTH = pytest.mark.databases("sqlite", "postgresql")  # texts that a database may refuse
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7*7}}${7*7}&lt;\u202eRTL\u0007"
LONG = "w" * 10_000
# Our own markup never has these. A page with one has inserted something unescaped.
RAW = ("<script>alert", "<img src=x", "onerror=alert(2)>", "\u202e", "\u0007")
SIGNED = "https://cdn.example.com/path-of-a-token/x.png?Signature=s3cr3t&Key-Pair-Id=K1"


def hostile(parts: Parts) -> tuple[Task, Callback]:
    """A task, a file, events and deliveries full of markup, script, RTL and endless words."""
    request = {"prompt": EVIL + LONG, "model_name": EVIL, "image_list": [{"image": SIGNED}]}
    ended = {"state": TaskState.SUCCEEDED, "archive": ArchiveState.INCOMPLETE}
    named = {"external_task_id": EVIL.replace("\u0007", ""), "provider_task_id": EVIL}
    task = insert_row(parts, **ended, **named, request=request, error=EVIL + LONG, note=EVIL, units="<b>9")
    with parts.database.write() as session:
        words = {"error": EVIL + LONG, "media_type": "text/html<script>", "fetched": {"host": EVIL, LONG.upper(): LONG}}
        for index in range(2):  # beside each other, where a figure is narrow
            new_asset(session, task, index, source_url=SIGNED, state=AssetState.FAILED, superseded=[EVIL], **words)
        told = {"error": EVIL, "kind": EVIL, "other": {"url": SIGNED, "x": EVIL}}
        record(session, EventName.ASSET_FAILED, task.id, told)
        batch = Batch(name=EVIL[:100], created_at=parts.database.now())
        session.add(batch)
        session.flush()
        session.get_one(Task, task.id).batch_id = batch.id
        outbox.disable(session, EVIL[:60], EVIL + LONG)
        [event] = session.exec(select(Event).where(Event.name == "asset.failed")).all()
        dead = {"state": DispatchState.DEAD, "error": EVIL + LONG[:400], "created_at": parts.database.now(), "tries": 2}
        session.add(Dispatch(sink=EVIL[:60], event_id=event.id or 0, task_id=task.id, **dead))
        record_act(session, EVIL, EVIL, EVIL, [task.id, None], reason=EVIL + LONG)
        pauses.pause(session, "kling", EVIL, ModelRefused("refused", code=1103, said=EVIL + LONG))
        finding = {"kind": EVIL, "key": EVIL + LONG, "detail": EVIL, "task": EVIL}
        session.add(RollingAudit(name="archive", due_at=parts.database.now(), findings=[finding]))
        session.add(Worker(host=EVIL, pid=1, threads=1, started_at=parts.database.now(), seen_at=parts.database.now()))
    body = json.dumps({"task_id": EVIL, "evil": EVIL, "url": SIGNED, "long": LONG}, ensure_ascii=False).encode()
    return task, deliver(parts, None, body.replace(b"/x.png", b"\\/x.png"))


SEARCHED = "%3Cscript%3Ealert(1)%3C/script%3E%22%3E%3Cimg%20src=x%20onerror=alert(2)%3E"


def own_pages(parts: Parts, task: Task, callback: Callback) -> list[str]:
    """The pages of the rows that `hostile` made, and lists with hostile filters."""
    with parts.database.read() as session:
        batch_id = session.get_one(Task, task.id).batch_id
    fields = ("tasks?q", "gallery?model", "deliveries?cause", "events?sink", "deliveries/replay?task")
    filtered = [f"/{field}={SEARCHED}" for field in fields]
    return [
        f"/tasks/{task.id}",
        f"/ask?again={task.id}",
        f"/deliveries/{callback.id}",
        f"/batches/{batch_id}",
        *filtered,
    ]


@BOTH
def test_hostile_markup_is_escaped_on_every_page(parts: Parts, ann: Reader) -> None:
    task, callback = hostile(parts)
    for path in (*PAGES, *own_pages(parts, task, callback)):
        answer = ann.get(path)
        assert answer.status_code == (400 if "sink=" in path or "?task=" in path else 200), path
        page = answer.text
        assert [each for each in RAW if each in page] == [], path
        assert "s3cr3t" not in page and "path-of-a-token" not in page, path
    assert "&lt;script&gt;alert(1)" in ann.page(f"/tasks/{task.id}")
    assert "&lt;script&gt;alert(1)" in ann.page(f"/deliveries/{callback.id}")


def test_every_answer_forbids_frames(
    parts: Parts, ann: Reader, stranger: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [ann.get(path) for path in (*PAGES, "/tasks/none", "/static/console.js")] + [stranger.get("/login")]
    answers += [ann.post("/act/retry", csrf="wrong")]
    monkeypatch.setattr(visit.Visit, "page", None)  # a bug
    answers += [ann.get("/tasks")]
    assert answers[-1].status_code == 500
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe" not in policy and answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_no_page_has_inline_script_or_style(parts: Parts, ann: Reader) -> None:
    task = archive(parts, 1, n=2)[0]
    for path in (*PAGES, f"/tasks/{task.external_task_id}", "/login"):
        page = ann.page(path)
        assert re.search(r"<script(?! src=)|<style|\sstyle=|\son[a-z]+=|javascript:", page) is None, path
        assert re.findall(r'(?:src|href|action)="(?!/console|#)[^"]*"', page) == [], path


def test_no_secret_of_the_settings_is_on_any_page(parts: Parts, ann: Reader) -> None:
    task = archive(parts, 1)[0]
    secrets = [
        value.get_secret_value()
        for given in vars(parts.settings).values()
        for value in (given if isinstance(given, tuple) else (given,))
        if isinstance(value, SecretStr) and len(value.get_secret_value()) > 8
    ]
    assert len(secrets) > 3
    urls = [asset.source_url for asset in assets_of(parts, task)] + [task.callback_url]
    for path in (*PAGES, f"/tasks/{task.external_task_id}"):
        page = ann.page(path)
        assert [each for each in (*secrets, *urls) if each and each in page] == [], path
    changed = ann.post("/settings").text
    assert not any(each in changed for each in secrets)


def test_the_default_of_a_secret_setting_is_shown_and_nothing_else_of_it() -> None:
    plain = shown_settings(Settings.model_construct(s3_bucket="b"))
    own = shown_settings(Settings.model_construct(s3_bucket="b", database_url=SecretStr("sqlite:///own.db")))
    assert (plain["RECEIVER_DATABASE_URL"], own["RECEIVER_DATABASE_URL"]) == ("sqlite:///receiver.db", "…")
    assert plain["RECEIVER_API_KEYS"] == plain["RECEIVER_KLING_API_KEY"] == ""


def test_file_is_served_with_a_policy_that_runs_no_script(parts: Parts, ann: Reader) -> None:
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    for path in (f"/files/{asset.id}", f"/thumbnails/{asset.id}"):
        answer = ann.get(path)
        assert "sandbox" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    path = f"/files/{asset.id}"
    etag = ann.get(path).headers["etag"]
    asked = ({"Range": "bytes=0-9"}, {"If-None-Match": etag}, {"Range": "bytes=99999999-"})
    answers = [ann.get(path, headers=each) for each in asked]
    assert [each.status_code for each in answers] == [206, 304, 416]
    for answer in answers:
        assert "sandbox" in answer.headers["content-security-policy"], answer.status_code
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_browser_asks_before_it_shows_a_kept_picture(parts: Parts, ann: Reader, ben: Reader) -> None:
    kept, gone = archive(parts, 2)
    paths = [f"/{kind}/{assets_of(parts, each)[0].id}" for each in (kept, gone) for kind in ("files", "thumbnails")]
    known = {path: {"If-None-Match": ann.get(path).headers["etag"]} for path in paths}
    ann.post("/act/delete", task=str(gone.id), typed=gone.external_task_id)
    again = [ben.get(path, headers=known[path]) for path in paths]
    assert [each.status_code for each in again] == [304, 304, 404, 404]
    assert [each.headers["cache-control"] for each in again] == ["private, no-cache"] * 2 + ["no-store"] * 2
    ended = ann.post("/logout").history[0]
    assert ended.headers["clear-site-data"] == '"cache"'
    assert "Your key" in ann.get(paths[1], headers=known[paths[1]]).text


@pytest.mark.parametrize("reached", ["through us", "at the store"])
def test_a_download_is_saved_under_the_objects_name(parts: Parts, ann: Reader, reached: str) -> None:
    if reached == "at the store":
        parts.bucket._public_endpoint_url = parts.bucket._endpoint_url
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    answer = ann.get(f"/files/{asset.id}?download=1")
    assert [each.status_code for each in answer.history] == ([302] if reached == "at the store" else [])
    name = str(asset.key).rpartition("/")[2]
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
    assert len(answer.content) == asset.size


def test_body_is_saved_and_never_shown_by_the_browser(parts: Parts, ann: Reader, ben: Reader) -> None:
    callback = deliver(parts, None, b"<script>alert(1)</script>\x00\xff")
    answer = ann.get(f"/deliveries/{callback.id}/body")
    assert (answer.content, answer.headers["content-type"]) == (callback.body, "application/octet-stream")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "\\x00" not in answer.text and "\\u0000\\xff" in ann.page(f"/deliveries/{callback.id}")
    assert ben.get(f"/deliveries/{callback.id}/body").status_code == 403


NESTED = json.dumps({"task_result": {"images": [{"url": SIGNED}]}})
ESCAPED = NESTED.replace("/", "\\/")
SPELLED = {
    "plain": NESTED,
    "a quote": NESTED.replace("x.png", "x'y.png"),
    "a tag": NESTED.replace("x.png", "x<y>.png"),
    "a space": NESTED.replace("x.png", "x y.png"),
    "a line": NESTED.replace("x.png", "x\\ny.png"),
    "a raw line break": NESTED.replace("x.png", "x\ny.png"),
    "slashes by number": NESTED.replace("/", "\\u002f"),
    "colons by number": NESTED.replace("https:", "https\\u003a"),
    "all by number": NESTED.replace(SIGNED, "".join(f"\\u{ord(each):04x}" for each in SIGNED)),
    "PHP": ESCAPED,
    "JSON in JSON": json.dumps({"data": NESTED}),
    "PHP in PHP": json.dumps({"data": ESCAPED}).replace("/", "\\/"),
    "thrice": json.dumps({"data": json.dumps({"data": ESCAPED})}),
    "JSON after words": json.dumps({"data": "got " + ESCAPED}),
    "a name": json.dumps({SIGNED: 1}),
    "encoded": json.dumps({"to": "https%3A%2F%2Fh%2Fpath-of-a-token%3FSignature%3Ds3cr3t"}),
    "UTF-16": NESTED.encode("utf-16"),
    "cut": ESCAPED.replace("x.png", "x'y.png")[:-2],
    "cut, by number": NESTED.replace("/", "\\u002f")[:-2],
    "cut in JSON": json.dumps({"data": ESCAPED})[:-2],
    "cut UTF-16": NESTED[:-2].encode("utf-16"),
    "a form": "url=https%3A%2F%2Fh%2Fpath-of-a-token%3FSignature%3Ds3cr3t",
    "a page": "<a href='https:&#x2f;&#x2f;h&#x2f;path-of-a-token?Signature=s3cr3t'>",
    "too deep": "[" * 5_000 + SIGNED.replace("x.png", "x'y"),
}


def test_a_reader_sees_no_signed_link_however_it_is_written(parts: Parts, ben: Reader) -> None:
    for how, given in SPELLED.items():
        callback = deliver(parts, None, given.encode() if isinstance(given, str) else given)
        page = ben.page(f"/deliveries/{callback.id}")
        shown = re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), page)
        assert "s3cr3t" not in shown and "path-of-a-token" not in shown, how


UNSCHEMED = (
    "//h/x?Signature=s3cr3t", "see //h/x?a=s3cr3t", "h.example/x?Signature=s3cr3t", "/x.png?Expires=9&Signature=s3cr3t",
    "https:/h/x?Signature=s3cr3t", "https:\\\\h/x?Signature=s3cr3t", "https:/\n/h/x?sig=s3cr3t", "192.0.2.1/x?a=s3cr3t",
    "Expires=9&Signature=s3cr3t", "a=1&X-Amz-Signature=s3cr3t https://h/x", "%2Fx%3Fsig%3Ds3cr3t",
)  # fmt: skip


def test_a_reader_sees_no_signature_without_a_scheme(parts: Parts, ben: Reader) -> None:
    for given in UNSCHEMED:
        for body in (json.dumps({"a": [given], given: 1, "b": json.dumps({"c": given})}), f"not JSON: {given}\n"):
            callback = deliver(parts, None, body.encode())
            assert "s3cr3t" not in ben.page(f"/deliveries/{callback.id}"), body


def test_an_image_link_of_a_request_is_masked_to_its_end(parts: Parts, ben: Reader) -> None:
    images = [{"image": SIGNED.replace("x.png", each)} for each in ("x'y.png", "x y.png", "x<y.png")]
    task = insert_row(parts, request={"prompt": "see https://a.example/b and more", "image_list": images})
    page = ben.page(f"/tasks/{task.id}")
    assert "s3cr3t" not in page and "path-of-a-token" not in page and "https://a.example/… and more" in page


def test_large_forms_are_refused_unread(ann: Reader) -> None:
    assert ann.post("/act/dismiss", reason="x" * 70_000).status_code == 413
    assert ann.http.post("/console/login", data={"key": "x" * 5_000}).status_code == 413
    chunked = ann.http.post("/console/act/dismiss", content=(b"x" * 1_000 for _ in range(100)))
    assert chunked.status_code == 413


NOWHERE = ("/tasks/none", "/deliveries/0", "/deliveries/x", "/batches/x", "/files/x", "/nothing", "x")


@BOTH
def test_missing_page_is_a_readable_404(ann: Reader) -> None:
    for path in NOWHERE:
        answer = ann.get(path)
        assert answer.status_code == 404 and (path == "x" or "There is nothing here" in answer.text), path
    assert "此处没有内容" in ann.get("/language/zh?next=/console/nothing").text
    switch = f'href="/console/language/en?next={quote("/console/files/x?download=1", safe="")}"'
    assert switch in ann.get("/files/x?download=1").text


def test_templates_never_mark_foreign_text_as_safe() -> None:
    for template in (Path(visit.HERE) / "templates").glob("*.html"):
        assert not re.search(r"\|\s*safe|autoescape false|Markup", template.read_text()), template


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("see https://a.example/b?c=d now", "see https://a.example/… now"),
        ('{"u":"https:\\/\\/a.example\\/b?c"}', '{"u":"https:\\/\\/a.example/…"}'),
        ("https://user:pw@a.example/b", "https://a.example/…"),
        ("https://a.example", "https://a.example"),
        ("'https://a.example/b'c<d>?e' now", "'https://a.example/… now"),
        ("a\u202eb\x00", "a\\u202eb\\u0000"),
    ],
)
def test_only_the_host_of_a_url_is_shown(foreign: str, shown: str) -> None:
    assert visible.seen(foreign) == shown


@pytest.mark.parametrize(
    "part", ["://", ":/", "\\\\", ":\\", "%3a", "%25", "\\u003a", "&#58;", "&colon;&sol;", "@", '["', "[{", '"\\"']
)
def test_bodies_are_masked_in_linear_time(part: str) -> None:
    before = time.process_time()
    for body in (part * (250_000 // len(part)), json.dumps([part * (250_000 // len(part))])):
        visible.pretty(body.encode())
        visible.guarded(body.encode())
    assert time.process_time() - before < 2
