"""A number of things in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import receiver
import storage
from storage.operations.counted import counted

# Nouns behind a number that may be 1. `counted` writes both forms.
PLURAL = re.compile(
    r"\{(?:len\([^{}]*\)|[a-z_.\[\]']+):?,?\} (?:of \S+ )?(?:unfinished )?"
    r"(?:deliveries|faults|files|folders|objects|pictures|problems|requests|rows|slots|tasks)\b"
)
# More than a limit, a part of several, or the five requests of the demo.
NEVER_ONE = ("asks for up to", "lists {count} files; at most", "of the pictures", "read back: {verdict}")


@pytest.mark.parametrize(("number", "words"), [(0, "0 tasks"), (1, "1 task"), (1_200, "1,200 tasks")])
def test_number_decides_the_form(number: int, words: str) -> None:
    assert counted(number, "task") == words


def test_irregular_plurals_and_verbs_are_given() -> None:
    assert counted(1, "delivery waits", "deliveries wait") == "1 delivery waits"
    assert counted(2, "delivery waits", "deliveries wait") == "2 deliveries wait"


def test_no_message_has_a_plural_whatever_its_number() -> None:
    found = {
        f"{path.name}: {line.strip()}"
        for folder in (receiver, storage)
        for path in Path(str(folder.__file__)).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if PLURAL.search(line)
    }
    assert {line for line in found if not any(words in line for words in NEVER_ONE)} == set()
