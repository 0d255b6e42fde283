"""The house rules, kept by machines: imports, lint, types, and prose that agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from receiver.base import config
from receiver.cli.main import app

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


def test_readme_documents_every_setting() -> None:
    readme = (ROOT / "README.md").read_text()
    documented = set(re.findall(r"RECEIVER_[A-Z0-9_]+", readme))
    settings = {f"RECEIVER_{name.upper()}" for name in config.Settings.model_fields}
    assert documented - settings <= {"RECEIVER_KLING_"}
    assert settings <= documented


def test_readme_documents_every_verb() -> None:
    readme = (ROOT / "README.md").read_text()
    for verb in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`receiver {verb}" in readme, verb


def options_of(command: Any, name: str = "") -> dict[str, set[str]]:
    """The options of each verb, by its name."""
    if not hasattr(command, "commands"):
        return {name: {option for parameter in command.params for option in parameter.opts}}
    verbs = [options_of(each, f"{name} {word}".strip()) for word, each in command.commands.items()]
    return {verb: options for found in verbs for verb, options in found.items()}


def test_readme_says_which_verbs_have_a_dry_run_and_json() -> None:
    readme, verbs = (ROOT / "README.md").read_text(), options_of(get_command(app))
    [dry] = re.findall(r"\(`--dry-run`\): ([^;]*);", readme)
    [mute] = re.findall(r"\(`--json`\): every verb but ([^.]*), which", readme)
    assert set(re.findall("`(.*?)`", dry)) == {verb for verb, options in verbs.items() if "--dry-run" in options}
    assert set(re.findall("`(.*?)`", mute)) == {verb for verb, options in verbs.items() if "--json" not in options}


def test_changelog_names_this_version() -> None:
    import receiver

    assert f"## {receiver.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_top_level_is_what_was_agreed() -> None:
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    top = {line.split("/")[0] for line in listing.stdout.splitlines()}
    agreed = {"pyproject.toml", "Dockerfile", "receiver", "storage", "tests", "infra"}
    assert {name for name in top if not name.startswith((".", "README"))} - agreed <= {"CHANGELOG.md", "SECURITY.md"}
