"""An export into a folder in which another user has prepared something."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from receiver.app.wiring import Parts
from storage.archive.export import Export
from storage.archive.zip_stream import places_of
from storage.local_folder import LocalFolder
from storage.rows.models import Task
from storage.rows.tasks import assets_of
from tests.archived_tasks import archive


def export_one(parts: Parts, folder: Path) -> tuple[Task, Path, list[str]]:
    """The one task, the path of its picture in `folder`, and the faults of its export."""
    (task,) = archive(parts, 1)
    with parts.database.read() as session:
        (asset,) = assets_of(session, task.id)
    picture = folder / str(asset.key).removeprefix(parts.bucket.prefix)
    return task, picture, faults_of(parts, folder, task)


def faults_of(parts: Parts, folder: Path, task: Task) -> list[str]:
    return [why for each in Export(parts.database, parts.bucket, folder).run(iter([task])) for _, why in each.faults]


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_planted_symlink_is_replaced_and_not_followed(parts: Parts, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    task, picture, _ = export_one(parts, folder)
    manifest = picture.with_name("manifest.json")
    for file in (picture, manifest):
        genuine = file.read_bytes()
        file.unlink()
        file.symlink_to(victim)
        assert faults_of(parts, folder, task) == []
        assert (victim.read_text(), file.is_symlink(), file.read_bytes()) == ("mine", False, genuine)


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_symlink_in_place_of_a_folder_is_named_and_not_followed(parts: Parts, tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    folder.mkdir()
    for year in ("2025", "2026", "2027"):
        (folder / year).symlink_to(elsewhere)
    _, _, faults = export_one(parts, folder)
    assert len(faults) == 2
    assert all("a symlink is not followed" in why for why in faults)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_names_that_earlier_releases_opened_are_left_alone(parts: Parts, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    task, picture, _ = export_one(parts, folder)
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    picture.unlink()
    planted = picture.with_name(f".{picture.name}.{os.getpid()}.part")
    planted.symlink_to(victim)
    assert faults_of(parts, folder, task) == []
    assert victim.read_text() == "mine"
    assert hashlib.sha256(picture.read_bytes()).hexdigest() == digest
    assert sorted(path.name for path in picture.parent.iterdir()) == sorted(
        [picture.name, "manifest.json", planted.name]
    )


def test_fifo_in_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "name")
    folder = LocalFolder(tmp_path)
    with folder.existing(["name"]) as found:
        assert found is None
    with folder.writing(["name"]) as file:
        file.write(b"content")
    assert (tmp_path / "name").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["CON", "con.1", "aux.", "LPT1", "night.", "nul.png"])
def test_name_that_some_disks_forbid_is_spelt_differently(tmp_path: Path, name: str) -> None:
    spelt = LocalFolder(tmp_path).portable(name)
    assert spelt != name
    assert spelt.startswith("%") or spelt.endswith("%2E")
    assert LocalFolder(tmp_path).portable("console-1.a") == "console-1.a"


@pytest.mark.parametrize("name", ["a\\b", "a:b", "a\nb", "a?b", "ä", "a b", "COM1.png ", 'a"b'])
def test_characters_that_separate_or_control_are_encoded(tmp_path: Path, name: str) -> None:
    spelt = LocalFolder(tmp_path).portable(name)
    assert unquote(spelt) == name
    assert re.fullmatch(r"[A-Za-z0-9._~%-]+", spelt)


def test_zip_entries_have_names_that_every_disk_keeps_apart() -> None:
    ids = ("night", "Night", "con", "dots...", "%C3%A4", "plain-1", "a\\b")
    keys = [f"p/2026/01/02/{each}/image-0-0123456789ab.png" for each in ids]
    places = places_of(keys)
    assert [places[key].rpartition("/")[0] for key in keys] == [
        "night", "%4Eight", "%63on", "dots..%2E", "%C3%A4", "plain-1", "a%5Cb",
    ]  # fmt: skip
    assert len({place.lower() for place in places.values()}) == len(keys)


def test_names_that_differ_by_case_stay_apart_on_a_disk_that_folds_it(tmp_path: Path) -> None:
    assert LocalFolder(tmp_path).portable("Night-1") == "Night-1"  # this disk keeps them apart
    folding = LocalFolder(tmp_path, folds_case=True)
    assert {folding.portable(name) for name in ("night-1", "Night-1", "NIGHT-1")} == {
        "night-1", "%4Eight-1", "%4E%49%47%48%54-1",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
