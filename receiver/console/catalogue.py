"""The texts of the console: one JSON file a language, `{key: text}`, with `{name}` for values.

`one|many` is chosen by `n`. A key that a language lacks is shown in English. A test finds such keys.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "catalogues"
DEFAULT = "en"
LANGUAGES = {"en": "English", "zh": "中文"}
TEXTS: dict[str, dict[str, str]] = {
    name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in LANGUAGES
}
# Texts of ours that rows keep, such as why a delivery was refused: {English: translation}, with {} for a word and {*}
# for words.
CAUSES: dict[str, dict[str, str]] = {"zh": json.loads((FOLDER / "causes.zh.json").read_text(encoding="utf-8"))}


@functools.cache
def _causes(language: str) -> list[tuple[re.Pattern[str], str]]:
    quoted = {re.escape(known): said for known, said in CAUSES.get(language, {}).items()}
    found = {known.replace(r"\{\}", r"(\S+)").replace(r"\{\*\}", "(.+)"): said for known, said in quoted.items()}
    return [(re.compile(known, re.S), said) for known, said in found.items()]


@functools.lru_cache(1_000)
def cause(language: str, said: str) -> str | None:
    """The translation of a text of ours, with those inside it; None if no catalogue has it."""
    for pattern, translated in _causes(language):
        if found := pattern.fullmatch(said):
            return translated.format(*(cause(language, part) or part for part in found.groups()))
    return None


def text(language: str, key: str, /, **values: Any) -> str:
    """The text of `key`. Raises KeyError for an unknown key."""
    found = TEXTS[language].get(key) or TEXTS[DEFAULT][key]
    if "|" in found and "n" in values:
        one, many = found.split("|")
        found = one if values["n"] == 1 else many
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in values.items()}
    shown |= {name: cause(language, shown[name]) or shown[name] for name in ("reason", "why", "time") if name in shown}
    return found.format(**shown)


def word(language: str, group: str, value: str) -> str:
    """The text of a state or another value of a known set; the value itself if no catalogue has it."""
    key = f"{group}.{value}"
    return TEXTS[language].get(key) or TEXTS[DEFAULT].get(key) or value


def choose(cookie: str | None, accept_language: str) -> str:
    """The reader's language: the chosen one, else the first known one of the browser."""
    if cookie in LANGUAGES:
        return str(cookie)
    asked = [_weighed(part) for part in accept_language[:500].split(",")]
    for _, name in sorted(asked, key=lambda pair: -pair[0]):
        if name in LANGUAGES:
            return name
    return DEFAULT


def _weighed(part: str) -> tuple[float, str]:
    name, _, options = part.strip().partition(";")
    try:
        weight = float(options.strip().removeprefix("q=") or 1)
    except ValueError:
        weight = 0.0
    return weight, name.partition("-")[0].lower()
