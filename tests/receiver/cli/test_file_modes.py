"""Other users of the machine: they cannot read our files, and their files decide nothing here."""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url
from structlog.testing import capture_logs

from receiver.batch import batch_report
from receiver.cli.audit_log import AuditLog
from receiver.events.dispatcher import SinkUnavailable
from receiver.events.lines import Lines
from storage.database import outages
from storage.database.sessions import Database
from storage.database.turnstile import Turnstile
from storage.errors import DatabaseUnavailable
from storage.local_folder import LocalFolder
from tests.command_line import CommandLine
from tests.harness import wait_until
from tests.sink_pairs import messages

ASK = ("submit", "--model-name", "kling-image-o1", "--prompt", "a boat")


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0o000)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_database_and_its_lock_are_for_one_user(receiver: CommandLine) -> None:
    assert receiver("migrate").code == 0
    database = Database(f"sqlite:///{receiver.folder / 'receiver.db'}")
    with database.read():
        names = {path.name: oct(mode(path)) for path in receiver.folder.iterdir()}
        with database.write():
            names |= {path.name: oct(mode(path)) for path in receiver.folder.iterdir()}
    database.close()
    assert {"receiver.db", "receiver.db.lock", "receiver.db.open"} <= names.keys()
    assert set(names.values()) == {"0o600"}, names


def test_the_write_ahead_log_is_for_one_user(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'own.db'}")
    with database.autocommit_writer() as connection:
        connection.exec_driver_sql("CREATE TABLE one (two)")
        names = {path.name: oct(mode(path)) for path in tmp_path.iterdir()}
    database.close()
    assert names == dict.fromkeys(["own.db", "own.db-wal", "own.db-shm", "own.db.lock", "own.db.open"], "0o600")


def test_files_of_commands_are_readable_by_one_user(tmp_path: Path) -> None:
    Lines(tmp_path / "events.jsonl").send(messages(1))
    AuditLog(tmp_path / "audit.jsonl").end()
    batch_report.write(tmp_path / "report.csv", "night", [])
    with LocalFolder(tmp_path / "out").writing(["task", "image-0.png"]) as file:
        file.write(b"bytes")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: oct(mode(path)) for path in files} == dict.fromkeys(
        ["events.jsonl", "audit.jsonl", "report.csv", "image-0.png"], "0o600"
    )


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock, which everyone who can open the file may do."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_lock_of_another_program_is_logged_and_its_waiters_are_bounded(tmp_path: Path) -> None:
    turnstile = Turnstile(tmp_path / "x.lock", wait_seconds=0.3)
    words = "x.lock has been locked for 0.3 s by another program; `fuser "

    def enter() -> None:
        with turnstile.turn():
            pass

    with capture_logs() as logs, ThreadPoolExecutor(2) as pool:
        with held(tmp_path / "x.lock"):
            first = pool.submit(enter)
            wait_until(lambda: [each for each in logs if each["event"] == "database.locked" and words in each["error"]])
            with pytest.raises(DatabaseUnavailable, match=re.escape(words)):
                enter()
        first.result(timeout=10)
        enter()
    turnstile.close()


def test_event_file_locked_by_another_program_holds_no_thread(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    sink = Lines(file, wait_seconds=0.2)
    with held(file):
        (outcome,) = sink.send(messages(1))
        assert isinstance(outcome, SinkUnavailable) and "locked by another program" in str(outcome)
    assert sink.send(messages(1)) == [None]


def test_command_gives_up_a_lock_of_another_program(tmp_path: Path) -> None:
    turnstile = Turnstile(tmp_path / "x.lock", wait_seconds=0.3, is_patient=lambda: False)
    with held(tmp_path / "x.lock"), pytest.raises(DatabaseUnavailable, match="a receiver is stopped"):
        turnstile.turn().__enter__()
    with turnstile.turn(), (tmp_path / "x.lock").open("a") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    turnstile.close()


def test_message_of_a_locked_database_names_its_file_too_as_the_other_program_uses_that_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.db.lock"
    waiting = Turnstile(path, wait_seconds=0.2, is_patient=lambda: False)
    remedy = f"`fuser {tmp_path / 'x.db'} {path}` lists processes"
    # a worker that has the turn waits for a lock which another program has taken with SQLite
    with held(path), pytest.raises(DatabaseUnavailable, match=re.escape(remedy)):
        waiting.turn().__enter__()
    url, error = make_url(f"sqlite:///{tmp_path / 'x.db'}"), sqlite3.OperationalError("database is locked")
    assert remedy in outages.words(url, error)


def test_a_command_waits_its_turn_behind_a_short_transaction(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    turnstile, entered = Turnstile(path, is_patient=lambda: False), threading.Event()

    def enter() -> None:
        with turnstile.turn():
            entered.set()

    with ThreadPoolExecutor(1) as pool:
        with held(path):
            done = pool.submit(enter)
            assert not entered.wait(0.2)
        done.result(timeout=10)
    turnstile.close()


def test_commands_wait_less_for_locks_than_workers(ready: CommandLine) -> None:
    database = Database(f"sqlite:///{ready.folder / 'receiver.db'}")
    assert isinstance(database.turnstile, Turnstile)
    assert not database.turnstile._is_patient()
    database.outages.is_on = True
    assert database.turnstile._is_patient()
    database.close()


def test_check_names_files_that_others_may_read_or_write(ready: CommandLine) -> None:
    (ready.folder / "receiver.db").chmod(0o644)
    (ready.folder / ".env").write_text("")
    (ready.folder / ".env").chmod(0o600)
    (ready.folder / "key").write_text("k")
    (ready.folder / "key").chmod(0o666)
    done = ready("check", RECEIVER_METRICS_TOKEN_FILE="key")
    said = [" ".join(line.split()) for line in done.out.splitlines()]
    readable = "has mode 0644: other users may read it: run `chmod 600 receiver.db`"
    writable = "has mode 0666: other users may write it: make it your own, and run `chmod 600 key`"
    assert f"note file: database receiver.db {readable}" in said
    assert f"fault file: RECEIVER_METRICS_TOKEN_FILE key {writable}" in said
    assert f"complete; {ready.folder}/.env was read" in done.out
    assert done.code == 1


@pytest.mark.parametrize("words", [("status",), ("check",), ("work", "--once"), ASK], ids=lambda words: words[0])
def test_an_env_file_that_others_may_write_is_refused(receiver: CommandLine, words: tuple[str, ...]) -> None:
    (receiver.folder / ".env").write_text("RECEIVER_KLING_BASE_URL=https://thief.example\n")
    (receiver.folder / ".env").chmod(0o666)
    done = receiver(*words)
    assert done.code == 1
    assert f"{receiver.folder}/.env: other users may write it" in done.out + done.err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
def test_an_env_file_of_another_user_is_refused(receiver: CommandLine) -> None:
    (receiver.folder / ".env").write_text("")
    (receiver.folder / ".env").chmod(0o644)
    os.chown(receiver.folder / ".env", 12_345, 12_345)
    assert "other users may write it" in receiver("status").err


def test_a_worker_says_which_env_file_it_read(receiver: CommandLine) -> None:
    (receiver.folder / ".env").write_text("")
    (receiver.folder / ".env").chmod(0o644)
    done = receiver("work", "--once")
    assert done.code == 0
    assert "settings.read" in done.err and f"{receiver.folder}/.env" in done.err


@pytest.mark.parametrize("words", [ASK, ("reconcile",), ("adopt", "none"), ("submit", "--batch", "wishes.csv")])
def test_commands_that_ask_the_provider_say_which_env_file_they_read(
    ready: CommandLine, words: tuple[str, ...]
) -> None:
    (ready.folder / "wishes.csv").write_text("model_name,prompt\nkling-image-o1,a boat\n")
    (ready.folder / ".env").write_text("")
    (ready.folder / ".env").chmod(0o600)
    said = f"settings: {ready.folder}/.env was read"
    assert said in ready(*words).err.splitlines()
    (ready.folder / ".env").unlink()
    assert said not in ready(*words).err


def test_an_env_file_that_is_anothers_symlink_is_refused(receiver: CommandLine) -> None:
    (receiver.folder / "other").write_text("RECEIVER_S3_BUCKET=mine\n")
    (receiver.folder / "other").chmod(0o600)
    (receiver.folder / ".env").symlink_to("other")
    receiver.folder.chmod(0o777)
    done = receiver("status")
    assert (done.code, "is a symlink that other users may have made" in done.err) == (1, True), done.err


def test_files_of_earlier_releases_are_narrowed_at_start(ready: CommandLine) -> None:
    for name in ("receiver.db", "receiver.db.lock"):
        (ready.folder / name).touch()
        (ready.folder / name).chmod(0o644)
    done = ready("work", "--once")
    assert "files.narrowed" in done.err and done.code == 0
    assert {oct(path.stat().st_mode & 0o777) for path in ready.folder.glob("receiver.db*")} == {"0o600"}
    assert "files.narrowed" not in ready("work", "--once").err
