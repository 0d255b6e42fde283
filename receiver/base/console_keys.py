"""`RECEIVER_CONSOLE_KEYS`: who may log in to the console, and whether they may act or only read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import SecretStr

MIN_CHARACTERS = 24
FORM = "write NAME=KEY (may act) or NAME(read)=KEY (may look), comma-separated"
_ENTRY = re.compile(r"(?P<name>[^\s=(),<>\"'&]{1,40})(?P<read>\(read\))?=(?P<key>[\x21-\x7e]+)")


class ConsoleKey(NamedTuple):
    """`may_act` False: sees every page and may change nothing."""

    name: str
    may_act: bool
    key: SecretStr


def parse(entries: Sequence[SecretStr]) -> list[ConsoleKey]:
    """Read the setting. A name may occur twice while its key is changed.

    Raises ValueError, one line per fault. No line shows a key.
    """
    found: list[ConsoleKey] = []
    faults: list[str] = []
    for number, entry in enumerate(entries, 1):
        parts = _ENTRY.fullmatch(entry.get_secret_value())
        if parts is None or not parts["name"].isprintable():
            faults.append(f"entry {number}: {FORM}")
        elif len(parts["key"]) < MIN_CHARACTERS:
            faults.append(f"entry {number}: the key needs at least {MIN_CHARACTERS} characters")
        else:
            found.append(ConsoleKey(parts["name"], not parts["read"], SecretStr(parts["key"])))
    if len({each.key.get_secret_value() for each in found}) < len(found):
        faults.append("two entries have the same key")
    if faults:
        raise ValueError("\n".join(faults))
    return found
