"""What a newcomer gets wrong on the first day is said in one sentence, with what to do."""

from __future__ import annotations

import socket

import pytest

from receiver.app import checks
from receiver.app.wiring import Parts
from receiver.base import config
from receiver.sandbox import Sandbox
from tests.command_line import CommandLine

ASK = ("submit", "--model-name", "kling-image-o1", "--prompt", "a boat")


@pytest.mark.parametrize(
    ("address", "why"), [("http://127.0.0.1:9", "Connection refused"), ("{url}/v1/images", "HTTP 404")]
)
def test_a_create_that_the_provider_did_not_take_is_told(
    receiver: CommandLine, sandbox: Sandbox, address: str, why: str
) -> None:
    done = receiver(*ASK, RECEIVER_KLING_BASE_URL=address.format(url=sandbox.url))
    assert done.code == 0
    assert "the provider has not taken it yet" in done.err and why in done.err
    assert "`receiver check`" in done.err


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("{url}/v1/images", "see that RECEIVER_KLING_BASE_URL is right, a path in it as well"),
        ("https://{host}", "its port speaks no TLS"),
    ],
)
def test_check_tells_a_wrong_address_of_the_provider_from_a_wrong_key(
    sandbox: Sandbox, address: str, advice: str
) -> None:
    url = address.format(url=sandbox.url, host=sandbox.url.removeprefix("http://"))
    parts = Parts(config.load(s3_bucket="pictures", kling_base_url=url, kling_api_key=sandbox.api_key))
    (found,) = checks.provider(parts)
    parts.close()
    assert found.advice.startswith(advice)


def test_the_command_that_starts_a_worker_names_the_store(receiver: CommandLine) -> None:
    done = receiver(*ASK, "--store", "my pictures", RECEIVER_S3_ENDPOINT_URL=None)
    assert "start `receiver serve --store 'my pictures'`" in done.err
    assert "start `receiver serve` " in receiver(*ASK).err


def test_a_server_that_cannot_listen_prints_no_link_to_its_console(receiver: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = receiver("serve", "--store", "own", "--port", port, RECEIVER_S3_ENDPOINT_URL=None)
    assert (done.code, done.out) == (1, "")
    assert "cannot listen" in done.err
