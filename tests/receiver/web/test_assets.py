"""`GET /assets/{token}.{ext}`: one archived file to whoever has its link, and nothing to anybody else."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import event

from receiver.app.wiring import Parts
from receiver.base.tokens import ASSET_PURPOSE
from receiver.cli import show
from receiver.sandbox import Sandbox
from receiver.web import assets
from receiver.web.assets import asset_link
from storage.rows.models import Asset, Task
from storage.states import AssetState
from tests.archived_tasks import archive
from tests.command_line import CommandLine, variables
from tests.harness import wait_until
from tests.pipeline import CALLBACK_SECRET, Web, assets_of, kept


@pytest.fixture
def task(parts: Parts, web: Web) -> Task:
    return archive(parts, 1)[0]


@pytest.fixture
def asset(parts: Parts, task: Task) -> Asset:
    return assets_of(parts, task)[0]


@pytest.fixture
def link(parts: Parts, asset: Asset) -> str:
    return asset_link(parts.tokens, str(parts.settings.public_url), asset)


def get(url: str, method: str = "GET") -> httpx.Response:
    return httpx.request(method, url, timeout=20, follow_redirects=False)


def test_a_private_store_is_read_for_the_reader(link: str, asset: Asset) -> None:
    answer = get(link)
    assert (answer.status_code, hashlib.sha256(answer.content).hexdigest()) == (200, asset.sha256)
    assert {name: answer.headers[name] for name in ("content-type", "content-length", "x-content-type-options")} == {
        "content-type": "image/png", "content-length": str(asset.size), "x-content-type-options": "nosniff",
    }  # fmt: skip
    name = str(asset.key).rpartition("/")[2]
    assert answer.headers["content-disposition"] == f'inline; filename="{name}"'


def test_head_tells_the_same_without_the_bytes(link: str, asset: Asset) -> None:
    answer = get(link, "HEAD")
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, str(asset.size), b"")


def test_a_public_store_is_pointed_at(parts: Parts, link: str, asset: Asset) -> None:
    parts.bucket._public_endpoint_url = parts.bucket._endpoint_url
    answer = get(link)
    assert (answer.status_code, answer.content) == (302, b"")
    assert "X-Amz-Signature" in answer.headers["location"] and answer.headers["cache-control"] == "no-store"
    assert hashlib.sha256(get(answer.headers["location"]).content).hexdigest() == asset.sha256


def test_what_a_browser_might_run_is_saved(parts: Parts, link: str, asset: Asset) -> None:
    with parts.database.write() as session:
        session.get_one(Asset, asset.id).media_type = "text/html"
    assert get(link).headers["content-disposition"].startswith("attachment;")


def test_no_query_is_made_before_the_token_is_checked(parts: Parts, web: Web, link: str) -> None:
    token = urlsplit(link).path.split("/")[-1].partition(".")[0]
    of_task = parts.tokens.sign("", uuid.uuid4())
    forged = ["A" * 55, token[:-1] + ("A" if token[-1] != "A" else "B"), token + "A", token[:-1], of_task, "%00", "é"]
    queries: list[str] = []
    event.listen(parts.database.reader, "before_cursor_execute", lambda *args: queries.append(args[2]))
    for each in forged:
        assert get(f"{web.url}/assets/{each}.png").status_code == 404
    for path in ("/assets/", "/assets/.png", f"/assets/{token}", f"/assets/{token}.svg", f"/assets/{token}.png/x"):
        assert get(web.url + path).status_code == 404
    assert queries == []


def test_a_good_token_of_no_archived_file(parts: Parts, web: Web, link: str, asset: Asset) -> None:
    unknown = parts.tokens.sign("", uuid.uuid4(), purpose=ASSET_PURPOSE)
    nobody = parts.tokens.sign("", None, purpose=ASSET_PURPOSE)
    for name in (f"{unknown}.png", f"{nobody}.png"):
        assert get(f"{web.url}/assets/{name}").status_code == 404
    assert get(link.replace(".png", ".jpg")).status_code == 404
    assert get(link, "POST").status_code == 405
    with parts.database.write() as session:
        session.get_one(Asset, asset.id).state = AssetState.DUE
    assert get(link).status_code == 404


def test_an_object_that_is_gone(parts: Parts, link: str, asset: Asset) -> None:
    parts.bucket.delete(str(asset.key))
    assert get(link).status_code == 404


def test_a_store_that_is_away(parts: Parts, link: str, asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.bucket, "name", "no-such-bucket")
    assert get(link).status_code == 503


def test_a_link_is_no_callback_token_and_the_other_way_round(parts: Parts, web: Web, link: str, task: Task) -> None:
    token = link.rpartition("/")[2].partition(".")[0]
    assert httpx.post(f"{web.url}/callbacks/kling/{token}", content=b"{}").status_code == 404
    assert get(f"{web.url}/assets/{parts.tokens.sign('kling', task.id)}.png").status_code == 404


def test_readers_who_leave_free_their_place(
    parts: Parts, link: str, asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "MAX_STREAMS", 1)
    for _ in range(3):
        with httpx.stream("GET", link, timeout=20) as answer:
            assert answer.status_code in (200, 503)
        wait_until(lambda: get(link).status_code == 200)


def test_links_as_people_get_them(parts: Parts, task: Task, link: str, asset: Asset) -> None:
    (one,) = show.urls(parts, task.external_task_id, 60)
    assert (one["kind"], one["index"], one["key"], one["link"]) == ("image", 0, asset.key, link)
    assert hashlib.sha256(get(one["url"]).content).hexdigest() == asset.sha256
    with pytest.raises(ValueError, match="not archived"):
        asset_link(parts.tokens, "https://a", asset.model_copy(update={"state": AssetState.DUE}))


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_status_prints_links(parts: Parts, database_url: str, sandbox: Sandbox, tmp_path: Any) -> None:
    (task,) = archive(parts, 1, n=2)
    known = variables(database_url, parts.bucket, sandbox)
    receiver = CommandLine(known, tmp_path)
    done = receiver("status", task.external_task_id, "--urls", "--expires", "120")
    urls = done.out.split()
    digests = {hashlib.sha256(get(url).content).hexdigest() for url in urls}
    assert (done.code, len(urls)) == (0, 2) and all("X-Amz-Expires=120" in url for url in urls)
    assert digests == {digest for key, digest in kept(parts).items() if "image" in key}
    public = {"RECEIVER_PUBLIC_URL": "https://p.example", "RECEIVER_CALLBACK_SECRETS": CALLBACK_SECRET}
    links = receiver("status", task.external_task_id, "--urls", "--json", **public).json
    assert all(one["link"].startswith("https://p.example/assets/") for one in links)
    assert receiver("status", "--urls").code == 2
