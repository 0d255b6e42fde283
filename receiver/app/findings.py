"""The result of one check of `receiver check`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from receiver.base.config import Settings


class Status(StrEnum):
    OK = "ok"
    NOTE = "note"
    FAULT = "fault"


@dataclass(frozen=True)
class Result:
    """The result of one check. `advice`: what to do about it. `paste`: a line to copy whole, which may be a secret.

    `detail`: shown with `--verbose` only; another result has the verdict.
    """

    name: str
    status: Status
    line: str
    advice: str = ""
    paste: str = field(default="", repr=False)
    detail: bool = False


# A clock error of seconds makes a JWT invalid; signed requests and callbacks tolerate minutes.
MAX_SKEW_SECONDS = 60.0
CLOCK_CODES = ("RequestTimeTooSkewed", 1003, 1004)
SYNCHRONISE = "turn on time synchronisation (NTP) on this machine"


def refused(code: str | int | None, skew_seconds: float | None) -> Status:
    """The status of a refusal: a fault, unless our clock causes it, which another check reports."""
    blamed = code in CLOCK_CODES and abs(skew_seconds or 0) > MAX_SKEW_SECONDS
    return Status.NOTE if blamed else Status.FAULT


def start_command(settings: Settings) -> str:
    """The command that starts web server and workers with these settings."""
    return f"receiver serve --store {shlex.quote(str(settings.store))}" if settings.store else "receiver serve"
