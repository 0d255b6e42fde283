"""Row 12: how long it takes to start."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
import threading
import time

from tests.bench import stage
from tests.bench.table import Sample
from tests.harness import wait_until
from tests.pipeline import free_port

IMPORTS = "import boto3, sqlmodel, starlette, uvicorn; boto3.client('s3', region_name='us-east-1')"
POLL_INTERVAL_SECONDS = 0.01
LIMIT_SECONDS = 60


def serve_to_ready(small: bool) -> Sample:
    """Seconds from `receiver serve` to its first 200 on /readyz; and of a process that imports and makes a client."""
    del small
    with stage.folder() as place, stage.database("sqlite", place) as url:
        port = free_port()
        variables = stage.environment(url, RECEIVER_PORT=str(port), RECEIVER_WORKERS="0")
        started = time.perf_counter()
        with stage.running([sys.executable, "-m", "receiver", "serve"], variables, place):
            wait_until(lambda: _is_ready(port), seconds=stage.START_SECONDS, every=POLL_INTERVAL_SECONDS)
            ours = time.perf_counter() - started
        return Sample(ours, _timed([sys.executable, "-c", IMPORTS]))


def help_to_end(small: bool) -> Sample:
    """Seconds of `receiver --help`, and of a process that imports typer."""
    del small
    return Sample(_timed([sys.executable, "-m", "receiver", "--help"]), _timed([sys.executable, "-c", "import typer"]))


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    return False


def _timed(command: list[str]) -> float:
    """Seconds. A wait with a timeout would look at 64, 114 and 164 ms alone, as `subprocess` polls then."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        limit = threading.Timer(LIMIT_SECONDS, process.kill)
        limit.start()
        code = process.wait()
        taken = time.perf_counter() - started
        limit.cancel()
    assert code == 0, command
    return taken
