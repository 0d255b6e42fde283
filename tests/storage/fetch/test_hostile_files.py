"""Every kind of hostile file through the real fetch and archive step: refused for its reason, and not stored.

The tables of `test_media` and the scripted file host of `test_fetch` are served over loopback. Assertions are about the
rows, the bucket and the output of `receiver status`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from receiver.app.wiring import Parts
from receiver.cli import show
from receiver.sandbox import Sandbox
from receiver.tasks import task_view
from storage.archive import manifest
from storage.archive.unusable import MAX_TRIES
from storage.fetch.client import Fetcher
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState, TaskState
from tests.loopback import Script
from tests.other_processes import fetch, forked
from tests.pipeline import assets_of, insert_row, kept, make_due_now, run
from tests.rows import LONG_AGO, new_asset
from tests.storage.fetch.test_client import FileHost, answer
from tests.storage.fetch.test_media_types import DAMAGED, FOREIGN, chunk, png
from tests.storage.fetch.test_media_types import WHOLE as PICTURES

pytestmark = pytest.mark.databases("sqlite")  # what a host sends is judged before any statement
MIB = 2**20
MAX_BYTES = MIB
LAST_TRY = {"unusable_since": LONG_AGO, "unusable_tries": MAX_TRIES - 1, "attempts": 1}
GIB = 2**30
# Memory may grow by this much more for a stream of 256 MiB than for one of 16.
FLAT_MIB = 24

WHOLE = png(*[chunk(b"IDAT", b"x" * 50)] * 6, chunk(b"tEXt", b"a\0b"), chunk(b"IEND"))
BOUNDARIES = (33, *range(33 + 62, len(WHOLE), 62), len(WHOLE) - 12, len(WHOLE) - 4)
STRAY = PICTURES["jpeg"][0][:20] + b"stray" + PICTURES["jpeg"][0][20:]
FILES: dict[str, tuple[bytes, str]] = {
    **DAMAGED,
    **FOREIGN,
    **{f"png cut at {place}": (WHOLE[:place], "cut short") for place in BOUNDARIES},
    "html with status 200": (b"<!DOCTYPE html><title>Sorry</title>", "html"),
}


@pytest.fixture
def host() -> Iterator[FileHost]:
    server = FileHost()
    yield server
    server.close()


@pytest.fixture
def changes(host: FileHost, sandbox: Sandbox) -> dict[str, Any]:
    private = f"{sandbox.url.removeprefix('http://')},127.0.0.1:{host.port}"
    return {"private_result_hosts": private, "max_asset_bytes": MAX_BYTES}


def archive(parts: Parts, host: FileHost, scripts: Mapping[str, Script], **values: Any) -> dict[str, Asset]:
    """Serve each script as a result of one task and archive them. Returns the asset rows by script name."""
    now = parts.database.now()
    over = {
        "reported_at": now,
        "state": TaskState.SUCCEEDED,
        "archive": ArchiveState.ARCHIVING,
        "step": None,
        "due_at": None,
    }
    task = insert_row(parts, expected=len(scripts), **over)
    with parts.database.write() as session:
        for index, script in enumerate(scripts.values()):
            host.scripts[f"/{index}.png?Signature=s"] = script
            url = f"{host.url}/{index}.png?Signature=s"
            new_asset(session, task, index, source_url=url, **values)
    run(parts, "assets")
    return dict(zip(scripts, assets_of(parts, task), strict=True))


def status_of(parts: Parts, task: Task) -> str:
    with pytest.MonkeyPatch.context() as terminal, contextlib.redirect_stdout(io.StringIO()) as shown:
        terminal.setenv("COLUMNS", "1000")
        show.show(parts, task.external_task_id)
    return shown.getvalue()


def test_hostile_file_is_refused_for_its_reason(parts: Parts, host: FileHost) -> None:
    rows = archive(parts, host, {name: answer(data) for name, (data, _) in FILES.items()}, **LAST_TRY)
    wrong = {name: row.error for name, row in rows.items() if not re.search(FILES[name][1], row.error or "")}
    assert wrong == {}
    assert {row.state for row in rows.values()} == {AssetState.FAILED}
    assert kept(parts) == {}
    with parts.database.read() as session:
        task = session.get_one(Task, rows["html"].task_id)
    status = status_of(parts, task)
    assert all(str(row.error) in status for row in rows.values())
    assert "Signature" not in status


def test_bytes_after_a_picture_are_archived_counted_and_shown(parts: Parts, host: FileHost) -> None:
    bodies = {"tail": WHOLE + b"SEFT" * 9, "stray": STRAY, "plain": WHOLE}
    rows = archive(parts, host, {name: answer(body) for name, body in bodies.items()})
    run(parts, "finishes")
    with parts.database.read() as session:
        task = session.get_one(Task, rows["tail"].task_id)
    shown = {
        file["key"]: file for file in task_view.report(parts.database, parts.bucket, task.external_task_id)["assets"]
    }
    told = manifest.read(parts.bucket.read_bytes(str(task.manifest_key), MIB))
    odd = {"tail": (36, []), "stray": (0, ["stray bytes between segments"]), "plain": (0, [])}
    for name, row in rows.items():
        assert parts.bucket.read_bytes(str(row.key), MIB) == bodies[name]
        assert (shown[row.key]["trailing_bytes"], shown[row.key]["notes"]) == odd[name]
        (facts,) = (one for one in told["assets"] if one["key"] == row.key)
        assert (facts.get("trailing_bytes", 0), facts.get("notes", [])) == odd[name]


def test_task_whose_files_are_refused_ends_incomplete(parts: Parts, host: FileHost) -> None:
    rows = archive(parts, host, {name: answer(FILES[name][0]) for name in ("html", "png + zip")}, **LAST_TRY)
    run(parts, "finishes")
    with parts.database.read() as session:
        task = session.get_one(Task, rows["html"].task_id)
    assert task.archive is ArchiveState.INCOMPLETE
    assert set(kept(parts)) <= {task.manifest_key}


def endless(connection: socket.socket) -> None:
    connection.sendall(answer(png()[:50], length=None))
    while True:
        connection.sendall(b"\0" * MIB)


def drip(connection: socket.socket) -> None:
    connection.sendall(answer(png()[:50], length=None))
    while True:
        time.sleep(0.05)
        connection.sendall(b"\0")


def closing(script: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(script)


def moved(to: str) -> bytes:
    return answer(b"", f"Location: {to}", status="302 Found")


# Faults of a transfer are retried (`due`). A file over the size cap waits for a person (`failed`).
ANSWERS: dict[str, tuple[Script, str, AssetState]] = {
    "stream without end": (endless, f"more than the {MAX_BYTES} bytes", AssetState.FAILED),
    "length over the cap": (closing(answer(png(), length=9 * GIB)), "announced", AssetState.FAILED),
    "length too long": (closing(answer(png(), length=10_000)), "broke off", AssetState.DUE),
    "length too short": (closing(answer(png(), length=20)), "more bytes than|Content-Length", AssetState.DUE),
    "brotli-encoded": (closing(answer(b"\x0b\2" + png(), "Content-Encoding: br")), "Content-Encoding", AssetState.DUE),
    "drip": (drip, "longer than|slower than", AssetState.DUE),
    "empty": (answer(b""), "empty", AssetState.DUE),
    "to metadata": (moved("http://169.254.169.254/latest/meta-data"), "redirect .* refused", AssetState.DUE),
    "to loopback": (moved("https://127.0.0.1/x"), "redirect .* refused", AssetState.DUE),
    "to a file": (moved("file:///etc/passwd"), "redirect .* refused", AssetState.DUE),
    "to a private name": (moved("https://inside.example/x"), "inside.example", AssetState.DUE),
}


def test_hostile_response_is_refused_for_its_reason(parts: Parts, host: FileHost) -> None:
    parts.__dict__["fetcher"] = Fetcher(
        parts.address_policy, max_bytes=MAX_BYTES, total_seconds=3, resolve=lambda name, port: ("10.0.0.1",)
    )
    rows = archive(parts, host, {name: script for name, (script, _, _) in ANSWERS.items()})
    for name, (_, reason, state) in ANSWERS.items():
        assert (rows[name].state, bool(re.search(reason, rows[name].error or ""))) == (state, True), rows[name].error
    assert kept(parts) == {}
    assert "169.254" not in " ".join(host.heads)


def test_redirect_between_permitted_hosts_is_followed(parts: Parts, host: FileHost) -> None:
    host.scripts["/there"] = answer(WHOLE)
    rows = archive(parts, host, {"moved": moved(f"{host.url}/there")})
    assert rows["moved"].state is AssetState.ARCHIVED
    assert list(kept(parts)) == [rows["moved"].key]


def test_host_that_redirects_to_itself_is_retried(parts: Parts, host: FileHost) -> None:
    row = archive(parts, host, {"edge": moved("0.png?Signature=s")})["edge"]
    assert (row.state, row.error) == (AssetState.DUE, "127.0.0.1 redirected to the same link")
    host.scripts["/0.png?Signature=s"] = answer(WHOLE)
    make_due_now(parts)
    run(parts, "assets")
    assert list(kept(parts).values()) == [hashlib.sha256(WHOLE).hexdigest()]


def growth_mib(host: FileHost, stream_bytes: int) -> int:
    with forked(fetch, host.port, stream_bytes) as other:
        assert other.poll(120)
        return int(other.recv())


def test_body_without_a_length_stops_at_the_size_limit_in_constant_memory(
    host: FileHost, record_property: Callable[[str, object], None]
) -> None:
    host.scripts["/"] = endless
    small, large = growth_mib(host, 16 * MIB), growth_mib(host, 256 * MIB)
    record_property("MiB of growth at 16 MiB and at 256 MiB", (small, large))
    assert large - small < FLAT_MIB
