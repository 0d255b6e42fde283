"""The JSON of a create: parsed like by any parser, and bounded in structure and memory for any content."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.gateway.answers import Refused
from receiver.gateway.create_body import LONG_BYTES, MAX_REST_BYTES, MAX_TEXT_BYTES, read_fields
from tests import fuzz_creates
from tests.fuzz_creates import creates
from tests.unreported_tasks import drawn, encoded

MIB = 2**20
UNIT = {"nested": b"[[],[]],", "objects": b'{"a":{}},', "texts": b'"",', "numbers": b"1,"}
HOSTILE = {
    **{name: b'{"prompt": [' + unit * (20 * MIB // len(unit)) for name, unit in UNIT.items()},
    "deep": b"[" * 20 * MIB,
    "quotes": b'{"prompt": "' + b'\\"' * 10 * MIB + b'"}',
    "backslashes": b'{"prompt": "' + b"\\" * 20 * MIB + b'"}',
    "escapes": b'{"prompt": "' + b"\\/" * 4 * MIB + b'"}',
    "spaces": b"{" + b" " * 20 * MIB + b"}",
    "digits": b'{"n": ' + b"9" * 20 * MIB + b"}",
    "long": b'{"prompt": "' + b"a" * MAX_TEXT_BYTES + b'"}',
    "long key": b'{"' + b"a" * 2 * LONG_BYTES + b'": 1}',
    "NaN": b'{"n": NaN, "prompt": "' + b"a" * 2 * LONG_BYTES + b'"}',
    "Infinity": b'{"n": -Infinity}',
    "no end": b'{"prompt": "',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused_without_being_parsed(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as refused:
            creates().read(HOSTILE[name], "client", "key")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (refused.value.http_status, refused.value.code) == (400, 1200)
    assert peak < 4 * MIB


def test_a_hundred_megabytes_of_pictures_take_little_more_than_themselves() -> None:
    """One character beyond the basic plane made the whole text four bytes wide."""
    picture = encoded(drawn(400, 300) + bytes(7 * MIB))
    body = bytearray(
        json.dumps({"model_name": "other", "prompt": "🌅", "image_list": [{"image": picture}] * 10}).encode()
    )
    body[body.index(b"\\ud83c") : body.index(b"\\udf05") + 6] = "🌅".encode()
    tracemalloc.start()
    try:
        create = creates().read(body, "client", "key")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [item.image for item in create.request.image_list or ()] == [picture] * 10
    assert peak < 1.6 * len(body)


TEXTS = st.text(max_size=20) | st.text(max_size=3).map(lambda text: text * (LONG_BYTES // 2)) | st.just("NaN")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
DOCUMENTS = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner), max_leaves=20
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=9), DOCUMENTS, max_size=9), st.booleans(), st.sampled_from([None, 2]))
def test_every_object_is_read_as_any_parser_reads_it(document: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    try:
        wanted = json.loads(text.decode())
    except UnicodeDecodeError:
        wanted = None
    try:
        read = read_fields(text)
    except Refused:
        assert wanted is None or len(text) > MAX_REST_BYTES or text.count(b"\\") * 5 > LONG_BYTES
    else:
        assert read == wanted


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='{}[]:,"\\ NaI01tue\u00e9', max_size=40))
def test_invalid_json_is_refused(text: str) -> None:
    try:
        wanted: Any = json.loads(text, parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError):
        wanted = None
    try:
        assert read_fields(text.encode()) == wanted
    except Refused:
        assert not isinstance(wanted, dict)


@pytest.mark.parametrize("seed", [1, 2])
def test_fuzzed_bodies_are_read_or_refused_in_bounded_memory(seed: int) -> None:
    wanted = fuzz_creates.bodies(random.Random(seed), 300, most=MIB)
    outcome = fuzz_creates.read(creates(), wanted, measured=True)
    assert outcome.ends.total() == 300
    assert outcome.ends["read"] > 10
    assert {end.split("/")[0] for end in outcome.ends} == {"read", "400"}
