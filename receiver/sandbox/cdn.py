"""The signed links of result files, and the faults of their downloads."""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from receiver.sandbox.http_protocol import JUNK_NAME
from receiver.sandbox.knobs import Knobs
from receiver.sandbox.tasks import Name, Task

FOLDER = "my pictures/"  # part of links with a space
PATH = re.compile(
    rf"^/cdn/(?:{FOLDER})?(?P<file>(?P<task_id>\d+)-(?P<kind>image|series|watermark)-(?P<index>\d)\.png)$"
)
RANGE = re.compile(r"bytes=(\d{1,15})-")
# The alphabet of CloudFront's signed URLs: Base64 with + = / replaced.
SIGNATURE_ALPHABET = str.maketrans("+=/", "-_~")

Fault = Literal[
    "", "403", "503", "truncated", "truncated_chunked", "truncated_silent", "html", "empty", "self_redirect"
]
FAULT_RATES: dict[Fault, str] = {
    "503": "cdn_503_rate",
    "truncated": "cdn_truncated_rate",
    "truncated_chunked": "cdn_truncated_chunked_rate",
    "truncated_silent": "cdn_truncated_silent_rate",
    "html": "cdn_html_rate",
    "empty": "cdn_empty_rate",
    "self_redirect": "cdn_self_redirect_rate",
}


def path(task: Task, name: Name) -> str:
    return f"/cdn/{task.id}-{name.kind}-{name.index}.png"


def url(task: Task, name: Name, key: bytes, form: str = "plain") -> str:
    """The absolute link in the task's current revision. `form`: as the knob `cdn_link_form`."""
    here = path(task, name)
    pair = f"K{task.revision + 1}"
    signature = _sign(key, here, task.expires, pair)
    if form == "space":
        here = here.replace("/cdn/", f"/cdn/{FOLDER}")
    link = f"{task.origin}{here}?Expires={task.expires}&Signature={signature}&Key-Pair-Id={pair}"
    return f"  {link} \n" if form == "blanks" else link


def is_valid(task: Task, here: str, query: Mapping[str, str], key: bytes, now_seconds: float) -> bool:
    """Whether the link was made by us, has not expired, and is of a revision that works."""
    expires, pair = query.get("Expires", ""), query.get("Key-Pair-Id", "")
    if not re.fullmatch(r"[0-9]{1,12}", expires) or now_seconds >= int(expires):
        return False
    if not re.fullmatch(r"K[1-9]\d{0,8}", pair) or int(pair[1:]) - 1 < task.live_from:
        return False
    signature = query.get("Signature", "").encode("utf-8", "surrogatepass")
    return hmac.compare_digest(signature, _sign(key, here, int(expires), pair).encode())


def _sign(key: bytes, here: str, expires: int, pair: str) -> str:
    digest = hmac.digest(key, f"{here}\n{expires}\n{pair}".encode(), hashlib.sha256)
    return base64.b64encode(digest).decode("ascii").translate(SIGNATURE_ALPHABET)


@dataclass(frozen=True)
class Served:
    """A file as sent: all of it or one range, with or without faults. `cut`: bytes before the connection closes."""

    status: int
    content: bytes = field(repr=False)
    headers: dict[str, str]
    cut: int | None = None


def serve(data: bytes, knobs: Knobs, wanted_range: str = "", seconds: float = 0) -> Served:
    """What a download without a fault gets. `wanted_range`: the request's Range, empty = none.

    `seconds`: since the task's end.
    """
    status, first = 200, 0
    headers: dict[str, str] = {}
    if knobs.cdn_ranges:
        headers |= {"accept-ranges": "bytes", "etag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}
        if (match := RANGE.fullmatch(wanted_range)) and int(match[1]) < len(data):
            first = int(match[1])
    if first or knobs.cdn_206_whole:
        status, headers["content-range"] = 206, f"bytes {first}-{len(data) - 1}/{len(data)}"
    content = data[first:]
    if knobs.cdn_content_encoding:
        headers["content-encoding"] = knobs.cdn_content_encoding
        content = gzip.compress(content, 1) if knobs.cdn_content_encoding.lower() == "gzip" else content
    if knobs.cdn_junk_header:
        headers[JUNK_NAME] = "junk"
    breaks = knobs.cdn_break_seconds is None or seconds < knobs.cdn_break_seconds
    cut = int(len(data) * knobs.cdn_break_share) if knobs.cdn_break_share and breaks else None
    return Served(status, content, headers, cut if cut and cut < len(content) else None)


def next_fault(knobs: Knobs, rng: random.Random, seconds: float) -> Fault:
    """The fault of the next download: first by the time since the task's end, then the queue, then chance; '' = none.

    `seconds`: that time.
    """
    if seconds < knobs.cdn_html_seconds:
        return "html"
    if seconds < knobs.cdn_empty_seconds:
        return "empty"
    if seconds < knobs.cdn_self_redirect_seconds:
        return "self_redirect"
    if knobs.cdn_faults:
        return knobs.cdn_faults.pop(0)
    for fault, knob in FAULT_RATES.items():
        rate = getattr(knobs, knob)
        if rate and rng.random() < rate:
            return fault
    return ""
