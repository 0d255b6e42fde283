"""What one look of `receiver check` found."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from receiver.base.config import Settings


class Status(StrEnum):
    OK = "ok"
    NOTE = "note"
    FAULT = "fault"


@dataclass(frozen=True)
class Result:
    """What one look found. `advice`: what to do about it. `paste`: a line to copy whole, which may be a secret.

    `detail`: shown with `--verbose` only; another result has the verdict.
    """

    name: str
    status: Status
    line: str
    advice: str = ""
    paste: str = field(default="", repr=False)
    detail: bool = False


# A JWT is refused after seconds, signed requests and callbacks after minutes.
MAX_SKEW_SECONDS = 60.0
CLOCK_CODES = ("RequestTimeTooSkewed", 1003, 1004)
SYNCHRONISE = "turn on time synchronisation (NTP) on this machine"


def refused(code: str | int | None, skew_seconds: float | None) -> Status:
    """The status of a refusal: a fault, unless it is our clock's, which is one fault already."""
    blamed = code in CLOCK_CODES and abs(skew_seconds or 0) > MAX_SKEW_SECONDS
    return Status.NOTE if blamed else Status.FAULT


def start_command(settings: Settings) -> str:
    """What starts web server and workers with these settings."""
    return f"receiver serve --store {shlex.quote(str(settings.store))}" if settings.store else "receiver serve"


def host_of(url: str | None) -> str:
    """Host and port only, because a URL may hold a password."""
    return urlsplit(url).netloc.rpartition("@")[2] if url else "AWS"
