"""Log lines that standard error does not take: they wait in memory or are dropped and counted, and nobody waits."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest
import structlog

from receiver.base import telemetry
from receiver.base.telemetry import LogHandler, LogStream
from tests.harness import wait_until

LINE = f"{'x' * 99}\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="ascii") as stream:
        yield reading, stream
        with suppress(OSError):
            os.close(reading)  # ends a write that waits for a reader, before the stream is closed


def fill(stream: TextIO) -> None:
    """Take all room in the pipe, to the last byte."""
    os.set_blocking(stream.fileno(), False)
    for piece in (LINE, "\n"):
        with suppress(BlockingIOError):
            while True:
                os.write(stream.fileno(), piece.encode())
    os.set_blocking(stream.fileno(), True)


def lines_in(reading: int, count: int) -> list[str]:
    """The first lines of others in the pipe. Waits for this many."""
    lines, found = list[str](), b""
    while len(lines) < count and select.select([reading], [], [], 30)[0]:
        found += os.read(reading, 65_536)
        lines = [line for line in found.decode().split("\n")[:-1] if line not in (LINE.strip(), "")]
    return lines


@pytest.mark.parametrize("is_blocking", [True, False])
def test_lines_for_a_reader_that_has_fallen_behind_wait_in_memory(pipe: tuple[int, TextIO], is_blocking: bool) -> None:
    log = LogStream(pipe[1])
    fill(pipe[1])
    os.set_blocking(pipe[1].fileno(), is_blocking)
    for number in range(3):
        log.write(f"{number}\n")
    time.sleep(0.1)  # its thread tries to write them
    assert (log.dropped, lines_in(pipe[0], 3)) == (0, ["0", "1", "2"])


def test_lines_beyond_the_room_in_memory_are_dropped_and_counted(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogStream, "MAX_WAITING_BYTES", 4)
    log = LogStream(pipe[1])
    fill(pipe[1])
    for number in range(5):
        log.write(f"{number}\n")
    assert (log.dropped, lines_in(pipe[0], 2)) == (3, ["0", "1"])
    log.drain()  # its thread may have written a line and not have forgotten it yet
    log.write("after\n")
    assert (log.dropped, lines_in(pipe[0], 1)) == (0, ["after"])


def test_lines_are_written_once_the_system_has_a_thread_again(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    log = LogStream(pipe[1])
    fill(pipe[1])
    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", refuse)
        log.write("lost\n")
    assert log.dropped == 1
    log.write("after\n")
    assert (log.dropped, lines_in(pipe[0], 1)) == (0, ["after"])


def test_event_loop_writes_no_line_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk behind it may be slow."""
    writers, write = [], os.write
    monkeypatch.setattr(os, "write", lambda *told: writers.append(threading.current_thread().name) or write(*told))

    async def log_a_line() -> None:
        log.write("line\n")

    with open(tmp_path / "log", "w", encoding="ascii") as file:
        log = LogStream(file)
        log.write("line\n")
        asyncio.run(log_a_line())
        log.drain()
    assert [name for name in writers if name in ("MainThread", "log")] == ["MainThread", "log"]


def test_line_does_not_wait_for_room_that_another_process_took(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Look:
        """Finds the room that was there a moment ago."""

        def register(self, *_: int) -> None: ...

        def poll(self, _: float) -> list[int]:
            return [pipe[1].fileno()]

    log = LogStream(pipe[1])
    fill(pipe[1])
    with monkeypatch.context() as before:
        before.setattr(select, "poll", Look)
        writer = threading.Thread(target=log.write, args=("line\n",))
        writer.start()
        writer.join(5)
    was_waiting = writer.is_alive()
    assert (lines_in(pipe[0], 1), was_waiting) == (["line"], False)


def test_system_without_writes_that_never_wait_takes_a_look(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT")  # macOS
    log = LogStream(pipe[1])
    log.write("line\n")
    assert (log.dropped, lines_in(pipe[0], 1)) == (0, ["line"])


def test_kernel_that_refuses_writes_that_never_wait_takes_a_look(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "pwritev", refuse)
    log = LogStream(pipe[1])
    log.write("line\n")
    assert (log.dropped, lines_in(pipe[0], 1)) == (0, ["line"])


def test_long_line_is_whole(pipe: tuple[int, TextIO]) -> None:
    log = LogStream(pipe[1])
    log.write("y" * 100_000 + "\n")
    log.write("after\n")
    assert lines_in(pipe[0], 2) == ["y" * 100_000, "after"]


def test_end_of_the_process_writes_the_lines_that_wait() -> None:
    program = """
import asyncio, structlog
from receiver.base import telemetry
async def main():
    for number in range(2_000):
        structlog.get_logger().info("line", number=number, text="x" * 100)
telemetry.configure("info", "json")
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, check=True, timeout=60)
    assert ended.stderr.count(b'"line"') == 2_000


def test_reader_that_stopped_reading_does_not_stop_the_end(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogStream, "END_SECONDS", 0.01)
    log = LogStream(pipe[1])
    fill(pipe[1])
    log.write("waits\n")
    LogHandler(log).close()
    assert lines_in(pipe[0], 1) == ["waits"]


def test_no_lock_is_around_the_stream() -> None:
    """A child that was forked while another thread wrote a line waited for ever for structlog's lock."""
    telemetry.configure("info", "json")
    logger = structlog.get_logger().bind()._logger
    assert isinstance(logger, LogStream)


def test_a_program_that_uses_the_library_has_its_own_output_and_log(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = list(logging.getLogger().handlers)
    telemetry.configure("info", "json", is_library=True)
    structlog.get_logger().info("task.finished", url="https://user:pass-word@host/?token=1")
    out, err = capfd.readouterr()
    assert (out, logging.getLogger().handlers) == ("", handlers)
    assert "task.finished" in err and "pass-word" not in err


def test_a_program_that_has_set_up_structlog_gets_the_lines_there() -> None:
    structlog.configure()
    its = structlog.get_config()
    telemetry.configure("info", "json", is_library=True)
    assert structlog.get_config() == its


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_does_not_write_its_parents_lines(pipe: tuple[int, TextIO]) -> None:
    log = LogStream(pipe[1])
    fill(pipe[1])
    log.write("parent\n")
    if not (child := os.fork()):
        log.write("child\n")
        log.drain()
        os._exit(0)
    found = lines_in(pipe[0], 2)
    os.waitpid(child, 0)
    assert (sorted(found), select.select([pipe[0]], [], [], 0)[0]) == (["child", "parent"], [])


def test_line_after_a_cut_one_begins_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, [3, 0]

    def fills_the_disk(descriptor: int, data: bytes) -> int:
        if descriptor != file.fileno() or not room:
            return write(descriptor, data)
        if not (left := room.pop(0)):
            raise OSError(errno.ENOSPC, "no space")
        return write(descriptor, data[:left])

    monkeypatch.setattr(os, "write", fills_the_disk)
    with open(tmp_path / "log", "w", encoding="ascii") as file:
        log = LogStream(file)
        log.write("before\n")
        assert log.dropped == 1
        log.write("after\n")
    assert (tmp_path / "log").read_text() == "bef\nafter\n"


def test_reader_that_is_gone_raises_nothing(pipe: tuple[int, TextIO]) -> None:
    os.close(pipe[0])
    log = LogStream(pipe[1])
    log.write(LINE)
    log.write("x" * 10_000)  # by the thread
    wait_until(lambda: log.dropped == 2, seconds=30)


def test_full_disk_raises_nothing() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        log = LogStream(full)
        log.write("ü\n")
    assert log.dropped == 1
