"""`receiver …` as a process of its own, forked from one that has imported everything: saves 1.3 s of CPU a start.

What depends on a fresh interpreter (start-up time, imports, `-m receiver`) is tested with `subprocess`.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from tests import forked_supervisor

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preload"])


class Forked:
    """One run with the methods of `subprocess.Popen`. It ends when this process does, however that ends (on Linux).

    `out` and `err` are appended to; `given` is its standard input. `module`: another program than `receiver`, as after
    `python -m`. `constants`: values that it has in place of a module's own, by "module:NAME". `strict`: a warning is an
    error. `leads`: it is the first of a process group of its own. `forks_supervisor`: False: as `receiver serve` it
    starts its supervisor afresh. `limits`: soft and hard limits of resources, by RLIMIT_ number.
    """

    def __init__(
        self,
        words: tuple[str, ...],
        variables: Mapping[str, str],
        folder: Path,
        *,
        out: Path,
        err: Path | None = None,
        given: Path = Path(os.devnull),
        module: str = "receiver",
        constants: Mapping[str, object] | None = None,
        strict: bool = False,
        leads: bool = False,
        forks_supervisor: bool = True,
        limits: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        self.args = [module, *words]
        files = [str(given), str(out), str(err or out)]
        supervises = forks_supervisor and words[:1] == ("serve",) and variables.get("RECEIVER_WORKERS") != "0"
        rest = (module, dict(constants or {}), strict, leads, supervises and module == "receiver", dict(limits or {}))
        self._process = FORKS.Process(target=_become, args=(words, dict(variables), str(folder), files, *rest))
        self._process.start()
        self._reading = threading.Lock()  # the fork server returns the exit code once: a second reader would get 255

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with self._reading:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        multiprocessing.connection.wait([self._process.sentinel], timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended since, as with subprocess.Popen
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, which alone has the pipe's other end.

    The parent in the kernel's sense, the fork server, lives until the last worker of the run ends.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if multiprocessing.connection.wait([parent.sentinel], 0):  # it has ended before
        os._exit(1)


def _become(
    words: tuple[str, ...],
    variables: dict[str, str],
    folder: str,
    files: list[str],
    module: str,
    constants: dict[str, object],
    strict: bool,
    leads: bool,
    supervises: bool,
    limits: dict[int, tuple[int, int]],
) -> None:
    """In the child: run `receiver words…`, or another program."""
    if leads:
        os.setsid()
    import_module("tests.preload")  # the fork server passes over an import that fails
    if sys.platform == "linux":
        _end_with_parent()
    flags = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_APPEND, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, (file, flag) in enumerate(zip(files, flags, strict=True)):
        os.dup2(os.open(file, flag, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - for the process's life
    for number, both in limits.items():
        resource.setrlimit(number, both)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    if supervises:
        forked_supervisor.prepare()
    sys.argv = [module, *words]
    if strict:
        warnings.simplefilter("error")
    for name, value in constants.items():
        place, _, constant = name.partition(":")
        assert hasattr(import_module(place), constant)
        setattr(import_module(place), constant, value)
    if module == "receiver":
        import_module("receiver.cli.main").main()
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
