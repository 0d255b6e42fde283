"""A proxy is the only way out: provider, files and webhooks use it, and the guard checks what it can."""

from __future__ import annotations

import base64
import io
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing

import pytest
from pydantic import SecretStr

from receiver.app import check_events, checks
from receiver.app.findings import Status
from receiver.app.wiring import Parts
from receiver.base import config
from receiver.events.dispatcher import SinkSilent
from receiver.events.http_post import Poster
from receiver.providers.base import ProxyUnavailable, Unavailable
from receiver.providers.kling.client import Kling
from receiver.sandbox import Sandbox
from storage.egress import EgressProxy
from storage.errors import FetchInterrupted, FetchRefused
from storage.fetch.addresses import AddressPolicy
from storage.fetch.client import Fetcher
from tests.archived_tasks import REQUEST
from tests.forward_proxy import ForwardProxy
from tests.harness import wait_until
from tests.pipeline import Wired, assert_archived, make_due_now, run, task_of
from tests.storage.fetch.test_client import FileHost, answer, png
from tests.storage.fetch.test_client import tls as tls

ON_SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"])
LISTED = frozenset({("files.internal", 80)})
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
BASIC = f"Basic {base64.b64encode('usér:hush'.encode()).decode()}"


@pytest.fixture
def host() -> Iterator[FileHost]:
    server = FileHost()
    yield server
    server.close()


@pytest.fixture
def proxy(host: FileHost) -> Iterator[ForwardProxy]:
    with ForwardProxy({"files.internal:80": ("127.0.0.1", host.port)}) as server:
        yield server


@pytest.fixture
def fetcher(proxy: ForwardProxy) -> Iterator[Fetcher]:
    policy, tunnel = AddressPolicy(private_hosts=LISTED), EgressProxy(proxy.url).connect
    made = Fetcher(policy, max_bytes=100_000, tunnel=tunnel, user_agent="Pictures/1")
    yield made
    made.close()


def test_file_is_fetched_through_the_proxy_by_its_name(host: FileHost, proxy: ForwardProxy, fetcher: Fetcher) -> None:
    host.scripts["/a.png"] = answer(png())
    assert fetcher.fetch("http://files.internal/a.png", io.BytesIO()).verified
    assert proxy.asked == [("CONNECT", "files.internal:80", BASIC)]
    assert "User-Agent: Pictures/1\r\n" in host.heads[0] and "hush" not in host.heads[0]


def test_settings_of_fetches_hold_behind_the_proxy(host: FileHost, proxy: ForwardProxy) -> None:
    host.scripts["/a.png"] = answer(png())
    settings = config.load(
        s3_bucket="pictures", kling_api_key="key", egress_proxy=EgressProxy(proxy.url), fetch_user_agent="Pictures/2",
        private_result_hosts="files.internal:80", result_hosts="cdn.example.com",
    )  # fmt: skip
    with closing(Parts(settings)) as parts:
        assert parts.fetcher.fetch("http://files.internal/a.png", io.BytesIO()).verified
        with pytest.raises(FetchRefused, match="RECEIVER_RESULT_HOSTS"):
            parts.fetcher.fetch("https://elsewhere.example.com/a.png", io.BytesIO())
        proxy.refuses = 503
        with pytest.raises(FetchInterrupted, match="answered 503"):
            parts.fetcher.fetch("https://p.cdn.example.com/a.png", io.BytesIO())
    assert [target for _, target, _ in proxy.asked] == ["files.internal:80", "p.cdn.example.com:443"]
    assert "User-Agent: Pictures/2\r\n" in host.heads[0]


def test_provider_and_webhooks_ignore_proxies_of_the_environment(
    host: FileHost, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with closing(Kling(base_url=sandbox.url, api_key=SecretStr(sandbox.api_key))) as kling:
        kling.list_page(1, 1)
    host.scripts["/hook"] = NO_CONTENT
    here = AddressPolicy(private_hosts=frozenset({("127.0.0.1", host.port)}))
    with closing(Poster(here, connections=1)) as poster:
        assert poster.post(f"{host.url}/hook", b"{}", {}).outcome() is None


def test_tls_is_spoken_with_the_host_and_not_with_the_proxy(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = tls
    host = FileHost(server)
    host.scripts["/a.png"] = answer(png())
    with ForwardProxy({"cdn.example.com:443": ("127.0.0.1", host.port)}) as proxy:
        tunnel = EgressProxy(proxy.url).connect
        fetcher = Fetcher(AddressPolicy(), max_bytes=100_000, tunnel=tunnel, ssl_context=client)
        assert fetcher.fetch("https://cdn.example.com/a.png", io.BytesIO()).verified
        fetcher.close()
    host.close()
    assert [target for _, target, _ in proxy.asked] == ["cdn.example.com:443"]


@pytest.mark.parametrize(
    "url",
    ["https://169.254.169.254/latest", "https://[::1]/", "http://cdn.example.com/", "https://db.internal/"],
)
def test_guard_still_refuses_forms_and_literal_addresses(proxy: ForwardProxy, fetcher: Fetcher, url: str) -> None:
    with pytest.raises(FetchRefused):
        fetcher.fetch(url, io.BytesIO())
    assert proxy.asked == []


def test_proxy_that_refuses_is_named_without_its_password(proxy: ForwardProxy, fetcher: Fetcher) -> None:
    proxy.refuses = 407
    with pytest.raises(FetchInterrupted, match=r"the egress proxy 127.0.0.1:[0-9]+ answered 407") as refused:
        fetcher.fetch("https://cdn.example.com/a.png", io.BytesIO())
    assert "hush" not in str(refused.value)
    assert "hush" not in repr(EgressProxy(proxy.url))


def test_dead_proxy_is_blamed_and_not_the_host_behind_it() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
    dead = EgressProxy(f"http://us:hush@{place}")
    settings = config.load(s3_bucket="pictures", kling_api_key="key", egress_proxy=dead)
    with closing(Parts(settings)) as parts:
        (found,) = checks.provider(parts)
        with pytest.raises(FetchInterrupted) as interrupted:
            parts.fetcher.fetch("https://p2-fdl.klingai.com/a.png", io.BytesIO())
    assert found.line.startswith(f"the egress proxy {place} gave no connection (")
    assert "check RECEIVER_EGRESS_PROXY" in found.advice
    assert f"the egress proxy {place} cannot be reached (Connection refused)" in str(interrupted.value)
    assert "hush" not in f"{found} {interrupted.value}"


def test_host_whose_certificate_fails_behind_the_proxy_is_blamed_itself(
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    host = FileHost(tls[0])
    with ForwardProxy({"api.example.com:443": ("127.0.0.1", host.port)}) as proxy:
        kling = Kling(base_url="https://api.example.com", api_key=SecretStr("key"), proxy=EgressProxy(proxy.url))
        with pytest.raises(Unavailable, match="no connection to the provider") as failed:
            kling.list_page(1, 1)
        kling.close()
    host.close()
    assert not isinstance(failed.value, ProxyUnavailable)


def test_create_that_the_proxy_refused_was_not_sent(proxy: ForwardProxy) -> None:
    proxy.refuses = 403
    kling = Kling(base_url="https://api.example.com", api_key=SecretStr("key"), proxy=EgressProxy(proxy.url))
    with pytest.raises(Unavailable) as refused:
        kling.create(REQUEST, external_task_id="task", callback_url=None)
    kling.close()
    assert not refused.value.sent and proxy.asked[0][:2] == ("CONNECT", "api.example.com:443")


def test_webhook_is_delivered_through_the_proxy(host: FileHost, proxy: ForwardProxy) -> None:
    host.scripts["/hook"] = NO_CONTENT
    poster = Poster(AddressPolicy(private_hosts=LISTED), connections=1, tunnel=EgressProxy(proxy.url).connect)
    assert poster.post("http://files.internal/hook", b'{"a": 1}', {"Webhook-Id": "msg_1"}).outcome() is None
    poster.close()
    assert proxy.asked == [("CONNECT", "files.internal:80", BASIC)]
    (head,) = host.heads
    assert head.startswith("POST /hook HTTP/1.1\r\n") and "Webhook-Id: msg_1" in head and "hush" not in head


def test_webhook_that_the_proxy_refuses_is_not_delivered(proxy: ForwardProxy) -> None:
    policy = AddressPolicy(private_hosts=LISTED)
    poster = Poster(policy, connections=1, tunnel=EgressProxy(proxy.url).connect)
    proxy.refuses = 503
    with pytest.raises(SinkSilent, match="the egress proxy"):
        poster.post("http://files.internal/hook", b"{}", {})
    assert poster.check("http://files.internal/hook") == "files.internal may be posted to"
    poster.close()
    assert [target for _, target, _ in proxy.asked] == ["files.internal:80"]


@ON_SQLITE
def test_picture_is_made_and_archived_through_the_proxy(parts: Parts, sandbox: Sandbox) -> None:
    with ForwardProxy() as proxy:
        settings = parts.settings.model_copy(update={"egress_proxy": EgressProxy(proxy.url), "public_url": None})
        on = Wired(settings, bucket=parts.bucket)
        on.submitter.submit(REQUEST, external_task_id="task")
        wait_until(lambda: sandbox.ledger().task("task").status == "succeed")
        make_due_now(on)
        run(on, "reads", "assets", "finishes")
        assert_archived(on, sandbox, task_of(on, "task"))
        on.close()
    methods = [method for method, _, _ in proxy.asked]
    assert methods[0] == "POST" and "GET" in methods and "CONNECT" in methods


def test_proxy_of_the_environment_is_named_by_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://us:hush@10.0.0.1:3128")
    (note,) = check_events.proxies(config.load(s3_bucket="pictures"))
    assert (note.status, "HTTPS_PROXY" in note.line, "hush" in note.line) == (Status.NOTE, True, False)
    assert "set RECEIVER_EGRESS_PROXY" in note.advice


@pytest.mark.parametrize("value", ["proxy:3128", "https://proxy:3128", "http://proxy", "http://us:hush@proxy"])
def test_proxy_of_another_form_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RECEIVER_EGRESS_PROXY", value)
    with pytest.raises(config.SettingsInvalid, match=r"^RECEIVER_EGRESS_PROXY: write http://HOST:PORT") as refused:
        config.load(s3_bucket="pictures")
    assert "hush" not in str(refused.value)
