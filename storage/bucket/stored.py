"""An object as the store describes it: on its own, and in a listing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple


@dataclass(frozen=True)
class Stored:
    """One object as the store describes it.

    `sha256`: of the whole object, 64 hex digits. It is the store's own checksum, else the one in the metadata that
    `put_once` wrote; None when neither is known. `checksum`: the store's own only. `metadata`: as given to `put_once`.
    """

    size: int
    sha256: str | None
    checksum: str | None
    etag: str
    media_type: str
    modified_at: datetime
    metadata: Mapping[str, str] = field(default_factory=dict)


class Listed(NamedTuple):
    key: str
    size: int
    etag: str
    modified_at: datetime
