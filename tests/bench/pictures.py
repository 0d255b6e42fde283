"""Rows 4 to 8 and 10: pictures from a file server into SeaweedFS, by a worker with its default settings."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlmodel import func, select

from storage.database.sessions import Database
from storage.rows.models import Asset, Event, Task, Worker
from storage.rows.tasks import asset_id
from storage.states import ArchiveState, AssetName, AssetState, TaskState
from tests.bench import stage
from tests.bench.late import png
from tests.bench.table import Sample, say
from tests.harness import wait_until
from tests.pipeline import free_port

IMAGES_PER_TASK = 4  # the usual size of a request: a manifest is written for every four
DRAIN_SECONDS = 300.0
TRANSFERS = 8


@dataclass(frozen=True)
class Source:
    """Files of equal size on a local server."""

    address: str
    names: list[str]
    scheme: str = "http"
    variables: dict[str, str] = field(default_factory=dict)  # the certificate that a client has to trust

    def link(self, number: int) -> str:
        return f"{self.scheme}://{self.address}/{self.names[number % len(self.names)]}"


@contextmanager
def source(place: Path, *, count: int, size: int, certificate: Path | None = None) -> Iterator[Source]:
    """`count` different PNGs behind rclone's file server, over TLS with a certificate that also holds its key."""
    shelf = place / "source"
    shelf.mkdir()
    names = [f"{number:05}.png" for number in range(count)]
    for number, name in enumerate(names):
        (shelf / name).write_bytes(png(size, number))
    if certificate is None:
        with stage.files(shelf) as address:
            yield Source(address, names)
        return
    with stage.files(shelf, "--cert", str(certificate), "--key", str(certificate)) as address:
        yield Source(address, names, "https", {"SSL_CERT_FILE": str(certificate)})


def insert_row(url: str, source: Source, count: int) -> int:
    """Insert due pictures of succeeded tasks in one transaction. The source's files are used in turn."""
    database = Database(url)
    now = datetime.now(UTC)
    end = now + timedelta(days=30)
    with database.write() as session:
        for start in range(0, count, IMAGES_PER_TASK):
            task = Task(
                external_task_id=uuid.uuid4().hex, provider="kling", state=TaskState.SUCCEEDED,
                archive=ArchiveState.ARCHIVING, expected=IMAGES_PER_TASK, created_at=now, completed_at=now,
                files_expire_at=end,
            )  # fmt: skip
            session.add(task)
            session.flush()
            for index in range(min(IMAGES_PER_TASK, count - start)):
                link, name = source.link(start + index), AssetName("image", index)
                values: dict[str, Any] = {"task_id": task.id, "kind": name.kind, "index": index, "source_url": link}
                session.add(
                    Asset(id=asset_id(task.id, name), **values, due_at=now, created_at=now, files_expire_at=end)
                )
        database.wake(session)
    database.close()
    return count


def count_archived(url: str) -> int:
    database = Database(url)
    with database.read() as session:
        done = session.exec(select(func.count()).where(Asset.state == AssetState.ARCHIVED)).one()
    database.close()
    return done


def archive(url: str, source: Source, count: int) -> float:
    """Insert them and wait until the last is archived. Returns the seconds since the commit that made them due."""
    database = Database(url)
    insert_row(url, source, count)
    started = time.monotonic()
    archived = select(func.count()).where(Asset.state == AssetState.ARCHIVED)

    def all_there() -> bool:
        with database.read() as session:
            return session.exec(archived).one() >= count

    wait_until(all_there, seconds=DRAIN_SECONDS, every=0.05)
    took = time.monotonic() - started
    with database.read() as session:
        assert not session.exec(select(func.count()).where(Event.name == "asset.failed")).one()
    database.close()
    return took


Store = Callable[[Path], AbstractContextManager[dict[str, str]]]


def ours(
    place: Path, source: Source, count: int, *, threads: int = TRANSFERS, store: Store = stage.seaweed, warm: int = 8
) -> tuple[float, float]:
    """(seconds, CPU seconds of the worker) for `count` pictures, default settings, after `warm` to warm up."""
    with store(place) as found, stage.database("sqlite", place) as url:
        found = {**found, **source.variables, "RECEIVER_WORKER_THREADS": str(threads)}
        variables = stage.environment(url, **found, RECEIVER_PRIVATE_RESULT_HOSTS=source.address)
        with stage.workers(variables, place) as (process_id,):
            _archive_and_forget(url, source, min(warm, count))
            before = stage.cpu_seconds(process_id)
            seconds = archive(url, source, count)
            return seconds, stage.cpu_seconds(process_id) - before


def _archive_and_forget(url: str, source: Source, count: int) -> None:
    archive(url, source, count)
    database = Database(url)
    with database.write() as session:
        session.execute(Asset.__table__.update().values(state=AssetState.FAILED))  # type: ignore[attr-defined]
    database.close()


def rclone(
    place: Path, source: Source, count: int, *, threads: int = TRANSFERS, store: Store = stage.seaweed, warm: int = 0
) -> tuple[float, float]:
    """(seconds, CPU seconds) of `rclone copyurl --urls` into an S3 server of its own, as many transfers as threads,
    after `warm` to warm that server up.
    """
    with store(place / "rclone") as found:
        remote = {
            "RCLONE_CONFIG_S_TYPE": "s3", "RCLONE_CONFIG_S_PROVIDER": "Other", "RCLONE_CONFIG_S_ENV_AUTH": "true",
            "RCLONE_CONFIG_S_ENDPOINT": found["RECEIVER_S3_ENDPOINT_URL"], "RCLONE_CONFIG_S_NO_CHECK_BUCKET": "true",
        }  # fmt: skip

        def copy(many: int, folder: str) -> tuple[float, float]:
            urls = place / "urls.csv"
            urls.write_text("".join(f"{source.link(number)},{number:06}.png\n" for number in range(many)))
            target = f"s:{found['RECEIVER_S3_BUCKET']}/{folder}"
            command = [stage.rclone(), "copyurl", "--urls", str(urls), target, "--transfers", str(threads)]
            before, started = _children_cpu(), time.monotonic()
            subprocess.run(
                command, env={**os.environ, **found, **remote, **source.variables}, check=True, timeout=DRAIN_SECONDS,
                capture_output=True,
            )  # fmt: skip
            return time.monotonic() - started, _children_cpu() - before

        if warm:
            copy(min(warm, count), "warm-up")
        return copy(count, "copied")


def floor(place: Path, source: Source, count: int) -> tuple[float, float]:
    """(seconds, CPU seconds) of the minimal archive, into an S3 server of its own."""
    with stage.seaweed(place) as found:
        words = [source.address, str(count), str(len(source.names)), str(place / "floor.db")]
        variables = {**stage.here(), **found}
        used = stage.printed("tests.bench.floor_archive", *words, variables=variables, seconds=DRAIN_SECONDS)
    return used["seconds"], used["cpu_seconds"]


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


Archiver = Callable[[Path, Source, int], tuple[float, float]]


class AgainstRclone:
    """Files of one size, by `archiver` and by rclone; several rows show figures of one run."""

    def __init__(self, size: int, count: int, archiver: Archiver = ours) -> None:
        self.size = size
        self._count = count
        self._archiver = archiver
        self.last: tuple[int, tuple[float, float], tuple[float, float]] | None = None

    def rate(self, small: bool) -> Sample:
        """Images a second: ours, rclone's."""
        count = 2 if small else self._count
        with stage.folder() as place, source(place, count=min(count, 64), size=self.size) as files:
            reference = rclone(place, files, count)
            mine = self._archiver(place, files, count)
        self.last = count, mine, reference
        return Sample(count / mine[0], count / reference[0])

    def cpu(self, small: bool) -> Sample:
        """CPU milliseconds an image, of the run that `rate` made last."""
        count, mine, reference = self.run(small)
        return Sample(mine[1] / count * 1e3, reference[1] / count * 1e3)

    def run(self, small: bool) -> tuple[int, tuple[float, float], tuple[float, float]]:
        """The last result of `rate`, once, or a new one: how many, (seconds, CPU seconds) of ours, and of rclone."""
        if self.last is None:
            self.rate(small)
        assert self.last is not None
        found, self.last = self.last, None
        return found


def memory(small: bool) -> Sample:
    """MB at the peak of 8 concurrent files of 100 MB, and of the idle worker; the difference decides."""
    size, count = (4_000_000, 4) if small else (100_000_000, 8)
    with stage.folder() as place, source(place, count=count, size=size) as files:
        with stage.seaweed(place) as found, stage.database("sqlite", place) as url:
            variables = stage.environment(url, **found, RECEIVER_PRIVATE_RESULT_HOSTS=files.address)
            with stage.workers(variables, place) as (process_id,):
                time.sleep(0 if small else 1)
                idle = stage.memory_bytes(process_id)
                archive(url, files, count)
                peak = stage.memory_bytes(process_id, "VmHWM")
    return Sample(peak / 1e6, idle / 1e6, value=(peak - idle) / 1e6)


def scaling(small: bool) -> Sample:
    """Images a second of 2, 4 and 8 single-threaded workers against one; the worst share of linear decides.

    20 KB files whose source answers after 200 ms, PostgreSQL.
    """
    with stage.folder() as place, ExitStack() as stack:
        files = stack.enter_context(late_source(place, 0.2))
        found = stack.enter_context(stage.seaweed(place))
        url = stack.enter_context(stage.database("postgresql", place))
        variables = stage.environment(url, **found, RECEIVER_PRIVATE_RESULT_HOSTS=files.address)
        variables["RECEIVER_WORKER_THREADS"] = "1"
        rates = {
            count: _rate(url, files, variables, place, count, small) for count in ((1, 2) if small else (1, 2, 4, 8))
        }
    shares = {count: rate / (count * rates[1]) for count, rate in rates.items() if count > 1}
    say(f"row 10, shares by workers: {', '.join(f'{count}: {share:.2f}' for count, share in shares.items())}")
    worst = min(shares, key=shares.__getitem__)
    return Sample(rates[worst], worst * rates[1], value=shares[worst])


def _rate(url: str, files: Source, variables: dict[str, str], place: Path, count: int, small: bool) -> float:
    database = Database(url)
    with database.write() as session:
        session.execute(Asset.__table__.delete())  # type: ignore[attr-defined]
        session.execute(Task.__table__.delete())  # type: ignore[attr-defined]
        session.execute(Worker.__table__.delete())  # type: ignore[attr-defined]
    database.close()
    images = (2 if small else 32) * count
    with stage.workers(variables, place, count):
        return images / archive(url, files, images)


@contextmanager
def late_source(place: Path, delay_seconds: float) -> Iterator[Source]:
    """Small PNGs from a server that delays its answers."""
    names = [f"{number:05}.png" for number in range(64)]
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.late", str(port), str(delay_seconds)]
    with stage.running(command, stage.here(), place):
        stage.wait_for(f"http://{stage.HOST}:{port}/00000.png")
        yield Source(f"{stage.HOST}:{port}", names)
