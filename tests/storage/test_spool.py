"""A spool is the same file in memory and on disk, and shows nothing of the file before it."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import pytest

from storage.errors import SpoolUnavailable
from storage.spool import blocks, memory_of, room, spool


@pytest.mark.parametrize("memory_bytes", [1_000, 10], ids=["memory", "disk"])
def test_spool_behaves_as_a_file(tmp_path: Path, memory_bytes: int) -> None:
    plain = io.BytesIO()
    with spool(tmp_path, memory_bytes=memory_bytes) as file:
        for each in (plain, file):
            each.write(b"0123456789")
            each.write(memoryview(b"abcdef"))
            each.seek(4)
            each.write(b"!!")
        for seek in ((0,), (3, io.SEEK_SET), (-4, io.SEEK_END), (99,)):
            assert file.seek(*seek) == plain.seek(*seek)
            assert (file.read(3), file.tell(), file.read()) == (plain.read(3), plain.tell(), plain.read())
        assert b"".join(blocks(file)) == plain.getvalue()
        assert (memory_of(file) is None) == (memory_bytes == 10)
        file.seek(0)
        file.truncate()
        file.write(b"anew")
        assert b"".join(blocks(file)) == b"anew"


def test_gap_shows_nothing_of_the_file_before() -> None:
    with spool(None) as file:
        file.write(b"x" * 100)
    with spool(None) as file:
        assert memory_of(file) == b""
        file.seek(50)
        file.write(b"y")
        assert memory_of(file) == bytes(50) + b"y"


def test_open_spools_never_share_memory() -> None:
    with spool(None) as one, spool(None) as other:
        one.write(b"one")
        other.write(b"other")
        assert (memory_of(one), memory_of(other)) == (b"one", b"other")


def test_spool_that_went_to_disk_keeps_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.spool._free", kept := [])
    with spool(tmp_path, memory_bytes=2) as file:
        file.write(b"long")
        assert memory_of(file) is None
    assert kept == []
    with spool(None) as one, spool(None) as other:
        one.write(b"one")
        other.write(b"other")
        assert (memory_of(one), memory_of(other)) == (b"one", b"other")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with spool(tmp_path / "no", memory_bytes=2) as file, pytest.raises(SpoolUnavailable, match="no cannot be written"):
        file.write(b"long")
    with pytest.raises(SpoolUnavailable):
        room(tmp_path / "no")
    assert room(tmp_path)[1] > 0


def test_room_is_that_of_the_temporary_folder_which_python_leaves_when_its_disk_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "full"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # as in a process that was started since
    assert room(None)[0] == tmp_path / "full"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert room(None)[0] == tmp_path
