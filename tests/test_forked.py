"""The forked commands of the tests end like `subprocess.Popen`'s, and with their worker."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.forked import FORKS, Forked
from tests.harness import wait_until


def test_every_thread_that_asks_gets_the_exit_code(tmp_path: Path) -> None:
    """Before, one of two threads got 255, as if the process had ended by itself."""

    def asked(process: Forked) -> int:
        while (code := process.poll()) is None:
            pass
        return code

    for _ in range(10):
        process = Forked(("--help",), dict(os.environ), tmp_path, out=tmp_path / "out")
        with ThreadPoolExecutor(4) as threads:
            codes = [threads.submit(process.wait, 20), *(threads.submit(asked, process) for _ in range(3))]
            process.kill()
        assert len({code.result() for code in codes}) == 1


def start_sandbox(folder: Path) -> None:
    """What a worker of the run does, until it is killed. The fork server is the run's, as it is a worker's."""
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign, attr-defined]
    process = Forked(("sandbox", "--port", "0"), dict(os.environ), folder, out=folder / "out")
    (folder / "pid").write_text(str(process.pid))
    signal.pause()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a command outlives a killed worker")
def test_command_ends_with_its_killed_worker_though_the_fork_server_lives(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    worker = FORKS.Process(target=start_sandbox, args=(tmp_path,))
    worker.start()
    try:
        wait_until(lambda: "Ctrl-C ends it" in (tmp_path / "out").read_text())
        command = Path("/proc", (tmp_path / "pid").read_text())
        assert command.exists()
    finally:
        worker.kill()
    wait_until(lambda: not command.exists())


def test_what_failed_to_be_made_is_made_by_the_next(made_once: Callable[[str, Callable[[Path], None]], Path]) -> None:
    def make(place: Path) -> None:
        place.mkdir()

    def fail(place: Path) -> None:
        make(place)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        made_once("made", fail)
    assert made_once("made", make).is_dir()
