"""The words: both languages have them all, with the same blanks, and pages ask for none that is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from receiver.console import catalogue

HERE = Path(catalogue.__file__).parent
SOURCES = [*HERE.rglob("*.py"), *HERE.rglob("*.html")]
ASKED = re.compile(r"""\b(?:t|text)\(\s*f?"([a-z0-9_.]+)"\s*[,)]""")
GROUPS = re.compile(r"""\b(?:w|word)\("([a-z_]+)",""")


def test_both_languages_have_the_same_keys() -> None:
    assert set(catalogue.TEXTS["en"]) == set(catalogue.TEXTS["zh"])


def test_both_languages_have_the_same_blanks() -> None:
    def blanks(text: str) -> set[str]:
        return set(re.findall(r"{(\w+)}", text))

    wrong = [key for key, text in catalogue.TEXTS["en"].items() if blanks(text) != blanks(catalogue.TEXTS["zh"][key])]
    assert wrong == []


def test_pages_ask_for_words_that_there_are() -> None:
    asked = {key for source in SOURCES for key in ASKED.findall(source.read_text()) if not key.endswith(".")}
    assert len(asked) > 250
    assert asked - set(catalogue.TEXTS["en"]) == set()


def test_no_word_is_kept_that_no_page_can_show() -> None:
    sources = "".join(source.read_text() for source in SOURCES)
    groups = {*GROUPS.findall(sources), "page", "event", "next", "need", "act", "figure", "ask", "error", "delivery"}
    asked = set(ASKED.findall(sources)) | set(re.findall(r'"([a-z0-9_]+\.[a-z0-9_.]+)"', sources))
    assert [key for key in catalogue.TEXTS["en"] if key not in asked and key.partition(".")[0] not in groups] == []


@pytest.mark.parametrize(
    ("cookie", "asked", "chosen"),
    [
        (None, "", "en"), (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"), (None, "en;q=0.5, zh;q=0.6", "zh"),
        (None, "fr,de;q=0.5", "en"), ("zh", "en", "zh"), ("xx", "zh", "zh"), (None, "zh;q=oops,en", "en"),
    ],
)  # fmt: skip
def test_language_is_the_chosen_one_else_the_browsers(cookie: str | None, asked: str, chosen: str) -> None:
    assert catalogue.choose(cookie, asked) == chosen
