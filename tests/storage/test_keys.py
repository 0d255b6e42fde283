"""Object keys are a public contract: they never change for the same asset."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.keys import EXTENSIONS, as_argument, encode_id, header_text, manifest_key, normal_prefix, object_key

SHA256 = "0123456789ab" + "c" * 52
CHINA = timezone(timedelta(hours=8))
DAY = datetime(2026, 3, 4, 23, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("prefix", "created_at", "task", "kind", "index", "extension", "key"),
    [
        ("", DAY, "a-1", "image", 0, "png", "2026/03/04/a-1/image-0-0123456789ab.png"),
        ("kept", DAY, "a-1", "series", 11, "jpg", "kept/2026/03/04/a-1/series-11-0123456789ab.jpg"),
        ("/kept/x/", DAY, "a-1", "video", 2, "mp4", "kept/x/2026/03/04/a-1/video-2-0123456789ab.mp4"),
        ("", DAY.astimezone(CHINA), "b", "image", 0, "gif", "2026/03/04/b/image-0-0123456789ab.gif"),
        ("", DAY.replace(year=987), "b", "audio", 0, "mp3", "0987/03/04/b/audio-0-0123456789ab.mp3"),
        ("", DAY, "é/ü %", "image", 0, "png", "2026/03/04/%C3%A9%2F%C3%BC%20%25/image-0-0123456789ab.png"),
        ("", DAY, "..", "image", 0, "png", "2026/03/04/%2E%2E/image-0-0123456789ab.png"),
    ],
)  # fmt: skip
def test_object_key_follows_the_contract(
    prefix: str, created_at: datetime, task: str, kind: str, index: int, extension: str, key: str
) -> None:
    assert object_key(normal_prefix(prefix), created_at, task, kind, index, SHA256, extension) == key


@given(task=st.text(min_size=1, max_size=16), prefix=st.sampled_from(["", "a", "/a/b/"]), index=st.integers(0, 9_999))
def test_every_id_is_one_segment_and_can_be_decoded(task: str, prefix: str, index: int) -> None:
    key = object_key(normal_prefix(prefix), DAY, task, "image", index, SHA256, "png")
    segment, name = key.removeprefix(normal_prefix(prefix)).split("/")[3:]
    assert unquote(segment) == task
    assert re.fullmatch(r"(?:[A-Za-z0-9\-_.~]|%[0-9A-F]{2})+", segment)
    assert segment.strip(".")
    assert name == f"image-{index}-0123456789ab.png"


@given(one=st.text(min_size=1, max_size=16), other=st.text(min_size=1, max_size=16))
def test_two_ids_never_share_a_folder(one: str, other: str) -> None:
    assert (encode_id(one) == encode_id(other)) == (one == other)


@given(moment=st.datetimes(timezones=st.timezones()))
def test_folder_uses_the_utc_day(moment: datetime) -> None:
    try:
        day = moment.astimezone(UTC)
    except OverflowError:  # the first and the last day of the calendar
        return
    assert manifest_key("", moment, "a", 1) == f"{day:%Y/%m/%d}/a/manifest.json".rjust(
        len("2026/03/04/a/manifest.json"), "0"
    )


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("", "empty"),
        ("x" * 201, "201 bytes"),
        ("é" * 34, "204 bytes"),
        ("." * 67, "201 bytes"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_ids_that_fit_no_key_are_refused(task: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encode_id(task)


def test_longest_id_fits_into_a_key() -> None:
    assert encode_id("x" * 200) == "x" * 200


def test_manifests_are_numbered_from_the_second() -> None:
    assert manifest_key("p/", DAY, "a", 1) == "p/2026/03/04/a/manifest.json"
    assert manifest_key("p/", DAY, "a", 2) == "p/2026/03/04/a/manifest.2.json"


@pytest.mark.parametrize(("given_prefix", "kept"), [("", ""), ("/", ""), ("a", "a/"), ("/a/", "a/"), ("a/b", "a/b/")])
def test_prefix_is_normalised(given_prefix: str, kept: str) -> None:
    assert normal_prefix(given_prefix) == kept


def test_invalid_arguments_make_no_key() -> None:
    with pytest.raises(ValueError, match="time zone"):
        object_key("", DAY.replace(tzinfo=None), "a", "image", 0, SHA256, "png")
    with pytest.raises(ValueError, match="extension"):
        object_key("", DAY, "a", "image", 0, SHA256, "exe")
    with pytest.raises(ValueError, match="hex"):
        object_key("", DAY, "a", "image", 0, SHA256.upper(), "png")
    assert "png" in EXTENSIONS


@given(value=st.text(st.characters(exclude_categories=["Cs"])))
def test_metadata_is_encoded_as_ascii(value: str) -> None:
    sent = header_text(value)
    assert sent.isascii()
    assert sent.isprintable()
    assert unquote(sent) == value.strip()


@pytest.mark.parametrize("name", ["plain-1", "a b", "-rf", "--help", "'", '""""', "$(x)", "`x`", "a;b"])
def test_a_name_in_a_printed_command_is_quoted_as_one_argument(name: str) -> None:
    words = shlex.split(f"receiver status {as_argument(name)}")
    assert words[2:] == (["--", name] if name.startswith("-") else [name])
