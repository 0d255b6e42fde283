"""Text of others on a terminal: characters that a terminal would execute or hide are written out."""

from __future__ import annotations

from storage.keys import TERMINAL_CONTROLS


def visible(text: str) -> str:
    r"""`text` as one line: `\x1b`, `\n`, `\u202e` in place of the characters that a terminal executes or hides."""
    return TERMINAL_CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
