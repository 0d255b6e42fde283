"""Dates in headers that other hosts choose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.http_date import http_date

WORDS = st.sampled_from(["Sun,", "1", "99", "Nov", "2026", "10000", "9" * 20, "9" * 5_000, "00:00:00", "9:99", "GMT"])
ZONES = st.sampled_from(["-0000", "+9999", "-" + "9" * 20, "-", ":", ",", "0", "\xff", "\0"])


@pytest.mark.parametrize("zone", ["GMT", "-0000", ""])
def test_date_without_a_zone_is_in_utc(zone: str) -> None:
    assert http_date(f"Sun, 01 Nov 2026 00:01:00 {zone}") == 1_793_491_260


@given(st.one_of(st.text(), st.lists(st.one_of(WORDS, ZONES)).map(" ".join)))
def test_no_text_raises(text: str) -> None:
    assert isinstance(http_date(text), float | None)
