"""A store that accepts a wrong SHA-256 and refuses a wrong MD5: `rclone serve s3`, and MinIO's code in its gateways."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from storage.bucket import bucket as objects
from storage.bucket import checksums
from storage.bucket.bucket import Bucket
from storage.errors import StoreUnavailable
from tests.archived_tasks import REQUEST
from tests.harness import wait_until
from tests.pipeline import Wired, assert_archived, assets_of, free_port, make_due_now, run, task_of
from tests.storage.bucket.test_bucket import put

MIB = 2**20
BINARY = Path(sys.executable).with_name("rclone")


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `rclone serve s3` with a bucket `pictures`."""
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "pictures").mkdir()
    address = f"127.0.0.1:{free_port()}"
    command = [BINARY, "serve", "s3", "--auth-key", "key,secret-key", "--addr", address, folder, "--config", os.devnull]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    yield f"http://{address}"
    process.terminate()
    process.wait(10)


@pytest.fixture
def store(rclone: str, s3_environment: object, monkeypatch: pytest.MonkeyPatch, request: Any) -> Bucket:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key")
    opened = Bucket("pictures", endpoint_url=rclone, prefix=f"{request.node.name}/")
    wait_until(lambda: _answers(opened))
    return opened


def _answers(bucket: Bucket) -> bool:
    try:
        return bucket.head("any") is None
    except StoreUnavailable:
        return False


@pytest.fixture
def reads(store: Bucket, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of objects that are read back, except those of the probe."""
    store.capabilities()
    keys: list[str] = []
    whole = store.sha256
    monkeypatch.setattr(store, "sha256", lambda key, *more: keys.append(key) or whole(key, *more))
    return keys


@pytest.mark.parametrize("size", [100_000, 7 * MIB])
def test_object_that_carries_its_md5_is_not_read_back(
    store: Bucket, reads: list[str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "MULTIPART_THRESHOLD_BYTES", 6 * MIB)
    assert store.capabilities().proof == "md5"
    content = os.urandom(size)
    assert put(store, "a.png", content) is True
    assert reads == []
    assert b"".join(store.read(f"{store.prefix}a.png")) == content


def test_bytes_that_changed_on_their_way_are_refused_by_the_md5(store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "md5_of", lambda *_: "0" * 32)
    with pytest.raises(StoreUnavailable, match="not those of the checksum"):
        put(store, "a.png", b"one")
    assert store.head(f"{store.prefix}a.png") is None


def test_file_that_changed_on_our_disk_is_not_stored(store: Bucket) -> None:
    with pytest.raises(StoreUnavailable, match="changed on our disk"):
        put(store, "a.png", b"one", "0" * 64)
    assert store.head(f"{store.prefix}a.png") is None


@pytest.mark.parametrize("changes", [{"public_url": "", "poll_after_seconds": 3_600}])
@pytest.mark.databases("sqlite")
def test_row_and_manifest_name_the_evidence(parts: Parts, sandbox: Sandbox, store: Bucket) -> None:
    parts.submitter.submit(REQUEST, external_task_id="task")
    wait_until(lambda: sandbox.ledger().task("task").status == "succeed")
    make_due_now(parts)
    on = Wired(parts.settings, bucket=store)
    run(on, "reads", "assets", "finishes")
    task = task_of(on, "task")
    (asset,) = assets_of(on, task)
    assert asset.notes == ["the store checked its MD5 on arrival, not its SHA-256"]
    assert_archived(on, sandbox, task)
    assert json.load(io.BytesIO(store.read_bytes(str(task.manifest_key), MIB)))["assets"][0]["notes"] == asset.notes
    on.close()
