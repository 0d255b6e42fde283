"""Options that several commands have."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

# The largest number of a row.
MAX_NUMBER = 2**63 - 1
UNITS = {"m": "minutes", "h": "hours", "d": "days"}
WHEN = "2026-11-23, 2026-11-23T10:00 (UTC), or an age: 90m, 6h, 7d"


def _moment(text: str) -> datetime:
    """A time as an operator writes it, with its time zone."""
    try:
        if age := re.fullmatch(r"([0-9]{1,6})([mhd])", text):
            return datetime.now(UTC) - timedelta(**{UNITS[age[2]]: int(age[1])})
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a time: write {WHEN}") from None


Store = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep pictures in DIR: runs the packaged S3 server on loopback."),
]
AllowHttp = Annotated[bool, typer.Option("--allow-http", help="Accept http:// addresses that are not loopback.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Since = Annotated[datetime | None, typer.Option(parser=_moment, metavar="TIME", help=f"The earliest time: {WHEN}.")]
Until = Annotated[
    datetime | None, typer.Option(parser=_moment, metavar="TIME", help="The end of the range, itself excluded.")
]
