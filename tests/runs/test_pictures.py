"""The table of `python -m tests.runs.pictures`, of a folder whose files are known."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from tests.runs import pictures


def drawn(kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((60, 40), 90).save(file, kind)
    return file.getvalue()


def test_pictures_are_classified_by_our_check_and_by_pillow(tmp_path: Path) -> None:
    png, jpeg = drawn("PNG"), drawn("JPEG")
    files = {
        "whole.png": png, "padded.jpg": jpeg + bytes(9), "program.jpg": jpeg + b"\x7fELF\x02\x01\x01" + bytes(9),
        "cut.png": png[:-900], "page.png": b"<!DOCTYPE html><html></html>",
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = list(pictures.verdicts(tmp_path))
    seen = [(each.path.name, bool(each.refused), bool(each.undecoded), each.odd) for each in found]
    assert seen == [
        ("cut.png", True, True, False), ("padded.jpg", False, False, True), ("program.jpg", True, False, False),
        ("whole.png", False, False, False),
    ]  # fmt: skip
    assert pictures.row("folder", found) == "| folder | 4 | 3 | 2 | 1 | 1 | 0 | 1 |\n"
