"""Text of others as it may be shown: control characters are written out, URLs are cut behind their host, and what
stands like a query or a signature is cut too.
"""

from __future__ import annotations

import json
import re
from typing import Any

from storage.keys import TERMINAL_CONTROLS
from storage.url_parts import without_queries

# What follows a scheme, also in the escapes of JSON, URLs and HTML, and a host behind it.
_SCHEME = re.compile(
    r"(?::|%(?:25)*3a|\\u003a|&(?:#58|#x3a|colon);)(?:\\*(?:/|%(?:25)*2f|u002f|&(?:#47|#x2f|sol);)){2}", re.I
)
_HOST = re.compile(r"(?:[^\s/?#@\"'<>\\%&]*@)?([^\s/?#@\"'<>\\%&]*)")
# Only a URL's host is shown: paths contain tokens, and queries contain signatures. JSON may write "/" as "\/".
_ADDRESS = re.compile(r"(https?:(?:\\?/){2})(?:[^\s/?#@\"'<>\\]*@)?([^\s/?#\"'<>\\]*)(?:\\?[/?#])[^\s\"]*", re.I)
# Control characters except line breaks and tabs, and characters that change the writing direction.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
# Longer JSON is not shown one value a line.
MAX_PRETTY_CHARS = 300_000


def visible(text: str) -> str:
    r"""`text` as one line: `\x1b`, `\n`, `\u202e` in place of the characters that a terminal executes or hides."""
    return TERMINAL_CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def masked(foreign: str) -> str:
    """`foreign` up to its first URL's host: a URL may have any character, so it may end where the text ends.

    Where no scheme stands, only what `without_queries` finds is cut.
    """
    if (found := _SCHEME.search(foreign)) is None:
        return without_queries(foreign)
    host = _HOST.match(foreign, found.end())
    shown = without_queries(foreign[: found.start()]) + found[0] + (host[1] if host else "")
    return shown if host and host.end() == len(foreign) else f"{shown}/…"


def masked_values(value: Any) -> Any:
    """`value` with all texts masked. JSON in a text is masked by its own texts."""
    if isinstance(value, str):
        try:
            inside = json.loads(value) if value.lstrip()[:1] in ("{", "[", '"') else None
        except ValueError:
            inside = None
        return masked(value) if inside is None else json.dumps(masked_values(inside), ensure_ascii=False)
    if isinstance(value, list):
        return [masked_values(each) for each in value]
    return {masked(name): masked_values(each) for name, each in value.items()} if isinstance(value, dict) else value


def seen(foreign: str) -> str:
    """Text of others with invisible characters written out, every URL reduced to its host, and no query."""
    return without_queries(_ADDRESS.sub(r"\1\2/…", _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", foreign)))


def raw(body: bytes) -> str:
    """A body byte for byte where it is text, and other bytes as `\\xNN`."""
    return seen(body.decode("utf-8", "backslashreplace"))


def guarded(body: bytes) -> str:
    """A body that is not JSON, for people who may see no signed link: up to its first URL's host."""
    return seen(masked(body.replace(b"\0", b"").decode("utf-8", "backslashreplace")))


def pretty(body: bytes) -> str | None:
    """JSON with one value a line, each text up to its first URL's host. None if it is not JSON or too large."""
    try:
        shown = json.dumps(masked_values(json.loads(body)), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
    return seen(shown) if len(shown) <= MAX_PRETTY_CHARS else None


def cut(text: str, most: int) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else text[:most] + "…"


def short(foreign: str | None, most: int = 160) -> str:
    """The beginning of a text of others, on one line."""
    flat = " ".join(seen((foreign or "")[: 8 * most]).split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"
