"""Dates and delays in HTTP headers, which other hosts choose."""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime

# A longer Retry-After is shortened, because resellers delete results after 24 hours.
MAX_RETRY_AFTER_SECONDS = 3_600.0


def http_date(text: str) -> float | None:
    """The moment of an HTTP date in seconds since 1970; None for any other text (RFC 9110 §5.6.7). Never raises.

    The standard library raises ValueError for the year 10000 and OverflowError for a year of twenty digits.
    """
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds of a Retry-After header, at most MAX_RETRY_AFTER_SECONDS; None if it is absent, malformed or in the past.

    Both forms: seconds and an HTTP date (RFC 9110 §10.2.3). `now`: seconds since 1970.
    """
    value = (header or "").strip()
    seconds = float(value[:9]) if value.isascii() and value.isdigit() else (http_date(value) or now) - now
    return min(seconds, MAX_RETRY_AFTER_SECONDS) if seconds > 0 else None
