"""A large video into the bucket with bounded memory; then again with a worker killed when half of it was uploaded.

`python -m tests.bench.large_video [MEGABYTES]`, 1,500 by default, which takes some minutes. Everything is on loopback
and in a temporary folder. Checks: peak memory of the worker above idle, the hash, one object, no upload left behind.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from receiver.app.wiring import Parts
from receiver.base import telemetry
from receiver.local_store.seaweed import OPTIONS, Seaweed
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.rows import migrations
from storage.states import ArchiveState
from tests.conftest import s3_variables
from tests.harness import wait_until
from tests.pipeline import assets_of, deliver, insert_row, settings_for, task_of
from tests.storage.fetch.test_media_types import TRACK, box

MB = 1_000_000
MOST_ABOVE_IDLE_BYTES = 200 * MB
LEASE_SECONDS = 6  # a shorter lease sometimes expires on a busy machine, and the file is fetched again
IDLE_SECONDS = 2.0
WAIT_SECONDS = 300.0
BLOCK = random.Random(5).randbytes(MB)


class Film:
    """An MP4 of about this size, generated while it is sent, so that it is never in memory."""

    def __init__(self, megabytes: int) -> None:
        self._blocks = megabytes
        media = megabytes * MB
        self._head = box(b"ftyp", b"isom\0\0\2\0isommp42") + box(b"moov", TRACK) + (media + 8).to_bytes(4) + b"mdat"
        self.size = len(self._head) + media

    def pieces(self) -> Iterator[bytes]:
        yield self._head
        for _ in range(self._blocks):
            yield BLOCK

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


@contextmanager
def serving(film: Film) -> Iterator[tuple[str, list[int]]]:
    """The film's URL, and a list that grows with each download."""
    begun: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            begun.append(1)
            self.send_response(200)
            self.send_header("Content-Length", str(film.size))
            self.end_headers()
            try:
                for piece in film.pieces():
                    self.wfile.write(piece)
            except OSError:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/film.mp4", begun
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Figures:
    size: int
    seconds: float = 0.0
    idle_bytes: int = 0
    peak_bytes: int = 0
    downloads: list[int] = field(default_factory=list)

    @property
    def above_idle(self) -> int:
        return self.peak_bytes - self.idle_bytes

    def __str__(self) -> str:
        return (
            f"{self.size / MB:,.0f} MB in {self.seconds:.1f} s; worker idle {self.idle_bytes / MB:.0f} MB, "
            f"peak {self.peak_bytes / MB:.0f} MB, {self.above_idle / MB:.0f} MB above; {len(self.downloads)} downloads"
        )


class Worker:
    """`receiver work` as a process of its own, on these parts."""

    def __init__(self, parts: Parts, folder: Path, private_hosts: str, max_bytes: int) -> None:
        chosen = parts.settings
        variables = {
            "DATABASE_URL": chosen.database_url.get_secret_value(), "KLING_BASE_URL": chosen.kling_base_url,
            "KLING_API_KEY": "sandbox-key", "PRIVATE_RESULT_HOSTS": private_hosts, "S3_BUCKET": chosen.s3_bucket,
            "S3_ENDPOINT_URL": str(chosen.s3_endpoint_url), "S3_PREFIX": chosen.s3_prefix, "SPOOL_DIR": str(folder),
            "MAX_ASSET_BYTES": str(max_bytes), "LEASE_SECONDS": str(LEASE_SECONDS),
            "LOG_FORMAT": "json", "CONFIRM": "never",  # a film in place of a picture causes a read first
        }  # fmt: skip
        rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
        environment = rest | {f"RECEIVER_{name}": value for name, value in variables.items()}
        self._log = (folder / f"worker-{time.monotonic_ns()}.log").open("wb")
        command = [sys.executable, "-m", "receiver", "work"]
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdout=self._log, stderr=self._log)

    def memory(self, name: str) -> int:
        """VmRSS (now) or VmHWM (the most so far), in bytes."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0

    def wait_until_idle(self) -> int:
        wait_until(lambda: b'"worker.started"' in Path(self._log.name).read_bytes(), seconds=60)
        time.sleep(IDLE_SECONDS)
        return self.memory("VmRSS")

    def end(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        self._process.wait(60)
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.end(signal.SIGKILL)


def uploads(bucket: Bucket) -> list[dict[str, Any]]:
    found = bucket._client().list_multipart_uploads(Bucket=bucket.name, Prefix=bucket.prefix)
    return list(found.get("Uploads", ()))


def uploaded_parts(bucket: Bucket) -> int:
    for upload in uploads(bucket):
        place = {"Bucket": bucket.name, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        with suppress(bucket._client().exceptions.NoSuchUpload):  # the process ended in between
            return len(bucket._client().list_parts(**place).get("Parts", ()))
    return 0


def run(parts: Parts, folder: Path, megabytes: int, *, crash: bool) -> Figures:
    """One film from its callback to its manifest. `crash`: kill -9 when half of its parts are in the bucket."""
    film = Film(megabytes)
    figures = Figures(film.size)
    half = film.size // (16 * 1024 * 1024) // 2
    with serving(film) as (url, begun), ExitStack() as workers:
        hosts = ",".join((*parts.settings.private_result_hosts, url.split("/")[2]))
        worker = workers.enter_context(Worker(parts, folder, hosts, film.size))
        figures.idle_bytes = worker.wait_until_idle()
        started = time.monotonic()
        task = insert_row(parts, provider_task_id=f"film-{crash}", expected=1)
        result = {"videos": [{"index": 0, "url": url}]}
        deliver(parts, task, {"task_id": task.provider_task_id, "task_status": "succeed", "task_result": result})
        if crash:
            wait_until(lambda: uploaded_parts(parts.bucket) >= half, seconds=WAIT_SECONDS, every=0.05)
            worker.end(signal.SIGKILL)
            assert len(uploads(parts.bucket)) == 1, "it was not killed in the midst of its upload"
            worker = workers.enter_context(Worker(parts, folder, hosts, film.size))
        wait_until(lambda: task_of(parts, task.external_task_id).manifest_key, seconds=WAIT_SECONDS)
        figures.seconds = time.monotonic() - started
        figures.peak_bytes = worker.memory("VmHWM")
        worker.end(signal.SIGTERM)
        figures.downloads = begun
    check(parts, film, task.external_task_id)
    return figures


def check(parts: Parts, film: Film, external_task_id: str) -> None:
    task = task_of(parts, external_task_id)
    (asset,) = assets_of(parts, task)
    assert (task.archive, asset.sha256, asset.size) == (ArchiveState.ARCHIVED, film.sha256, film.size), task.note
    digest = hashlib.sha256()
    for chunk in parts.bucket.read(str(asset.key)):
        digest.update(chunk)
    assert digest.hexdigest() == film.sha256, "other bytes are in the bucket"
    mine = [each.key for each in parts.bucket.list(parts.bucket.prefix) if external_task_id in each.key]
    assert sorted(mine) == sorted([str(asset.key), str(task.manifest_key)]), mine
    assert uploads(parts.bucket) == [], "an upload was left behind"


class Roomy(Seaweed):
    """SeaweedFS with room for several films."""

    def _options(self) -> list[str]:
        return ["-volume.max=64" if option.startswith("-volume.max") else option for option in super()._options()]


def main(megabytes: int) -> None:
    assert any(option.startswith("-volume.max") for option in OPTIONS)
    telemetry.configure("error")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Roomy(folder / "seaweed", "pictures") as seaweed, Sandbox() as sandbox:
            os.environ.update(s3_variables(seaweed))
            bucket = Bucket(seaweed.bucket, endpoint_url=seaweed.endpoint_url, prefix="bench/")
            url = f"sqlite:///{folder / 'receiver.db'}"
            parts = Parts(settings_for(url, bucket, sandbox, public_url="", confirm="never", poll_after_seconds=3_600))
            migrations.upgrade(parts.database)
            for crash in (False, True):
                figures = run(parts, folder, megabytes, crash=crash)
                print(f"{'killed at half' if crash else 'undisturbed'}: {figures}", flush=True)  # noqa: T201
                assert figures.above_idle < MOST_ABOVE_IDLE_BYTES
            parts.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_500)
