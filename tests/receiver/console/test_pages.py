"""Every page over the real server: its contents by role and language, and its paging."""

from __future__ import annotations

import re

import pytest

from receiver.app.wiring import Parts
from storage.accounts import pauses
from storage.errors import AccountRefused, ModelRefused
from storage.states import TaskState
from tests.archived_tasks import archive
from tests.console_reader import PAGES, Reader
from tests.harness import wait_until
from tests.pipeline import Web, assets_of, deliver, insert_row

pytestmark = pytest.mark.databases("sqlite")  # words and languages
BOTH = pytest.mark.databases("sqlite", "postgresql")  # the statements of every page


@pytest.mark.parametrize("language", [pytest.param("en", marks=BOTH), "zh"])
def test_every_page_answers_without_anything_in_the_database(ann: Reader, language: str) -> None:
    ann.http.headers["Accept-Language"] = language
    for path in PAGES:
        assert f'lang="{language}"' in ann.page(path)


@BOTH
def test_every_page_answers_with_something_in_it(parts: Parts, ann: Reader) -> None:
    task = archive(parts, 2, n=2)[0]
    callback = deliver(parts, insert_row(parts), b"no json")
    own = (f"/tasks/{task.external_task_id}", f"/deliveries/{callback.id}", f"/tasks?q={task.external_task_id}")
    for path in (*PAGES, *own):
        assert len(ann.page(path)) < 100_000
    for asset in assets_of(parts, task):
        assert ann.get(f"/files/{asset.id}").headers["content-type"] == "image/png"
        assert ann.get(f"/thumbnails/{asset.id}").content[8:12] == b"WEBP"


@pytest.mark.parametrize(("code", "sentence"), [(1102, "is paused"), (1103, "may not use kling-image-o1")])
@pytest.mark.usefixtures("fresh_needs")
def test_overview_names_a_paused_account_with_the_providers_message(
    parts: Parts, ann: Reader, code: int, sentence: str
) -> None:
    refusal = (ModelRefused if code == 1103 else AccountRefused)("refused", code=code, said="<b>top up</b>")
    with parts.database.write() as session:
        pauses.pause(session, "kling", "kling-image-o1", refusal)
    wait_until(lambda: sentence in ann.page(""), every=0.3)  # all consoles share one query in three seconds
    assert "&lt;b&gt;top up&lt;/b&gt;" in ann.page("")


@pytest.mark.parametrize(
    ("accepted", "next_step", "offered"),
    [("74912873", "nothing by itself: retry tries once more", True), (None, "nothing: it is over", False)],
    ids=["accepted", "refused"],
)
def test_a_failed_task_offers_a_retry_where_one_does_something(
    parts: Parts, ann: Reader, accepted: str | None, next_step: str, offered: bool
) -> None:
    task = insert_row(
        parts, provider_task_id=accepted, error="content refused", state=TaskState.FAILED, step=None, due_at=None
    )
    page = ann.page(f"/tasks/{task.external_task_id}")
    assert (next_step in page, "No file." in page) == (True, True)
    assert ('action="/console/act/retry"' in page, 'class="main"' in page) == (offered, False)


def test_a_queued_task_names_the_pause_of_its_account(parts: Parts, ann: Reader) -> None:
    task = insert_row(parts, queued_at=parts.database.now(), due_at=None, slots=-1)
    page = f"/tasks/{task.external_task_id}"
    assert "it waits for a free slot of the account" in ann.page(page)
    with parts.database.write() as session:
        pauses.pause(session, task.provider, None, AccountRefused("refused", code=1102, said="top up"))
    assert "the account is paused, and a create is tried" in ann.page(page)


def test_causes_are_in_the_language_of_the_page(parts: Parts, web: Web) -> None:
    """On the lists, on their own pages and in the timeline. What is not ours stays and is marked."""
    deliver(parts, None, {"task_id": "unknown", "task_status": "succeed"})
    task = insert_row(parts, note="delivered 1 of 2", error="content refused", state=TaskState.FAILED)
    unreadable = deliver(parts, task, b"no json")
    with Reader(web.url, language="zh") as zhang, Reader(web.url) as ann:
        listed, own = zhang.page("/deliveries"), zhang.page(f"/deliveries/{unreadable.id}")
        shown = zhang.page(f"/tasks/{task.external_task_id}")
        assert "这里没有此编号的任务" in listed and "无法按 JSON 读取" in listed and "无法按 JSON 读取" in own
        assert "应有 2 个，仅收到 1 个" in shown and '<span lang="en">content refused</span>' in shown
        assert "无法按 JSON 读取" in shown[shown.index('data-live="timeline') :]
        assert "no task of ours has this id" in ann.page("/deliveries") and 'span lang="en"' not in ann.page("/tasks")


def test_durations_provenance_and_faults_of_a_request_are_in_chinese_too(parts: Parts, web: Web) -> None:
    task = archive(parts, 1)[0]
    with Reader(web.url, language="zh") as zhang:
        shown = zhang.page(f"/tasks/{task.external_task_id}")
        assert re.search(r"\+\d\.\d 秒<", shown) and "文件主机" in shown and "响应头" in shown and "{&#39;" not in shown
        assert re.search(r"<b>\d+\.\d 秒</b>", zhang.page("")) is not None
        refused = zhang.post("/ask", n="99", resolution="9k", more="{")
        assert "更多字段：请写一个 JSON 对象" in refused.text
        refused = zhang.post("/ask", n="99", resolution="9k")
        assert "prompt：必填" in refused.text and "n：99：必须是 1 到 9" in refused.text
