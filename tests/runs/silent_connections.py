"""Callbacks beside silent connections: `python -m tests.runs.silent_connections --descriptors 1024`.

`receiver serve` has this limit of descriptors, and four times as many connections are opened to it that send nothing.
Every callback must be stored. The time of each is compared with that of the same server without the connections.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles

from tests.postgres import Postgres
from tests.receiver.web.test_connections import CALLBACK, logged, serving, silent

CALLBACKS, TIMES_DESCRIPTORS, MORE_BETWEEN = 100, 4, 4


def run(folder: Path, *, descriptors: int, connections: int, database_url: str) -> tuple[list[int], list[float]]:
    """Statuses (0: the connection was reset) and seconds of CALLBACKS callbacks, each on a connection of its own."""
    folder.mkdir()
    url = database_url or f"sqlite:///{folder}/receiver.db"
    settings = {"RECEIVER_DATABASE_URL": url, "RECEIVER_MIGRATE_ON_START": "true"}
    both = (descriptors, descriptors)  # the soft and the hard limit
    statuses: list[int] = []
    seconds: list[float] = []
    with (
        serving(folder, descriptors=both, **settings) as (port, _),
        silent(port) as more,
    ):
        more(connections)
        for number in range(CALLBACKS):
            more(MORE_BETWEEN if connections else 0)  # the first ones have met their deadline
            began = time.monotonic()
            statuses.append(call_back(port, b'{"number": %d}' % number))
            seconds.append(time.monotonic() - began)
    warned = len(logged(folder, "start.descriptors_limited"))
    sys.stdout.write(f"  {len(logged(folder, 'worker.step_failed'))} bugs, {warned} warning of few descriptors\n")
    return statuses, seconds


def call_back(port: int, body: bytes) -> int:
    """The status, 0: the connection was reset. Not with httpx, whose TLS context takes longer than the callback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", CALLBACK, body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--descriptors", type=int, default=1_024)
    chosen = parser.parse_args()
    good = True
    postgres = Postgres() if chosen.database == "postgresql" else nullcontext()
    with tempfile.TemporaryDirectory(prefix="receiver-silent-") as folder, postgres as server:
        for connections in (0, TIMES_DESCRIPTORS * chosen.descriptors):
            sys.stdout.write(f"{chosen.descriptors} descriptors, {connections} silent connections\n")
            statuses, seconds = run(
                Path(folder) / str(connections),
                descriptors=chosen.descriptors,
                connections=connections,
                database_url=server.url() if server else "",
            )
            taken, worst = statuses.count(200), quantiles(seconds, n=100)[98] * 1_000
            sys.stdout.write(
                f"  {taken} of {CALLBACKS} answered 200; median {median(seconds) * 1_000:.1f} ms, p99 {worst:.1f} ms\n"
            )
            good = good and taken == CALLBACKS
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
