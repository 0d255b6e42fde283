"""The console over the real server, on both databases, with some rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.console_reader import KEYS, READ_KEY, Reader
from tests.pipeline import Web


@pytest.fixture
def changes(tmp_path: Path) -> dict[str, Any]:
    return {"console_keys": KEYS, "console_thumbnail_dir": tmp_path / "thumbnails"}


@pytest.fixture
def ann(web: Web) -> Iterator[Reader]:
    """A person who may act."""
    with Reader(web.url) as reader:
        yield reader


@pytest.fixture
def ben(web: Web) -> Iterator[Reader]:
    """A person who may only read."""
    with Reader(web.url, READ_KEY) as reader:
        yield reader


@pytest.fixture
def stranger(web: Web) -> Iterator[Reader]:
    with Reader(web.url, None) as reader:
        yield reader


@pytest.fixture
def fresh_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a person is counted at each page, and not every three seconds."""
    monkeypatch.setattr("receiver.console.needs.FRESH_SECONDS", 0.1)
