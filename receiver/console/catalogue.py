"""The texts of the console: one JSON file a language, `{key: text}`, with `{name}` for values.

`one|many` is chosen by `n`. A key that a language lacks is shown in English. A test finds such keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "catalogues"
DEFAULT = "en"
LANGUAGES = {"en": "English", "zh": "中文"}
TEXTS: dict[str, dict[str, str]] = {
    name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in LANGUAGES
}


def text(language: str, key: str, /, **values: Any) -> str:
    """The text of `key`. Raises KeyError for an unknown key."""
    found = TEXTS[language].get(key) or TEXTS[DEFAULT][key]
    if "|" in found and "n" in values:
        one, many = found.split("|")
        found = one if values["n"] == 1 else many
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in values.items()}
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
