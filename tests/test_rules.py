"""The rules that machines check: imports, lint, format, types, version and top level. `test_pages` checks the prose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ["lint-imports", "--no-cache"],
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--no-cache", "--check", "."],
        ["mypy"],
    ],
    ids=["imports", "lint", "format", "types"],
)
def test_machine_rules_hold(command: list[str]) -> None:
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_changelog_names_this_version() -> None:
    import receiver

    assert f"## {receiver.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_top_level_is_what_was_agreed() -> None:
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    top = {line.split("/")[0] for line in listing.stdout.splitlines()}
    agreed = {"pyproject.toml", "Dockerfile", "receiver", "storage", "tests", "infra"}
    assert {name for name in top if not name.startswith((".", "README"))} - agreed <= {"CHANGELOG.md", "SECURITY.md"}
