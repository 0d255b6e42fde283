"""From the request to the object, through the real web server: every payload, every shape, every fault."""

from __future__ import annotations

import hashlib
import json
import socket
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import rfc8785
from sqlalchemy import update
from sqlmodel import col

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks.task_view import is_over
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState, CallbackState, Step, TaskState
from tests.harness import PAYLOADS, wait_until
from tests.pipeline import (
    Web,
    assert_archived,
    assets_of,
    callbacks_of,
    insert_row,
    kept,
    make_due_now,
    run,
    task_of,
)
from tests.rows import LONG_AGO, event_names

PLAIN = {"model_name": "kling-image-o1", "prompt": "a boat"}
SERIES = {"model_name": "kling-v3-omni", "prompt": "a boat", "result_type": "series", "series_amount": 3}
WATERMARKED = {**SERIES, "watermark_info": {"enabled": True}}

# For what the provider's messages say. How rows are written is tested on both.
ONE_DATABASE = pytest.mark.databases("sqlite")


@pytest.fixture
def changes() -> dict[str, Any]:
    """Far polls: everything happens because of a callback, or because a test made a read due."""
    return {"poll_after_seconds": 3_600}


@pytest.fixture(autouse=True)
def dialled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test here may leave this machine, not even to resolve a name."""
    outside: list[str] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def note(host: Any) -> None:
        if str(host) not in ("127.0.0.1", "localhost", "::1"):
            outside.append(str(host))

    def noted_connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            note(address[0])
        return connect(self, address)

    def noted_resolve(host: Any, *rest: Any, **named: Any) -> Any:
        note(host)
        return resolve(host, *rest, **named)

    monkeypatch.setattr(socket.socket, "connect", noted_connect)
    monkeypatch.setattr(socket, "getaddrinfo", noted_resolve)
    yield
    assert outside == []


# -- the recorded payloads ----------------------------------------------------------------------------------------


def payload(name: str) -> bytes:
    return (PAYLOADS / f"{name}.json").read_bytes()


def receive(web: Web, parts: Parts, task: Task | None, body: bytes) -> httpx.Response:
    """POST one delivery to the task's URL, or to the account's, and apply it. Nothing is fetched."""
    token = parts.tokens.sign("kling", task.id if task else None)
    answer = httpx.post(f"{web.url}/callbacks/kling/{token}", content=body, timeout=10)
    run(parts, "callbacks")
    return answer


def rows(parts: Parts, task: Task) -> list[tuple[str, int, str, str]]:
    return [(asset.kind, asset.index, asset.original, asset.source_url) for asset in assets_of(parts, task)]


S15, P4 = "https://s15-kling-fdl.klingai.com/bs2/x", "https://p4-fdl.klingai.com/ksc2"
SIGNED = "x-kcdn-pid=112781&Expires=1792592037&Signature"
PID = "x-kcdn-pid=112757&pkey"


class Told(NamedTuple):
    """The contents of a payload: its task, the resulting state, its files."""

    external_task_id: str
    provider_task_id: str
    state: TaskState
    rows: list[tuple[str, int, str, str]]
    series: bool = False


DONE = TaskState.SUCCEEDED
TOLD = {
    "callback-processing": Told(
        "7b0e9c52-2f5b-4c5e-9d6a-0c9a1d1f4e77", "901234567890123456", TaskState.PROCESSING, []
    ),
    "callback-single": Told(
        "7b0e9c52-2f5b-4c5e-9d6a-0c9a1d1f4e77", "901234567890123456", DONE,
        [("image", 0, "", f"{S15}/a0.png?cacheKey=AA&{SIGNED}=s~0_-&Key-Pair-Id=K1"),
         ("image", 1, "", f"{S15}/a1.png?cacheKey=BB&{SIGNED}=s~1_-&Key-Pair-Id=K1")],
    ),
    "callback-series-watermarked": Told(
        "c2d1e0aa-90b1-4d5e-8a3f-3f0f6b1f2c11", "901234567890123457", DONE,
        [("series", index, "", f"{P4}/s{index}.png?cacheKey=C{index}&{PID}=P{index}") for index in range(3)]
        + [("watermark", index, "series", f"{P4}/w{index}.png?cacheKey=W{index}&{PID}=Q{index}") for index in range(3)],
        series=True,
    ),
    "callback-new-shape": Told(
        "2f8b4e0e-3d55-4c1d-a0f0-6a1b9f0a7c33", "901234567890123459", DONE,
        [("image", 0, "", f"{P4}/n0.png?cacheKey=N0&pkey=P")],
    ),
    "callback-no-task-info": Told(
        "ours-alone", "901234567890123460", DONE,
        [("image", 0, "", "https://h1.inkwai.com/bs2/upload-ylab-stunt/1fa0.png")],
    ),
    "callback-wrapped": Told(
        "0a7e5bb0-8a0b-4a35-9a55-2f9f86a7b001", "901234567890123461", DONE,
        [("image", 0, "", "https://p2-fdl.klingai.com/ksc2/z0.png?pkey=P")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
@ONE_DATABASE
def test_a_recorded_callback_is_applied(name: str, web: Web, parts: Parts) -> None:
    told = TOLD[name]
    task = insert_row(
        parts, external_task_id=told.external_task_id, series=told.series, expected=len(told.rows) or 1
    )  # fmt: skip
    answer = receive(web, parts, task, payload(name))
    assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
    (callback,) = callbacks_of(parts)
    assert (callback.state, callback.reason, callback.body) == (CallbackState.APPLIED, None, payload(name))
    found = task_of(parts, told.external_task_id)
    assert (found.state, found.provider_task_id) == (told.state, None)  # no unsigned delivery gives an id
    assert rows(parts, task) == told.rows


FAILED_ID = "e41f5b8d-7c0d-4b0b-b0a5-5b8f0d5f7d90"


@pytest.mark.databases("sqlite")
def test_a_recorded_failure_is_read_before_it_is_believed(web: Web, parts: Parts) -> None:
    task = insert_row(parts, external_task_id=FAILED_ID)
    assert receive(web, parts, task, payload("callback-failed")).status_code == 200
    (callback,) = callbacks_of(parts)
    assert (callback.state, callback.reason) == (
        CallbackState.APPLIED,
        "not believed yet: the task is read at the provider",
    )
    found = task_of(parts, FAILED_ID)
    assert (found.state, found.step) == (TaskState.SUBMITTED, Step.READ)
    assert found.due_at is not None and task.due_at is not None and found.due_at < task.due_at


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("changes", [{"confirm": "never"}])
def test_a_recorded_failure_is_applied(web: Web, parts: Parts) -> None:
    task = insert_row(parts, external_task_id=FAILED_ID)
    assert receive(web, parts, task, payload("callback-failed")).status_code == 200
    found = task_of(parts, FAILED_ID)
    assert (found.state, found.error) == (TaskState.FAILED, "Failure to pass the risk control system")
    assert (found.archive, found.due_at, rows(parts, task)) == (ArchiveState.NONE, None, [])


@pytest.mark.databases("sqlite")
def test_test_callback_of_the_providers_console_ends_unmatched(web: Web, parts: Parts) -> None:
    assert receive(web, parts, None, payload("console-test-callback")).status_code == 200
    (callback,) = callbacks_of(parts)
    assert (callback.state, callback.task_id) == (CallbackState.UNMATCHED, None)


# The recorded answers of the API; tests/receiver/sandbox/test_sandbox.py compares the sandbox's answers with them.


@pytest.mark.databases("sqlite")
def test_an_accepted_create_leaves_a_submitted_row(parts: Parts, sandbox: Sandbox) -> None:
    task = parts.submitter.submit(PLAIN, external_task_id="one").task
    assert (task.state, task.step, task.lease) == (TaskState.SUBMITTED, Step.READ, None)
    assert task.provider_task_id == sandbox.ledger().task("one").task_id


def test_a_create_over_the_concurrency_limit_waits_in_its_row(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(concurrency_limit=1)
    task = parts.submitter.submit({**PLAIN, "n": 2}, external_task_id="two").task
    assert (task.state, task.step, task.sent_at) == (TaskState.CREATED, Step.CREATE, None)
    assert task.due_at is not None and "1303" in str(task.note)
    sandbox.set(concurrency_limit=2)
    make_due_now(parts)
    run(parts, "creates")
    assert task_of(parts, "two").state is TaskState.SUBMITTED


def create_directly(sandbox: Sandbox, external_task_id: str) -> None:
    """A request of another program with the same account."""
    body = {**PLAIN, "external_task_id": external_task_id}
    headers = {"Authorization": f"Bearer {sandbox.api_key}"}
    httpx.post(f"{sandbox.url}/v1/images/omni-image", json=body, headers=headers).raise_for_status()


@pytest.mark.databases("sqlite")
def test_an_id_that_exists_already_is_refused_when_the_task_is_older_than_our_row(
    parts: Parts, sandbox: Sandbox
) -> None:
    create_directly(sandbox, "theirs")
    for made in sandbox.world.tasks.values():
        made.created_ms -= 3_600_000
    task = parts.submitter.submit(PLAIN, external_task_id="theirs").task
    assert (task.state, task.archive) == (TaskState.FAILED, ArchiveState.NONE)
    assert "--adopt" in str(task.error)


@ONE_DATABASE
def test_an_id_that_exists_already_is_ours_when_the_task_is_younger_than_our_row(
    parts: Parts, sandbox: Sandbox
) -> None:
    sandbox.set(create_faults=["5000:created"])
    task = parts.submitter.submit(PLAIN, external_task_id="ours").task
    assert (task.state, task.step) == (TaskState.CREATED, Step.CREATE)
    for made in sandbox.world.tasks.values():
        made.visible_ms += 3_600_000  # reads do not find it yet
    for _ in range(3):  # not found, not found, sent again: "already exists"
        make_due_now(parts)
        run(parts, "creates")
    assert task_of(parts, "ours").state is TaskState.CREATED
    for made in sandbox.world.tasks.values():
        made.visible_ms = 0
    make_due_now(parts)
    run(parts, "creates")
    assert task_of(parts, "ours").state is TaskState.SUCCEEDED


def test_a_task_that_is_not_found_is_read_again_later(parts: Parts) -> None:
    insert_row(parts, external_task_id="42", due_at=LONG_AGO, submitted_at=parts.database.now())
    run(parts, "reads")
    task = task_of(parts, "42")
    assert (task.state, task.step, task.polls, task.lease) == (TaskState.SUBMITTED, Step.READ, 1, None)


# -- whole flows --------------------------------------------------------------------------------------------------


class Flow(NamedTuple):
    files: int
    request: dict[str, Any] = PLAIN
    knobs: dict[str, Any] = {}  # noqa: RUF012 - never written to


FLOWS = {
    "single": Flow(1),
    "four": Flow(4, {**PLAIN, "n": 4}),
    "series with watermark": Flow(6, WATERMARKED),
    "series as images": Flow(6, WATERMARKED, {"callback_without_series": True}),
    "duplicated and reordered": Flow(2, {**PLAIN, "n": 2}, {"callback_duplicates": 4, "callback_reorder": True}),
    "wrapped": Flow(2, {**PLAIN, "n": 2}, {"callback_shape": "wrapped"}),
    "new": Flow(6, WATERMARKED, {"callback_shape": "new"}),
    "no task info": Flow(1, PLAIN, {"callback_shape": "no_task_info"}),
    "other ids": Flow(1, PLAIN, {"gateway_ids": True, "task_info": False}),
    "first urls dead": Flow(2, {**PLAIN, "prompt": "a boat [expire]", "n": 2}),
    "store of files away": Flow(2, {**PLAIN, "n": 2}, {"cdn_faults": ["503", "503"]}),
    "cut off": Flow(2, {**PLAIN, "n": 2}, {"cdn_faults": ["truncated", "truncated_chunked", "truncated_silent"]}),
    "error page": Flow(1, PLAIN, {"cdn_faults": ["html", "html"]}),
    "redirected": Flow(1, PLAIN, {"cdn_redirects": 2}),
}


def finish(parts: Parts, external_task_id: str) -> Task:
    """Do all due work until the task is over, without waiting for times that come after the provider's answer."""
    worker = parts.worker()

    def over() -> Task | None:
        worker.run_until_idle()
        task = task_of(parts, external_task_id)
        make_due_now(parts, *([Task, Asset] if task.state is TaskState.SUCCEEDED else [Asset]))
        return task if is_over(task) else None

    return wait_until(over)


# The rows are tested on both databases, the provider and its file hosts on one.
ON_BOTH = ("single", "four", "series as images", "duplicated and reordered", "first urls dead")
RUNS = [
    *((name, "sqlite") for name in FLOWS),
    ("series with watermark", "postgresql"),
    *(pytest.param(name, "postgresql", marks=pytest.mark.databases("sqlite")) for name in ON_BOTH),
]


@pytest.mark.parametrize(("name", "database_kind"), RUNS)
def test_every_picture_ends_in_the_bucket(name: str, web: Web, parts: Parts, sandbox: Sandbox) -> None:
    flow = FLOWS[name]
    sandbox.set(**flow.knobs)
    external_task_id = parts.submitter.submit(flow.request).task.external_task_id
    task = finish(parts, external_task_id)
    assert_archived(parts, sandbox, task)
    assert (len(assets_of(parts, task)), task.note) == (flow.files, None)
    assert task.called_back_at is not None
    assert event_names(parts.database, task).count("task.archived") == 1


def ended(sandbox: Sandbox, external_task_id: str) -> bool:
    return sandbox.ledger().task(external_task_id).status in ("succeed", "failed")


@pytest.mark.databases("sqlite")
def test_a_task_whose_callbacks_never_come_is_read(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    parts.submitter.submit({**PLAIN, "prompt": "a boat [drop]"}, external_task_id="silent")
    wait_until(lambda: ended(sandbox, "silent"))
    make_due_now(parts)
    task = finish(parts, "silent")
    assert_archived(parts, sandbox, task)
    assert (task.called_back_at, task.polls) == (None, 1)


@ONE_DATABASE
def test_a_failure_of_the_provider_ends_the_task_without_files(web: Web, parts: Parts) -> None:
    parts.submitter.submit({**PLAIN, "prompt": "a boat [fail]"}, external_task_id="bad")
    task = finish(parts, "bad")
    assert (task.state, task.archive, task.polls) == (TaskState.FAILED, ArchiveState.NONE, 1)
    assert (task.error, kept(parts)) == ("Failure to pass the risk control system", {})


@ONE_DATABASE
def test_fewer_pictures_than_asked_for_are_believed_after_three_reads(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(deliver_fewer=1)
    parts.submitter.submit({**PLAIN, "n": 4}, external_task_id="fewer")
    task = finish(parts, "fewer")
    assert_archived(parts, sandbox, task)
    assert (task.note, task.completeness_reads) == ("delivered 3 of 4", 3)


@ONE_DATABASE
def test_one_dead_url_among_nine_holds_up_none_of_the_others(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    parts.submitter.submit({**PLAIN, "n": 9}, external_task_id="nine")
    wait_until(lambda: run(parts, "callbacks") and len(assets_of(parts, task_of(parts, "nine"))) == 9)
    dead = f"{sandbox.url}/cdn/gone.png"
    with parts.database.write() as session:
        session.execute(update(Asset).where(col(Asset.index) == 4).values(source_url=dead))
    sandbox.set(query_faults=["5001"] * 20)  # no read returns another one
    parts.worker().run_until_idle()
    states = [asset.state for asset in assets_of(parts, task_of(parts, "nine"))]
    assert states == [AssetState.ARCHIVED] * 4 + [AssetState.DUE] + [AssetState.ARCHIVED] * 4
    sandbox.set(query_faults=[])
    make_due_now(parts)
    assert_archived(parts, sandbox, finish(parts, "nine"))


@ONE_DATABASE
def test_a_series_reported_in_the_new_shape_and_read_in_the_old_one_is_archived_once(
    web: Web, parts: Parts, sandbox: Sandbox
) -> None:
    sandbox.set(callback_shape="new", fresh_urls_on_read=True)
    parts.submitter.submit(WATERMARKED, external_task_id="both")
    wait_until(lambda: run(parts, "callbacks") and assets_of(parts, task_of(parts, "both")))
    pushed = rows(parts, task_of(parts, "both"))
    with parts.database.write() as session:
        session.execute(update(Task).values(step=Step.READ, due_at=LONG_AGO))
    assert run(parts, "reads") == 1
    polled = rows(parts, task_of(parts, "both"))
    assert [row[:3] for row in polled] == [row[:3] for row in pushed] and len(polled) == 6
    assert {row[3] for row in polled}.isdisjoint(row[3] for row in pushed)
    assert_archived(parts, sandbox, finish(parts, "both"))


@ONE_DATABASE
def test_the_manifest_proves_itself_and_holds_no_signed_url(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    image = "https://example.com/in.png?Signature=secret"
    request = {**WATERMARKED, "image_list": [{"image": image}]}
    task = finish(parts, parts.submitter.submit(request, external_task_id=uuid.uuid4().hex).task.external_task_id)
    raw = parts.bucket.read_bytes(str(task.manifest_key), 2**20)
    manifest = json.loads(raw)
    digest = manifest.pop("digest")
    assert digest == task.manifest_digest == hashlib.sha256(rfc8785.dumps(manifest)).hexdigest()
    assert raw == rfc8785.dumps({**manifest, "digest": digest})
    assert b"?" not in raw and parts.tokens.sign("kling", task.id).encode() not in raw
    assert {entry["sha256"] for entry in manifest["assets"]} == set(sandbox.ledger().sha256.values())
    assert str(task.manifest_key).endswith(f"/{task.external_task_id}/manifest.json")
