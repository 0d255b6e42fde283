"""A newcomer's mistakes of the first day: each is reported in one sentence with its remedy."""

from __future__ import annotations

import codecs
import os
import socket
from dataclasses import replace

import httpx
import pytest

from receiver.app import checks
from receiver.app.findings import Status
from receiver.app.wiring import Parts
from receiver.base import config
from receiver.sandbox import Knobs, Sandbox
from tests.command_line import CommandLine
from tests.forked import Forked
from tests.harness import wait_until
from tests.pipeline import free_port
from tests.receiver.cli.test_plain_faults import serving

ASK = ("submit", "--model-name", "kling-image-o1", "--prompt", "a boat")


@pytest.mark.parametrize(
    ("address", "why"), [("http://127.0.0.1:9", "Connection refused"), ("{url}/v1/images", "HTTP 404")]
)
def test_create_that_the_provider_did_not_accept_is_reported(
    ready: CommandLine, sandbox: Sandbox, address: str, why: str
) -> None:
    done = ready(*ASK, RECEIVER_KLING_BASE_URL=address.format(url=sandbox.url))
    assert done.code == 0
    assert "the provider has not accepted it yet" in done.err and why in done.err
    assert "`receiver check`" in done.err


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("{url}/v1/images", "check RECEIVER_KLING_BASE_URL and its path"),
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


def test_check_names_a_spool_folder_that_is_not_there_or_small() -> None:
    (found,) = checks.spooling(config.load(s3_bucket="pictures", spool_dir="/nowhere"))
    assert found.status is Status.FAULT and "/nowhere cannot be written" in found.line
    (found,) = checks.spooling(config.load(s3_bucket="pictures", max_asset_bytes=2**60))
    assert found.status is Status.NOTE and "set RECEIVER_SPOOL_DIR to a larger disk" in found.advice
    assert list(checks.spooling(config.load(s3_bucket="pictures", max_asset_bytes=1))) == []


@pytest.mark.parametrize("words", [("status",), ("retry",), ("batch", "status"), ("submit", "--prompt")])
def test_an_argument_that_is_not_text_is_refused_in_one_sentence(receiver: CommandLine, words: tuple[str, ...]) -> None:
    done = receiver(*words, "\udcff-1")
    assert (done.code, "is not utf-8 text" in done.err, "Traceback" in done.err) == (2, True, False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (codecs.BOM_UTF8 + b'{"model_name": "kling-image-o1", "prompt": "a boat"}', None),
        ('{"prompt": "a boat"}'.encode("utf-16"), "is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_request_file_with_a_byte_order_mark_is_read(ready: CommandLine, content: bytes, says: str | None) -> None:
    (ready.folder / "request.json").write_bytes(content)
    done = ready("submit", "--request", "request.json")
    assert (done.code, says is None or says in done.err) == (2 if says else 0, True), done.err


def test_the_command_that_starts_a_worker_names_the_store(ready: CommandLine) -> None:
    done = ready(*ASK, "--store", "my pictures", RECEIVER_S3_ENDPOINT_URL=None)
    assert "start `receiver serve --store 'my pictures'`" in done.err
    assert "start `receiver serve` " in ready(*ASK).err


def test_paid_request_into_a_new_file_of_the_current_folder_is_refused(receiver: CommandLine, sandbox: Sandbox) -> None:
    file = receiver.folder / "receiver.db"
    hasty = replace(receiver, constants={"receiver.cli.opening:NEW_FILE_SECONDS": 0.1})
    done = hasty(*ASK)
    assert (done.code, done.out, file.exists(), len(sandbox.ledger().creates)) == (1, "", False, 0)
    assert f"nothing was sent, because {file} does not exist: run this in the folder where `receiver serve`" in done.err
    assert hasty(*ASK, RECEIVER_DATABASE_URL=f"sqlite:///{file}").code == 0  # the whole path is no accident


def test_paid_request_waits_for_a_receiver_that_is_starting(receiver: CommandLine, sandbox: Sandbox) -> None:
    said = receiver.folder / "said"
    asked = Forked(ASK, {**os.environ, **receiver.variables}, receiver.folder, out=said)
    wait_until(lambda: said.exists() and "waiting" in said.read_text(), seconds=60)
    assert receiver("migrate").code == 0
    assert (asked.wait(60), len(sandbox.ledger().creates)) == (0, 1)


def test_a_server_that_cannot_listen_prints_no_link_to_its_console(receiver: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = receiver("serve", "--store", "own", "--port", port, RECEIVER_S3_ENDPOINT_URL=None)
    assert (done.code, done.out) == (1, "")
    assert "cannot listen" in done.err


def test_the_sandbox_of_the_command_line_waits_for_a_receiver_that_is_starting(receiver: CommandLine) -> None:
    out = receiver.folder / "out"
    out.touch()
    process = Forked(("sandbox", "--port", "0"), dict(os.environ), receiver.folder, out=out)
    try:
        wait_until(lambda: "Ctrl-C ends it." in out.read_text())
        knobs = httpx.get(f"{out.read_text().split()[1]}/sandbox/knobs").json()
        patience = knobs["callback_backoff_seconds"] * (2 ** (knobs["callback_tries"] - 1) - 1)
        assert patience > 20
        assert knobs["seed"] != Knobs().seed  # a receiver knows the ids of earlier starts
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("public_port", "is_warned"), [(8000, True), (None, False)], ids=["other", "own"])
def test_serve_warns_of_a_public_url_that_is_another_port_of_this_machine(
    ready: CommandLine, public_port: int | None, is_warned: bool
) -> None:
    port = free_port()
    ready.variables["RECEIVER_CALLBACK_SECRETS"] = "a-callback-secret-of-more-than-32-characters"
    ready.variables["RECEIVER_PUBLIC_URL"] = f"http://127.0.0.1:{public_port or port}"
    with serving(ready, "--port", str(port)) as (_, log):
        assert ("start.callbacks_misdirected" in log.read_text()) is is_warned
