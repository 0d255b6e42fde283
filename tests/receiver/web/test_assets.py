"""`GET /assets/{token}.{ext}`: everyone with the link reads that one file, and nothing else."""

from __future__ import annotations

import hashlib
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import event, text

from receiver.app.wiring import Parts
from receiver.base.tokens import ASSET_PURPOSE
from receiver.cli import show
from receiver.sandbox import Sandbox
from receiver.web import assets, reader_speed
from receiver.web.assets import asset_link
from storage.rows.models import Asset, Task
from storage.states import AssetState
from tests.archived_tasks import archive
from tests.command_line import CommandLine, variables
from tests.harness import wait_until
from tests.pipeline import CALLBACK_SECRET, Web, assets_of, kept

# For how a file is sent; which file a link is for is read from rows and tested on both.
ONE_DATABASE = pytest.mark.parametrize("database_kind", ["sqlite"])


@pytest.fixture
def task(parts: Parts, web: Web) -> Task:
    return archive(parts, 1)[0]


@pytest.fixture
def asset(parts: Parts, task: Task) -> Asset:
    return assets_of(parts, task)[0]


@pytest.fixture
def link(parts: Parts, asset: Asset) -> str:
    return asset_link(parts.tokens, str(parts.settings.public_url), asset)


def get(url: str, method: str = "GET", **headers: str) -> httpx.Response:
    return httpx.request(method, url, headers=headers, timeout=20, follow_redirects=False)


def make_public(parts: Parts) -> None:
    """Pretend that readers could reach the store."""
    parts.bucket._public_endpoint_url = parts.bucket._endpoint_url


@pytest.mark.databases("sqlite")
def test_file_in_a_private_store_is_streamed(link: str, asset: Asset) -> None:
    answer = get(link)
    assert (answer.status_code, hashlib.sha256(answer.content).hexdigest()) == (200, asset.sha256)
    assert {name: answer.headers[name] for name in ("content-type", "content-length", "x-content-type-options")} == {
        "content-type": "image/png", "content-length": str(asset.size), "x-content-type-options": "nosniff",
    }  # fmt: skip
    name = str(asset.key).rpartition("/")[2]
    assert answer.headers["content-disposition"] == f'inline; filename="{name}"'
    assert (answer.headers["etag"], answer.headers["accept-ranges"]) == (f'"{asset.sha256}"', "bytes")
    assert answer.headers.get_list("cache-control") == ["private, max-age=31536000, immutable"]


@pytest.mark.parametrize("public", [False, True])
@ONE_DATABASE
def test_known_file_is_not_sent_again(parts: Parts, link: str, asset: Asset, public: bool) -> None:
    if public:
        make_public(parts)
    for known in (f'"{asset.sha256}"', f'"other", W/"{asset.sha256}"', "*"):
        answer = get(link, **{"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", f'"{asset.sha256}"')
    assert get(link, **{"If-None-Match": '"other"'}).status_code == (302 if public else 200)


@ONE_DATABASE
def test_range_is_answered_with_that_part(link: str, asset: Asset) -> None:
    whole, size = get(link).content, asset.size or 0
    for asked, start, end in (("0-0", 0, 1), ("10-", 10, size), ("-7", size - 7, size), ("5-99999999", 5, size)):
        answer = get(link, Range=f"bytes={asked}", **{"If-Range": f'"{asset.sha256}"'})
        assert (answer.status_code, answer.content) == (206, whole[start:end])
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert answer.headers["content-length"] == str(end - start)


@ONE_DATABASE
def test_range_behind_the_end_is_refused(link: str, asset: Asset) -> None:
    for asked in (f"{asset.size}-", "-0"):
        answer = get(link, Range=f"bytes={asked}")
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{asset.size}")


@ONE_DATABASE
def test_other_ranges_are_ignored(link: str, asset: Asset) -> None:
    headers = [{"Range": asked} for asked in ("bytes=0-1,4-5", "bytes=5-2", "bytes=-", "lines=0-1", "bytes=x")]
    for each in (*headers, {"Range": "bytes=0-1", "If-Range": '"another file"'}):
        answer = get(link, **each)
        assert (answer.status_code, len(answer.content)) == (200, asset.size)


@pytest.mark.parametrize("public", [False, True])
@ONE_DATABASE
def test_head_describes_the_file_without_a_redirect(parts: Parts, link: str, asset: Asset, public: bool) -> None:
    if public:
        make_public(parts)
    answer = get(link, "HEAD")
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, str(asset.size), b"")


@ONE_DATABASE
def test_file_in_a_public_store_is_redirected_to(parts: Parts, link: str, asset: Asset) -> None:
    make_public(parts)
    answer = get(link)
    assert (answer.status_code, answer.content) == (302, b"")
    assert "X-Amz-Signature" in answer.headers["location"] and answer.headers["cache-control"] == "no-store"
    assert hashlib.sha256(get(answer.headers["location"]).content).hexdigest() == asset.sha256


@pytest.mark.parametrize("changes", [{"stream_assets": True}], ids=["RECEIVER_STREAM_ASSETS"])
@ONE_DATABASE
def test_file_in_a_public_store_is_streamed_where_asked_for(parts: Parts, link: str, asset: Asset) -> None:
    make_public(parts)
    assert (get(link).status_code, get(link, Range="bytes=0-3").content) == (200, b"\x89PNG")


@pytest.mark.parametrize("changes", [{"cors_origins": "https://a.example,https://b.example:8443"}], ids=["origins"])
@ONE_DATABASE
def test_pages_of_allowed_origins_read_the_file(link: str, web: Web) -> None:
    for origin in ("https://a.example", "https://b.example:8443"):
        answer = get(link, Origin=origin)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
        assert "Content-Range" in answer.headers["access-control-expose-headers"] and "Origin" in answer.headers["vary"]
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}
    preflight = get(link, "OPTIONS", **asked, **{"Access-Control-Request-Headers": "if-none-match"})
    assert preflight.status_code == 200 and "If-None-Match" in preflight.headers["access-control-allow-headers"]
    assert get(f"{web.url}/assets/{'A' * 55}.png", Origin="https://a.example").status_code == 404
    assert "access-control-allow-origin" not in get(link, Origin="https://c.example").headers
    assert get(link, "OPTIONS").status_code == 405


@ONE_DATABASE
def test_no_origin_is_allowed_by_default(link: str) -> None:
    assert "access-control-allow-origin" not in get(link, Origin="https://a.example").headers


@ONE_DATABASE
def test_file_that_a_browser_might_run_is_downloaded(parts: Parts, link: str, asset: Asset) -> None:
    with parts.database.write() as session:
        session.get_one(Asset, asset.id).media_type = "text/html"
    assert get(link).headers["content-disposition"].startswith("attachment;")


@pytest.mark.databases("sqlite")
def test_invalid_token_causes_no_query(parts: Parts, web: Web, link: str) -> None:
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


def test_valid_token_without_an_archived_file_is_404(parts: Parts, web: Web, link: str, asset: Asset) -> None:
    unknown = parts.tokens.sign("", uuid.uuid4(), purpose=ASSET_PURPOSE)
    nobody = parts.tokens.sign("", None, purpose=ASSET_PURPOSE)
    for name in (f"{unknown}.png", f"{nobody}.png"):
        assert get(f"{web.url}/assets/{name}").status_code == 404
    assert get(link.replace(".png", ".jpg")).status_code == 404
    assert get(link, "POST").status_code == 405
    with parts.database.write() as session:
        session.get_one(Asset, asset.id).state = AssetState.DUE
    assert get(link).status_code == 404


@ONE_DATABASE
def test_missing_object_is_404(parts: Parts, link: str, asset: Asset) -> None:
    parts.bucket.delete(str(asset.key))
    assert get(link).status_code == 404


@ONE_DATABASE
def test_unavailable_store_is_503(parts: Parts, link: str, asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.bucket, "name", "no-such-bucket")
    assert get(link).status_code == 503


@ONE_DATABASE
def test_asset_and_callback_tokens_are_not_interchangeable(parts: Parts, web: Web, link: str, task: Task) -> None:
    token = link.rpartition("/")[2].partition(".")[0]
    assert httpx.post(f"{web.url}/callbacks/kling/{token}", content=b"{}").status_code == 404
    assert get(f"{web.url}/assets/{parts.tokens.sign('kling', task.id)}.png").status_code == 404


@ONE_DATABASE
def test_reader_who_leaves_frees_its_stream(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "MAX_STREAMS", 1)
    for _ in range(3):
        with httpx.stream("GET", link, timeout=20) as answer:
            assert answer.status_code in (200, 503)
        wait_until(lambda: get(link).status_code == 200)


@pytest.fixture
def large(parts: Parts, asset: Asset) -> int:
    """The file is far larger than the buffers of a connection."""
    size = 8 * 2**20
    parts.bucket._client().put_object(Bucket=parts.bucket.name, Key=asset.key, Body=bytes(size))
    with parts.database.write() as session:
        session.get_one(Asset, asset.id).size = size
    return size


@contextmanager
def stuck_readers(link: str, count: int) -> Iterator[None]:
    """Connections that request the file and do not read the answer."""
    url = urlsplit(link)
    with ExitStack() as opened:
        for _ in range(count):
            reader = opened.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            reader.settimeout(10)
            reader.connect((url.hostname, url.port))
            reader.sendall(f"GET {url.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert reader.recv(12).startswith(b"HTTP/1.1")
        yield


@ONE_DATABASE
def test_readers_of_one_link_leave_room_for_other_files(parts: Parts, link: str, large: int, web: Web) -> None:
    (other,) = archive(parts, 1)
    other_link = asset_link(parts.tokens, web.url, assets_of(parts, other)[0])
    with stuck_readers(link, 40):
        assert (get(link).status_code, get(other_link).status_code) == (503, 200)


@ONE_DATABASE
def test_readers_at_one_address_leave_room_for_others(link: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "MAX_STREAMS_OF_ADDRESS", 1)
    with stuck_readers(link, 1):
        assert get(link, Range="bytes=0-3").status_code == 503


@pytest.mark.parametrize(("seconds", "others"), [(60, False), (0.2, True)], ids=["waited for", "dropped"])
@ONE_DATABASE
def test_reader_without_progress_is_dropped(
    seconds: float, others: bool, link: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`others`: whether other readers are served, which is the case once the stuck one is disconnected."""
    monkeypatch.setattr(reader_speed, "GRACE_SECONDS", seconds)
    monkeypatch.setattr(assets, "MAX_STREAMS_OF_ASSET", 1)
    with stuck_readers(link, 1):
        wait_until(lambda: is_served(link) is others)


@ONE_DATABASE
def test_reader_below_the_least_speed_is_dropped(link: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_speed, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(reader_speed, "LEAST_BYTES_PER_SECOND", 2**30)
    with httpx.stream("GET", link, timeout=20) as answer, pytest.raises(httpx.TransportError):
        # The kernel's buffer takes a part of each write.
        sum(time.sleep(0.02) or len(piece) for piece in answer.iter_raw(64 * 1024))


@ONE_DATABASE
def test_dropped_reader_is_disconnected_without_an_error_in_the_log(
    web: Web, link: str, large: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connections = web._server.server_state.connections
    caplog.set_level("ERROR", "uvicorn.error")
    monkeypatch.setattr(reader_speed, "GRACE_SECONDS", 0.2)
    others = set(connections)  # the provider keeps one
    with stuck_readers(link, 1):
        assert connections - others
        wait_until(lambda: not connections - others)
    assert caplog.records == []


@pytest.mark.parametrize("database_kind", ["postgresql"])
def test_many_requests_for_a_link_take_four_threads(parts: Parts, web: Web, link: str) -> None:
    """The lock represents a slow database."""
    pool: Any = parts.database.reader.pool
    with ThreadPoolExecutor(20) as senders, parts.database.write() as session:
        session.execute(text("LOCK TABLE asset IN ACCESS EXCLUSIVE MODE"))
        before = pool.checkedout()
        asked = [senders.submit(get, link, "HEAD") for _ in range(20)]
        wait_until(lambda: web.requests_under_way == 20 and pool.checkedout() >= before + 4)
        assert pool.checkedout() == before + 4
        session.rollback()
        assert {each.result().status_code for each in asked} == {200}


def is_served(link: str) -> bool:
    with httpx.stream("GET", link, timeout=20) as answer:
        return answer.status_code == 200


@pytest.mark.databases("sqlite")
def test_status_has_lasting_and_presigned_links(parts: Parts, task: Task, link: str, asset: Asset) -> None:
    (one,) = show.urls(parts, task.external_task_id, 60)
    assert (one["kind"], one["index"], one["key"], one["link"]) == ("image", 0, asset.key, link)
    assert hashlib.sha256(get(one["url"]).content).hexdigest() == asset.sha256
    with pytest.raises(ValueError, match="not archived"):
        asset_link(parts.tokens, "https://a", asset.model_copy(update={"state": AssetState.DUE}))


@ONE_DATABASE
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
