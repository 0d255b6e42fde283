"""Every page over the real server: what it shows, for whom, in which language, and how it pages."""

from __future__ import annotations

import pytest

from receiver.app.wiring import Parts
from tests.archived_tasks import archive
from tests.console_reader import PAGES, Reader
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
