"""With a promise broken on purpose, the chaos campaigns fail, or the tests that a mutation names.

`python -m tests.chaos.mutations`

Each mutation is made in a copy of the tree by replacing exact text; the copy without one must pass. Exit 1 when a
mutation goes unnoticed, or when nothing is broken and a test fails nevertheless.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.processes import ROOT

NOT_COPIED = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
TEST_SECONDS = 400
CAMPAIGNS = "tests/flows/test_chaos.py"


@dataclass(frozen=True)
class Mutation:
    """`file`: in which `text`, which stands there once, becomes `instead`. `tests`: those that have to notice it."""

    name: str
    file: str = ""
    text: str = ""
    instead: str = ""
    tests: str = CAMPAIGNS


MUTATIONS = (
    Mutation("nothing broken"),
    Mutation(
        "no lease check in settle",
        "storage/rows/claims.py",
        'table.c.lease == bindparam("held"))',
        '(table.c.lease == bindparam("held")) | (table.c.id == bindparam("row_id")))',
    ),
    Mutation(
        "answered before the commit",
        "receiver/web/callbacks.py",
        "intake = await self._group_commit.commit(delivery)",
        "import asyncio\n\n"
        "                asyncio.ensure_future(self._group_commit.commit(delivery))\n"
        "                intake = Intake.NEW",
    ),
    Mutation(
        "answered before the commit in the loop",
        "storage/rows/group_commit.py",
        "new = await self._connection.insert(deliveries)",
        "_answer(_outcomes(batch, {each.key for each in deliveries}))\n"
        "        await asyncio.sleep(0.05)\n"
        "        new = await self._connection.insert(deliveries)",
        "tests/storage/rows/test_group_commit.py",
    ),
    Mutation(
        "no task lock before an asset is settled",
        "storage/archive/archiver.py",
        "task = tasks.lock(session, asset.task_id)",
        "task = session.get(Task, asset.task_id)",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.mutations", description=__doc__)
    parser.add_argument("--tests", default="", help="as pytest's -k: only these tests")
    given = parser.parse_args()
    good = True
    for mutation in MUTATIONS:
        failed, reasons, words = run(mutation, ["-k", given.tests] if given.tests else [])
        as_wanted = bool(failed) == bool(mutation.file)
        good = good and as_wanted
        print(f"{'ok  ' if as_wanted else 'BAD '} {mutation.name}: {words}", flush=True)  # noqa: T201
        for line in [f"failed: {name}" for name in failed] + [f"campaign: {reason}" for reason in reasons]:
            print(f"     {line}", flush=True)  # noqa: T201
    return 0 if good else 1


def run(mutation: Mutation, options: Sequence[str]) -> tuple[list[str], list[str], str]:
    """The tests that failed with it, what the campaigns said, and pytest's last line.

    Raises RuntimeError when they could not be run.
    """
    with tempfile.TemporaryDirectory(prefix="receiver-teeth-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        apply(mutation, tree)
        command = [
            sys.executable,
            "-m",
            "pytest",
            mutation.tests,
            "-p",
            "no:cacheprovider",
            "-rfE",
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS, check=False
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the tests could not be run:\n{done.stdout[-3_000:]}\n{done.stderr[-3_000:]}")
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.MULTILINE)
    reasons = Counter(re.findall(r"^E\s+FAILED ([a-z ]+): ", done.stdout, re.MULTILINE))
    told = [f"{count} × {reason}" for reason, count in reasons.items()]
    return failed, told, done.stdout.strip().splitlines()[-1]


def apply(mutation: Mutation, tree: Path) -> None:
    if not mutation.file:
        return
    (tree / mutation.file).write_text(mutated(mutation, tree), encoding="utf-8")


def mutated(mutation: Mutation, tree: Path) -> str:
    """The file with the mutation. Raises RuntimeError when its text does not stand there once."""
    before = (tree / mutation.file).read_text(encoding="utf-8")
    if before.count(mutation.text) != 1:
        raise RuntimeError(f"{mutation.file} does not hold this once: {mutation.text}")
    return before.replace(mutation.text, mutation.instead)


if __name__ == "__main__":
    sys.exit(main())
