"""The sandbox's result files over real sockets, its knobs and its ledger, start and stop."""

from __future__ import annotations

import hashlib
import io
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from PIL import Image

from receiver.sandbox import Knobs, Sandbox
from tests.harness import wait_until
from tests.receiver.sandbox.conftest import QUICK
from tests.receiver.sandbox.test_sandbox import PATH, client, create, ended, urls


@pytest.fixture
def api(sandbox: Sandbox) -> Iterator[httpx.Client]:
    with client(sandbox) as speaking:
        yield speaking


def test_every_file_is_a_picture_of_its_own_and_in_the_ledger(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, n=2, external_task_id="x", watermark_info={"enabled": True}, aspect_ratio="16:9")
    served = [httpx.get(url).content for url in urls(ended(api, "x"))]
    for data in served:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert (picture.format, round(picture.width / picture.height, 1)) == ("PNG", 1.8)
        assert 15_000 < len(data) < 30_000
    names = [("x", "image", 0), ("x", "watermark", 0), ("x", "image", 1), ("x", "watermark", 1)]
    assert sandbox.ledger().sha256 == dict(
        zip(names, (hashlib.sha256(data).hexdigest() for data in served), strict=True)
    )
    assert len(set(served)) == 4


@pytest.mark.parametrize(("resolution", "least", "most"), [("1k", 1e6, 2e6), ("2k", 4e6, 8e6)])
def test_pictures_are_as_large_as_real_ones(
    api: httpx.Client, sandbox: Sandbox, resolution: str, least: float, most: float
) -> None:
    sandbox.set(picture_bytes=None)
    create(api, resolution=resolution, external_task_id="x")
    (url,) = urls(ended(api, "x"))
    assert least < len(httpx.get(url).content) < most


def test_links_expire_and_cannot_be_forged(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    record = ended(api, "x")
    (url,) = urls(record)
    expires = parse_qs(urlsplit(url).query)["Expires"][0]
    assert int(expires) == record["updated_at"] // 1000 + 2_592_000
    assert httpx.get(url.replace(f"Expires={expires}", "Expires=9999999999")).status_code == 403
    assert httpx.get(url.replace("-image-0", "-image-1")).status_code == 403
    sandbox.set(result_lifetime_seconds=0)
    create(api, external_task_id="y")
    assert httpx.get(urls(ended(api, "y"))[0]).status_code == 403


def test_downloads_fail_as_the_knobs_say(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    (url,) = urls(ended(api, "x"))
    sandbox.set(cdn_faults=["503", "403", "html", "truncated_silent", "truncated", "truncated_chunked"])
    whole = sandbox.ledger().assets["x", "image", 0]
    answers = [httpx.get(url) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [503, 403, 200, 200]
    assert len(answers[3].content) == whole.size // 2
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(url)
    assert hashlib.sha256(httpx.get(url).content).hexdigest() == whole.sha256
    wait_until(lambda: sandbox.ledger().assets["x", "image", 0].served == 1)
    assert sandbox.ledger().assets["x", "image", 0].hits == 7


def test_cdn_fails_for_a_time_after_the_end_of_a_task(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    (url,) = urls(ended(api, "x"))
    sandbox.set(cdn_html_seconds=600)
    assert httpx.get(url).headers["content-type"].startswith("text/html")
    sandbox.set(cdn_html_seconds=0, cdn_empty_seconds=600)
    assert (httpx.get(url).status_code, httpx.get(url).content) == (200, b"")
    sandbox.set(cdn_empty_seconds=0, cdn_self_redirect_seconds=600)
    assert httpx.get(url).headers["location"] == url
    sandbox.set(cdn_self_redirect_seconds=0)
    assert httpx.get(url).headers["content-type"] == "image/png"


def test_files_served_with_oddities_are_whole(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    (url,) = urls(ended(api, "x"))
    data = httpx.get(url).content
    sandbox.set(cdn_content_encoding="gzip")
    assert httpx.get(url).content == data
    sandbox.set(cdn_content_encoding="UTF-8", cdn_206_whole=True)
    answer = httpx.get(url)
    assert (answer.status_code, answer.headers["content-encoding"], answer.content) == (206, "UTF-8", data)
    assert answer.headers["content-range"] == f"bytes 0-{len(data) - 1}/{len(data)}"


def test_a_connection_breaks_at_its_share_and_resumes(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    (url,) = urls(ended(api, "x"))
    data = httpx.get(url).content
    sandbox.set(cdn_break_share=0.6, cdn_ranges=True)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url)
    rest = httpx.get(url, headers={"Range": f"bytes={len(data) * 6 // 10}-"})
    assert (rest.status_code, rest.content) == (206, data[len(data) * 6 // 10 :])


def test_a_connection_breaks_for_a_while(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    (url,) = urls(ended(api, "x"))
    sandbox.set(cdn_break_share=0.6, cdn_break_seconds=600)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url)
    sandbox.set(cdn_break_seconds=0)
    assert httpx.get(url).status_code == 200


def test_a_line_that_is_not_a_header_is_sent_with_the_file(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    (url,) = urls(ended(api, "x"))
    data = httpx.get(url).content
    sandbox.set(cdn_junk_header=True)
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=20) as raw:
        raw.sendall(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: raw.recv(65_536), b"")).partition(b"\r\n\r\n")
    assert (b"\r\nthis line is no header\r\n" in head, body) == (True, data)


def test_links_have_a_space_inside_or_blanks_around(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    (plain,) = urls(ended(api, "x"))
    data = httpx.get(plain).content
    sandbox.set(cdn_link_form="blanks")
    assert urls(ended(api, "x")) == [f"  {plain} \n"]
    sandbox.set(cdn_link_form="space", cdn_redirects=1)
    (spaced,) = urls(ended(api, "x"))
    assert "/my pictures/" in spaced
    answer = httpx.get(spaced)
    assert "/my pictures/" in answer.headers["location"]
    assert httpx.get(answer.headers["location"]).content == data


def test_redirects_lead_to_the_picture(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    (url,) = urls(ended(api, "x"))
    sandbox.set(cdn_redirects=2)
    answer = httpx.get(url, follow_redirects=True)
    assert (answer.status_code, len(answer.history)) == (200, 2)


def test_sandbox_returns_fewer_pictures_on_request(api: httpx.Client, sandbox: Sandbox) -> None:
    sandbox.set(deliver_fewer=1, fresh_urls_on_read=True)
    create(api, n=3, external_task_id="x")
    first, second = urls(ended(api, "x")), urls(ended(api, "x"))
    assert len(first) == len(second) == 2
    assert not set(first) & set(second)
    assert [httpx.get(url).status_code for url in first + second] == [200] * 4


def test_downloads_can_lead_elsewhere_and_take_their_time(api: httpx.Client, sandbox: Sandbox) -> None:
    create(api, external_task_id="x")
    (url,) = urls(ended(api, "x"))
    sandbox.set(cdn_redirect_to="http://192.0.2.1/x.png")
    assert httpx.get(url).headers["Location"] == "http://192.0.2.1/x.png"
    sandbox.set(cdn_redirect_to=None, cdn_seconds=60)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(url, timeout=0.2)


# -- knobs, ledger, start and stop ------------------------------------------------------------------------------------


def test_knobs_are_changed_and_the_ledger_is_read_over_http(api: httpx.Client, sandbox: Sandbox) -> None:
    assert api.post("/sandbox/knobs", json={"fail_rate": 1}).json()["fail_rate"] == 1
    (slip,) = api.post("/sandbox/knobs", json={"fail_rte": 1}).json()["errors"]
    assert slip["msg"] == "no such knob; did you mean 'fail_rate'?"
    create(api, external_task_id="x")
    assert ended(api, "x")["task_status_msg"] == "Failure to pass the risk control system"
    ledger = api.get("/sandbox/ledger").json()
    assert ledger["creates"][0]["body"]["external_task_id"] == "x"
    assert ledger["tasks"][0]["status"] == "failed"
    api.post("/sandbox/reset")
    assert api.get("/sandbox/ledger").json()["tasks"] == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Host": "evil.example:9000"},
        {"Host": "evil.example:9000", "Origin": "http://evil.example:9000"},
        {"Host": "[::"},
    ],
)
def test_web_page_of_another_site_changes_no_knob(api: httpx.Client, sandbox: Sandbox, headers: dict[str, str]) -> None:
    create(api, external_task_id="x")
    for method, path in (("POST", "knobs"), ("GET", "knobs"), ("GET", "ledger"), ("POST", "reset")):
        answer = api.request(method, f"/sandbox/{path}", headers=headers, content=b'{"fail_rate": 1}')
        assert answer.status_code == 403
    assert sandbox.world.knobs.fail_rate == 0
    assert [task.external_task_id for task in sandbox.ledger().tasks] == ["x"]
    own = {"Origin": sandbox.url, "Host": sandbox.url.removeprefix("http://")}
    assert api.get("/sandbox/ledger", headers=own).status_code == 200


@pytest.mark.parametrize(
    "wrong", [{"no_such": 1}, {"fail_rate": 2}, {"allow_remote_callbacks": True}, {"webhook_secrets": ["whsec_"]}, []]
)
def test_wrong_knobs_are_refused(api: httpx.Client, sandbox: Sandbox, wrong: Any) -> None:
    before = api.get("/sandbox/knobs").json()
    assert api.post("/sandbox/knobs", json=wrong).status_code == 400
    assert api.get("/sandbox/knobs").json() == before


def test_every_knob_is_described() -> None:
    assert [name for name, field in Knobs.model_fields.items() if not field.description] == []


def test_the_same_seed_makes_the_same_choices(api: httpx.Client, sandbox: Sandbox) -> None:
    sandbox.set(submitted_seconds=60)  # a change of a task's state also takes a random number

    def choices() -> list[Any]:
        sandbox.reset()
        return [create(api, result_type="series", series_amount="auto").json()["data"]["task_id"] for _ in range(3)]

    assert choices() == choices()


def test_sandbox_listens_on_loopback_unless_a_host_is_given() -> None:
    with pytest.raises(ValueError, match="not a loopback address"):
        Sandbox(host="0.0.0.0")  # noqa: S104 – the point is that it is refused
    Sandbox(host="0.0.0.0", knobs=Knobs(allow_remote_host=True))  # noqa: S104 – allowed, but never started


def test_restarted_sandbox_keeps_its_port_and_tasks() -> None:
    sandbox = Sandbox(knobs=Knobs(**QUICK))
    with sandbox:
        url, headers = sandbox.url, {"Authorization": f"Bearer {sandbox.api_key}"}
        httpx.post(url + PATH, headers=headers, json={"model_name": "m", "prompt": "p", "external_task_id": "x"})
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}{PATH}/x", headers=headers)
    with sandbox, httpx.Client(base_url=url, headers=headers) as api:
        assert ended(api, "x")["task_status"] == "succeed"
