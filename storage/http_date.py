"""Dates in HTTP headers, which other hosts choose."""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime


def http_date(text: str) -> float | None:
    """The moment of an HTTP date in seconds since 1970; None for any other text (RFC 9110 §5.6.7). Never raises.

    The standard library raises ValueError for the year 10000 and OverflowError for a year of twenty digits.
    """
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
