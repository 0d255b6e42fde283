"""Log lines that standard error does not take: they are dropped and counted, and nobody waits for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

import pytest

from receiver.base.telemetry import LogStream

LINE = f"{'x' * 99}\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="ascii") as stream:
        yield reading, stream
    with suppress(OSError):
        os.close(reading)


def test_reader_that_stopped_reading_stops_no_writer(pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogStream, "PATIENCE_SECONDS", 0.01)
    log = LogStream(pipe[1])
    while not log.dropped:
        log.write(LINE * 100)  # far more than a pipe takes without blocking
    log.write(LINE)
    assert log.dropped == 2
    while len(os.read(pipe[0], 65_536)) == 65_536:
        pass
    log.write("after\n")
    assert (log.dropped, os.read(pipe[0], 65_536).split(b"\n")[-2:]) == (0, [b"after", b""])


def test_line_after_a_cut_one_is_whole(pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogStream, "PATIENCE_SECONDS", 0.01)
    log = LogStream(pipe[1])
    log.write("x" * 100_000)
    assert len(os.read(pipe[0], 100_000)) < 100_000
    log.write("after\n")
    assert os.read(pipe[0], 100) == b"\nafter\n"


def test_reader_that_is_gone_raises_nothing(pipe: tuple[int, TextIO]) -> None:
    os.close(pipe[0])
    log = LogStream(pipe[1])
    log.write(LINE)
    log.write(LINE)
    assert log.dropped == 2


def test_full_disk_raises_nothing() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        log = LogStream(full)
        log.write("ü\n")
    assert log.dropped == 1
