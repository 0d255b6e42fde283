"""Reference images of a request: a URL, or a picture in Base64, checked without decoding a pixel."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

from storage.errors import AssetDamaged
from storage.fetch.jpeg import jpeg_header_size
from storage.fetch.png import png_header_size
from storage.fetch.structure import Reader

MAX_IMAGE_BYTES = 10 * 1024 * 1024
MIN_IMAGE_PIXELS = 300
MAX_URL_CHARS = 8_192
# Characters between the lines of Base64 in MIME.
BREAKS = " \t\r\n\v\f"
URL_SAFE = str.maketrans("-_", "+/")


def refused(rule: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


def image_input(text: str) -> str:
    """The URL unchanged, or Base64 without its `data:` prefix and line breaks."""
    if re.match(r"https?://", text, re.IGNORECASE):
        return _image_url(text)
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not (comma and head.endswith(";base64")):
            raise refused("must be data:…;base64,… when it starts with data:")
    if any(space in text for space in BREAKS):  # the usual case copies none of the caller's 14 MB
        text = text.translate(dict.fromkeys(map(ord, BREAKS)))
    try:
        text = _standard(text)
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise refused("must be an http(s) URL or Base64") from None
    if not decoded:
        raise refused("must not be empty")
    return text


def _standard(text: str) -> str:
    """Base64 in the alphabet and with the padding of RFC 4648 §4, which the provider requires."""
    if "-" in text or "_" in text:
        text = text.translate(URL_SAFE)
    return text + "=" * (-len(text) % 4) if len(text) % 4 != 1 else text


def _image_url(text: str) -> str:
    try:
        host = urlsplit(text).hostname
    except ValueError:
        host = None
    if not host or re.search(r"\s", text) or len(text) > MAX_URL_CHARS:
        raise refused(f"must be an http(s) URL with a host, without spaces, of at most {MAX_URL_CHARS} characters")
    return text


def is_url(image: str) -> bool:
    return "://" in image[:10]


def picture_fault(encoded: str) -> str | None:
    """The rule that a Base64 image breaks; None if it breaks none. Reads the header and decodes no pixel."""
    picture = base64.b64decode(encoded)
    if len(picture) > MAX_IMAGE_BYTES:
        return f"holds {len(picture)} bytes; at most {MAX_IMAGE_BYTES} (10 MB)"
    size = _pixels(picture)
    if size is None:
        return "must be a jpg or png picture"
    width, height = size
    if min(size) < MIN_IMAGE_PIXELS:
        return f"is {width} × {height} pixels; each side must have at least {MIN_IMAGE_PIXELS}"
    if 2 * max(size) > 5 * min(size):
        return f"is {width} × {height} pixels; the ratio must lie between 1:2.5 and 2.5:1"
    return None


def _pixels(picture: bytes) -> tuple[int, int] | None:
    """Pillow reads every chunk before the pixels and unpacks profiles: 10 MB of them took it 22 s."""
    read = png_header_size if picture.startswith(b"\x89PNG\r\n\x1a\n") else jpeg_header_size
    if read is jpeg_header_size and not picture.startswith(b"\xff\xd8\xff"):
        return None
    try:
        return read(Reader(BytesIO(picture)))
    except AssetDamaged:
        return None


def fingerprint(image: str) -> str | dict[str, Any]:
    if is_url(image):
        return image
    picture = base64.b64decode(image)
    return {"sha256": hashlib.sha256(picture).hexdigest(), "bytes": len(picture)}
