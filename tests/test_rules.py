"""Rules checked by machines: imports, lint, format, version and top level. `test_pages` checks the prose."""

from __future__ import annotations

import ast
import re
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
    ],
    ids=["imports", "lint", "format"],
)
def test_machine_rules_hold(command: list[str]) -> None:
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# The most that a reader can keep in view. Split a room that grows beyond it.
MAX_MODULES, MAX_LINES = 14, 2_500

CLAIM_COLUMNS = {"due_at", "attempts", "lease", "losses"}
NO_CLAIMS = {
    "storage/rows/claims.py": "the one that writes them",
    "storage/rows/columns.py": "declares them",
    "storage/archive/continuous_audit.py": "the audit's own row, which counts neither attempts nor losses",
    "receiver/cli/events.py": "shows them",
}


def written(node: ast.AST) -> set[str | None]:
    """Names that an expression writes: of attributes, of a call's arguments, of a dictionary's keys."""
    match node:
        case ast.Attribute(attr=name, ctx=ast.Store()):
            return {name}
        case ast.Call(func=ast.Attribute(value=ast.Name(id="claims" | "log"))):
            return set()
        case ast.Call(keywords=keywords):
            return {keyword.arg for keyword in keywords}
        case ast.Dict(keys=keys):
            return {key.value for key in keys if isinstance(key, ast.Constant)}
    return set()


def test_only_claims_writes_claim_columns() -> None:
    paths = [path for folder in ("storage", "receiver") for path in (ROOT / folder).rglob("*.py")]
    found = set()
    for path in paths:
        name = str(path.relative_to(ROOT))
        if name not in NO_CLAIMS and not {"migrations", "sandbox"} & set(path.parts):
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if written(node) & CLAIM_COLUMNS]
            found |= {f"{name}:{getattr(node, 'lineno', 0)}" for node in nodes}
    assert not found


def test_the_console_with_its_pages_has_less_than_2500_lines() -> None:
    lines = sum(len(file.read_text().splitlines()) for file in (ROOT / "receiver/console").rglob("*.py"))
    assert lines < MAX_LINES


def test_rooms_are_bounded_in_modules_and_lines() -> None:
    rooms = {file.parent for base in ("receiver", "storage") for file in (ROOT / base).rglob("*.py")}
    for room in sorted(rooms - {ROOT / "storage/rows/migrations/versions"}):
        modules = [file for file in room.glob("*.py") if file.name != "__init__.py"]
        lines = sum(len(file.read_text().splitlines()) for file in modules)
        assert (len(modules) <= MAX_MODULES, lines <= MAX_LINES) == (True, True), f"{room}: {len(modules)}, {lines}"


def test_changelog_begins_with_this_version() -> None:
    import receiver

    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == ("Unreleased" if ".dev" in receiver.__version__ else receiver.__version__)


def test_top_level_has_only_agreed_names() -> None:
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    top = {line.split("/")[0] for line in listing.stdout.splitlines()}
    agreed = {"pyproject.toml", "Dockerfile", "receiver", "storage", "tests", "infra"}
    assert {name for name in top if not name.startswith((".", "README"))} - agreed <= {"CHANGELOG.md", "SECURITY.md"}
