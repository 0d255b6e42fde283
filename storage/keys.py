"""Object keys: pure functions of the public contract, importable without boto3."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from storage.errors import UserError

EXTENSIONS = frozenset({"png", "jpg", "webp", "gif", "avif", "heic", "mp4", "webm", "mov", "mp3", "wav"})
# User metadata travels in HTTP headers. These characters need no encoding there.
HEADER_TEXT = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
# Characters that a terminal executes (ESC, line ends, bidirectional controls) or hides. No new id may contain any,
# because an operator could be shown a false line, title or id.
TERMINAL_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
MAX_ID_BYTES = 200  # encoded; leaves room for prefix, date and file name in an S3 key of at most 1,024 bytes


class IdInvalid(UserError, ValueError):
    """An external id that cannot be part of an object key."""


def as_argument(name: str) -> str:
    """A name as the last argument of a command that is printed for a shell."""
    return f"-- {shlex.quote(name)}" if name.startswith("-") else shlex.quote(name)


def normal_prefix(prefix: str) -> str:
    """The prefix without leading `/` and with a trailing `/`; empty stays empty."""
    trimmed = prefix.lstrip("/")
    return trimmed if not trimmed or trimmed.endswith("/") else f"{trimmed}/"


def encode_id(external_task_id: str) -> str:
    """The id as one path segment of a key: every UTF-8 byte outside `A-Za-z0-9-_.~` is percent-encoded.

    An id of dots only is encoded too, because some clients remove `.` and `..` from paths. Raises `IdInvalid` when
    the id is empty, is not valid Unicode, or takes more than 200 bytes encoded. Submit checks this first.
    """
    if not external_task_id:
        raise IdInvalid("external_task_id is empty; give every task an id")
    try:
        encoded = quote(external_task_id, safe="")
    except UnicodeEncodeError:
        raise IdInvalid("external_task_id is not valid Unicode; remove the lone surrogate") from None
    if not external_task_id.strip("."):
        encoded = external_task_id.replace(".", "%2E")
    if len(encoded) > MAX_ID_BYTES:
        raise IdInvalid(
            f"external_task_id takes {len(encoded)} bytes in an object key, at most {MAX_ID_BYTES} are allowed"
        )
    return encoded


def check_new_id(external_task_id: Any) -> None:
    """Raises `IdInvalid` for an id that no new task may have. Existing rows with such an id continue."""
    if not isinstance(external_task_id, str):  # of a JSON file, or of an untyped caller
        raise IdInvalid("external_task_id: must be text")
    encode_id(external_task_id)
    if found := TERMINAL_CONTROLS.search(external_task_id):
        shown = found[0].encode("unicode_escape").decode()
        raise IdInvalid(f"external_task_id holds a control character ({shown} at character {found.start() + 1})")


def task_folder(prefix: str, created_at: datetime, external_task_id: str) -> str:
    """The folder of all objects of a task: `{prefix}{yyyy}/{mm}/{dd}/{external_task_id}/`, the date in UTC.

    `prefix`: a normal one, as that of every `Bucket`.
    """
    if created_at.tzinfo is None:
        raise ValueError("created_at has no time zone")
    day = created_at.astimezone(UTC)
    return f"{prefix}{day.year:04}/{day.month:02}/{day.day:02}/{encode_id(external_task_id)}/"


def object_key(
    prefix: str, created_at: datetime, external_task_id: str, kind: str, index: int, sha256: str, extension: str
) -> str:
    """The key of one asset (DESIGN §7). The same asset always has the same key."""
    if extension not in EXTENSIONS:
        raise ValueError(f"{extension!r} is not an extension of EXTENSIONS")
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("sha256 must be 64 lower-case hex digits")
    return f"{task_folder(prefix, created_at, external_task_id)}{kind}-{index}-{sha256[:12]}.{extension}"


def manifest_key(prefix: str, created_at: datetime, external_task_id: str, number: int, last: str | None = None) -> str:
    """`manifest.json` for number 1, then `manifest.2.json`, … `last`: the key of the one before, beside which it is
    written, also after a change of the prefix.
    """
    folder = f"{last.rpartition('/')[0]}/" if last else task_folder(prefix, created_at, external_task_id)
    return folder + manifest_name(number)


def manifest_name(number: int) -> str:
    return "manifest.json" if number == 1 else f"manifest.{number}.json"


def header_text(value: str) -> str:
    """Percent-encode everything but printable ASCII, and `%`. `urllib.parse.unquote` reverses it."""
    return quote(value.strip(), safe=HEADER_TEXT)
