"""A public URL with a path: a proxy may pass the path on or strip it."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx
import pytest

from receiver.app.wiring import Parts
from tests.pipeline import Web, Wired, callbacks_of, task_of

BODY = b'{"task_id": "901", "task_status": "processing"}'
ON_SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"])


@ON_SQLITE
@pytest.mark.parametrize("public_path", ["/pics", "/a/b", "/kling", "/console"])
@pytest.mark.parametrize("is_stripped", [True, False], ids=["stripped", "kept"])
def test_callback_below_a_path_is_kept_either_way(parts: Parts, public_path: str, is_stripped: bool) -> None:
    update = {"public_url": f"https://h.example.com{public_path}"}
    public = Wired(parts.settings.model_copy(update=update), bucket=parts.bucket)
    public.submitter.submit({"model_name": "kling-image-o1", "prompt": "a boat"}, external_task_id="task")
    task = task_of(public, "task")
    path = urlsplit(str(task.callback_url)).path
    assert path.startswith(f"{public_path}/callbacks/kling/")
    with Web(public) as web:
        answer = httpx.post(web.url + (path.removeprefix(public_path) if is_stripped else path), content=BODY)
    assert answer.status_code == 200
    assert [each.body for each in callbacks_of(public)] == [BODY]
    public.close()


@ON_SQLITE
@pytest.mark.parametrize("changes", [{"public_url": "https://h.example.com/pics", "api_keys": "k" * 24}])
def test_other_paths_are_answered_below_the_public_path_too(parts: Parts, web: Web) -> None:
    assert {httpx.get(f"{web.url}{path}").status_code for path in ("/healthz", "/pics/healthz")} == {200}
    assert {httpx.get(f"{web.url}{path}/kling/v1/images").status_code for path in ("", "/pics")} == {401}
    assert {httpx.get(f"{web.url}/{path}").status_code for path in ("picsx/healthz", "pics/x/healthz")} == {404}
