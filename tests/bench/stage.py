"""The programs of the benchmarks, each a process of its own on loopback, and their CPU and memory from the kernel."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from receiver.app.wiring import Parts
from receiver.base import config
from receiver.local_store.seaweed import Seaweed
from storage.operations import heartbeats as heartbeats
from storage.rows import migrations
from tests.conftest import s3_variables
from tests.forked import Forked
from tests.harness import wait_until
from tests.pipeline import CALLBACK_SECRET, free_port
from tests.postgres import Postgres

HOST = "127.0.0.1"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
START_SECONDS = 60.0


@dataclass(frozen=True)
class Lent:
    """Shared servers of the suite's small forms, which judge nothing: servers that run already, and a migrated file and
    database to copy. Our programs are then forked, which saves each a second of imports.
    """

    seaweed: Seaweed
    postgres: Postgres
    migrated_file: Path
    template: str


lent: Lent | None = None


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="receiver-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def database(kind: str, place: Path) -> Iterator[str]:
    """A migrated database with a user's durability: fsync on, `synchronous=FULL`."""
    with databases(kind, place) as create:
        url = create("bench")
        if lent is None:
            _migrate(url)
        yield url


@contextmanager
def databases(kind: str, place: Path, settings: Mapping[str, str] | None = None) -> Iterator[Callable[[str], str]]:
    """Makes databases, empty or migrated: name to URL. `settings`: PostgreSQL's, if they differ from a user's."""
    if kind == "sqlite":
        yield lambda name: _file(place, name)
    elif lent is None:
        with Postgres(settings or {}) as server:
            yield server.create_database
    else:
        made: list[str] = []

        def create(name: str) -> str:
            assert lent is not None
            made.append(name)
            return lent.postgres.create_database(name, lent.template)

        try:
            yield create
        finally:
            for name in made:
                lent.postgres.drop_database(name)


def _file(place: Path, name: str) -> str:
    if lent is not None:
        shutil.copy(lent.migrated_file, place / f"{name}.db")
    return f"sqlite:///{place}/{name}.db"


def _migrate(url: str) -> None:
    parts = Parts(config.load(database_url=url, s3_bucket="unused"))
    migrations.upgrade(parts.database)
    parts.close()


@contextmanager
def seaweed(place: Path) -> Iterator[dict[str, str]]:
    """An empty S3 server; yields the environment variables for it."""
    if lent is not None:
        place.mkdir(exist_ok=True)  # the server would create it
        yield _variables(lent.seaweed)
        return
    server = Seaweed(place / "seaweed", "pictures")
    server.start()
    try:
        yield _variables(server)
    finally:
        server.kill()  # an orderly stop takes two seconds, and its data is not needed


def _variables(server: Seaweed) -> dict[str, str]:
    found = {"RECEIVER_S3_BUCKET": server.bucket, "RECEIVER_S3_ENDPOINT_URL": server.endpoint_url}
    return {**s3_variables(server), **found}


def environment(url: str, **more: str) -> dict[str, str]:
    """The settings of all measurements: the defaults, and the parts of this stage."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    return {
        **rest,
        "RECEIVER_DATABASE_URL": url,
        "RECEIVER_CALLBACK_SECRETS": CALLBACK_SECRET,
        "RECEIVER_S3_BUCKET": "unused",
        "RECEIVER_LOG_LEVEL": "warning",
        **more,
    }


Process = subprocess.Popen[bytes] | Forked


@contextmanager
def running(command: list[str], variables: Mapping[str, str], place: Path) -> Iterator[Process]:
    """A process that is ended with SIGTERM, or SIGKILL after the receiver's own grace time."""
    process = _started(command, variables, place, place / "log")
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        process.kill()
        process.wait()


def _started(command: list[str], variables: Mapping[str, str], place: Path, out: Path) -> Process:
    if lent is not None and command[:2] == [sys.executable, "-m"]:
        return Forked(tuple(command[3:]), variables, place, out=out, err=place / "log", module=command[2])
    with out.open("ab") as output, (place / "log").open("ab") as log:
        return subprocess.Popen(command, env=dict(variables), cwd=place, stdout=output, stderr=log)


def printed(module: str, *words: str, variables: Mapping[str, str], seconds: float) -> Any:
    """Run one of our own programs to its end. Returns the JSON that it printed."""
    with folder() as place:
        process = _started([sys.executable, "-m", module, *words], variables, place, place / "out")
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        if code:
            raise RuntimeError(f"{module} ended with {code}:\n{(place / 'log').read_text()[-3_000:]}")
        return json.loads((place / "out").read_text())


@contextmanager
def served(variables: Mapping[str, str], place: Path, *, workers: int = 0) -> Iterator[int]:
    """Run `receiver serve`. Yields its port."""
    port = free_port()
    chosen = {**variables, "RECEIVER_PORT": str(port), "RECEIVER_WORKERS": str(workers)}
    with running([sys.executable, "-m", "receiver", "serve"], chosen, place):
        wait_for(f"http://{HOST}:{port}/readyz")
        yield port


@contextmanager
def bare(place: Path) -> Iterator[int]:
    """Run the bare endpoint. Yields its port."""
    with program(place, "tests.bench.bare") as port:
        yield port


@contextmanager
def program(place: Path, module: str, *words: str) -> Iterator[int]:
    """Run one of our own small servers, whose first argument is its port. Yields the port."""
    port = free_port()
    with running([sys.executable, "-m", module, str(port), *words], here(), place):
        wait_for(f"http://{HOST}:{port}/")
        yield port


@contextmanager
def workers(variables: Mapping[str, str], place: Path, count: int = 1) -> Iterator[list[int]]:
    """Run worker processes that are ready to claim. Yields their process ids."""
    parts = Parts(config.load(database_url=variables["RECEIVER_DATABASE_URL"], s3_bucket="unused"))
    command = [sys.executable, "-m", "receiver", "work"]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(running(command, variables, place)) for _ in range(count)]
        wait_until(lambda: heartbeats.count_alive(parts.database) >= count, seconds=START_SECONDS)
        yield [process.pid for process in started]
    parts.close()


@contextmanager
def files(place: Path, *more: str) -> Iterator[str]:
    """rclone's file server over `place`: the source of both sides; its host and port. `more`: options of rclone."""
    port = free_port()
    address = f"{HOST}:{port}"
    with running([rclone(), "serve", "http", str(place), "--addr", address, *more], here(), place.parent):
        wait_for(f"http://{address}/")  # over TLS it answers 400
        yield address


def rclone() -> str:
    found = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "rclone is not installed: pip install -r infra/lock/all.txt"
    return found


def here() -> dict[str, str]:
    """Our own environment, in which `tests` can be imported from any folder."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def load(
    port: int, *, seconds: float, rate: float = 0, warm_seconds: float = 1, until: Path | None = None
) -> dict[str, Any]:
    """Send callbacks from a separate process; see `tests.bench.load`. `until`: a file whose creation ends it. The
    answer then has `dues`.
    """
    words = [str(port), "--seconds", str(seconds), "--rate", str(rate), "--warm-seconds", str(warm_seconds)]
    words += ["--dues", "--until", str(until)] if until else []
    found: dict[str, Any] = printed("tests.bench.load", *words, variables=here(), seconds=seconds + 60)
    assert not found["refused"], f"{found['refused']} deliveries were not acknowledged"
    return found


def cpu_seconds(process_id: int) -> float:
    """User and system time of a process so far, without its ended children."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def memory_bytes(process_id: int, what: str = "VmRSS") -> int:
    """Resident memory now, or `VmHWM`: its peak."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def wait_for(url: str) -> None:
    place = urlsplit(url)

    def answers() -> bool:
        connection = http.client.HTTPConnection(place.netloc, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", place.path)
            return connection.getresponse().status < 500
        return False

    wait_until(answers, seconds=START_SECONDS)
