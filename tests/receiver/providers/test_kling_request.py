"""The request's fields: for each a valid value and, if there is a rule, an invalid one."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from receiver.providers.base import RequestFacts
from receiver.providers.kling.request import (
    ASPECT_RATIOS,
    MAX_FAULTS,
    OmniImageRequest,
    RequestInvalid,
    facts_of,
    parse_request,
    redacted,
)
from receiver.providers.kling.request_images import MAX_IMAGE_BYTES
from tests.seed_client import EXAMPLE

URL = "https://cdn.example/cat.png?Signature=canary~_-"


def picture(width: int = 300, height: int = 300, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height)).save(file, kind)
    return file.getvalue()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def request(**fields: Any) -> OmniImageRequest:
    return parse_request({"model_name": "kling-v3-omni", "prompt": "a cat", **fields})


def faults(**fields: Any) -> list[str]:
    with pytest.raises(RequestInvalid) as caught:
        request(**fields)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


@pytest.mark.parametrize(
    "fields",
    [
        {"model_name": "kling-image-o1"},
        {"prompt": "图" * 2_500},
        {"image_list": [{"image": URL}] * 10},
        {"image_list": [{"image": encoded(picture())}]},
        {"image_list": [{"image": encoded(picture(750, 300, "JPEG"))}]},
        {"image_list": [{"image": encoded(picture(300, 750))}]},
        {"element_list": [{"element_id": 2**63 - 1}]},
        *({"resolution": value} for value in ("1k", "2k", "4k")),
        *({"n": value} for value in (1, 9)),
        *({"result_type": value} for value in ("single", "series")),
        *({"series_amount": value} for value in (2, 9, "auto")),
        *({"aspect_ratio": value} for value in ASPECT_RATIOS),
        *({"watermark_info": {"enabled": value}} for value in (True, False)),
    ],
)
def test_valid_field_is_sent_as_given(fields: dict[str, Any]) -> None:
    assert request(**fields).wire() == {"model_name": "kling-v3-omni", "prompt": "a cat", **fields}


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"model_name": ""}, "model_name: '': must not be empty"),
        ({"model_name": 3}, "model_name: 3: must be text"),
        ({"prompt": " "}, "prompt: '': must not be empty"),
        ({"prompt": None}, "prompt: None: must be text"),
        ({"prompt": b"cat"}, "prompt: a bytes: must be text"),
        ({"prompt": "a\0"}, "prompt: 'a': must hold no NUL and no lone surrogate"),
        ({"prompt": "\ud800a"}, "prompt: 'a': must hold no NUL and no lone surrogate"),
        ({"element_list": [{"element_id": 0}]}, "element_list[0].element_id: 0: must be a 64-bit id above 0"),
        (
            {"element_list": [{"element_id": 2**63}]},
            "element_list[0].element_id: 9223372036854775808: must be a 64-bit id",
        ),
        ({"element_list": [{"element_id": "x"}]}, "element_list[0].element_id: 'x': must be a whole number"),
        ({"element_list": [{"element_id": 1.0}]}, "element_list[0].element_id: 1.0: must be a whole number"),
        ({"element_list": 5}, "element_list: 5: must be a list"),
        ({"element_list": [5]}, "element_list[0]: 5: must be an object"),
        ({"resolution": "8k"}, "resolution: '8k': must be 1k or 2k or 4k"),
        ({"n": 0}, "n: 0: must be 1 to 9"),
        ({"n": 10}, "n: 10: must be 1 to 9"),
        ({"n": 10**5_000}, "n: a huge number: must be 1 to 9"),
        ({"n": True}, "n: True: must be a whole number"),
        ({"n": "three"}, "n: 'three': must be a whole number"),
        ({"result_type": "both"}, "result_type: 'both': must be single or series"),
        ({"series_amount": 1}, "series_amount: 1: must be 2 to 9, or auto"),
        ({"series_amount": 10}, "series_amount: 10: must be 2 to 9, or auto"),
        ({"series_amount": "many"}, "series_amount: 'many': must be a whole number, or auto"),
        ({"series_amount": True}, "series_amount: True: must be a whole number, or auto"),
        ({"aspect_ratio": "5:1"}, "aspect_ratio: '5:1': must be 16:9 or 9:16 or"),
        ({"watermark_info": {"enabled": 1}}, "watermark_info.enabled: 1: must be true or false"),
        ({"watermark_info": {}}, "watermark_info.enabled: is required"),
        ({"watermark_info": {"enabled": True, "text": "x"}}, "watermark_info.text: 'x': is not a field"),
        ({"seed": 7}, "seed: 7: is not a field of this request"),
        ({"callback_url": "https://us.example/x"}, "callback_url: 'https://us.example/…': is made by the receiver"),
        ({"external_task_id": "mine"}, "external_task_id: 'mine': is given beside the request"),
        ({"\ud800": 1}, "'': is not a field name"),
    ],
)
def test_invalid_field_is_refused_with_value_and_rule(fields: dict[str, Any], fault: str) -> None:
    lines = faults(**fields)
    assert len(lines) == 1
    assert lines[0].startswith(fault)


@pytest.mark.parametrize(
    ("image", "rule"),
    [
        ("", "must not be empty"),
        ("cat.png", "must be an http(s) URL or Base64"),
        ("ftp://host/cat.png", "must be an http(s) URL or Base64"),
        ("https://", "must be an http(s) URL with a host"),
        ("https://[::1", "must be an http(s) URL with a host"),
        ("https://a b/c", "must be an http(s) URL with a host"),
        ("https://host/" + "x" * 8_192, "must be an http(s) URL with a host"),
        ("data:image/png,AAAA", "must be data:…;base64,…"),
        ("data:image/png;base64,", "must not be empty"),
        (encoded(picture(kind="WEBP")), "must be a jpg or png picture"),
        (encoded(b"GIF89a" + b"x" * 50), "must be a jpg or png picture"),
        (encoded(b"\x89PNG\r\n\x1a\n"), "must be a jpg or png picture"),
        (encoded(b"\xff\xd8\xff\xe0\x00"), "must be a jpg or png picture"),
        (encoded(picture(299, 300)), "is 299 × 300 pixels; each side must have at least 300"),
        (encoded(picture(300, 751)), "is 300 × 751 pixels; the ratio must lie between 1:2.5 and 2.5:1"),
        (encoded(picture(751, 300)), "is 751 × 300 pixels; the ratio must lie between 1:2.5 and 2.5:1"),
        (encoded(picture() + b"x" * MAX_IMAGE_BYTES), "holds"),
    ],
)
def test_invalid_image_is_refused_with_the_rule(image: str, rule: str) -> None:
    [line] = faults(image_list=[{"image": URL}, {"image": image}])
    assert line.startswith("image_list[1].image: '")
    assert rule in line
    assert len(line) < 250


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


JPEG_HEADER = b"\xff\xc0\0\x0b\x08\2\0\2\0\1\1\x11\0\xff\xda\0\2"


@pytest.mark.parametrize(
    "hostile",
    [
        png_header(512, 512) + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20 - 10))) * 2_000,
        png_header(512, 512) + chunk(b"aaAa", b"") * 200_000,
        b"\xff\xd8" + b"\xff\xfe\0\2" * 600_000 + JPEG_HEADER,
    ],
    ids=["packed profiles", "empty chunks", "empty segments"],
)
def test_what_stands_before_the_pixels_takes_no_time(hostile: bytes) -> None:
    """Pillow read and unpacked all of it: 10 MB took 22 s of a web process, and held up everybody's queries."""
    before = time.thread_time()
    with suppress(RequestInvalid):
        request(image_list=[{"image": encoded(hostile)}])
    assert time.thread_time() - before < 0.3


def test_the_size_of_a_jpeg_stands_behind_its_other_segments() -> None:
    file = BytesIO()
    Image.new("RGB", (300, 751)).save(file, "JPEG", exif=b"Exif\0\0" + bytes(60_000), icc_profile=bytes(200_000))
    [line] = faults(image_list=[{"image": encoded(file.getvalue())}])
    assert "is 300 × 751 pixels" in line


def test_a_picture_is_judged_by_its_header_alone() -> None:
    enormous = png_header(60_000, 60_000) + chunk(b"IDAT", b"")
    assert request(image_list=[{"image": encoded(enormous)}]).wire()["image_list"]


def test_images_and_elements_share_one_limit() -> None:
    images, elements = [{"image": URL}] * 6, [{"element_id": 7}] * 5
    [line] = faults(image_list=images, element_list=elements)
    assert line == "element_list: '6 images and 5 elements': images and elements together: at most 10"
    assert "at most 10" in faults(image_list=[{"image": URL}] * 11)[0]


@pytest.mark.parametrize("model_name", ["kling-v3-omni", "a-model-of-tomorrow"])
@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"image_list": [{"image": "a+"}] * 60_000}, "image_list: 'more than 100 images': "),
        ({"element_list": [{}] * 60_000}, "element_list: 'more than 100 elements': "),
        (
            {"image_list": [{"image": URL, **dict.fromkeys(map(str, range(60_000)), 1)}]},
            "image_list: has an object with",
        ),
        ({"watermark_info": dict.fromkeys(map(str, range(60_000)), 1)}, "watermark_info: has an object with more than"),
        (dict.fromkeys(map(str, range(60_000)), 1), "has 60,002 fields; at most 100"),
    ],
    ids=["images", "elements", "fields of an image", "fields of the watermark", "fields"],
)
def test_too_many_of_anything_are_one_fault(model_name: str, fields: dict[str, Any], fault: str) -> None:
    [line] = faults(model_name=model_name, **fields)
    assert line.startswith(fault)


@pytest.mark.parametrize("field", ["n", "series_amount"])
def test_no_request_asks_for_more_pictures_than_a_task_holds(field: str) -> None:
    assert faults(model_name="a-model-of-tomorrow", **{field: 5_000}) == [
        f"{field}: 5000: must be at most 64: a task has no more files"
    ]


def test_faults_of_one_request_are_bounded() -> None:
    lines = faults(
        model_name="a-model-of-tomorrow", n="x", image_list=[{"image": f"?{number}"} for number in range(100)]
    )
    assert len(lines) == MAX_FAULTS + 1 and lines[-1] == f"… and {101 - MAX_FAULTS} further faults"


def test_too_many_images_hide_no_other_fault() -> None:
    lines = faults(n=0, image_list=[{"image": URL}] * 11)
    assert [line.partition(":")[0] for line in lines] == ["image_list", "n"]


@pytest.mark.parametrize("fields", [{"resolution": "4k"}, {"result_type": "series"}])
def test_field_of_the_other_model_is_refused(fields: dict[str, Any]) -> None:
    [line] = faults(model_name="kling-image-o1", **fields)
    assert line.endswith("for this model")


def test_all_faults_come_at_once() -> None:
    lines = faults(prompt="x" * 2_501, n=0, resolution=5, image_list=[{"image": ""}, {"image": "?"}])
    assert [line.partition(":")[0] for line in lines] == [
        "prompt",
        "image_list[0].image",
        "image_list[1].image",
        "resolution",
        "n",
    ]


def test_missing_required_fields_are_refused() -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_request({})
    assert caught.value.faults == ["model_name: is required", "prompt: is required"]


def test_faults_show_no_long_value_and_no_query() -> None:
    text = "\n".join(faults(seed=URL, extra="x" * 10_000, n=URL))
    assert "canary" not in text
    assert max(map(len, text.splitlines())) < 150


def test_example_of_the_seed_is_accepted_unchanged() -> None:
    wire = parse_request(EXAMPLE).wire()
    assert wire == {name: EXAMPLE[name] for name in ("model_name", "prompt", "element_list", "n")}
    assert b'"element_id": 835266081714884677' in json.dumps(wire).encode()


def test_empty_lists_and_nulls_are_left_out() -> None:
    assert request(image_list=[], element_list=[], n=None).wire() == request().wire()


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("line_chars", [76, 10_000])
def test_base64_is_sent_bare(prefix: str, line_chars: int) -> None:
    text = encoded(picture())
    lines = "\r\n".join(text[at : at + line_chars] for at in range(0, len(text), line_chars))
    assert request(image_list=[{"image": prefix + lines}]).wire()["image_list"] == [{"image": text}]


def test_base64_may_be_url_safe_and_unpadded() -> None:
    pictures = [picture() + bytes([251, 239, 190, *range(count)]) for count in range(3)]
    for content in pictures:
        text = encoded(content)
        for variant in (text.rstrip("="), text.translate(str.maketrans("+/", "-_")), f"data:image/png;base64,{text}"):
            assert request(image_list=[{"image": variant}]).wire()["image_list"] == [{"image": text}]


def test_numbers_may_come_as_digits_where_a_command_line_needs_it() -> None:
    wire = request(element_list=[{"element_id": "835266081714884677"}], n="2", series_amount="4").wire()
    assert wire["element_list"] == [{"element_id": 835266081714884677}]
    assert (wire["n"], wire["series_amount"]) == (2, 4)


def test_an_unknown_model_passes_with_a_warning() -> None:
    asked = request(model_name="kling-v9", n=30, resolution="8k", prompt="x" * 9_999, image_list=[{"image": "AAAA"}])
    [warning] = asked.warnings()
    assert warning.startswith("model_name: 'kling-v9' is not known here")
    assert asked.wire()["n"] == 30


@pytest.mark.parametrize("slip", ["kling-v3-omi", "kling_v3_omni", "Kling-V3-Omni", "kling-v3-omni "])
def test_a_misspelt_model_is_refused_with_the_nearest_name(slip: str) -> None:
    [warning] = request(model_name=slip).warnings()
    assert "did you mean 'kling-v3-omni'?" in warning


@pytest.mark.parametrize("fields", [{"n": "x"}, {"resolution": 8}, {"image_list": [{"image": "?"}]}, {"seed": 1}])
def test_an_unknown_model_is_checked_for_its_shape(fields: dict[str, Any]) -> None:
    assert faults(model_name="kling-v9", **fields)


def test_field_without_effect_causes_a_warning() -> None:
    assert request().warnings() == []
    assert request(result_type="series", n=3).warnings()[0].startswith("n: ignored")
    assert request(series_amount=3).warnings()[0].startswith("series_amount: ignored")
    [warning] = request(prompt="<<<image_2>>>", image_list=[{"image": URL}]).warnings()
    assert warning == "prompt: refers to <<<image_2>>> but 1 given"


# The same request


def test_spelling_out_a_default_is_the_same_request() -> None:
    spelled = {"resolution": "1k", "n": 1, "result_type": "single", "aspect_ratio": "auto", "series_amount": 4}
    same = request(**spelled, watermark_info={"enabled": False})
    assert same.canonical_hash() == request().canonical_hash()
    assert len(same.canonical_hash()) == 64


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a dog"},
        {"model_name": "kling-image-o1"},
        {"n": 2},
        {"resolution": "2k"},
        {"image_list": [{"image": URL}]},
        {"element_list": [{"element_id": 7}]},
        {"watermark_info": {"enabled": True}},
    ],
)
def test_another_value_is_another_request(fields: dict[str, Any]) -> None:
    assert request(**fields).canonical_hash() != request().canonical_hash()


def test_images_are_compared_by_their_bytes() -> None:
    bare, other = encoded(picture()), encoded(picture(301))
    hashes = [
        request(image_list=[{"image": image}]).canonical_hash()
        for image in (bare, f"data:image/png;base64,{bare}", other)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_hash_is_over_canonical_json() -> None:
    text = (
        '{"aspect_ratio":"auto","image_list":[{"image":"https://cdn.example/cat.png?Signature=canary~_-"}],'
        '"model_name":"kling-v3-omni","n":1,"prompt":"a cat","resolution":"1k","result_type":"single",'
        '"series_amount":4,"watermark_info":{"enabled":false}}'
    )
    asked = request(image_list=[{"image": URL}])
    assert asked.canonical_hash() == hashlib.sha256(text.encode()).hexdigest()


def test_stored_request_contains_no_picture() -> None:
    content = picture()
    kept = redacted(request(image_list=[{"image": encoded(content)}, {"image": URL}]).wire())
    fingerprint = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert kept["image_list"] == [{"image": fingerprint}, {"image": URL}]
    assert redacted(kept) == kept


def test_repr_holds_no_picture_and_no_query() -> None:
    assert "canary" not in repr(request(image_list=[{"image": URL}]))


# What to expect


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({}, RequestFacts(False, 1, 1)),
        ({"n": 4}, RequestFacts(False, 4, 4)),
        ({"n": 4, "watermark_info": {"enabled": True}}, RequestFacts(False, 8, 4)),
        ({"n": 4, "series_amount": 3}, RequestFacts(False, 4, 4)),
        ({"n": 2, "result_type": "series"}, RequestFacts(True, 4, 4)),
        ({"result_type": "series", "series_amount": 3, "watermark_info": {"enabled": True}}, RequestFacts(True, 6, 3)),
        ({"result_type": "series", "series_amount": "auto"}, RequestFacts(True, None, 9)),
    ],
)
def test_request_determines_the_expected_files(fields: dict[str, Any], facts: RequestFacts) -> None:
    asked = request(**fields)
    assert asked.facts == facts_of(redacted(asked.wire())) == replace(facts, model=asked.model_name)
    assert (asked.series, asked.expected, asked.slots) == (facts.series, facts.expected, facts.slots)


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=30)
VALUES = ODD | st.lists(ODD | st.dictionaries(st.sampled_from(["image", "element_id"]), ODD), max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*OmniImageRequest.model_fields, "odd"]), VALUES))
def test_any_fields_make_a_request_or_are_refused(fields: dict[str, Any]) -> None:
    try:
        asked = parse_request(fields)
    except RequestInvalid as error:
        str(error).encode()
        return
    json.dumps(asked.wire()).encode()
    assert len(asked.canonical_hash()) == 64


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(["n", "result_type", "series_amount", "watermark_info"]), VALUES))
def test_facts_of_any_stored_value_never_raise(fields: dict[str, Any]) -> None:
    assert facts_of(fields).slots >= 1
