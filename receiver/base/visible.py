"""Text of strangers on a terminal: what a terminal would obey or hide is shown instead."""

from __future__ import annotations

from storage.keys import TERMINAL_CONTROLS


def visible(text: str) -> str:
    r"""`text` as one line: `\x1b`, `\n`, `\u202e` in place of the characters that a terminal obeys or hides."""
    return TERMINAL_CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
