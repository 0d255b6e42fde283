"""Live consoles with the same view share one rendering, without anything that belongs to one reader."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import event

from receiver.app.wiring import Parts
from tests.archived_tasks import archive
from tests.console_reader import CSRF, READ_KEY, Reader
from tests.pipeline import Web, assets_of, insert_row

LIVE = {"X-Live": "1"}


def test_ten_consoles_at_one_view_cost_one_rendering(parts: Parts, web: Web) -> None:
    archive(parts, 2)
    readers = [Reader(web.url) for _ in range(10)]
    readers[0].get("/gallery", headers=LIVE)
    asked: list[str] = []
    event.listen(parts.database.reader, "before_cursor_execute", lambda *given: asked.append(given[2]))
    readers[0].get("/tasks", headers=LIVE)
    once = len(asked)
    asked.clear()
    with ThreadPoolExecutor(10) as threads:
        pages = list(threads.map(lambda reader: reader.get("/tasks?state=succeeded", headers=LIVE).text, readers))
    assert len([each for each in asked if "task.archive" in each]) <= once
    assert len({CSRF.sub("", page) for page in pages}) == 1
    for reader in readers:
        reader.http.close()


def test_a_shared_page_has_the_readers_own_token_rights_and_language(parts: Parts, web: Web, ann: Reader) -> None:
    task = archive(parts, 1)[0]
    path = f"/tasks/{task.external_task_id}"
    with Reader(web.url) as other, Reader(web.url, READ_KEY) as ben, Reader(web.url, language="zh") as zhang:
        pages = [each.get(path, headers=LIVE).text for each in (ann, other, ben, zhang)]
        tokens = [set(CSRF.findall(page)) for page in pages]
        assert tokens == [{each.csrf} for each in (ann, other, ben, zhang)]
        assert ["/act/delete" in page for page in pages] == [True, True, False, True]
        assert "档" in pages[3] and "档" not in pages[0]


def test_after_an_action_the_next_live_page_is_new(parts: Parts, ann: Reader) -> None:
    task = insert_row(parts)
    path = f"/tasks/{task.external_task_id}"
    assert "an old wish" not in ann.get(path, headers=LIVE).text
    ann.post("/act/dismiss", task=str(task.id), reason="an old wish")
    assert "an old wish" in ann.get(path, headers=LIVE).text


def test_a_file_is_never_shared(parts: Parts, ann: Reader) -> None:
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    answers = [ann.get("/gallery/zip", params={"id": str(asset.id)}, headers=LIVE) for _ in range(2)]
    assert all(len(each.content) > (asset.size or 0) for each in answers)
