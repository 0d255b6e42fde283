"""xdist's workers, forked from one process that has imported everything.

Each would import pytest, the product and all tests for itself, and start a fork server for its commands (forked.py)
that imports the product: six workers start with 21 instead of 42 s of CPU.
"""

from __future__ import annotations

import gc
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path

import boto3
import pytest
from _pytest.config import _prepareconfig
from _pytest.outcomes import OutcomeException
from execnet.gateway_base import get_execmodel, init_popen_io
from execnet.gateway_base import serve as serve_gateway

from tests.store_clients import read_once

END_SECONDS = 5
# What xdist starts as a worker. It hands over its standard files and ends when the worker does.
LAUNCHER = """
import socket, sys
with socket.socket(socket.AF_UNIX) as to_parent:
    to_parent.connect(sys.argv[1])
    socket.send_fds(to_parent, [b"0"], [0, 1, 2])
    to_parent.recv(1)
"""


class WorkerForks:
    """The process from which the workers of this run are forked, until `close`."""

    def __init__(self, config: pytest.Config) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="receiver-workers-"))
        self._address = str(self._folder / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._address)
            listener.listen(64)
            words = [str(listener.fileno()), os.environ.get("PYTHONPATH", ""), *map(str, config.invocation_params.args)]
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from tests.forked_workers import serve; serve()", *words],
                cwd=config.invocation_params.dir,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(config.rootpath), *sys.path]))},
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
            )

    @property
    def spec(self) -> str:
        """A worker as a word after xdist's `--tx`."""
        command = [sys.executable, "-I", "-S", "-c", LAUNCHER, self._address]
        return f"popen//python={shlex.join(command)}"

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(2 * END_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)


def serve() -> None:
    """In the process from which workers are forked: fork one for each launcher until the controller ends."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    import_tests(sys.argv[3:])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the commands of the tests inherit it
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers heed it
    restore_path(sys.argv[2])
    assert threading.active_count() == 1, "a fork has one thread only"
    gc.freeze()
    children: set[int] = set()
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        launcher, _ = listener.accept()
        _, files, _, _ = socket.recv_fds(launcher, 1, 3)
        if not (child := os.fork()):
            listener.close()
            become_worker(launcher, files)
            return
        children.add(child)
        launcher.close()
        for number in files:
            os.close(number)
    end(children)


def restore_path(given: str) -> None:
    """Give the workers' commands the `PYTHONPATH` of the run, not the one with which this process has started."""
    os.environ["PYTHONPATH"] = given
    if not given:
        del os.environ["PYTHONPATH"]


def import_tests(words: Sequence[str]) -> None:
    """Import what pytest would collect with these arguments, and read botocore's descriptions of S3.

    What cannot be imported is left to the workers, which report it.
    """
    gc.disable()
    config = _prepareconfig([*words, "-n0", "--capture=no"])
    places = [config.invocation_params.dir / word.partition("::")[0] for word in config.args]
    files = [file for place in places for file in (place.rglob("test_*.py") if place.is_dir() else [place])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in files:
            with suppress(Exception, OutcomeException):
                import_module(".".join(file.resolve().relative_to(config.rootpath).with_suffix("").parts))
    config._ensure_unconfigure()
    read_once()
    boto3.Session(region_name="us-east-1").client("s3").close()
    gc.enable()


def become_worker(launcher: socket.socket, files: Sequence[int]) -> None:
    """In the child: what xdist's `python -c …` does with its standard files."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - for the process's life
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The fork server is the parent's, which has started it.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign, attr-defined]
    sys.stdin.readline()  # source that would import what is imported here
    files_of_gateway = init_popen_io(get_execmodel("main_thread_only"))
    files_of_gateway.write(b"1")
    serve_gateway(files_of_gateway, id="worker")
    launcher.close()


def end(children: set[int]) -> None:
    """Wait for the workers, whose controller has ended or will do nothing more with them, then kill them."""
    deadline = time.monotonic() + END_SECONDS
    while children:
        for child in [child for child in children if os.waitpid(child, os.WNOHANG)[0]]:
            children.remove(child)
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
