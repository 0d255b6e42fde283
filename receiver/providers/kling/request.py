"""Requests to Kling's omni-image endpoint, checked before they are sent.

Types and structure are checked for every model, the documented rules only for documented models. Models come and go
without notice, so an unknown name is sent with a warning.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple

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
from receiver.providers.kling.request_images import fingerprint, image_input, is_url, picture_fault, refused
from storage.states import MAX_FILES, expected_files

MAX_PROMPT_CHARS = 2_500
MAX_INPUTS = 10  # images and elements together
MAX_PICTURES = 9
# Of any model, also an unknown one. Counted before a field or an item is checked, which takes up to 1 kB a fault.
MAX_FIELDS, MAX_ITEMS = 100, 100
MAX_FAULTS = 20
ASPECT_RATIOS = ("16:9", "9:16", "1:1", "4:3", "3:4", "3:2", "2:3", "21:9", "auto")

# The documented meaning of a missing field. A request that states the same value is the same request.
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
# For a request without a model: values that at least one model accepts.
ANY_MODEL = Model(("1k", "2k", "4k"), ("single", "series"))


class Fault(NamedTuple):
    where: str
    value: Any
    rule: str


def _storable(text: str) -> str:
    if not is_storable(text):
        raise refused("must hold no NUL and no lone surrogate")
    if not text.strip():
        raise refused("must not be empty")
    return text


def _number(value: Any) -> Any:
    """A whole number, also as decimal digits: JavaScript numbers do not hold 64 bits."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value) else value


def _amount(value: Any) -> int | str:
    number = _number(value)
    if number == "auto":
        return "auto"
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    raise refused("must be a whole number, or auto")


Text = Annotated[StrictStr, AfterValidator(_storable)]
Number = Annotated[StrictInt, BeforeValidator(_number)]


class _Strict(BaseModel):
    # protected_namespaces: pydantic reserves `model_`, and the provider's field is `model_name`.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())


class ImageInput(_Strict):
    image: Annotated[Text, AfterValidator(image_input)] = Field(repr=False)


class ElementInput(_Strict):
    element_id: Annotated[Number, Field(ge=1, le=2**63 - 1)]


class WatermarkInfo(_Strict):
    enabled: StrictBool


class OmniImageRequest(_Strict):
    """One request to `POST /v1/images/omni-image`, without the fields that we add (callback_url, external_task_id)."""

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
        is_documented = model_name is None or model_name in MODELS
        rule = (RULES if is_documented else RULES_OF_ANY_MODEL).get(info.field_name or "")
        if rule is None or value is None:
            return value
        faults = list(rule(value, info.data, MODELS.get(model_name or "", ANY_MODEL)))
        if faults:
            text = "; ".join(fault.rule for fault in faults)
            shown = [(fault.where, _shown(fault.value), fault.rule) for fault in faults]
            raise PydanticCustomError("faults", "{rule}", {"rule": text, "faults": shown})
        return value

    def wire(self) -> dict[str, Any]:
        """The JSON that is sent: without unused fields, element ids as numbers, Base64 without its prefix."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return {name: value for name, value in fields.items() if value != []}

    def canonical_hash(self) -> str:
        """SHA-256 (64 hex digits) of the caller's fields. Requests that ask for the same have the same hash.

        Documented defaults count as given, images by their bytes. The id and the callback URL do not count.
        """
        text = json.dumps(DEFAULTS | redacted(self.wire()), sort_keys=True, separators=(",", ":"))
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
        """One line for each part that the caller may not have meant. The request is sent anyway."""
        found = []
        if self.model_name not in MODELS:
            near = get_close_matches(self.model_name[:60].lower(), MODELS, 1, 0.8)
            meant = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(MODELS)}"
            found.append(f"model_name: {_shown(self.model_name)} is not known here ({meant}); sent unchecked")
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
        rule = None if is_url(item.image) else picture_fault(item.image)
        if rule:
            yield Fault(f"[{position}].image", item.image, rule)


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


def _amount_rule(amount: int | str, _fields: Mapping[str, Any], _model: Model) -> Iterator[Fault]:
    if isinstance(amount, int) and amount > MAX_FILES:
        yield Fault("", amount, f"must be at most {MAX_FILES}: a task has no more files")


# Without a rule of its own a model may ask for what no task of ours can hold, and nobody could say its price.
RULES_OF_ANY_MODEL: dict[str, Callable[[Any, Mapping[str, Any], Model], Iterator[Fault]]] = {
    "n": _amount_rule,
    "series_amount": _amount_rule,
}


def redacted(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request as sent, with Base64 images replaced by their hash and size. Idempotent."""
    fields = dict(request)
    if "image_list" in fields:
        images = [item["image"] for item in fields["image_list"]]
        fields["image_list"] = [{"image": fingerprint(one) if isinstance(one, str) else one} for one in images]
    return fields


def facts_of(request: Mapping[str, Any]) -> RequestFacts:
    """What to expect of a request, as sent or as stored. A missing or invalid field counts as its default."""
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


def parse_request(data: Mapping[str, Any]) -> OmniImageRequest:
    """Check a caller's fields.

    Leaves out fields given as "" or [], as the provider's own example sends them, and unknown ones also as null or {}.
    Raises RequestInvalid with the first MAX_FAULTS faults and the number of the others.
    """
    if len(data) > MAX_FIELDS:
        raise RequestInvalid([f"has {len(data):,} fields; at most {MAX_FIELDS}"])
    known = OURS.keys() | OmniImageRequest.model_fields.keys()
    unused = {
        name
        for name, value in data.items()
        if name not in ("model_name", "prompt") and (value in ("", []) or (name not in known and value in (None, {})))
    }
    fields = {name: value for name, value in data.items() if name not in unused}
    odd_names = [name for name in fields if not (isinstance(name, str) and is_storable(name))]
    if odd_names:
        raise _invalid(f"{_shown(name)}: is not a field name" for name in odd_names)
    too_many = dict(_too_many(fields))
    lines = list(too_many.values())
    try:
        checked = OmniImageRequest.model_validate({name: fields[name] for name in fields if name not in too_many})
    except ValidationError as error:
        lines += [line for details in error.errors(include_url=False) for line in _lines(details)]
    if lines:
        raise _invalid(lines)
    return checked


def _invalid(lines: Iterable[str]) -> RequestInvalid:
    found = list(dict.fromkeys(lines))
    further = [f"… and {len(found) - MAX_FAULTS:,} further faults"] if len(found) > MAX_FAULTS else []
    return RequestInvalid(found[:MAX_FAULTS] + further)


def _too_many(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, fault) of each field that holds more than is checked one by one."""
    is_documented = fields.get("model_name") in (None, *MODELS)
    for name, what in (("image_list", "images"), ("element_list", "elements"), ("watermark_info", "fields")):
        value = fields.get(name)
        items = value if isinstance(value, list) else [value]
        if len(items) > MAX_ITEMS or (is_documented and len(items) > MAX_INPUTS):
            most = f"images and elements together: at most {MAX_INPUTS}" if is_documented else f"at most {MAX_ITEMS}"
            count = len(items) if len(items) <= MAX_ITEMS else f"more than {MAX_ITEMS}"
            yield name, f"{name}: '{count} {what}': {most}"
        elif any(isinstance(item, dict) and len(item) > MAX_FIELDS for item in items):
            yield name, f"{name}: has an object with more than {MAX_FIELDS} fields"


# Our messages for pydantic's error types. Other types keep pydantic's message.
RULE_WORDS = {
    "extra_forbidden": "is not a field of this request",
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
    """A value in an error message: short, and of a URL only its host."""
    if isinstance(value, str):
        return repr(plain(value, 60))
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"
    if isinstance(value, (int, float, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"
