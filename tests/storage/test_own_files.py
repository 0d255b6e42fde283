"""Files in a folder where another user may write: no code of ours follows that user's symlinks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from receiver.batch import batch_report
from receiver.cli.audit_log import AuditLog
from receiver.events.dispatcher import SinkUnavailable
from receiver.events.lines import Lines
from receiver.local_store import serve_store
from storage.database.sessions import Database
from storage.database.turnstile import Turnstile
from storage.errors import DatabaseUnavailable
from storage.local_folder import LocalFolder
from storage.own_files import final, narrow, open_own
from tests.sink_pairs import messages

NOT_FOLLOWED = "is a symlink that other users may have made"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that every user may write, and a file of ours elsewhere."""
    (tmp_path / "victim").write_text("mine\n")
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def plant(shared: Path, name: str) -> Path:
    (shared / name).symlink_to(shared.parent / "victim")
    return shared / name


def enter(path: Path) -> None:
    with Turnstile(path).turn():
        pass


def open_database(path: Path) -> None:
    database = Database(f"sqlite:///{path}")
    try:
        with database.autocommit_writer() as connection:
            connection.exec_driver_sql("CREATE TABLE one (two)")
    finally:
        database.close()


def send(path: Path) -> None:
    (outcome,) = Lines(path).send(messages(1))
    if outcome is not None:
        raise outcome


@pytest.mark.parametrize("use", [AuditLog, enter, open_database, send, lambda path: Lines(path).check(), LocalFolder])
def test_a_planted_symlink_is_named_and_not_followed(shared: Path, use: Callable[[Path], object]) -> None:
    planted = plant(shared, "name")
    with pytest.raises((PermissionError, DatabaseUnavailable, SinkUnavailable), match=NOT_FOLLOWED):
        use(planted)
    assert (shared.parent / "victim").read_text() == "mine\n"
    assert [path.name for path in shared.iterdir() if path.name != "name.lock"] == ["name"]


def test_a_report_replaces_a_planted_symlink(shared: Path) -> None:
    batch_report.write(plant(shared, "report.csv"), "night", [])
    assert (shared.parent / "victim").read_text() == "mine\n"
    assert not (shared / "report.csv").is_symlink()


@pytest.mark.parametrize("name", ["store.json", "store.lock", "console.key"])
def test_a_store_is_not_made_in_a_folder_that_others_may_write(shared: Path, name: str) -> None:
    plant(shared, name)
    with pytest.raises(serve_store.StoreFailed, match="other users may write this folder"):
        serve_store.console_key(shared)


def test_symlinks_of_ones_own_are_followed(tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to(tmp_path / "file")
    with os.fdopen(open_own(tmp_path / "first", os.O_WRONLY | os.O_CREAT), "wb") as file:
        file.write(b"kept")
    assert (tmp_path / "file").read_bytes() == b"kept"
    assert final(tmp_path / "first") == tmp_path / "file"


def test_symlinks_that_form_a_ring_end(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(OSError, match="symbolic links"):
        final(tmp_path / "ring")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a symlink away")
def test_owner_of_a_symlink_in_a_sticky_folder_decides(shared: Path) -> None:
    shared.chmod(0o1777)
    assert final(plant(shared, "name")) == shared.parent / "victim"
    os.chown(shared / "name", 12_345, 12_345, follow_symlinks=False)
    with pytest.raises(PermissionError, match=NOT_FOLLOWED):
        final(shared / "name")


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.lock")
    with pytest.raises(DatabaseUnavailable, match=r"x\.lock"):
        enter(tmp_path / "x.lock")


def test_only_regular_files_are_narrowed(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o644)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir(0o755)
    assert narrow([tmp_path / "link", tmp_path / "folder", tmp_path / "absent"]) == []
    assert narrow([tmp_path / "file"]) == [tmp_path / "file"]
