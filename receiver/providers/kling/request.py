"""What one may ask of Kling's omni-image endpoint, checked before it costs a round trip.

Types and shape are checked for every model; the rules of KLING's page only for the models it names,
because models come and go without notice: an unknown name passes through with a warning.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from PIL import ImageFile, JpegImagePlugin, PngImagePlugin
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from receiver.providers.base import RequestFacts, RequestInvalid, is_storable, plain
from storage.states import expected_files

MAX_PROMPT_CHARS = 2_500
MAX_INPUTS = 10  # images and elements together
MAX_IMAGE_BYTES = 10 * 1024 * 1024
MIN_IMAGE_PIXELS = 300
MAX_PICTURES = 9
MAX_URL_CHARS = 8_192
# What MIME puts between the lines of Base64.
BREAKS = " \t\r\n\v\f"
URL_SAFE = str.maketrans("-_", "+/")
ASPECT_RATIOS = ("16:9", "9:16", "1:1", "4:3", "3:4", "3:2", "2:3", "21:9", "auto")

READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
}

# Where the page documents what a missing field means; a request that spells it out is the same request.
DEFAULTS: dict[str, Any] = {
    "resolution": "1k",
    "n": 1,
    "result_type": "single",
    "series_amount": 4,
    "aspect_ratio": "auto",
    "watermark_info": {"enabled": False},
}


class Model(NamedTuple):
    resolutions: tuple[str, ...]
    result_types: tuple[str, ...]


MODELS = {
    "kling-image-o1": Model(("1k", "2k"), ("single",)),
    "kling-v3-omni": Model(("1k", "2k", "4k"), ("single", "series")),
}
# For a request that names no model: what any of them takes.
ANY_MODEL = Model(("1k", "2k", "4k"), ("single", "series"))


class Fault(NamedTuple):
    where: str
    value: Any
    rule: str


def _refuse(rule: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


def _storable(text: str) -> str:
    if not is_storable(text):
        raise _refuse("must hold no NUL and no lone surrogate")
    if not text.strip():
        raise _refuse("must not be empty")
    return text


def _number(value: Any) -> Any:
    """A whole number may come as decimal digits: command lines and JavaScript cannot hold 64 bits otherwise."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value) else value


def _amount(value: Any) -> int | str:
    number = _number(value)
    if number == "auto":
        return "auto"
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    raise _refuse("must be a whole number, or auto")


def _image(text: str) -> str:
    """A URL as it came, or Base64 without its `data:` prefix and line breaks."""
    if re.match(r"https?://", text, re.IGNORECASE):
        return _image_url(text)
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not (comma and head.endswith(";base64")):
            raise _refuse("must be data:…;base64,… when it starts with data:")
    if any(space in text for space in BREAKS):  # else it stays the caller's own 14 MB
        text = text.translate(dict.fromkeys(map(ord, BREAKS)))
    try:
        text = _standard(text)
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _refuse("must be an http(s) URL or Base64") from None
    if not decoded:
        raise _refuse("must not be empty")
    return text


def _standard(text: str) -> str:
    """Base64 in the alphabet and with the padding of RFC 4648 §4, which is what the provider takes."""
    if "-" in text or "_" in text:
        text = text.translate(URL_SAFE)
    return text + "=" * (-len(text) % 4) if len(text) % 4 != 1 else text


def _image_url(text: str) -> str:
    try:
        host = urlsplit(text).hostname
    except ValueError:
        host = None
    if not host or re.search(r"\s", text) or len(text) > MAX_URL_CHARS:
        raise _refuse(f"must be an http(s) URL with a host, without spaces, of at most {MAX_URL_CHARS} characters")
    return text


Text = Annotated[StrictStr, AfterValidator(_storable)]
Number = Annotated[StrictInt, BeforeValidator(_number)]


class _Strict(BaseModel):
    # protected_namespaces: `model_name` is the provider's word, not pydantic's.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())


class ImageInput(_Strict):
    image: Annotated[Text, AfterValidator(_image)] = Field(repr=False)


class ElementInput(_Strict):
    element_id: Annotated[Number, Field(ge=1, le=2**63 - 1)]


class WatermarkInfo(_Strict):
    enabled: StrictBool


class OmniImageRequest(_Strict):
    """One request to `POST /v1/images/omni-image`, without what we add to it (callback_url, external_task_id)."""

    model_name: Text
    prompt: Text
    image_list: list[ImageInput] | None = None
    element_list: list[ElementInput] | None = None
    resolution: Text | None = None
    n: Number | None = None
    result_type: Text | None = None
    series_amount: Annotated[int | str, PlainValidator(_amount)] | None = None
    aspect_ratio: Text | None = None
    watermark_info: WatermarkInfo | None = None

    @field_validator("*")
    @classmethod
    def _obeys_its_model(cls, value: Any, info: ValidationInfo) -> Any:
        model_name = info.data.get("model_name")
        rule = RULES.get(info.field_name or "")
        if rule is None or value is None or (model_name is not None and model_name not in MODELS):
            return value
        faults = list(rule(value, info.data, MODELS.get(model_name or "", ANY_MODEL)))
        if faults:
            text = "; ".join(fault.rule for fault in faults)
            shown = [(fault.where, _shown(fault.value), fault.rule) for fault in faults]
            raise PydanticCustomError("faults", "{rule}", {"rule": text, "faults": shown})
        return value

    def wire(self) -> dict[str, Any]:
        """What is sent: unused fields left out, element ids as JSON numbers, Base64 without its prefix."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return {name: value for name, value in fields.items() if value != []}

    def redacted(self) -> dict[str, Any]:
        """What is kept: like `wire()`, with the bytes of Base64 images replaced by their hash and size."""
        return redacted(self.wire())

    def canonical_hash(self) -> str:
        """SHA-256 as 64 hex digits over the caller's fields: equal for requests that ask for the same thing.

        Documented defaults count as if spelled out, images by their bytes; never the id or the callback URL.
        """
        text = json.dumps(DEFAULTS | self.redacted(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def facts(self) -> RequestFacts:
        return facts_of(self.wire())

    @property
    def series(self) -> bool:
        return self.facts.series

    @property
    def expected(self) -> int | None:
        return self.facts.expected

    @property
    def slots(self) -> int:
        return self.facts.slots

    @property
    def model(self) -> str:
        return self.model_name

    def warnings(self) -> list[str]:
        """What the caller may not have meant; none of it stops the request."""
        found = []
        if self.model_name not in MODELS:
            known = ", ".join(MODELS)
            found.append(f"model_name: {_shown(self.model_name)} is not known here (known: {known}); sent unchecked")
        if self.series and self.n is not None:
            found.append("n: ignored by the provider when result_type is series; series_amount counts")
        if not self.series and self.series_amount is not None:
            found.append("series_amount: ignored by the provider unless result_type is series")
        for kind, given in (("image", self.image_list), ("element", self.element_list)):
            asked = [int(number) for number in re.findall(rf"<<<{kind}_([0-9]{{1,4}})>>>", self.prompt)]
            if max(asked, default=0) > len(given or ()):
                found.append(f"prompt: refers to <<<{kind}_{max(asked)}>>> but {len(given or ())} given")
        return found


def _prompt_rule(prompt: str, _fields: Mapping[str, Any], _model: Model) -> Iterator[Fault]:
    if len(prompt) > MAX_PROMPT_CHARS:
        yield Fault("", prompt, f"is {len(prompt)} characters long; at most {MAX_PROMPT_CHARS}")


def _images_rule(images: list[ImageInput], _fields: Mapping[str, Any], _model: Model) -> Iterator[Fault]:
    for position, item in enumerate(images):
        rule = None if _is_url(item.image) else _picture_fault(item.image)
        if rule:
            yield Fault(f"[{position}].image", item.image, rule)
    if len(images) > MAX_INPUTS:
        yield Fault("", f"{len(images)} images", f"images and elements together: at most {MAX_INPUTS}")


def _elements_rule(elements: list[ElementInput], fields: Mapping[str, Any], _model: Model) -> Iterator[Fault]:
    images = len(fields.get("image_list") or ())
    if len(elements) + images > MAX_INPUTS:
        given = f"{images} images and {len(elements)} elements"
        yield Fault("", given, f"images and elements together: at most {MAX_INPUTS}")


def _n_rule(n: int, _fields: Mapping[str, Any], _model: Model) -> Iterator[Fault]:
    if not 1 <= n <= MAX_PICTURES:
        yield Fault("", n, f"must be 1 to {MAX_PICTURES}")


def _series_amount_rule(amount: int | str, _fields: Mapping[str, Any], _model: Model) -> Iterator[Fault]:
    if isinstance(amount, int) and not 2 <= amount <= MAX_PICTURES:
        yield Fault("", amount, f"must be 2 to {MAX_PICTURES}, or auto")


def _one_of(value: str, here: tuple[str, ...], anywhere: tuple[str, ...]) -> Iterator[Fault]:
    if value not in here:
        where = " for this model" if value in anywhere else ""
        yield Fault("", value, f"must be {' or '.join(here)}{where}")


RULES: dict[str, Callable[[Any, Mapping[str, Any], Model], Iterator[Fault]]] = {
    "prompt": _prompt_rule,
    "image_list": _images_rule,
    "element_list": _elements_rule,
    "resolution": lambda value, _fields, model: _one_of(value, model.resolutions, ANY_MODEL.resolutions),
    "n": _n_rule,
    "result_type": lambda value, _fields, model: _one_of(value, model.result_types, ANY_MODEL.result_types),
    "series_amount": _series_amount_rule,
    "aspect_ratio": lambda value, _fields, _model: _one_of(value, ASPECT_RATIOS, ASPECT_RATIOS),
}


def _is_url(image: str) -> bool:
    return "://" in image[:10]


def _picture_fault(encoded: str) -> str | None:
    """The rule a Base64 image breaks, None when it breaks none. Reads the header, decodes no pixel."""
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
    reader = next((reader for magic, reader in READERS.items() if picture.startswith(magic)), None)
    if reader is None:
        return None
    # Not Image.open: it tries every format and warns of large dimensions, which are no fault here.
    try:
        with reader(BytesIO(picture)) as header:
            return header.size
    except (OSError, SyntaxError, ValueError, OverflowError):
        return None


def _fingerprint(image: str) -> str | dict[str, Any]:
    if _is_url(image):
        return image
    picture = base64.b64decode(image)
    return {"sha256": hashlib.sha256(picture).hexdigest(), "bytes": len(picture)}


def redacted(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request as sent, with the bytes of Base64 images replaced by their hash and size. Repeatable."""
    fields = dict(request)
    if "image_list" in fields:
        images = [item["image"] for item in fields["image_list"]]
        fields["image_list"] = [{"image": _fingerprint(one) if isinstance(one, str) else one} for one in images]
    return fields


def facts_of(request: Mapping[str, Any]) -> RequestFacts:
    """What a request as sent or as stored lets us expect; whatever is missing or odd counts as its default."""
    series = request.get("result_type") == "series"
    n = _count(request.get("n"), DEFAULTS["n"])
    amount = request.get("series_amount")
    series_amount: int | Literal["auto"] = "auto" if amount == "auto" else _count(amount, DEFAULTS["series_amount"])
    watermark_info = request.get("watermark_info")
    watermark = isinstance(watermark_info, Mapping) and watermark_info.get("enabled") is True
    expected = expected_files(n=n, series=series, series_amount=series_amount, watermark=watermark)
    pictures = expected_files(n=n, series=series, series_amount=series_amount, watermark=False)
    model = request.get("model_name")
    return RequestFacts(
        series=series,
        expected=expected,
        slots=pictures or MAX_PICTURES,
        model=model if isinstance(model, str) else None,
    )


def _count(value: Any, default: int) -> int:
    return value if isinstance(value, int) and value is not True and 1 <= value <= 1_000 else default


def parse_request(data: Mapping[str, Any], *, drop_empty: bool = True) -> OmniImageRequest:
    """Check a caller's fields.

    `drop_empty`: leave out fields given as "" or [], as the provider's own example sends them, and unknown ones
    also as null or {}; False refuses them. Raises RequestInvalid with every fault found.
    """
    known = OURS.keys() | OmniImageRequest.model_fields.keys()
    unused = {
        name
        for name, value in data.items()
        if drop_empty
        and name not in ("model_name", "prompt")
        and (value in ("", []) or (name not in known and value in (None, {})))
    }
    fields = {name: value for name, value in data.items() if name not in unused}
    odd_names = [name for name in fields if not (isinstance(name, str) and is_storable(name))]
    if odd_names:
        raise RequestInvalid([f"{_shown(name)}: is no field name" for name in odd_names])
    try:
        return OmniImageRequest.model_validate(fields)
    except ValidationError as error:
        lines = [line for details in error.errors(include_url=False) for line in _lines(details)]
        raise RequestInvalid(list(dict.fromkeys(lines))) from None


# Our words for what pydantic says; anything else keeps pydantic's.
RULE_WORDS = {
    "extra_forbidden": "is no field of this request",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "greater_than_equal": "must be a 64-bit id above 0",
    "less_than_equal": "must be a 64-bit id above 0",
    "list_type": "must be a list",
    "model_type": "must be an object",
}
OURS = {
    "callback_url": "is made by the receiver from RECEIVER_PUBLIC_URL; leave it out",
    "external_task_id": "is given beside the request, not in it; leave it out",
}


def _lines(details: ErrorDetails) -> Iterator[str]:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]).lstrip(".")
    kind = details["type"]
    if kind == "missing":
        yield f"{where}: is required"
    elif kind == "faults":
        for place, shown, rule in details["ctx"]["faults"]:
            yield f"{where}{place}: {shown}: {rule}"
    else:
        words = OURS.get(where) or RULE_WORDS.get(kind) or details["msg"]
        yield f"{plain(where, 80)}: {_shown(details['input'])}: {words}"


def _shown(value: Any) -> str:
    """A value as a person may see it: short, and of a URL only its host."""
    if isinstance(value, str):
        return repr(plain(value, 60))
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"
    if isinstance(value, (int, float, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"
