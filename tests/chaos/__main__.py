"""`python -m tests.chaos --database sqlite|postgresql --tasks 500 --workers 4 --seed N`: exit 1 on any disagreement."""

from __future__ import annotations

import argparse
import random
import signal
import sys
from pathlib import Path

from receiver.base import telemetry
from tests.chaos import campaign, plan


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--bounded", action="store_true", help="the short form that the suite runs")
    parser.add_argument("--keep", type=Path, help="keep rows, objects and logs in this folder")
    given = parser.parse_args()
    if given.bounded:
        chosen = plan.bounded(given.database, seed=given.seed)
    else:
        chosen = plan.full(given.database, seed=given.seed, tasks=given.tasks, workers=given.workers)
    telemetry.configure("error")
    outcome = campaign.run(chosen, keep=given.keep)
    print(campaign.report(outcome))  # noqa: T201
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # SystemExit, so that everything is stopped
    sys.exit(main())
