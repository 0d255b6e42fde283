"""The command line as a user runs it, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from tests.command_line import CommandLine, variables


@pytest.fixture
def receiver(bucket: Bucket, sandbox: Sandbox, tmp_path: Path) -> CommandLine:
    """On a SQLite file that does not exist yet."""
    return CommandLine(variables("sqlite:///receiver.db", bucket, sandbox), tmp_path)


@pytest.fixture
def ready(receiver: CommandLine, migrated_sqlite: Path) -> CommandLine:
    """On a SQLite file with the schema."""
    (receiver.folder / "receiver.db").write_bytes(migrated_sqlite.read_bytes())
    return receiver
