"""Every page over the real server: its contents by role and language, and its paging."""

from __future__ import annotations

import pytest

from receiver.app.wiring import Parts
from storage.accounts import pauses
from storage.errors import AccountRefused, ModelRefused
from tests.archived_tasks import archive
from tests.console_reader import PAGES, Reader
from tests.harness import wait_until
from tests.pipeline import assets_of, deliver, insert_row


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_page_answers_without_anything_in_the_database(ann: Reader, language: str) -> None:
    ann.http.headers["Accept-Language"] = language
    for path in PAGES:
        assert f'lang="{language}"' in ann.page(path)


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
def test_overview_names_a_paused_account_with_the_providers_message(
    parts: Parts, ann: Reader, code: int, sentence: str
) -> None:
    refusal = (ModelRefused if code == 1103 else AccountRefused)("refused", code=code, said="<b>top up</b>")
    with parts.database.write() as session:
        pauses.pause(session, "kling", "kling-image-o1", refusal)
    wait_until(lambda: sentence in ann.page(""), every=0.3)  # all consoles share one query in three seconds
    assert "&lt;b&gt;top up&lt;/b&gt;" in ann.page("")
