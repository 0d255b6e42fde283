"""The OpenAPI document is correct: schemathesis makes requests from it and compares every answer with it.

The long form: `python -m tests.receiver.gateway.test_openapi URL KEY [EXAMPLES]` against a running server and sandbox.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.harness import ROOT
from tests.pipeline import Web
from tests.receiver.gateway.test_gateway import KEY, PATH, changes  # noqa: F401 - the fixture

# A limit of its own, because a create commits three times, which takes 50 ms on a slow disk.
EXAMPLES, TIMEOUT_SECONDS = 8, 240


def schemathesis(url: str, key: str, *options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "st"
    command = [program, "--config-file", ROOT / "tests" / "schemathesis.toml", "run", f"{url}/kling/openapi.json"]
    return subprocess.run(
        [*command, "-H", f"Authorization: Bearer {key}", "--continue-on-failure", "--no-color", *options],
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks", "PYTHONPATH": str(ROOT)},
        cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
    )  # fmt: skip


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_requests_are_accepted_exactly_as_the_document_says(web: Web, tmp_path: Path) -> None:
    bounded = ("--max-examples", str(EXAMPLES), "--seed", "1", "--phases", "fuzzing,stateful")
    done = schemathesis(web.url, KEY, *bounded, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 generated" not in done.stdout


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_openapi_document_needs_no_key_and_lists_every_call(web: Web) -> None:
    document = httpx.get(f"{web.url}/kling/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    calls = {(path, method) for path, item in document["paths"].items() for method in item}
    assert calls == {(PATH, "post"), (PATH, "get"), (f"{PATH}/{{id}}", "get"), ("/kling/tasks", "get")}


if __name__ == "__main__":
    url, key, *more = sys.argv[1:]
    TIMEOUT_SECONDS = 3_600
    done = schemathesis(url, key, "--max-examples", *(more or ["500"]), folder=Path.cwd())
    sys.stdout.write(done.stdout + done.stderr)
    sys.exit(done.returncode)
