"""`receiver serve` and its worker processes: their shared memory, and their common end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.command_line import CommandLine
from tests.harness import ROOT, wait_until
from tests.pipeline import free_port
from tests.receiver.cli.test_plain_faults import serving
from tests.receiver.workers.test_supervisor import is_alive

EXIT_SECONDS = 40
START_SECONDS = 120  # three interpreters import everything, one after the other


def children(process_id: int) -> list[int]:
    tasks = Path(f"/proc/{process_id}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def started(log: Path) -> int:
    return log.read_text().count("worker.started")


def test_supervisor_has_nothing_that_workers_could_share(ready: CommandLine) -> None:
    """It has no thread, no socket and no file of the database, which could be in a wrong state after a fork."""
    ready.variables["RECEIVER_WORKERS"] = "2"
    with serving(ready, "--port", str(free_port()), forks_supervisor=False) as (process, log):
        wait_until(lambda: started(log) == 2)
        (supervisor,) = children(process.pid)
        assert len(children(supervisor)) == 2
        assert len(list(Path(f"/proc/{supervisor}/task").iterdir())) == 1
        held = {os.readlink(file).partition(":")[0] for file in Path(f"/proc/{supervisor}/fd").iterdir()}
        assert held == {"pipe", str(log)}


def test_workers_import_no_module_of_the_current_folder(ready: CommandLine) -> None:
    (ready.folder / "storage.py").write_text("raise SystemExit('of another project')")
    program = [sys.executable, "-P", "-c", "from receiver.cli.main import main; main()", "serve", "--port", "0"]
    log, environment = ready.folder / "log", {**os.environ, **ready.variables, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as err, subprocess.Popen(program, cwd=ready.folder, env=environment, stderr=err) as process:
        try:
            wait_until(lambda: started(log) == 1 or process.poll() is not None, seconds=START_SECONDS)
        finally:
            process.terminate()
    assert (process.returncode, "another project" in log.read_text()) == (0, False)


def test_serve_ends_when_the_supervisor_is_killed_and_workers_drain(ready: CommandLine) -> None:
    with serving(ready, "--port", str(free_port())) as (process, log):
        (supervisor,) = children(process.pid)
        (worker,) = children(supervisor)
        os.kill(supervisor, signal.SIGKILL)
        assert process.wait(EXIT_SECONDS) == 1
        wait_until(lambda: not is_alive(worker), seconds=EXIT_SECONDS)
    assert log.read_text().count("the supervisor of the workers has ended with signal 9; ") == 1
    assert "Traceback" not in log.read_text() and "worker.stopped" in log.read_text()


def test_no_worker_outlives_a_killed_serve(ready: CommandLine) -> None:
    with serving(ready, "--port", str(free_port())) as (process, log):
        (supervisor,) = children(process.pid)
        (worker,) = children(supervisor)
        process.kill()
        wait_until(lambda: not is_alive(worker) and not is_alive(supervisor), seconds=EXIT_SECONDS)
    assert "worker.stopped" in log.read_text()


def test_killed_worker_is_started_again(ready: CommandLine) -> None:
    with serving(ready, "--port", str(free_port())) as (process, log):
        (supervisor,) = children(process.pid)
        os.kill(*children(supervisor), signal.SIGKILL)
        wait_until(lambda: started(log) == 2, seconds=EXIT_SECONDS)
        process.terminate()
        assert process.wait(EXIT_SECONDS) == 0
    assert log.read_text().count("worker.died") == 1
