"""Checks a create request as strictly as Kling does. Every refusal names its rule."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from PIL import Image

from receiver.sandbox.access import is_loopback
from receiver.sandbox.answers import Refused
from receiver.sandbox.knobs import Knobs

MAX_PROMPT_CHARACTERS = 2_500
MAX_INPUTS = 10  # images and elements together
MAX_IMAGE_BYTES = 10 * 1024 * 1024
MIN_IMAGE_SIDE = 300
MAX_IMAGE_RATIO = 2.5
RESOLUTIONS = ("1k", "2k", "4k")
ASPECT_RATIOS = ("16:9", "9:16", "1:1", "4:3", "3:4", "3:2", "2:3", "21:9", "auto")
# The one known model that has neither series nor 4k.
PLAIN_MODEL = "kling-image-o1"


@dataclass(frozen=True)
class Wanted:
    """A valid create request. `pictures`: how many, None when the provider chooses (`series_amount` auto)."""

    model: str
    prompt: str
    pictures: int | None
    series: bool
    resolution: str
    aspect_ratio: str
    watermark: bool
    callback_url: str | None
    external_task_id: str | None


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises Refused 1200 for anything else."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise Refused(1200, "Request body is not valid JSON") from None
    if not isinstance(body, dict):
        raise Refused(1200, "Request body must be a JSON object")
    return body


def read(body: Mapping[str, Any], knobs: Knobs) -> Wanted:
    """Check every field. An empty string is an unused field, as in the documented example.

    Raises Refused 1200 or 1201 (bad value), 1203 (no such model).
    """
    model = _text(body, "model_name") or _missing("model_name")
    if knobs.models and model not in knobs.models:
        raise Refused(1203, f"Model {model} does not exist")
    prompt = _text(body, "prompt") or _missing("prompt")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise Refused(1201, f"prompt must not exceed {MAX_PROMPT_CHARACTERS} characters")
    _check_inputs(body)
    resolution = _choice(body, "resolution", RESOLUTIONS, "1k")
    series = _choice(body, "result_type", ("single", "series"), "single") == "series"
    n = _whole(body, "n", 1, 9, 1)
    amount = _series_amount(body) if series else n
    if series and (not knobs.series_supported or model == PLAIN_MODEL):
        raise Refused(1201, f"result_type series is not supported by {model}")
    if resolution == "4k" and model == PLAIN_MODEL:
        raise Refused(1201, f"resolution 4k is not supported by {model}")
    return Wanted(
        model=model,
        prompt=prompt,
        pictures=amount,
        series=series,
        resolution=resolution,
        aspect_ratio=_choice(body, "aspect_ratio", ASPECT_RATIOS, "auto"),
        watermark=_watermark(body),
        callback_url=_callback_url(body, knobs),
        external_task_id=_text(body, "external_task_id"),
    )


def _missing(name: str) -> str:
    raise Refused(1201, f"{name} is required")


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise Refused(1200, f"{name} must be a string")
    return value


def _choice(body: Mapping[str, Any], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = _text(body, name) or default
    if value not in allowed:
        raise Refused(1201, f"{name} must be one of {', '.join(allowed)}")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = body.get(name)
    if value is None or value == "":
        return default
    if not _is_whole(value) or not low <= value <= high:
        raise Refused(1201, f"{name} must be an integer from {low} to {high}")
    return int(value)


def _series_amount(body: Mapping[str, Any]) -> int | None:
    return None if body.get("series_amount") == "auto" else _whole(body, "series_amount", 2, 9, 4)


def _watermark(body: Mapping[str, Any]) -> bool:
    info = body.get("watermark_info")
    if info is None or info == "":
        return False
    if not isinstance(info, dict) or not isinstance(info.get("enabled"), bool):
        raise Refused(1200, "watermark_info.enabled must be a boolean")
    return bool(info["enabled"])


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise Refused(1200, f"{name} must be a list")
    return value


def _check_inputs(body: Mapping[str, Any]) -> None:
    images, elements = _list(body, "image_list"), _list(body, "element_list")
    if len(images) + len(elements) > MAX_INPUTS:
        raise Refused(1201, f"image_list and element_list together must not exceed {MAX_INPUTS}")
    for element in elements:
        number = element.get("element_id") if isinstance(element, dict) else None
        if number is None or not _is_whole(number) or not 0 < number < 2**63:
            raise Refused(1201, "element_list.element_id must be a 64-bit integer")
    for entry in images:
        image = entry.get("image") if isinstance(entry, dict) else None
        if not isinstance(image, str) or not image:
            raise Refused(1201, "image_list.image must not be empty")
        if urlsplit(image[:2_000]).scheme not in ("http", "https"):
            _check_picture(image)


def _check_picture(encoded: str) -> None:
    """A Base64 image: without `data:` prefix (Kling refuses one), png or jpeg, within the limits."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(1201, "image_list.image must be a URL or bare Base64") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise Refused(1201, "image_list.image must not exceed 10 MB")
    width, height = _size(data)
    if min(width, height) < MIN_IMAGE_SIDE or max(width, height) > MAX_IMAGE_RATIO * min(width, height):
        raise Refused(1201, "image_list.image must have sides of at least 300 px and a ratio from 1:2.5 to 2.5:1")


def _size(data: bytes) -> tuple[int, int]:
    kind: Literal["PNG", "JPEG"] = "PNG" if data.startswith(b"\x89PNG") else "JPEG"
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as picture:
            return picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(1201, "image_list.image must be a jpg or png picture") from None


def _callback_url(body: Mapping[str, Any], knobs: Knobs) -> str | None:
    url = _text(body, "callback_url")
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # raises for text that is not a number
    except ValueError:
        raise Refused(1200, "callback_url is not a valid URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise Refused(1200, "callback_url must be an http or https URL")
    if not knobs.allow_remote_callbacks and not is_loopback(host):
        raise Refused(
            1200,
            f"callback_url host {host} is not loopback; this sandbox calls back to its own machine only "
            "unless it was started with --allow-remote-callbacks",
        )
    return url
