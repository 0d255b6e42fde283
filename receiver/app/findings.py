"""What one look of `receiver check` found."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Status(StrEnum):
    OK = "ok"
    NOTE = "note"
    FAULT = "fault"


@dataclass(frozen=True)
class Result:
    """What one look found. `advice`: what to do about it. `paste`: a line to copy whole, which may be a secret."""

    name: str
    status: Status
    line: str
    advice: str = ""
    paste: str = field(default="", repr=False)
