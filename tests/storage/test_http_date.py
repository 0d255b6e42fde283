"""Dates in headers that other hosts choose."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.http_date import http_date, retry_after

WORDS = st.sampled_from(["Sun,", "1", "99", "Nov", "2026", "10000", "9" * 20, "9" * 5_000, "00:00:00", "9:99", "GMT"])
ZONES = st.sampled_from(["-0000", "+9999", "-" + "9" * 20, "-", ":", ",", "0", "\xff", "\0"])


@pytest.mark.parametrize("zone", ["GMT", "-0000", ""])
def test_date_without_a_zone_is_in_utc(zone: str) -> None:
    assert http_date(f"Sun, 01 Nov 2026 00:01:00 {zone}") == 1_793_491_260


@given(st.one_of(st.text(), st.lists(st.one_of(WORDS, ZONES)).map(" ".join)))
def test_no_text_raises(text: str) -> None:
    assert isinstance(http_date(text), float | None)


RETRY_AFTER: dict[str | None, float | None] = {
    "0": None,
    "120": 120,
    " 5 ": 5,
    None: None,
    "99999999999999999999": 3600,
    "Sun, 01 Nov 2026 00:01:00 GMT": 60,
    "Sunday, 01-Nov-26 00:01:00 GMT": 60,
    "Sun, 01 Nov 2026 09:00:00 GMT": 3600,
    "Sat, 31 Oct 2026 00:00:00 GMT": None,
} | dict.fromkeys(("", "-5", "1.5", "soon", "²", "inf", "nan", "Sun, 99 Nov 2026 00:00:00 GMT"))


def test_retry_after_is_read_in_both_forms_and_capped() -> None:
    now = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
    assert {value: retry_after(value, now) for value in RETRY_AFTER} == RETRY_AFTER
