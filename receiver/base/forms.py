"""Forms, cookies and addresses of strangers, read in time linear in their length.

The standard library's parsers of header values and of quoted cookies take seconds for the 16 KiB of one head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode

MAX_FIELDS = 600
# A browser's type with its boundary has 70 characters.
MAX_TYPE_CHARS = 200
# A part's head names its field and its file; the longest file name of a file system has 255 bytes.
MAX_HEAD_BYTES = 1_024
_BOUNDARY = re.compile(r";[ \t]*boundary=(?:\"([^\"]{1,70})\"|([^\s\";]{1,70}))", re.I)
_NAMED = re.compile(r";[ \t]*(name|filename)=(?:\"((?:[^\"\\]|\\.)*)\"|([^\s\";]*))", re.I | re.S)
_ESCAPED = re.compile(r"\\([\"\\])")


@dataclass(frozen=True)
class Upload:
    """A file in a form."""

    name: str
    content: bytes = field(repr=False)


def cookie(header: str, name: str) -> str | None:
    """The value of the first cookie of that name, as it was sent. Ours need no quotes."""
    for pair in header.split(";"):
        key, _, value = pair.partition("=")
        if key.strip() == name:
            return value.strip()
    return None


def parse_form(content_type: str, body: bytes) -> tuple[list[tuple[str, str]], dict[str, Upload]]:
    """The fields and files of a POST. Raises ValueError."""
    if len(content_type) > MAX_TYPE_CHARS:
        raise ValueError("the content type is too long")
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return _parse_multipart(content_type, body)
    if kind != "application/x-www-form-urlencoded":
        raise ValueError("the body is not a form")
    pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="replace")
    return pairs, {}


def _parse_multipart(content_type: str, body: bytes) -> tuple[list[tuple[str, str]], dict[str, Upload]]:
    if (boundary := _BOUNDARY.search(content_type)) is None:
        raise ValueError("the content type names no boundary")
    line = b"\r\n--" + (boundary[1] or boundary[2]).encode("latin-1")
    _, *parts = (b"\r\n" + body).split(line, MAX_FIELDS + 2)
    if not parts or len(parts) > MAX_FIELDS + 1 or not parts.pop().startswith(b"--"):
        raise ValueError("the form has too many parts or no end")
    fields: list[tuple[str, str]] = []
    uploads: dict[str, Upload] = {}
    for number, part in enumerate(parts):
        name, filename, content = _parse_part(part)
        if filename is not None:
            uploads[name if name not in uploads else f"{name}-{number}"] = Upload(filename, content)
        else:
            fields.append((name, content.decode("utf-8", "replace")))
    return fields, uploads


def _parse_part(part: bytes) -> tuple[str, str | None, bytes]:
    """The field's name, the file's name if it is one, and the content."""
    end = part.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
    before, *lines = part[: max(end, 0)].decode("utf-8", "replace").split("\r\n")
    named: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() == "content-disposition":
            for found in _NAMED.finditer(value):
                named.setdefault(found[1].lower(), _ESCAPED.sub(r"\1", found[2] or found[3] or ""))
    if before.strip() or "name" not in named:
        raise ValueError("a part of the form is malformed")
    return named["name"], named.get("filename"), part[end + 4 :]


def address_of(path: str, fields: Mapping[str, str | None]) -> str:
    """The address of a decoded path with those fields that have a value."""
    query = urlencode({name: value for name, value in fields.items() if value})
    quoted = quote(path).replace("//", "/%2F")  # `own_path` refuses two slashes
    return f"{quoted}?{query}" if query else quoted


def came_from(headers: Mapping[str, str]) -> str:
    """The console's page whose form was sent, "" if unknown. The console's Referrer-Policy makes browsers send it."""
    rest = headers.get("referer", "").partition("://")[2]
    return own_path("/" + rest.partition("/")[2], "")


def own_path(path: str | None, default: str) -> str:
    """A path of the console, or `default`, so that no link redirects elsewhere. `%2e` is a dot to browsers."""
    if not path or not path.isascii() or not path.isprintable() or set("\\#") & set(path):
        return default
    plain = path.partition("?")[0]
    good = f"{plain}/".startswith("/console/") and "//" not in plain and not {".", ".."} & {*unquote(plain).split("/")}
    return path if good else default
