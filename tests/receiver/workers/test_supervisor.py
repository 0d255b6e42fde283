"""The supervisor restarts its workers, even those that cannot be started at first, and none outlives it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from receiver.workers import supervisor
from receiver.workers.supervisor import SupervisorEnded, SupervisorProcess
from tests.forked import Forked
from tests.harness import wait_until

EXIT_SECONDS = 30
OURS = "receiver.workers.supervisor"
BRIEFLY = {f"{OURS}:RESTART_FIRST_SECONDS": 0.05}


class Supervised:
    """A supervisor, and the files of its workers in a folder. `parent`: the pipe that ends with its parent."""

    def __init__(self, folder: Path, behaviour: str, count: int, grace: float, constants: dict[str, object]) -> None:
        self._signs, self._log, given = folder / "signs", folder / "log", folder / "given"
        self._signs.mkdir()
        self._log.touch()
        os.mkfifo(given)
        words = (str(count), str(grace), str(self._signs), behaviour)
        module = "tests.receiver.workers.supervised"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        self.process = Forked(
            words, environment, folder, out=self._log, given=given, module=module, constants=constants
        )
        self.parent = os.open(given, os.O_WRONLY)

    @property
    def started(self) -> list[Path]:
        return list(self._signs.iterdir())

    @property
    def living(self) -> list[int]:
        return [int(sign.name) for sign in self.started if is_alive(int(sign.name))]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(EXIT_SECONDS) == 0
        assert self.living == []


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    made: list[Supervised] = []

    def make(
        behaviour: str, count: int = 2, grace: float = 20, constants: dict[str, object] | None = None
    ) -> Supervised:
        made.append(Supervised(tmp_path, behaviour, count, grace, constants or {}))
        return made[-1]

    yield make
    for each in made:
        each.process.kill()
        os.close(each.parent)
        for process_id in each.living:
            os.kill(process_id, signal.SIGKILL)


def is_alive(process_id: int) -> bool:
    """Whether a worker lives. If its supervisor was killed it may stay a zombie."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends between open and read
        return False


def test_workers_that_start_while_it_stops_are_awaited_too(supervised: Callable[..., Supervised]) -> None:
    workers = supervised("ends slowly", 24)
    wait_until(lambda: workers.started)
    workers.end()


def test_a_worker_that_outlives_its_grace_is_killed(supervised: Callable[..., Supervised]) -> None:
    workers = supervised("is deaf", grace=0.2, constants={f"{OURS}:KILL_AFTER_SECONDS": 0.2})
    wait_until(lambda: len(workers.living) == 2)
    workers.end()


def test_a_worker_that_cannot_be_started_is_tried_again(supervised: Callable[..., Supervised]) -> None:
    workers = supervised("starts late", 1, constants=BRIEFLY)
    wait_until(lambda: workers.living)
    assert (workers.lines[0]["event"], workers.lines[0]["code"]) == (
        "worker.died",
        "not started: Cannot allocate memory",
    )
    workers.end()


def test_worker_that_is_killed_at_times_is_not_in_a_crash_loop(supervised: Callable[..., Supervised]) -> None:
    """A worker that lives longer than the limit is started again after the first pause each time."""
    workers = supervised("dies", 1, constants={**BRIEFLY, f"{OURS}:LIVED_SECONDS": supervisor.LIVED_SECONDS / 50})
    wait_until(lambda: len(workers.lines) >= 4)
    assert [(each["code"], each["restart_in"]) for each in workers.lines[:4]] == [(9, 0.05)] * 4
    workers.end()


def test_worker_that_dies_at_once_is_started_again_ever_later(supervised: Callable[..., Supervised]) -> None:
    workers = supervised("dies", 1, constants=BRIEFLY)
    wait_until(lambda: len(workers.lines) >= 3)
    assert [each["restart_in"] for each in workers.lines[:3]] == [0.05, 0.1, 0.2]
    workers.end()


def test_signal_to_the_process_group_is_not_logged_as_a_death(supervised: Callable[..., Supervised]) -> None:
    workers = supervised("ends slowly")
    wait_until(lambda: len(workers.living) == 2)
    for process_id in workers.living:
        os.kill(process_id, signal.SIGKILL)
    workers.end()
    assert workers.lines == []


def test_workers_end_when_their_supervisor_is_killed(supervised: Callable[..., Supervised]) -> None:
    workers = supervised("watches")
    wait_until(lambda: len(workers.living) == 2)
    workers.process.kill()
    wait_until(lambda: not workers.living)


def test_supervisor_and_workers_end_with_the_parent(supervised: Callable[..., Supervised]) -> None:
    workers = supervised("ends slowly")
    wait_until(lambda: len(workers.living) == 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), workers.parent)
    assert workers.process.wait(EXIT_SECONDS) == 0
    assert workers.living == []


def test_workers_draw_different_random_numbers(supervised: Callable[..., Supervised]) -> None:
    """Otherwise the backoffs of all workers would end at the same time."""
    workers = supervised("ends slowly", 4)
    wait_until(lambda: len({sign.read_text() for sign in workers.started} - {""}) == 4)
    workers.end()


def test_supervisor_that_cannot_be_started_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    ended: list[bool] = []
    process = SupervisorProcess(grace_seconds=1, environment={})
    process.start(lambda: ended.append(True))
    process.stop()
    with pytest.raises(SupervisorEnded, match="could not be started: No such file or directory"):
        process.raise_if_ended()
    assert ended == [True]
