"""One running sandbox for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from receiver.sandbox import Knobs, Sandbox

QUICK = {"submitted_seconds": 0.02, "processing_seconds": 0.02, "picture_bytes": 20_000}


@pytest.fixture(scope="module")
def running() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running: Sandbox) -> Sandbox:
    """The running sandbox after a reset."""
    running.set(**{**Knobs().model_dump(), **QUICK})
    running.reset()
    return running
