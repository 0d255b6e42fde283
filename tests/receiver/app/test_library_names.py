"""The names of the library's page: each is imported from `receiver`, and errors of its program are one sentence."""

from __future__ import annotations

import builtins
import gc
import os
import pickle
import re
import uuid
from pathlib import Path

import pytest

import receiver
from receiver import (
    Conflict,
    DatabaseUnavailable,
    File,
    NotArchived,
    Receiver,
    RequestInvalid,
    Result,
    SettingsInvalid,
    StoreUnavailable,
)
from storage.errors import NoSuchTask
from storage.states import ArchiveState, AssetState, TaskState
from tests.harness import ROOT

PAGE = (ROOT / "infra" / "docs" / "library.md").read_text()
ROWS = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]
RAISED = {name for row in ROWS for name in re.findall(r"`(\w+)`", row[3])}


def test_every_error_of_the_page_is_imported_from_the_package() -> None:
    errors = {name for name in receiver.__all__ if issubclass(getattr(receiver, name), Exception)}
    assert {name for name in RAISED if not hasattr(builtins, name)} | {"DatabaseUnavailable"} == errors


def test_errors_pass_from_a_process_of_a_pool_to_its_caller() -> None:
    """One that could not be made again ended the thread of the pool that reads results: the caller waited for ever."""
    over = Result("x", uuid.uuid4(), None, TaskState.FAILED, ArchiveState.NONE, 1, "refused", None, (), True)
    errors = [NotArchived(over), RequestInvalid(["n: 0", "prompt: is required"]), NoSuchTask("x"), Conflict("x")]
    for error in [*errors, DatabaseUnavailable("down", after=1)]:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_receiver_that_no_one_closes_ends_with_its_last_reference(tmp_path: Path) -> None:
    """Each call of a function that made one kept a thread and two connections of PostgreSQL."""
    receiver = Receiver(database_url=f"sqlite:///{tmp_path / 'receiver.db'}", s3_bucket="pictures")
    receiver._parts.database.write_in_group(lambda _: None)
    thread = receiver._parts.database._group_writer._thread
    assert thread is not None and thread.is_alive()
    del receiver
    gc.collect()
    assert not thread.is_alive()


def test_link_without_credentials_for_the_bucket_is_an_error_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    file = File(uuid.uuid4(), "image", 0, AssetState.ARCHIVED, "a.png", "s3://pictures/a.png", None, None, None, None)
    with Receiver(database_url=f"sqlite:///{tmp_path / 'receiver.db'}", s3_bucket="pictures") as library:
        with pytest.raises(StoreUnavailable, match="nobody"):
            library.url(file)
    assert "StoreUnavailable" in RAISED


def test_a_program_without_settings_ends_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RECEIVER_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    program = next(text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "sys.exit" in text)
    with pytest.raises(SystemExit) as ended:
        exec(program, {})  # noqa: S102 - our own page
    assert ended.value.code == "RECEIVER_S3_BUCKET: required; or set RECEIVER_STORE=DIR for a store of your own"
    assert ended.value.code in program
    assert not list(tmp_path.iterdir())


def test_an_argument_that_is_not_a_setting_is_refused_by_name() -> None:
    with pytest.raises(SettingsInvalid, match="s3_bukcet: no such setting; s3_bucket is the nearest"):
        Receiver(s3_bukcet="pictures")
    with pytest.raises(SettingsInvalid, match=r"nonsense: no such setting$"):
        Receiver(nonsense=1)
