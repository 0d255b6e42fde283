"""Every route of the console's application: which need a session, and which the right to act."""

from __future__ import annotations

import re
import uuid

import pytest
from starlette.routing import Route

from receiver.app.console_parts import make_console
from receiver.app.wiring import Parts
from receiver.web.assets import Assets
from tests.archived_tasks import archive
from tests.console_reader import Reader
from tests.pipeline import assets_of, callbacks_of
from tests.receiver.console.test_access import POSTS
from tests.rows import stored

pytestmark = pytest.mark.databases("sqlite")  # who may do what is asked of no database
OPEN_TO_ALL = (
    "/console/",
    "/console/login",
    "/console/logout",
    "/console/language/{language}",
    "/console/static/{name}",
)


def routes(parts: Parts, method: str) -> list[str]:
    """The paths of the routes with this method."""
    made = make_console(parts).application(Assets(parts.database, parts.bucket, parts.tokens).answer)
    found = [route for route in made.app.routes if isinstance(route, Route) and method in (route.methods or ())]
    return [route.path for route in found if route.path not in OPEN_TO_ALL]


def test_a_reader_is_refused_at_every_action_and_changes_nothing(parts: Parts, ben: Reader) -> None:
    task = archive(parts, 1)[0]
    before = stored(parts.database, task)
    paths = [path.removeprefix("/console") for path in routes(parts, "POST")]
    assert sorted(paths) == sorted(POSTS)
    for path in paths:
        answer = ben.post(path, task=str(task.id), typed=task.external_task_id, reason="x", step="send")
        assert answer.status_code == 403, path
    assert stored(parts.database, task) == before


def test_every_page_wants_a_session_and_answers_a_reader(parts: Parts, ben: Reader, stranger: Reader) -> None:
    task = archive(parts, 1)[0]
    asset = assets_of(parts, task)[0]
    callback = next(each for each in callbacks_of(parts) if each.source == "push")
    ids = {"tasks": task.external_task_id, "files": asset.id, "thumbnails": asset.id, "deliveries": callback.id}
    paths = routes(parts, "GET")
    assert len(paths) >= 20
    for path in paths:
        url = re.sub(r"\{id(:path)?\}", str(ids.get(path.split("/")[2] if "{" in path else "", uuid.uuid4())), path)
        assert "/console/login" in str(stranger.http.get(url).url), url
        if path == "/console/live":
            continue
        status = ben.http.get(url, params={"state": "applied"} if "deliveries" in url else {}).status_code
        absent = "{id}" in path and "batches" in path
        expected = 403 if path.endswith("/body") else 404 if absent else 400 if path.endswith("/zip") else 200
        assert status == expected, (url, status)
