"""README-recipes.md: each recipe runs as printed."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import uvicorn
from moto.server import ThreadedMotoServer

from receiver import AsyncReceiver, NotArchived, Receiver
from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from tests import pipeline
from tests.command_line import CommandLine, variables
from tests.harness import ROOT, wait_until
from tests.pipeline import free_port
from tests.webhook_receiver import SECRET

PAGE = (ROOT / "README-recipes.md").read_text()
RECIPES = dict(re.findall(r"```(?:python|sh) ([\w-]+)\n(.*?)```", PAGE, re.DOTALL))
REQUEST = {"model_name": "kling-v3-omni", "prompt": "a lighthouse", "n": 2}

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


@pytest.fixture
def environment(parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A user's settings, for the programs that the recipes start and for the recipes."""
    chosen = variables(parts.settings.database_url.get_secret_value(), parts.bucket, sandbox)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    return chosen


@pytest.fixture
def working(parts: Parts) -> Iterator[None]:
    """A worker beside the recipe."""
    with pipeline.working(parts):
        yield


def recipe(name: str) -> dict[str, Any]:
    """The names that the recipe defines."""
    defined: dict[str, Any] = {}
    exec(compile(RECIPES[name], name, "exec"), defined)  # noqa: S102 - our own page
    return defined


@pytest.fixture(scope="module")
def sqs_server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def changes(port: int, sqs_server: str, s3_environment: dict[str, str]) -> dict[str, Any]:
    """A webhook and a queue, with the page's settings."""
    sqs = boto3.Session().client("sqs", endpoint_url=sqs_server)
    queue = sqs.create_queue(QueueName=f"pictures-{port}")["QueueUrl"]
    webhook = f"http://127.0.0.1:{port}/events#task.archived,task.incomplete"
    private = f"127.0.0.1:{port} {sqs_server.removeprefix('http://')}"
    sinks = f"{webhook} sqs+{queue}#asset.archived"
    return {"event_sinks": sinks, "event_secrets": SECRET, "private_event_hosts": private.replace(" ", ",")}


@contextmanager
def served(app: Any, port: int) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    server.capture_signals = nullcontext  # type: ignore[method-assign] # only the main thread may
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.mark.usefixtures("environment", "working")
def test_the_asgi_app_submits_requests_and_receives_events(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEIVER_EVENT_SECRETS", SECRET)
    defined = recipe("asgi-app")
    with served(defined["app"], port), httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        answer = client.post("/orders", json={"number": 17, "prompt": "a lighthouse"})
        assert (answer.status_code, answer.json()["id"]) == (202, "order-17")
        (uris,) = wait_until(lambda: list(defined["handled"].values()))
        assert len(uris) == 2 and all(uri.startswith("s3://") for uri in uris)
        assert client.post("/events", json={"id": "forged"}).status_code == 401


@pytest.mark.usefixtures("environment", "working")
def test_the_queue_consumer_gets_every_picture(
    port: int, sqs_server: str, monkeypatch: pytest.MonkeyPatch, parts: Parts
) -> None:
    monkeypatch.setenv("SQS_ENDPOINT_URL", sqs_server)
    monkeypatch.setenv("QUEUE_URL", f"{sqs_server}/123456789012/pictures-{port}")
    consume = recipe("queue-consumer")["consume"]
    with Receiver() as receiver:
        task = receiver.submit(REQUEST)
        files = receiver.wait(task.external_task_id, timeout_seconds=30).files
    got: dict[str, Any] = {}
    wait_until(lambda: consume(lambda event: got.update({event["data"]["key"]: event}), rounds=1) or len(got) >= 2)
    assert set(got) == {file.key for file in files}
    assert {event["data"]["sha256"] for event in got.values()} == {file.sha256 for file in files}


# The command of a recipe is one of our forked processes, because a fresh interpreter takes a second of CPU.
RECEIVER = """receiver() { printf '%s\\n' "$@" > asked; read code < answered; return $code; }\n"""


@contextmanager
def answering(receiver: CommandLine) -> Iterator[None]:
    """Run the commands that a shell in the same folder asks for with the function `RECEIVER`."""
    asked, answered = (receiver.folder / name for name in ("asked", "answered"))
    os.mkfifo(asked)
    os.mkfifo(answered)

    def answer() -> None:
        while words := asked.read_text().splitlines():
            answered.write_text(f"{receiver(*words).code}\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield
    asked.write_text("")
    thread.join(20)


@pytest.mark.usefixtures("working")
def test_the_nightly_batch_runs_twice_and_pays_once(
    environment: dict[str, str], tmp_path: Path, sandbox: Sandbox
) -> None:
    lines = [["model_name", "prompt"], *(["kling-image-o1", f"boat {number}"] for number in range(5))]
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    with answering(CommandLine(environment, tmp_path)):
        for _ in range(2):
            command = ["sh", "-e", "-c", RECEIVER + RECIPES["nightly-batch"]]
            subprocess.run(command, cwd=tmp_path, check=True, timeout=90)
    with (tmp_path / "archived.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and {row["archive"] for row in rows} == {"archived"}
    assert len(sandbox.ledger().tasks) == 5


@pytest.mark.usefixtures("environment", "working")
def test_following_events_continues_after_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    follow = recipe("follow-events")["follow"]
    seen = [0]
    with Receiver() as receiver:
        for number in (1, 2):
            receiver.submit(REQUEST, external_task_id=f"follow-{number}")
            receiver.wait(f"follow-{number}", timeout_seconds=30)
            wait_until(lambda: follow(seen[-1], seen.append) or len(seen) > number)  # noqa: B023 - called at once
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("follow-")]
    assert printed == ["follow-1", "follow-2"]
    assert seen == sorted(set(seen))


@pytest.mark.usefixtures("environment", "working")
def test_file_that_is_not_archived_has_a_reason(sandbox: Sandbox) -> None:
    with Receiver() as receiver:
        receiver.submit({**REQUEST, "prompt": "[fail]"}, external_task_id="bad")
        with pytest.raises(NotArchived, match="bad: ") as caught:
            receiver.wait("bad", timeout_seconds=30)
        assert caught.value.result.error
        sandbox.set(processing_seconds=60)
        receiver.submit(REQUEST, external_task_id="slow")
        with pytest.raises(TimeoutError, match="the task continues"):
            receiver.wait("slow", timeout_seconds=0.3)
        with pytest.raises(LookupError):
            receiver.status("nobody")


@pytest.mark.usefixtures("environment", "working")
def test_async_receiver_archives_like_the_synchronous_one() -> None:
    async def ask_and_wait() -> tuple[Any, list[str], bytes]:
        with Receiver() as receiver:
            several = AsyncReceiver(receiver)
            tasks = await asyncio.gather(*(several.submit(REQUEST, external_task_id=f"a-{n}") for n in range(3)))
            results = await asyncio.gather(*(several.wait(t.external_task_id, timeout_seconds=30) for t in tasks))
            assert results[0] == await several.wait("a-0", timeout_seconds=0)
            names = []
            async for fact in several.events(names={"task.archived"}, follow=True):
                names.append(fact.external_task_id or "")
                if len(names) == 3:
                    break
            link = await several.url(results[0].files[0])
            return results, names, (await asyncio.to_thread(httpx.get, link)).content

    results, names, content = asyncio.run(ask_and_wait())
    assert sorted(names) == [result.external_task_id for result in results] == ["a-0", "a-1", "a-2"]
    assert hashlib.sha256(content).hexdigest() == results[0].files[0].sha256
