"""The command line for tests: environment variables, a process, its exit code and its output."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from tests.forked import Forked

TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def variables(database_url: str, bucket: Bucket, sandbox: Sandbox) -> dict[str, str]:
    """A valid setup: this database, this bucket and this provider; no public URL, so tasks are polled."""
    return {
        "RECEIVER_DATABASE_URL": database_url,
        "RECEIVER_KLING_BASE_URL": sandbox.url,
        "RECEIVER_KLING_API_KEY": sandbox.api_key,
        "RECEIVER_PRIVATE_RESULT_HOSTS": sandbox.url.removeprefix("http://"),
        "RECEIVER_S3_BUCKET": bucket.name,
        "RECEIVER_S3_ENDPOINT_URL": str(bucket._endpoint_url),
        "RECEIVER_S3_PREFIX": bucket.prefix,
        "RECEIVER_POLL_AFTER_SECONDS": "0.2",
    }


@dataclass(frozen=True)
class CommandLine:
    """Runs `receiver …` in a folder of its own, so that no `.env` of ours is read."""

    variables: Mapping[str, str]
    folder: Path
    constants: Mapping[str, object] | None = None  # as of `Forked`

    def __call__(self, *words: str, given: str = "", **changes: str | None) -> Done:
        """Run to the end. `given`: standard input. `changes`: other values of variables, None = unset."""
        rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
        wanted = {**rest, "COLUMNS": "200", "NO_COLOR": "1", **self.variables, **changes}
        values = {name: value for name, value in wanted.items() if value is not None}
        with tempfile.TemporaryDirectory() as desk:
            stdin, out, err = (Path(desk, name) for name in ("in", "out", "err"))
            stdin.write_text(given)
            process = Forked(words, values, self.folder, given=stdin, out=out, err=err, constants=self.constants)
            try:
                code = process.wait(TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            return Done(code, out.read_text(), err.read_text())
