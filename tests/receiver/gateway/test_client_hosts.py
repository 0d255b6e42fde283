"""Callback hosts of clients: never a host to which the operator's own events go."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from receiver.app.check_events import callbacks
from receiver.base import config
from receiver.events.http_post import Poster
from storage.errors import FetchRefused
from storage.fetch.addresses import check_url
from tests.webhook_receiver import SECRET


@pytest.mark.parametrize(
    ("sink", "callback"),
    [
        ("http://127.0.0.1:9/hook", "http://127.0.0.1:10/"),
        ("http://127.0.0.1:9/hook", "http://localhost:10/"),
        ("http://127.0.0.1:9/hook", "http://[::ffff:7f00:1]:10/"),
        ("http://127.0.0.1:9/hook", "http://127.0.0.2:10/"),
        ("http://10.0.0.5:9/hook", "http://[::ffff:10.0.0.5]:10/"),
        ("https://hooks.example.com/x", "https://HOOKS.example.com.:443/y"),
        ("https://hooks.example.com/x", "http://hooks.example.com:10/y"),
        ("https://hooks.example.com:8443/x", "https://hooks.example.com/y"),
        ("sqs+https://queue.internal/1/q", "https://queue.internal:10/y"),
    ],
)
def test_a_host_of_events_is_refused_on_every_port_and_in_every_spelling(sink: str, callback: str) -> None:
    listed = ["127.0.0.1", "localhost", "[::ffff:7f00:1]", "127.0.0.2", "[::ffff:a00:5]", "hooks.example.com"]
    settings = config.load(
        s3_bucket="pictures",
        event_sinks=sink,
        event_secrets=SECRET,
        private_event_hosts="127.0.0.1:9,10.0.0.5:9,hooks.example.com:8443",
        private_callback_hosts=",".join(f"{host}:10" for host in [*listed, "queue.internal"]),
    )
    with pytest.raises(FetchRefused, match="receives events, so no client is called back there"):
        check_url(callback, settings.callback_policy)
    with pytest.raises(FetchRefused, match="receives events, so no client is called back there"):
        Poster(settings.callback_policy, connections=1).post(callback, b"", {})


def test_a_name_that_resolves_to_a_host_of_events_is_not_dialled() -> None:
    settings = config.load(
        s3_bucket="pictures",
        event_sinks="http://127.0.0.1:9/hook",
        event_secrets=SECRET,
        private_event_hosts="127.0.0.1:9",
        private_callback_hosts="callbacks.example:9",
    )
    refused = settings.callback_policy.refuses(ip_address("127.0.0.1"), "callbacks.example", 9)
    assert refused == "events go there"
    assert settings.event_policy.refuses(ip_address("127.0.0.1"), "127.0.0.1", 9) is None


def test_check_names_a_callback_host_that_events_go_to() -> None:
    settings = config.load(
        s3_bucket="pictures",
        event_sinks="http://127.0.0.1:9/hook",
        event_secrets=SECRET,
        private_event_hosts="127.0.0.1:9",
        private_callback_hosts="127.0.0.1:10,10.0.0.6:10",
    )
    (found,) = callbacks(settings)
    assert "127.0.0.1:10 is a host that events go to" in found.line
