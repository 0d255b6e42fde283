"""The command line as a user has it: variables in the environment, a process, its exit code and its words.

Each run is a process of its own, forked from one that has imported everything: that saves a second and a half a run.
What depends on a fresh interpreter (start-up time, imports, `-m receiver`) is tested with `subprocess`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket

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
    """A good setup: this database, this bucket and this provider; no public URL, so tasks are polled."""
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

    def __call__(self, *words: str, given: str = "", **changes: str | None) -> Done:
        """Run to the end. `given`: standard input. `changes`: other values of variables, None = unset."""
        rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
        wanted = {**rest, "COLUMNS": "200", "NO_COLOR": "1", **self.variables, **changes}
        values = {name: value for name, value in wanted.items() if value is not None}
        with tempfile.TemporaryDirectory() as desk:
            files = [Path(desk, name) for name in ("in", "out", "err")]
            files[0].write_text(given)
            process = FORKS.Process(target=_run, args=(words, values, str(self.folder), [str(one) for one in files]))
            process.start()
            process.join(TIMEOUT_SECONDS)
            if process.is_alive():
                process.kill()
                raise TimeoutError(f"receiver {' '.join(words)}: no end after {TIMEOUT_SECONDS} s")
            return Done(process.exitcode or 0, files[1].read_text(), files[2].read_text())


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preload"])


def _run(words: tuple[str, ...], values: dict[str, str], folder: str, files: list[str]) -> None:
    """In the child: become `receiver words…`."""
    from receiver.cli.main import main

    flags = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for number, (file, flag) in enumerate(zip(files, flags, strict=True)):
        os.dup2(os.open(file, flag, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - for the process's life
    os.environ.clear()
    os.environ.update(values)
    os.chdir(folder)
    sys.argv = ["receiver", *words]
    main()
